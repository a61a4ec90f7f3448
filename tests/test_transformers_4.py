"""transformers 4.57: gradients, hub layout in and out, refusals. Skipped under transformers 5.

make test TRANSFORMERS=4.57.6 PYTEST_ARGS=tests/test_transformers_4.py
"""

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from torch import nn

from torch_moe_ep import (
    apply_expert_parallel,
    average_gradients,
    export_hf,
    init_device_mesh,
    load_hf,
    save_checkpoint,
)
from torch_moe_ep.checkpoint.__main__ import main as command
from torch_moe_ep.integrations.transformers4 import find_blocks, fused_names, hub_parts
from torch_moe_ep.testing import assert_close, batch_of, relative_error
from torch_moe_ep.testing.parallel import full_gradients, wrap

TOLERANCE = 1e-5
needs_4 = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) != 4,
    reason="needs transformers 4.57: make test TRANSFORMERS=4.57.6 "
    "PYTEST_ARGS=tests/test_transformers_4.py",
)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "use_cache": False,
}
AUX = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
FAMILIES = {
    "Mixtral": {"num_local_experts": 8},
    "Qwen3Moe": {"num_experts": 8, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "Olmoe": {"num_experts": 8, "pad_token_id": 0, "eos_token_id": 2},
}


def build(family: str, **overrides) -> nn.Module:
    config_class = getattr(transformers, f"{family}Config")
    torch.manual_seed(0)
    model_class = getattr(transformers, f"{family}ForCausalLM")
    return model_class(config_class(**{**SIZES, **FAMILIES[family], **overrides}))


def as_hub(model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fused weights or gradients under the names of the unpatched model."""
    fused, parts = fused_names(model), {}
    for name, tensor in tensors.items():
        parts.update(hub_parts(name, tensor, fused))
    return parts


def check_gradients(family: str, kind: str, overrides: dict) -> None:
    world = dist.get_world_size()
    reference = build(family, **overrides)
    losses = []
    for rank in range(world):
        loss = reference(**batch_of(rank)).loss
        (loss / world).backward()
        losses.append(loss.item())
    mesh = init_device_mesh("cpu", world)
    inner = apply_expert_parallel(build(family, **overrides), mesh)
    model = wrap(inner, kind, mesh)
    loss = model(**batch_of(dist.get_rank())).loss
    loss.backward()
    if kind == "none":
        average_gradients(model)
    assert abs(loss.item() - losses[dist.get_rank()]) < TOLERANCE * abs(losses[0])
    wanted = {name: param.grad for name, param in reference.named_parameters()}
    for name, param in reference.named_parameters():
        if param.grad is None:
            wanted[name] = torch.zeros_like(param)
    assert_close(as_hub(inner, full_gradients(model)), wanted, TOLERANCE, f"{family} under {kind}")


@needs_4
@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1", "none"])
def test_gradients_of_mixtral_equal_one_process(ranks, kind):
    ranks(2).run(check_gradients, "Mixtral", kind, AUX)


@needs_4
@pytest.mark.parametrize("family", ["Qwen3Moe", "Olmoe"])
def test_gradients_of_other_families_equal_one_process(ranks, family):
    ranks(2).run(check_gradients, family, "fsdp2", {})


def check_files(plain: str, exported: str, kind: str) -> None:
    mesh = init_device_mesh("cpu", 2)
    model = build("Mixtral")
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    model = wrap(apply_expert_parallel(model, mesh), kind, mesh)
    load_hf(model, plain)
    with torch.no_grad():
        logits = model(input_ids=batch_of(0)["input_ids"]).logits
        wanted = build("Mixtral")(input_ids=batch_of(0)["input_ids"]).logits
    assert relative_error(logits, wanted) < TOLERANCE
    export_hf(model, exported)
    save_checkpoint(exported + "-checkpoint", model)
    dist.barrier()
    if dist.get_rank() == 0:
        assert command(["export", exported + "-checkpoint", exported + "-offline"]) == 0


@needs_4
@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1"])
def test_hub_layout_in_and_out(ranks, tmp_path, kind):
    build("Mixtral").save_pretrained(tmp_path / "plain")
    ranks(2).run(check_files, str(tmp_path / "plain"), str(tmp_path / "exported"), kind)
    plain, *others = (
        load_file(tmp_path / name / "model.safetensors")
        for name in ("plain", "exported", "exported-offline")
    )
    for exported in others:
        assert plain.keys() == exported.keys()
        assert all(torch.equal(plain[name], exported[name]) for name in plain)
    transformers.MixtralForCausalLM.from_pretrained(tmp_path / "exported")


def refusal_on_rank() -> str:
    config = transformers.Qwen2MoeConfig(**{**SIZES, "num_experts": 8})
    model = transformers.Qwen2MoeForCausalLM(config)
    with pytest.raises(ValueError) as caught:
        apply_expert_parallel(model, init_device_mesh("cpu", 2))
    return str(caught.value)


@needs_4
def test_other_blocks_are_refused_by_name(ranks):
    for message in ranks(2).run(refusal_on_rank):
        assert "Qwen2MoeSparseMoeBlock" in message and "use transformers 5" in message


class Expert(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(4, 6, bias=bias), nn.Linear(4, 6, bias=bias)
        self.w2 = nn.Linear(6, 4, bias=bias)
        self.act_fn = nn.SiLU()


class MixtralSparseMoeBlock(nn.Module):
    """The shape of transformers 4.57's, for the part that needs no transformers."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3, bias=False)
        self.experts = nn.ModuleList([Expert(bias) for _ in range(3)])


def test_blocks_are_found_by_their_parts_and_cost_no_memory():
    fits, misfits = find_blocks(nn.ModuleDict({"moe": MixtralSparseMoeBlock()}))
    stand_in = fits["moe.experts"]
    assert misfits == []
    assert stand_in.gate_up_proj.shape == (3, 12, 4) and stand_in.down_proj.shape == (3, 4, 6)
    assert stand_in.gate_up_proj.untyped_storage().nbytes() == 4
    fits, misfits = find_blocks(nn.ModuleDict({"moe": MixtralSparseMoeBlock(bias=True)}))
    assert fits == {} and "without bias" in misfits[0]
