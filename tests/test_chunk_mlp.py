"""The operators of expert_mlp on segments of buffers of all chunks: a chunk's rows in place."""

import dataclasses

import pytest
import torch

from torch_moe_ep import _library  # noqa: F401  (loads the operators)
from torch_moe_ep.testing import relative_error

operators = torch.ops.torch_moe_ep
CHECKS = ("test_schema", "test_faketensor")
EXPERTS, HIDDEN, WIDTH = 3, 16, 24
CHUNK_LENGTHS = {  # rows of each expert in each chunk
    1: [[5], [0], [7]],
    2: [[5, 0], [3, 4], [0, 6]],
    3: [[2, 0, 3], [0, 0, 0], [4, 1, 6]],
}


@dataclasses.dataclass
class Whole:
    """Buffers of all chunks, and what one chunk gives on them."""

    num_chunks: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*sizes):
            return torch.randn(*sizes, generator=generator).to(self.dtype)

        lengths = torch.tensor(CHUNK_LENGTHS[self.num_chunks]).flatten()
        self.offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        self.expert_offsets = self.offsets[:: self.num_chunks].clone()
        num_slots = int(self.offsets[-1]) + 2  # two rows that nobody owns
        self.rows, self.grad_y = normal(num_slots, HIDDEN), normal(num_slots, HIDDEN)
        self.row_weights = torch.rand(num_slots, generator=generator)
        self.experts = (normal(EXPERTS, 2 * WIDTH, HIDDEN), normal(EXPERTS, HIDDEN, WIDTH))

    def rows_of(self, chunk: int) -> torch.Tensor:
        """Which slots are the chunk's."""
        mask = torch.zeros(self.rows.size(0), dtype=torch.bool)
        for segment in range(chunk, EXPERTS * self.num_chunks, self.num_chunks):
            mask[self.offsets[segment] : self.offsets[segment + 1]] = True
        return mask

    def segments(self, chunk: int, is_known: bool = True) -> tuple:
        """segment_offsets, host_offsets, num_chunks and chunk."""
        return self.offsets, self.offsets if is_known else self.offsets[:0], self.num_chunks, chunk

    def empty(self, *columns: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A result's buffer; what is not written stays 7."""
        return torch.full((self.rows.size(0), *columns), 7.0, dtype=dtype or self.dtype)


def poisoned(tensor: torch.Tensor, is_read: torch.Tensor) -> torch.Tensor:
    """NaN in all rows but these."""
    found = tensor.clone()
    found[~is_read] = float("nan")
    return found


def assert_same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """fp32 is bit-equal: an element depends on its row alone. 16-bit GEMMs are the library's."""
    if ours.dtype == torch.float32:
        assert torch.equal(ours, expected)
    elif ours.numel():
        assert relative_error(ours.float(), expected.float()) < 2e-2


def check_rows_of_chunk(ours: list, expected: list, is_written: torch.Tensor) -> None:
    """The chunk's rows are those of the whole, and no other row is written."""
    for found, whole in zip(ours, expected, strict=True):
        assert_same(found[is_written], whole[is_written])
        assert bool((found[~is_written] == 7).all())


CASES = pytest.mark.parametrize(
    ("num_chunks", "dtype"), [(1, torch.float32), (2, torch.bfloat16), (3, torch.float32)], ids=str
)


@pytest.mark.parametrize("slots_per_pass", [0, 4])
@CASES
def test_forward_of_a_chunk_writes_its_rows_alone(num_chunks, dtype, slots_per_pass):
    """NaN in the rows of other chunks reaches nothing."""
    whole = Whole(num_chunks, dtype)
    expected = operators.expert_mlp_forward(
        whole.rows, whole.row_weights, *[whole.expert_offsets] * 2, *whole.experts, 0
    )
    for chunk in range(num_chunks):
        mine = whole.rows_of(chunk)
        y, z = whole.empty(HIDDEN), whole.empty(2 * WIDTH)
        arguments = (
            poisoned(whole.rows, mine), poisoned(whole.row_weights, mine),
            *whole.segments(chunk), *whole.experts, slots_per_pass, y,
            None if slots_per_pass else z,
        )  # fmt: skip
        operators.expert_mlp_forward_chunk(*arguments)
        check_rows_of_chunk([y], expected[:1], mine)
        if not slots_per_pass:
            check_rows_of_chunk([z], expected[1:], mine)
        torch.library.opcheck(
            operators.expert_mlp_forward_chunk, arguments, test_utils=CHECKS
        )  # fmt: skip


@pytest.mark.parametrize("has_z", [True, False])
@CASES
def test_gradients_of_a_chunk_and_then_of_the_weights_are_those_of_all_rows(
    num_chunks, dtype, has_z
):
    whole = Whole(num_chunks, dtype)
    offsets = [whole.expert_offsets] * 2
    _, z = operators.expert_mlp_forward(
        whole.rows, whole.row_weights, *offsets, *whole.experts, 0
    )  # fmt: skip
    expected = operators.expert_mlp_backward(
        whole.grad_y, whole.rows, whole.row_weights, z, *offsets, *whole.experts, 0.5, 0
    )
    grad_z, activation = whole.empty(2 * WIDTH), whole.empty(WIDTH)
    for chunk in range(num_chunks):
        mine = whole.rows_of(chunk)
        grad_rows, grad_row_weights = whole.empty(HIDDEN), whole.empty(dtype=torch.float32)
        arguments = (
            poisoned(whole.grad_y, mine),
            None if has_z else poisoned(whole.rows, mine),
            poisoned(whole.row_weights, mine),
            poisoned(z, mine) if has_z else None,
            *whole.segments(chunk, is_known=False),
            *whole.experts,
            *(grad_rows, grad_row_weights, grad_z, activation),
        )
        operators.expert_mlp_input_grads_chunk(*arguments)
        check_rows_of_chunk([grad_rows, grad_row_weights], expected[:2], mine)
        torch.library.opcheck(
            operators.expert_mlp_input_grads_chunk, arguments, test_utils=CHECKS
        )  # fmt: skip
    arguments = (whole.grad_y, whole.rows, grad_z, activation, *whole.segments(0)[:3], 0.5)
    for ours, theirs in zip(
        operators.expert_mlp_weight_grads(*arguments), expected[2:], strict=True
    ):
        assert_same(ours, theirs)
    torch.library.opcheck(operators.expert_mlp_weight_grads, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("slots_per_pass", [0, 4])
@CASES
def test_backward_of_all_chunks_at_once_is_that_of_all_rows(num_chunks, dtype, slots_per_pass):
    whole = Whole(num_chunks, dtype)
    z = torch.empty(0, 2 * WIDTH, dtype=dtype)
    inputs = (whole.grad_y, whole.rows, whole.row_weights, z)
    expected = operators.expert_mlp_backward(
        *inputs, *[whole.expert_offsets] * 2, *whole.experts, 0.5, slots_per_pass
    )
    grad_rows, grad_row_weights = whole.empty(HIDDEN), whole.empty(dtype=torch.float32)
    arguments = (
        *inputs, *whole.segments(0)[:3], *whole.experts, 0.5, slots_per_pass,
        grad_rows, grad_row_weights,
    )  # fmt: skip
    grad_gate_up, grad_down = operators.expert_mlp_backward_chunks(*arguments)
    owned = torch.arange(whole.rows.size(0)) < whole.offsets[-1]
    check_rows_of_chunk([grad_rows, grad_row_weights], expected[:2], owned)
    assert torch.equal(grad_gate_up, expected[2]) and torch.equal(grad_down, expected[3])
    torch.library.opcheck(operators.expert_mlp_backward_chunks, arguments, test_utils=CHECKS)


def forward_with(change: dict) -> None:
    whole = Whole(2, torch.float32)
    arguments = {
        "rows": whole.rows, "row_weights": whole.row_weights, "segment_offsets": whole.offsets,
        "host_offsets": whole.offsets, "num_chunks": 2, "chunk": 0, "gate_up": whole.experts[0],
        "down": whole.experts[1], "slots_per_pass": 0, "y": whole.empty(HIDDEN), "z": None,
        **change,
    }  # fmt: skip
    operators.expert_mlp_forward_chunk(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 2}, "chunk must be one of the 2 chunks, from 0 on, got 2"),
        ({"num_chunks": 4}, r"expert_offsets must be .* \[local experts \* num_chunks \+ 1\]"),
        ({"num_chunks": 0}, "chunk must be one of the 0 chunks"),
        ({"y": torch.zeros(20, HIDDEN).t()}, "y is written and must be contiguous Float"),
        ({"z": torch.zeros(20, 5)}, "z is written and must be contiguous Float"),
    ],
    ids=str,
)
def test_what_does_not_fit_a_chunk_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        forward_with(change)


def test_rows_or_z_and_the_products_of_one_width_are_asked_for():
    whole = Whole(2, torch.float32)
    targets = (whole.empty(HIDDEN), whole.empty(), whole.empty(2 * WIDTH), whole.empty(WIDTH))
    with pytest.raises(ValueError, match="rows or z must be given, and not both, got none"):
        operators.expert_mlp_input_grads_chunk(
            whole.grad_y, None, whole.row_weights, None, *whole.segments(0), *whole.experts,
            *targets,
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"grad_z must be .*, 48\], got"):
        operators.expert_mlp_weight_grads(
            whole.grad_y, whole.rows, whole.empty(40), whole.empty(WIDTH),
            *whole.segments(0)[:3], 1.0,
        )  # fmt: skip
