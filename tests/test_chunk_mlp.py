"""The operators of expert_mlp on segments of buffers of all chunks: a chunk's rows in place."""

import pytest
import torch
from chunk_mlp_cases import Sizes, Whole, is_untouched, poisoned

from torch_moe_ep import ops  # noqa: F401  (loads the operators and their fakes)
from torch_moe_ep.testing import relative_error

operators = torch.ops.torch_moe_ep
CHECKS = ("test_schema", "test_faketensor")
ONE = ((5,), (0,), (7,))
TWO = ((5, 0), (3, 4), (0, 6))
THREE = ((2, 0, 3), (0, 0, 0), (4, 1, 6))
CASES = [Sizes(ONE), Sizes(TWO, dtype=torch.bfloat16), Sizes(THREE)]


@pytest.fixture(params=CASES, ids=str)
def whole(request):
    return Whole(request.param)


def assert_same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """fp32 is bit-equal: an element depends on its row alone. 16-bit GEMMs are the library's."""
    if ours.dtype == torch.float32:
        assert torch.equal(ours, expected)
    elif ours.numel():
        assert relative_error(ours.float(), expected.float()) < 2e-2


def check_rows(ours: list, expected: list, is_written: torch.Tensor) -> None:
    """These rows are those of the whole, and no other row is written."""
    for found, whole in zip(ours, expected, strict=True):
        assert_same(found[is_written], whole[is_written])
        assert is_untouched(found, is_written)


@pytest.mark.parametrize("slots_per_pass", [0, 4])
def test_forward_of_a_chunk_writes_its_rows_alone(whole, slots_per_pass):
    """NaN in the rows of other chunks reaches nothing."""
    expected = operators.expert_mlp_forward(
        whole.rows, whole.row_weights, *whole.of_all_chunks(), *whole.experts, 0
    )
    for chunk in range(whole.num_chunks):
        mine = whole.rows_of(chunk)
        results = [whole.empty(whole.hidden), whole.empty(2 * whole.width)]
        if slots_per_pass:
            results[1] = None
        inputs = (poisoned(whole.rows, mine), poisoned(whole.row_weights, mine))
        arguments = (*inputs, *whole.segments(chunk), *whole.experts, slots_per_pass, *results)
        operators.expert_mlp_forward_chunk(*arguments)
        num_results = 1 if slots_per_pass else 2
        check_rows(results[:num_results], expected[:num_results], mine)
        torch.library.opcheck(operators.expert_mlp_forward_chunk, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("has_z", [True, False])
def test_gradients_of_chunks_and_then_of_the_weights_are_those_of_all_rows(whole, has_z):
    offsets, rest = whole.of_all_chunks(), (*whole.experts, 0)
    inputs = (whole.rows, whole.row_weights)
    _, z = operators.expert_mlp_forward(*inputs, *offsets, *rest)
    expected = operators.expert_mlp_backward(
        whole.grad_y, *inputs, z, *offsets, *whole.experts, 0.5, 0
    )
    *_, grad_z, activation = whole.gradient_buffers()
    for chunk in range(whole.num_chunks):
        mine = whole.rows_of(chunk)
        of_rows = whole.gradient_buffers()[:2]
        arguments = (
            poisoned(whole.grad_y, mine),
            None if has_z else poisoned(whole.rows, mine),
            poisoned(whole.row_weights, mine),
            poisoned(z, mine) if has_z else None,
            *whole.segments(chunk, is_known=False),
            *whole.experts,
            *(*of_rows, grad_z, activation),
        )
        operators.expert_mlp_input_grads_chunk(*arguments)
        check_rows(of_rows, expected[:2], mine)
        torch.library.opcheck(operators.expert_mlp_input_grads_chunk, arguments, test_utils=CHECKS)
    assert is_untouched(grad_z, whole.owned()) and is_untouched(activation, whole.owned())
    arguments = (whole.grad_y, whole.rows, grad_z, activation, *whole.segments(0)[:3], 0.5)
    for ours, theirs in zip(
        operators.expert_mlp_weight_grads(*arguments), expected[2:], strict=True
    ):
        assert_same(ours, theirs)
    torch.library.opcheck(operators.expert_mlp_weight_grads, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("slots_per_pass", [0, 4])
def test_backward_of_all_chunks_at_once_is_that_of_all_rows(whole, slots_per_pass):
    z = torch.empty(0, 2 * whole.width, dtype=whole.dtype)
    inputs = (whole.grad_y, whole.rows, whole.row_weights, z)
    rest = (*whole.experts, 0.5, slots_per_pass)
    expected = operators.expert_mlp_backward(*inputs, *whole.of_all_chunks(), *rest)
    of_rows = whole.gradient_buffers()[:2]
    arguments = (*inputs, *whole.segments(0)[:3], *rest, *of_rows)
    of_weights = operators.expert_mlp_backward_chunks(*arguments)
    check_rows(of_rows, expected[:2], whole.owned())
    for ours, theirs in zip(of_weights, expected[2:], strict=True):
        assert torch.equal(ours, theirs)
    torch.library.opcheck(operators.expert_mlp_backward_chunks, arguments, test_utils=CHECKS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 2}, "chunk must be one of the 2 chunks, from 0 on, got 2"),
        ({"num_chunks": 0}, "chunk must be one of the 0 chunks"),
        ({"num_chunks": 4}, r"or \[local experts \* num_chunks \+ 1\] of chunks, got shape \[7\]"),
        ({"y": torch.zeros(16, 20).t()}, "y is written and must be contiguous Float"),
        ({"z": torch.zeros(20, 5)}, "z is written and must be contiguous Float"),
    ],
    ids=str,
)
def test_what_does_not_fit_a_chunk_is_refused(change, message):
    whole = Whole(Sizes(TWO))
    names = ("segment_offsets", "host_offsets", "num_chunks", "chunk", "gate_up", "down")
    arguments = dict(zip(names, (*whole.segments(0), *whole.experts), strict=True))
    arguments.update(rows=whole.rows, row_weights=whole.row_weights, slots_per_pass=0)
    arguments.update(y=whole.empty(whole.hidden), z=None)
    with pytest.raises(ValueError, match=message):
        operators.expert_mlp_forward_chunk(**arguments | change)


def test_backward_asks_for_rows_or_z_and_for_products_of_one_width():
    whole = Whole(Sizes(TWO))
    with pytest.raises(ValueError, match="rows or z must be given, and not both, got none"):
        operators.expert_mlp_input_grads_chunk(
            *(whole.grad_y, None, whole.row_weights, None),
            *(*whole.segments(0), *whole.experts, *whole.gradient_buffers()),
        )
    found = (whole.empty(40), whole.empty(whole.width))
    with pytest.raises(ValueError, match=r"grad_z must be .*, 48\], got"):
        operators.expert_mlp_weight_grads(
            whole.grad_y, whole.rows, *found, *whole.segments(0)[:3], 1.0
        )
