"""The one-process layer on the GPU against Hugging Face's eager experts."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from torch_moe_ep import MoEConfig, apply_expert_parallel, clip_grad_norm_, init_device_mesh
from torch_moe_ep.parallel.state import iter_experts
from torch_moe_ep.testing import assert_close, batch_of, tiny_mixtral

from .cases import poisoned_memory, requires_gpu

pytestmark = requires_gpu


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients_of(
    is_parallel: bool, dtype: torch.dtype = torch.float32, **overrides: object
) -> dict[str, torch.Tensor]:
    """The loss and every gradient of one batch."""
    model = tiny_mixtral(router_scale=20.0, **overrides).to("cuda", dtype)
    if is_parallel:
        apply_expert_parallel(model, init_device_mesh("cuda", 1))
    batch = {key: value.cuda() for key, value in batch_of(0).items()}
    loss = model(**batch).loss
    loss.backward()
    gradients = {"loss": loss.detach()}
    for name, param in model.named_parameters():
        gradient = param.grad
        assert gradient is not None or not is_parallel, f"{name} has no gradient"
        if gradient is None:
            gradient = torch.zeros_like(param)
        full = getattr(gradient, "full_tensor", lambda gradient=gradient: gradient)()
        gradients[name] = full.float()
    return gradients


@pytest.mark.parametrize("output_router_logits", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_layer_float32_equals_hugging_face_eager(top_k: int, output_router_logits: bool) -> None:
    overrides = {"num_experts_per_tok": top_k, "output_router_logits": output_router_logits}
    with poisoned_memory():
        ours = gradients_of(True, **overrides)
    expected = gradients_of(False, **overrides)
    if top_k == 1 and not output_router_logits:
        # A single normalised weight is 1 whatever the router says: the gradient is rounding alone.
        for name in [name for name in expected if name.endswith("gate.weight")]:
            scale = expected[name.replace("gate.weight", "experts.gate_up_proj")].abs().max()
            for gradients in (ours, expected):
                assert gradients.pop(name).abs().max() <= 1e-5 * scale
    assert_close(ours, expected, 1e-5, "gradients")


def test_layer_twice_is_bit_equal() -> None:
    """Trap 21: gradients, attention and embeddings included, in bfloat16."""
    first = gradients_of(True, torch.bfloat16)
    for name, value in gradients_of(True, torch.bfloat16).items():
        if "experts" in name or name == "loss":
            assert torch.equal(value, first[name]), name


def invalid_ids_of(experts: torch.nn.Module) -> torch.Tensor:
    """Backward of tokens one of which names an expert that does not exist; returns the output."""
    x = torch.randn(6, 64, device="cuda", requires_grad=True)
    ids = torch.arange(12, device="cuda").view(6, 2) % 8
    ids[4] = 8
    y = experts(x, ids, torch.full((6, 2), 0.5, device="cuda"))
    y.sum().backward()
    return y.detach()


@pytest.mark.parametrize("how", ["clipping", "step"])
def test_layer_invalid_expert_id_contributes_zero_and_raises_before_the_update(how: str) -> None:
    model = apply_expert_parallel(tiny_mixtral().cuda(), init_device_mesh("cuda", 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    experts = next(iter_experts(model))
    y = invalid_ids_of(experts)
    assert not y[4].any() and y[[0, 1, 2, 3, 5]].any(dim=1).all()
    before = {name: full_tensor(param).clone() for name, param in model.named_parameters()}
    update = optimizer.step if how == "step" else functools.partial(clip_grad_norm_, model, 1.0)
    with pytest.raises(ValueError, match=r"expert ids outside of .* on ranks \[0\]"):
        update()
    for name, param in model.named_parameters():
        assert torch.equal(full_tensor(param), before[name])
    optimizer.step()


def test_layer_invalid_expert_id_raises_at_once_when_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_MOE_EP_CHECK", "1")
    model = apply_expert_parallel(tiny_mixtral().cuda(), init_device_mesh("cuda", 1))
    with pytest.raises(ValueError, match="expert_ids must be in"):
        invalid_ids_of(next(iter_experts(model)))


def full_tensor(param: torch.Tensor) -> torch.Tensor:
    return param.detach().full_tensor() if isinstance(param, DTensor) else param.detach()


def test_layer_autocast_trains() -> None:
    model = tiny_mixtral().cuda()
    apply_expert_parallel(model, init_device_mesh("cuda", 1))
    batch = {key: value.cuda() for key, value in batch_of(0).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(5):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        assert torch.isfinite(clip_grad_norm_(model, 1.0))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_layer_float16_with_grad_scaler_trains() -> None:
    model = tiny_mixtral().cuda()
    apply_expert_parallel(model, init_device_mesh("cuda", 1))
    batch = {key: value.cuda() for key, value in batch_of(0).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    losses = []
    for _ in range(5):
        with torch.autocast("cuda", dtype=torch.float16):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def saved_bytes_of(experts: torch.nn.Module, x: torch.Tensor, ids: torch.Tensor) -> int:
    """What forward keeps for backward beside x, its router weights and the experts' weights."""
    weights = torch.full(ids.shape, 0.5, device="cuda", requires_grad=True)
    own = {t.untyped_storage().data_ptr() for t in (x, weights)}
    weight_shapes = {param.shape for param in experts.parameters()}  # FSDP's gathered copies
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.shape not in weight_shapes:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = experts(x, ids, weights)
    y.sum().backward()
    return sum(found.values())


@pytest.mark.parametrize("recompute", ["none", "gate_up"])
def test_layer_at_one_rank_saves_x_and_z_alone(recompute: str) -> None:
    """The rows that x was copied into are not kept: backward packs them again.

    R slots of 2I gate and up values; a row weight and the plan's numbers are under 64 bytes a slot.
    At T = 16384, Mixtral's sizes and loads that need no padding that is 1.75 GiB and 2 MiB.
    """
    num_tokens, top_k, num_experts, hidden, width = 512, 2, 8, 512, 512
    model = tiny_mixtral(hidden_size=hidden, intermediate_size=width).to("cuda", torch.bfloat16)
    config = MoEConfig(recompute=recompute)
    apply_expert_parallel(model, init_device_mesh("cuda", 1), config)
    x = torch.randn(num_tokens, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids = torch.arange(num_tokens * top_k, device="cuda").view(-1, top_k) % num_experts
    slots = num_tokens * top_k + num_experts * 127
    z_bytes = 0 if recompute == "gate_up" else slots * 2 * width * 2
    saved = saved_bytes_of(next(iter_experts(model)), x, ids)
    assert z_bytes * 0.9 <= saved <= z_bytes + 64 * slots
    assert saved < z_bytes + slots * hidden * 2
