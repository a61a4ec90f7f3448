"""The operators plan and dispatch: copies to their slots, exactly."""

import pytest
import torch
from operator_cases import CASES, DTYPES, Case, occupied_rows, strided

from torch_moe_ep import ops, reference


def slots_by_hand(case: Case) -> tuple[list[int], list[int]]:
    """Slot of every copy and the expert offsets, by the sentence of the contract."""
    ids = case.expert_ids().flatten().tolist()
    offsets, slot_of_copy = [0], [0] * len(ids)
    for expert in range(case.num_experts):
        copies = [n for n, expert_id in enumerate(ids) if expert_id == expert]
        for place, copy in enumerate(copies):
            slot_of_copy[copy] = offsets[-1] + place
        length = -(-len(copies) // case.row_alignment) * case.row_alignment
        offsets.append(offsets[-1] + length)
    return slot_of_copy, offsets


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plan_places_copies_by_expert_then_ascending(case):
    plan = case.plan()
    slot_of_copy, offsets = slots_by_hand(case)
    assert plan.slot_of_copy.tolist() == slot_of_copy
    assert plan.expert_offsets.tolist() == offsets
    counts = torch.bincount(case.expert_ids().flatten(), minlength=case.num_experts)
    assert plan.counts.tolist() == [counts.tolist()]
    assert plan.slot_of_received.numel() == 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plan_equals_reference(case):
    expected = reference.plan(case.expert_ids(), case.num_experts, row_alignment=case.row_alignment)
    plan = case.plan()
    assert torch.equal(plan.slot_of_copy, expected.slot_of_copy)
    assert torch.equal(plan.expert_offsets, expected.expert_offsets)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_dispatch_moves_rows_exactly(case, dtype):
    x, weights, plan = case.tokens_of(dtype), case.weights(), case.plan()
    rows, row_weights = ops.dispatch(x, weights, plan)
    expected_rows, expected_weights = reference.dispatch(x, weights, plan)
    used = occupied_rows(plan)
    assert rows.dtype == dtype and row_weights.dtype == torch.float32
    assert torch.equal(rows[:used], expected_rows[:used])
    assert torch.equal(row_weights[:used], expected_weights[:used])
    slots = slots_by_hand(case)[0]
    for copy, slot in enumerate(slots):
        token, k = divmod(copy, case.top_k)
        assert torch.equal(rows[slot], x[token]) and row_weights[slot] == weights[token, k]
    padding = sorted(set(range(used)) - set(slots))
    assert not rows[padding].any() and not row_weights[padding].any()


def test_dispatch_without_weights_gives_no_row_weights():
    case = CASES[0]
    rows, row_weights = ops.dispatch(case.tokens_of(), None, case.plan())
    assert row_weights.shape == (0,)
    assert torch.equal(rows, ops.dispatch(case.tokens_of(), case.weights(), case.plan())[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_dispatch_gradient_is_combine_of_gradients(case, dtype):
    plan = case.plan()
    x = case.tokens_of(dtype).requires_grad_()
    weights = case.weights().requires_grad_()
    rows, row_weights = ops.dispatch(x, weights, plan)
    generator = torch.Generator().manual_seed(5)
    grad_rows = torch.randint(-3, 4, rows.shape, generator=generator).to(dtype)
    grad_weights = torch.randint(-3, 4, row_weights.shape, generator=generator).float()
    torch.autograd.backward([rows, row_weights], [grad_rows, grad_weights])
    slots = torch.tensor(slots_by_hand(case)[0], dtype=torch.int64)
    shape = (case.tokens, case.top_k)
    summed = grad_rows[slots].float().view(*shape, case.hidden).sum(dim=1).to(dtype)
    assert torch.equal(x.grad, summed)
    assert torch.equal(weights.grad, grad_weights[slots].view(shape))


def test_dispatch_takes_non_contiguous_tokens_and_weights():
    case = CASES[0]
    plan = case.plan()
    expected = ops.dispatch(case.tokens_of(), case.weights(), plan)
    for x in (strided(case.tokens_of()), case.tokens_of().t().contiguous().t()):
        actual = ops.dispatch(x, strided(case.weights()), plan)
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


def test_plan_takes_non_contiguous_ids():
    case = CASES[0]
    plan = ops.plan(case.expert_ids().t().contiguous().t(), case.num_experts)
    assert torch.equal(plan.slot_of_copy, case.plan().slot_of_copy)


def dispatch_arguments(case: Case, *, needs_grad: bool = True) -> tuple:
    plan = case.plan()
    return (
        case.tokens_of().requires_grad_(needs_grad),
        case.weights().requires_grad_(needs_grad),
        plan.slot_of_copy,
        plan.slot_of_received,
        plan.expert_offsets,
        plan.counts,
        plan.host_counts,
        plan.top_k,
        plan.row_alignment,
        plan.group_name,
    )


UNPADDED = [case for case in CASES if case.row_alignment == 1]


@pytest.mark.parametrize("case", UNPADDED, ids=str)
def test_dispatch_opcheck(case):
    torch.library.opcheck(torch.ops.torch_moe_ep.dispatch.default, dispatch_arguments(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plan_opcheck(case):
    arguments = (case.expert_ids(), case.num_experts, case.row_alignment, 0, "")
    flag = torch.zeros(1, dtype=torch.int32)
    torch.library.opcheck(torch.ops.torch_moe_ep.plan.default, (*arguments, flag))


@pytest.mark.parametrize("expert_id", [-1, 4, 2**40])
def test_plan_expert_id_out_of_range_is_refused_at_once(expert_id):
    ids = torch.tensor([[0, 1], [2, expert_id]])
    with pytest.raises((RuntimeError, ValueError, IndexError), match="expert_ids"):
        ops.plan(ids, 4)


@pytest.mark.parametrize(
    ("ids", "num_experts", "message"),
    [
        (torch.zeros(3, 2, dtype=torch.int32), 4, "expert_ids.*int64"),
        (torch.zeros(3, dtype=torch.int64), 4, "expert_ids"),
        (torch.zeros(3, 2, dtype=torch.int64), 0, "num_experts"),
    ],
    ids=["int32", "one_dimension", "no_experts"],
)
def test_plan_wrong_input_is_refused_by_name(ids, num_experts, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        ops.plan(ids, num_experts)


def test_plan_over_max_rows_names_the_rows_needed():
    case = CASES[0]
    with pytest.raises((RuntimeError, ValueError), match=str(case.tokens * case.top_k)):
        ops.plan(case.expert_ids(), case.num_experts, max_rows=case.tokens * case.top_k - 1)
    assert ops.plan(case.expert_ids(), case.num_experts, max_rows=14).slot_of_copy.numel() == 14


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(6, 16)}, "x"),
        ({"x": torch.zeros(7, 16, dtype=torch.float64)}, "x"),
        ({"x": torch.zeros(7)}, "x"),
        ({"weights": torch.zeros(7, 3)}, "weights"),
        ({"weights": torch.zeros(7, 2, dtype=torch.float16)}, "weights"),
    ],
    ids=["too_few_tokens", "float64", "one_dimension", "weights_shape", "weights_dtype"],
)
def test_dispatch_wrong_input_is_refused_by_name(change, message):
    case = CASES[0]
    given = {"x": case.tokens_of(), "weights": case.weights(), **change}
    with pytest.raises((RuntimeError, ValueError), match=message):
        ops.dispatch(given["x"], given["weights"], case.plan())


def test_meta_weights_beside_real_tokens_are_refused():
    """torch takes the fake kernel then, whose rows nobody writes."""
    case = CASES[0]
    with pytest.raises(ValueError, match="weights is on meta, but x is on cpu"):
        ops.dispatch(case.tokens_of(), case.weights().to("meta"), case.plan())
