"""expert_mlp on CUDA against an fp32 oracle and against torch in the same dtype."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional

from torch_moe_ep import ops

from .cases import (
    ORACLE_DEVICE,
    Case,
    expert_ids_of,
    normal,
    poisoned_memory,
    relative_error,
    requires_gpu,
)

pytestmark = requires_gpu

KERNELS = ["auto", "sm80", "torch"]
NAMES = ["y", "grad rows", "grad row weights", "grad gate_up", "grad down"]


@dataclass(frozen=True)
class MlpCase:
    """A routing, an expert width I and a dtype."""

    routed: Case
    width: int

    def __str__(self) -> str:
        return f"{self.routed}-I{self.width}"


def mlp_cases(dtype: torch.dtype) -> list[MlpCase]:
    return [
        MlpCase(Case(300, 8, 2, 256, "skewed", dtype), 384),
        MlpCase(Case(200, 4, 2, 128, "one", dtype), 96),
        MlpCase(Case(64, 1, 1, 64, "random", dtype), 128),
        MlpCase(Case(50, 4, 4, 72, "random", dtype), 40),
        MlpCase(Case(0, 4, 2, 64, "random", dtype), 64),
        MlpCase(Case(90, 3, 2, 33, "random", dtype), 17),
        MlpCase(Case(1024, 8, 2, 1024, "skewed", dtype), 2560),
    ]


ALL_CASES = [
    case for dtype in (torch.float32, torch.bfloat16, torch.float16) for case in mlp_cases(dtype)
]


def takes(kernels: str, case: MlpCase) -> bool:
    """Whether a wish for these kernels is not refused for this case."""
    is_multiple_of_8 = case.routed.hidden % 8 == 0 and case.width % 8 == 0
    return kernels != "sm80" or (case.routed.dtype == torch.bfloat16 and is_multiple_of_8)


KERNEL_CASES = [
    pytest.param(kernels, case, id=f"{kernels}-{case}")
    for kernels in KERNELS
    for case in ALL_CASES
    if takes(kernels, case)
]
# Rows, K and columns that take SwiGLU's gradient into the GEMM's epilogue; the last tile is ragged.
FUSED = MlpCase(Case(1100, 2, 2, 4096, "random"), 760)
KERNEL_CASES.append(pytest.param("auto", FUSED, id=f"fused-{FUSED}"))
KERNEL_DTYPES = [
    ("auto", torch.float32),
    ("auto", torch.bfloat16),
    ("sm80", torch.bfloat16),
    ("torch", torch.float32),
    ("torch", torch.bfloat16),
]


@dataclass
class Inputs:
    """What one call takes, on the GPU."""

    plan: ops.DispatchPlan
    rows: torch.Tensor
    row_weights: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    grad_y: torch.Tensor

    @property
    def used(self) -> int:
        return int(self.plan.expert_offsets[-1])


def inputs_of(case: MlpCase) -> Inputs:
    """Rows nobody owns hold NaN in the rows, their weights and the gradient that arrives."""
    routed = case.routed
    plan = ops.plan(expert_ids_of(routed).cuda(), routed.num_experts)
    x = normal(routed.num_tokens, routed.hidden, dtype=routed.dtype, seed=1).cuda()
    weights = normal(routed.num_tokens, routed.top_k, seed=2).abs().cuda()
    rows, row_weights = ops.dispatch(x, weights, plan)
    used = int(plan.expert_offsets[-1])
    grad = normal(routed.num_tokens, routed.hidden, dtype=routed.dtype, seed=3).cuda()
    grad_y, _ = ops.dispatch(grad, None, plan)
    for tensor in (rows, row_weights, grad_y):
        tensor[used:] = float("nan")
    experts, hidden, width = routed.num_experts, routed.hidden, case.width
    gate_up = normal(experts, 2 * width, hidden, seed=4, scale=hidden**-0.5)
    down = normal(experts, hidden, width, seed=5, scale=width**-0.5)
    return Inputs(plan, rows, row_weights, gate_up.to(rows), down.to(rows), grad_y)


def results_of(inputs: Inputs, **options: object) -> list[torch.Tensor]:
    """y and the four gradients (None of the weights with main_grads), rows nobody owns cut off."""
    leaves = [
        tensor.clone().requires_grad_()
        for tensor in (inputs.rows, inputs.row_weights, inputs.gate_up, inputs.down)
    ]
    rows, row_weights, gate_up, down = leaves
    with poisoned_memory():
        y = ops.expert_mlp(rows, row_weights, inputs.plan, gate_up, down, **options)
        has_main_grads = "main_grads" in options
        grads = torch.autograd.grad(y, leaves, inputs.grad_y, allow_unused=has_main_grads)
    used = inputs.used
    return [y.detach()[:used], grads[0][:used], grads[1][:used], grads[2], grads[3]]


def torch_results_of(inputs: Inputs, dtype: torch.dtype) -> list[torch.Tensor]:
    """The same in plain torch, one expert after another, in ``dtype``."""
    used = inputs.used
    rows, row_weights, gate_up, down = (
        tensor.to(ORACLE_DEVICE).to(kept, copy=True).requires_grad_()
        for tensor, kept in (
            (inputs.rows[:used], dtype),
            (inputs.row_weights[:used], torch.float32),
            (inputs.gate_up, dtype),
            (inputs.down, dtype),
        )
    )
    offsets = inputs.plan.expert_offsets.tolist()
    parts = []
    for expert in range(len(offsets) - 1):
        segment = slice(offsets[expert], offsets[expert + 1])
        gate, up = (rows[segment] @ gate_up[expert].t()).chunk(2, dim=-1)
        hidden = functional.silu(gate) * up * row_weights[segment, None].to(dtype)
        parts.append(hidden @ down[expert].t())
    y = torch.cat(parts)
    leaves = (rows, row_weights, gate_up, down)
    grad_y = inputs.grad_y[:used].to(ORACLE_DEVICE).to(dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]


def assert_close_to_oracle(ours: list[torch.Tensor], inputs: Inputs) -> None:
    oracle = torch_results_of(inputs, torch.float64)
    peer = torch_results_of(inputs, inputs.rows.dtype)
    floor = 1e-5 if inputs.rows.dtype == torch.float32 else 2e-3
    for name, value, other, reference in zip(NAMES, ours, peer, oracle, strict=True):
        error, allowed = relative_error(value, reference), relative_error(other, reference)
        assert error <= max(2 * allowed, floor), f"{name}: {error:.2e} against {allowed:.2e}"


@pytest.mark.parametrize(("kernels", "case"), KERNEL_CASES)
def test_expert_mlp_equals_oracle(
    case: MlpCase, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value and gradients; NaN in memory that nobody wrote (trap 8)."""
    monkeypatch.setenv("TORCH_MOE_EP_KERNELS", kernels)
    inputs = inputs_of(case)
    assert_close_to_oracle(results_of(inputs), inputs)


@pytest.mark.parametrize(("kernels", "dtype"), KERNEL_DTYPES, ids=str)
def test_expert_mlp_without_tokens_has_zero_gradients(
    dtype: torch.dtype, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 9: an expert with no token; its gradient is zero, not garbage."""
    monkeypatch.setenv("TORCH_MOE_EP_KERNELS", kernels)
    inputs = inputs_of(MlpCase(Case(200, 6, 2, 128, "one", dtype), 256))
    *_, grad_gate_up, grad_down = results_of(inputs)
    assert grad_gate_up[:2].any() and grad_down[:2].any()
    assert not grad_gate_up[2:].any() and not grad_down[2:].any()


@pytest.mark.parametrize(("kernels", "dtype"), KERNEL_DTYPES, ids=str)
def test_expert_mlp_twice_is_bit_equal(
    dtype: torch.dtype, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 21."""
    monkeypatch.setenv("TORCH_MOE_EP_KERNELS", kernels)
    inputs = inputs_of(MlpCase(Case(1024, 8, 2, 1024, "skewed", dtype), 2560))
    for first, second in zip(results_of(inputs), results_of(inputs), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expert_mlp_recompute_gate_up_is_bit_equal(dtype: torch.dtype) -> None:
    inputs = inputs_of(MlpCase(Case(300, 8, 2, 256, "skewed", dtype), 384))
    expected = results_of(inputs)
    for ours, value in zip(results_of(inputs, recompute_gate_up=True), expected, strict=True):
        assert torch.equal(ours, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expert_mlp_that_keeps_x_instead_of_rows_is_bit_equal(dtype: torch.dtype) -> None:
    case = MlpCase(Case(300, 8, 2, 256, "skewed", dtype), 384)
    inputs = inputs_of(case)
    x = normal(case.routed.num_tokens, case.routed.hidden, dtype=dtype, seed=1).cuda()
    expected = results_of(inputs)
    for ours, value in zip(results_of(inputs, x=x), expected, strict=True):
        assert torch.equal(ours, value)


@pytest.mark.parametrize("slots_per_pass", [128, 300, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expert_mlp_several_passes_equal_oracle(dtype: torch.dtype, slots_per_pass: int) -> None:
    inputs = inputs_of(MlpCase(Case(300, 4, 2, 256, "skewed", dtype), 384))
    assert_close_to_oracle(results_of(inputs, slots_per_pass=slots_per_pass), inputs)


@pytest.mark.parametrize(("kernels", "dtype"), KERNEL_DTYPES, ids=str)
def test_expert_mlp_weight_grad_scale_scales_weight_gradients_alone(
    dtype: torch.dtype, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_MOE_EP_KERNELS", kernels)
    inputs = inputs_of(MlpCase(Case(300, 4, 2, 256, "random", dtype), 384))
    expected = results_of(inputs)
    scaled = results_of(inputs, weight_grad_scale=0.25)
    for ours, value in zip(scaled[:3], expected[:3], strict=True):
        assert torch.equal(ours, value)
    for ours, value in zip(scaled[3:], expected[3:], strict=True):
        assert torch.equal(ours, value * 0.25)


@pytest.mark.parametrize("kernels", KERNELS)
def test_expert_mlp_bfloat16_never_syncs_the_host(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_MOE_EP_KERNELS", kernels)
    inputs = inputs_of(MlpCase(Case(300, 8, 2, 256, "random"), 384))
    leaves = [t.requires_grad_() for t in (inputs.rows, inputs.gate_up, inputs.down)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = ops.expert_mlp(
            inputs.rows, inputs.row_weights, inputs.plan, inputs.gate_up, inputs.down
        )
        torch.autograd.grad(y, leaves, inputs.grad_y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_expert_mlp_autocast_computes_in_bfloat16() -> None:
    inputs = inputs_of(MlpCase(Case(100, 4, 2, 64, "random", torch.float32), 128))
    low = [t.bfloat16() for t in (inputs.rows, inputs.gate_up, inputs.down)]
    expected = ops.expert_mlp(low[0], inputs.row_weights, inputs.plan, low[1], low[2])
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = ops.expert_mlp(
            inputs.rows, inputs.row_weights, inputs.plan, inputs.gate_up, inputs.down
        )
    assert y.dtype == torch.bfloat16
    assert torch.equal(y[: inputs.used], expected[: inputs.used])


def test_expert_mlp_wished_kernels_that_do_not_fit_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Trap 22."""
    inputs = inputs_of(MlpCase(Case(64, 4, 2, 64, "random", torch.float32), 64))
    arguments = (inputs.rows, inputs.row_weights, inputs.plan, inputs.gate_up, inputs.down)
    monkeypatch.setenv("TORCH_MOE_EP_KERNELS", "sm90")
    with pytest.raises(RuntimeError, match="bfloat16 only"):
        ops.expert_mlp(*arguments)
    monkeypatch.setenv("TORCH_MOE_EP_KERNELS", "fastest")
    with pytest.raises(ValueError, match="must be auto, sm90, sm80 or torch, got fastest"):
        ops.expert_mlp(*arguments)


def test_expert_mlp_opcheck() -> None:
    inputs = inputs_of(MlpCase(Case(40, 2, 1, 16, "random", torch.float32), 8))
    used = inputs.used
    for tensor in (inputs.rows, inputs.row_weights):
        tensor[used:] = 0
    leaves = [
        t.requires_grad_() for t in (inputs.rows, inputs.row_weights, inputs.gate_up, inputs.down)
    ]
    host_offsets = torch.empty(0, dtype=torch.long)
    arguments = (*leaves[:2], inputs.plan.expert_offsets, host_offsets, *leaves[2:], 1.0, 0, False)
    torch.library.opcheck(
        torch.ops.torch_moe_ep.expert_mlp.default,
        arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


# Rows an expert: few, so that B is kept down a column; an odd number of 128-row blocks; none.
MAIN_GRAD_CASES = [
    MlpCase(Case(300, 8, 2, 256, "skewed"), 384),
    MlpCase(Case(1024, 2, 2, 1024, "random"), 2560),
    MlpCase(Case(200, 6, 2, 128, "one"), 256),
    MlpCase(Case(90, 3, 2, 40, "random"), 24),
]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("case", MAIN_GRAD_CASES, ids=str)
def test_expert_mlp_main_grads_hold_what_was_there_plus_each_gradient(
    case: MlpCase, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice into the same tensors, scaled; no worse than the bf16 gradient added in fp32."""
    monkeypatch.setenv("TORCH_MOE_EP_KERNELS", kernels)
    inputs = inputs_of(case)
    oracle = torch_results_of(inputs, torch.float64)[3:]
    rounded = results_of(inputs)[3:]
    main_grads = [torch.full_like(w, 0.25, dtype=torch.float32) for w in oracle]
    for _ in range(2):
        got = results_of(inputs, main_grads=tuple(main_grads), weight_grad_scale=0.5)
    assert got[3:] == [None, None]
    for main_grad, exact, plain in zip(main_grads, oracle, rounded, strict=True):
        allowed = max(2 * relative_error(0.25 + plain.double(), 0.25 + exact), 1e-3)
        assert relative_error(main_grad, 0.25 + exact) <= allowed
