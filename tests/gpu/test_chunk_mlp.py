"""The operators of expert_mlp on one chunk's segments of buffers of all chunks, in place."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from chunk_mlp_cases import Sizes, Whole, is_untouched, poisoned

from torch_moe_ep import _library  # noqa: F401  (loads the operators)

from .cases import poisoned_memory, relative_error, requires_gpu

pytestmark = requires_gpu

operators = torch.ops.torch_moe_ep

THREE = ((128, 0, 256), (0, 0, 0), (384, 128, 128))
SMALL = Sizes(THREE, 72, 40, torch.bfloat16, num_unowned=128)
ODD = replace(SMALL, hidden=67, width=33)
MANY_EXPERTS = Sizes(((128, 0, 128),) * 100, 64, 64, torch.bfloat16, num_unowned=256)
# SwiGLU and its gradient in the epilogue, pairs of row tiles: the second may lie in another chunk.
LARGE = Sizes(((1152, 1024), (1280, 1408)), 4096, 1536, torch.bfloat16, num_unowned=128)
CASES = [
    (SMALL, "auto"),
    (SMALL, "sm80"),
    (SMALL, "torch"),
    (replace(SMALL, dtype=torch.float16), "auto"),
    (replace(SMALL, dtype=torch.float32), "auto"),
    (ODD, "auto"),
    (MANY_EXPERTS, "auto"),
    (LARGE, "auto"),
    (LARGE, "sm80"),
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def whole(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Whole:
    """Buffers on the GPU, with the kernels that take them chosen."""
    sizes, kernels = request.param
    monkeypatch.setenv("TORCH_MOE_EP_KERNELS", kernels)
    return Whole(sizes, "cuda")


def kernels_for(whole: Whole) -> AbstractContextManager[object]:
    """Those of the case, but where it refuses fp32: bounds are what the same kernels give."""
    if whole.dtype != torch.float32:
        return nullcontext()
    return patch.dict("os.environ", TORCH_MOE_EP_KERNELS="auto")


def forward_of(whole: Whole) -> tuple[torch.Tensor, torch.Tensor]:
    """y and z of all rows at once."""
    with kernels_for(whole):
        found: tuple[torch.Tensor, torch.Tensor] = operators.expert_mlp_forward(
            whole.rows, whole.row_weights, *whole.of_all_chunks(), *whole.experts, 0
        )
    return found


def backward_of(whole: Whole, z: torch.Tensor, slots_per_pass: int = 0) -> tuple[torch.Tensor, ...]:
    """All four gradients of all rows, at once or in passes."""
    with kernels_for(whole):
        found: tuple[torch.Tensor, ...] = operators.expert_mlp_backward(
            *(whole.grad_y, whole.rows, whole.row_weights, z),
            *(*whole.of_all_chunks(), *whole.experts, 0.5, slots_per_pass),
        )
    return found


def assert_close_to(
    ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor, rows: torch.Tensor | None = None
) -> None:
    """No further from fp32 than twice what all rows at once give; fp32 is fp32."""
    if rows is not None:
        ours, theirs, exact = ours[rows], theirs[rows], exact[rows]
    if ours.numel() == 0:
        return
    allowed = 1e-5 if ours.dtype == torch.float32 else 2e-3
    allowed = max(allowed, 2 * relative_error(theirs, exact))
    assert relative_error(ours, exact) <= allowed


@pytest.mark.parametrize("slots_per_pass", [0, 256])
@pytest.mark.parametrize("is_known", [True, False])
def test_forward_of_a_chunk_writes_its_rows_alone(
    whole: Whole, is_known: bool, slots_per_pass: int
) -> None:
    """NaN in the rows of other chunks, and in memory that nobody wrote, reaches nothing."""
    exact, theirs = forward_of(whole.in_float32()), forward_of(whole)
    for chunk in range(whole.num_chunks):
        mine = whole.rows_of(chunk)
        y, z = whole.empty(whole.hidden), whole.empty(2 * whole.width)
        with poisoned_memory():
            operators.expert_mlp_forward_chunk(
                *(poisoned(whole.rows, mine), poisoned(whole.row_weights, mine)),
                *(*whole.segments(chunk, is_known), *whole.experts, slots_per_pass),
                *(y, None if slots_per_pass else z),
            )
        assert is_untouched(y, mine)
        assert_close_to(y, theirs[0], exact[0], mine)
        if not slots_per_pass:
            assert is_untouched(z, mine)
            assert_close_to(z, theirs[1], exact[1], mine)


@pytest.mark.parametrize("has_z", [True, False])
def test_gradients_of_chunks_and_then_of_the_weights_are_those_of_all_rows(
    whole: Whole, has_z: bool
) -> None:
    z = forward_of(whole)[1]
    exact, theirs = backward_of(whole.in_float32(), z.float()), backward_of(whole, z)
    *_, grad_z, activation = whole.gradient_buffers()
    for chunk in range(whole.num_chunks):
        mine = whole.rows_of(chunk)
        of_rows = whole.gradient_buffers()[:2]
        with poisoned_memory():
            operators.expert_mlp_input_grads_chunk(
                poisoned(whole.grad_y, mine),
                None if has_z else poisoned(whole.rows, mine),
                poisoned(whole.row_weights, mine),
                poisoned(z, mine) if has_z else None,
                *(*whole.segments(chunk), *whole.experts, *of_rows, grad_z, activation),
            )
        for ours, other, reference in zip(of_rows, theirs[:2], exact[:2], strict=True):
            assert is_untouched(ours, mine)
            assert_close_to(ours, other, reference, mine)
    assert is_untouched(grad_z, whole.owned()) and is_untouched(activation, whole.owned())
    with poisoned_memory():
        of_weights = operators.expert_mlp_weight_grads(
            *(whole.grad_y, whole.rows, grad_z, activation), *whole.segments(0)[:3], 0.5
        )
    for ours, other, reference in zip(of_weights, theirs[2:], exact[2:], strict=True):
        assert_close_to(ours, other, reference)


@pytest.mark.parametrize("slots_per_pass", [0, 256])
def test_backward_of_all_chunks_at_once_is_that_of_all_rows(
    whole: Whole, slots_per_pass: int
) -> None:
    """In the same passes: of few rows SwiGLU's gradient is taken, and rounded, at another place."""
    z = forward_of(whole)[1]
    exact = backward_of(whole.in_float32(), z.float())
    theirs = backward_of(whole, z, slots_per_pass)
    of_rows = whole.gradient_buffers()[:2]
    with poisoned_memory():
        of_weights = operators.expert_mlp_backward_chunks(
            *(whole.grad_y, whole.rows, whole.row_weights, z, *whole.segments(0)[:3]),
            *(*whole.experts, 0.5, slots_per_pass, *of_rows),
        )
    for ours, other, reference in zip(of_rows, theirs[:2], exact[:2], strict=True):
        assert is_untouched(ours, whole.owned())
        assert_close_to(ours, other, reference, whole.owned())
    for ours, other, reference in zip(of_weights, theirs[2:], exact[2:], strict=True):
        assert_close_to(ours, other, reference)
