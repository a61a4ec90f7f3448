"""The experts module in one process, against Hugging Face's own."""

import copy

import pytest
import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralSparseMoeBlock

from torch_moe_ep import MoEConfig, ops
from torch_moe_ep.testing import (
    LoneExperts,
    assert_close,
    make_local_expert_parallel,
    random_routing,
    relative_error,
)


def block_of(implementation: str = "eager", hidden: int = 64, width: int = 128, **fields):
    """A Mixtral MoE block: router and experts."""
    config = MixtralConfig(hidden_size=hidden, intermediate_size=width, **fields)
    config._experts_implementation = implementation
    torch.manual_seed(0)
    block = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        for param in block.parameters():
            param.normal_(0.0, param.shape[-1] ** -0.5)
    return block


def results_of(block: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and the gradient of the input and of every parameter."""
    x = x.clone().requires_grad_()
    y = block(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    y.backward(upstream)
    grads = {name: param.grad for name, param in block.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **grads}


def ours_and_theirs(**fields):
    theirs = block_of(**fields)
    ours = copy.deepcopy(theirs)
    make_local_expert_parallel(ours.experts)
    return ours, theirs


@pytest.mark.parametrize(
    ("tokens", "fields"),
    [
        (50, {}),
        (1, {}),
        (50, {"num_experts_per_tok": 1}),
        (50, {"num_experts_per_tok": 8}),
        (50, {"num_local_experts": 16, "num_experts_per_tok": 3}),
        (50, {"num_local_experts": 1, "num_experts_per_tok": 1}),
        (50, {"hidden": 33, "width": 17}),
    ],
    ids=str,
)
def test_block_equals_hugging_face_eager(tokens, fields):
    ours, theirs = ours_and_theirs(**fields)
    x = torch.randn(2, tokens, ours.gate.hidden_dim)
    expected = results_of(theirs, x)
    for name, grad in expected.items():
        if grad is None:
            expected[name] = torch.zeros_like(dict(theirs.named_parameters())[name])
    actual = results_of(ours, x)
    if ours.gate.top_k == 1:
        # A single normalised weight is 1 whatever the router says: the gradient is rounding alone.
        scale = expected["experts.gate_up_proj"].abs().max()
        for gradients in (actual, expected):
            assert gradients.pop("gate.weight").abs().max() <= 1e-5 * scale
    assert_close(actual, expected, 1e-5, "block")


def test_trap_09_empty_batch_gives_zero_gradients_not_none():
    model = LoneExperts()
    make_local_expert_parallel(model.experts)
    x = torch.zeros(0, 16, requires_grad=True)
    y = model(x, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert y.shape == (0, 16)
    y.sum().backward()
    for name, param in model.named_parameters():
        assert param.grad is not None and not param.grad.any(), name


def test_trap_09_all_to_one_expert_gives_exact_zeros_elsewhere():
    model = LoneExperts()
    make_local_expert_parallel(model.experts)
    x = torch.randn(12, 16)
    model(x, torch.full((12, 1), 5), torch.ones(12, 1)).sum().backward()
    for param in model.parameters():
        used = [expert for expert in range(8) if param.grad[expert].any()]
        assert used == [5]


def test_bfloat16_error_is_within_twice_grouped_mms():
    exact = block_of()
    half = block_of("grouped_mm").to(torch.bfloat16)
    ours = copy.deepcopy(half)
    make_local_expert_parallel(ours.experts)
    with torch.no_grad():
        for wide, narrow in zip(exact.parameters(), half.parameters(), strict=True):
            wide.copy_(narrow)
        # Equal routing everywhere: the router's own rounding is not what is measured.
    x = torch.randn(3, 40, 64).to(torch.bfloat16).float()
    with torch.no_grad():
        _, weights, ids = exact.gate(x.reshape(-1, 64))

    def run(experts, dtype):
        tokens = x.reshape(-1, 64).to(dtype).requires_grad_()
        scores = weights.clone().requires_grad_()
        y = experts(tokens, ids, scores)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
        y.backward(upstream.to(torch.bfloat16).to(dtype))
        return [y, tokens.grad, scores.grad, *(p.grad for p in experts.parameters())]

    wanted = run(exact.experts, torch.float32)
    theirs = run(half.experts, torch.bfloat16)
    mine = run(ours.experts, torch.bfloat16)
    for ours_one, theirs_one, exact_one in zip(mine, theirs, wanted, strict=True):
        bound = 2 * relative_error(theirs_one.float(), exact_one)
        assert relative_error(ours_one.float(), exact_one) <= bound


def test_nan_weights_and_tokens_pass_through_as_in_eager():
    ours, theirs = LoneExperts(), LoneExperts()
    make_local_expert_parallel(ours.experts)
    x = torch.randn(9, 16)
    ids, weights = random_routing(9, 2, 8)
    weights[3, 1] = float("nan")
    x[5, 2] = float("inf")
    actual, expected = ours(x, ids, weights), theirs(x, ids, weights)
    assert actual[3].isnan().all() and not actual[5].isfinite().all()
    finite = [0, 1, 2, 4, 6, 7, 8]
    assert relative_error(actual[finite], expected[finite]) <= 1e-5
    assert torch.equal(actual.isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_a_matmul_and_gradients_stay_float32(dtype):
    ours, theirs = ours_and_theirs()
    x = torch.randn(2, 30, 64)
    exact = results_of(copy.deepcopy(theirs), x)
    with torch.autocast("cpu", dtype=dtype):
        actual, expected = results_of(ours, x), results_of(theirs, x)
    for name in ("experts.gate_up_proj", "experts.down_proj"):
        assert actual[name].dtype == torch.float32
        bound = 2 * relative_error(expected[name], exact[name])
        assert 0 < relative_error(actual[name], exact[name]) <= bound
    assert relative_error(actual["y"].float(), exact["y"]) <= 2 * relative_error(
        expected["y"].float(), exact["y"]
    )


def test_float16_trains_with_grad_scaler():
    model = LoneExperts()
    make_local_expert_parallel(model.experts)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x, target = torch.randn(32, 16), torch.randn(32, 16)
    ids, weights = random_routing(32, 2, 8)
    losses = []
    for _ in range(20):
        with torch.autocast("cpu", dtype=torch.float16):
            y = model(x, ids, weights)
        loss = (y.float() - target).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02


def test_profiler_shows_every_stage_forward_and_backward():
    model = LoneExperts()
    make_local_expert_parallel(model.experts)
    x = torch.randn(6, 16, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(x, *random_routing(6, 2, 8)).sum().backward()
    names = {event.key for event in profile.key_averages()}
    for stage in ("plan", "dispatch", "expert_mlp", "combine", "expert_mlp_backward"):
        assert any(stage in name for name in names), f"{stage} not in {sorted(names)}"


@pytest.mark.parametrize(
    ("config", "columns"),
    [
        ({}, 2 * 32),
        ({"recompute": "gate_up"}, 0),
        ({"max_slots": 64}, 0),
        ({"received_rows": "keep"}, 2 * 32 + 16),
    ],
    ids=str,
)
def test_saved_bytes_beside_x_are_gate_up_and_rows_if_kept(config, columns):
    """R rows of 2I elements unless the gate and up products are computed again; of H if kept."""
    model = LoneExperts()
    make_local_expert_parallel(model.experts, MoEConfig(**config))
    tokens, top_k = 500, 2
    x = torch.randn(tokens, 16, requires_grad=True)
    ids, weights = random_routing(tokens, top_k, 8)
    given = {t.untyped_storage().data_ptr() for t in (x, ids, weights, *model.parameters())}
    saved: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x, ids, weights)
    copies = tokens * top_k
    maps = copies * (8 + 4)  # slot_of_copy and row_weights
    assert 4 * columns * copies <= sum(saved.values()) <= 4 * columns * copies + maps + 4096
    y.sum().backward()


def test_trap_12_counters_count_once_per_backward_and_not_in_evaluation():
    model = LoneExperts()
    make_local_expert_parallel(model.experts)
    experts = model.experts
    x = torch.randn(10, 16, requires_grad=True)
    ids, weights = random_routing(10, 2, 8)
    expected = torch.bincount(ids.flatten(), minlength=8)
    model(x, ids, weights).sum().backward()
    assert torch.equal(experts.tokens_per_expert.cpu(), expected)
    model.eval()
    with torch.no_grad():
        model(x, ids, weights)
    assert torch.equal(experts.tokens_per_expert.cpu(), expected)
    model.train()
    for use_reentrant in (True, False):
        y = torch.utils.checkpoint.checkpoint(model, x, ids, weights, use_reentrant=use_reentrant)
        y.sum().backward()
    assert torch.equal(experts.tokens_per_expert.cpu(), 3 * expected)


def test_counters_and_flags_stay_out_of_the_state_dict():
    model, plain = LoneExperts(), LoneExperts()
    make_local_expert_parallel(model.experts)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert isinstance(model.experts, MixtralExperts)
    assert not list(model.buffers())


@pytest.fixture
def _poison():
    """Every uninitialised tensor holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def three_steps(config: dict, dtype: torch.dtype) -> list[torch.Tensor]:
    model = LoneExperts().to(dtype)
    make_local_expert_parallel(model.experts, MoEConfig(**config))
    found = []
    for step in range(3):
        x = torch.randn(20, 16, generator=torch.Generator().manual_seed(step)).to(dtype)
        x.requires_grad_()
        ids, weights = random_routing(20, 2, 4, seed=step)  # experts 4 to 7 get nothing
        weights.requires_grad_()
        y = model(x, ids, weights)
        y.float().square().sum().backward()
        found += [y.detach(), x.grad, weights.grad, *(p.grad.clone() for p in model.parameters())]
        with torch.no_grad():
            for param in model.parameters():
                param.sub_(0.01 * param.grad)
                param.grad = None
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "config",
    [{}, {"recompute": "gate_up"}, {"max_slots": 7}, {"received_rows": "keep"}],
    ids=["plain", "recompute", "passes", "kept rows"],
)
def test_trap_08_rows_nobody_wrote_do_not_matter(config, dtype, request):
    clean = three_steps(config, dtype)
    request.getfixturevalue("_poison")
    for poisoned, expected in zip(three_steps(config, dtype), clean, strict=True):
        assert torch.equal(poisoned, expected)


def test_kept_rows_change_no_bit():
    for kept, again in zip(
        three_steps({"received_rows": "keep"}, torch.bfloat16),
        three_steps({"received_rows": "dispatch_again"}, torch.bfloat16),
        strict=True,
    ):
        assert torch.equal(kept, again)


def padded_pipeline(dtype: torch.dtype, row_alignment: int, slots_per_pass: int):
    """Output and every gradient of the operators, each expert's rows padded as on CUDA."""
    found = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(20, 16, generator=generator).to(dtype).requires_grad_()
        gate_up = (torch.randn(8, 64, 16, generator=generator) / 4).to(dtype).requires_grad_()
        down = (torch.randn(8, 16, 32, generator=generator) / 6).to(dtype).requires_grad_()
        ids, weights = random_routing(20, 2, 4, seed=step)  # experts 4 to 7 get nothing
        weights.requires_grad_()
        plan = ops.plan(ids, 8, row_alignment=row_alignment)
        rows, row_weights = ops.dispatch(x, weights, plan)
        y = ops.expert_mlp(rows, row_weights, plan, gate_up, down, slots_per_pass=slots_per_pass)
        out = ops.combine(y, plan)
        out.float().square().sum().backward()
        found += [out.detach(), x.grad, weights.grad, gate_up.grad, down.grad]
    return found


@pytest.mark.parametrize("slots_per_pass", [0, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trap_08_padding_rows_do_not_matter(dtype, slots_per_pass, request):
    """Segments of 8 rows as CUDA has of 128: padding, and rows behind the last segment."""
    clean = padded_pipeline(dtype, 1, slots_per_pass)
    request.getfixturevalue("_poison")
    padded = padded_pipeline(dtype, 8, slots_per_pass)
    tolerance = 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for poisoned, expected in zip(padded, clean, strict=True):
        assert relative_error(poisoned, expected) <= tolerance
