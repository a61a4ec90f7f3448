"""The operator combine: results back to their tokens, summed over K."""

import pytest
import torch
from gpu.cases import poisoned_memory
from operator_cases import CASES, DTYPES, Case, strided

from torch_moe_ep import ops, reference
from torch_moe_ep.testing import relative_error


def rows_of(case: Case, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """An expert-ordered buffer of small integers [R, H]."""
    num_rows = ops.dispatch(case.tokens_of(), None, case.plan())[0].shape[0]
    generator = torch.Generator().manual_seed(9)
    return torch.randint(-4, 5, (num_rows, case.hidden), generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_combine_sums_copies_exactly(case, dtype):
    plan, rows = case.plan(), rows_of(case, dtype)
    x = ops.combine(rows, plan)
    assert x.dtype == dtype and x.shape == (case.tokens, case.hidden)
    by_hand = rows[plan.slot_of_copy].float().view(case.tokens, case.top_k, case.hidden).sum(1)
    assert torch.equal(x, by_hand.to(dtype))
    assert torch.equal(x, reference.combine(rows, plan))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_combine_accumulates_in_float32_and_rounds_once(dtype):
    case = Case("k_equals_e", tokens=50, top_k=4)
    plan = case.plan()
    rows = torch.randn(200, case.hidden, generator=torch.Generator().manual_seed(2)).to(dtype)
    parts = rows[plan.slot_of_copy].float().view(50, 4, case.hidden)
    total = parts[:, 0]
    for k in range(1, 4):
        total = total + parts[:, k]
    assert torch.equal(ops.combine(rows, plan), total.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_combine_gradient_is_dispatch_of_gradients(case, dtype):
    plan = case.plan()
    rows = rows_of(case, dtype).requires_grad_()
    x = ops.combine(rows, plan)
    upstream = case.tokens_of(dtype)
    x.backward(upstream)
    used = int(plan.expert_offsets[-1])
    assert torch.equal(rows.grad[:used], ops.dispatch(upstream, None, plan)[0][:used])


def test_combine_after_dispatch_multiplies_by_top_k():
    case = Case("k3", top_k=3)
    x = case.tokens_of()
    assert torch.equal(ops.combine(ops.dispatch(x, None, case.plan())[0], case.plan()), 3 * x)


def test_combine_takes_non_contiguous_rows():
    case = CASES[0]
    rows = rows_of(case)
    expected = ops.combine(rows, case.plan())
    assert torch.equal(ops.combine(strided(rows), case.plan()), expected)
    assert torch.equal(ops.combine(rows.t().contiguous().t(), case.plan()), expected)


def test_combine_nan_row_reaches_its_token_only():
    case = CASES[0]
    plan, rows = case.plan(), rows_of(case)
    rows[int(plan.slot_of_copy[4])] = float("nan")  # copy 4 is token 2, k 0
    x = ops.combine(rows, plan)
    assert x[2].isnan().all()
    assert relative_error(x[[0, 1, 3, 4, 5, 6]], x[[0, 1, 3, 4, 5, 6]].nan_to_num()) == 0


@pytest.mark.parametrize("case", [c for c in CASES if c.row_alignment == 1], ids=str)
def test_combine_opcheck(case):
    plan = case.plan()
    arguments = (
        rows_of(case).requires_grad_(),
        None,
        plan.slot_of_copy,
        plan.slot_of_received,
        plan.expert_offsets,
        plan.counts,
        plan.host_counts,
        plan.top_k,
        plan.row_alignment,
        plan.group_name,
    )
    torch.library.opcheck(torch.ops.torch_moe_ep.combine.default, arguments)


@pytest.mark.parametrize(
    "rows",
    [torch.zeros(13, 16), torch.zeros(14), torch.zeros(14, 16, dtype=torch.float64)],
    ids=["too_few_rows", "one_dimension", "float64"],
)
def test_combine_wrong_rows_are_refused_by_name(rows):
    with pytest.raises((RuntimeError, ValueError), match="rows"):
        ops.combine(rows, CASES[0].plan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_combine_backward_under_autocast_casts_nothing(dtype):
    case = CASES[0]
    rows = rows_of(case).requires_grad_()
    upstream = torch.randn(case.tokens, case.hidden)
    (expected,) = torch.autograd.grad(ops.combine(rows, case.plan()), rows, upstream)
    x = ops.combine(rows, case.plan())
    with torch.autocast("cpu", dtype=dtype):
        (grad,) = torch.autograd.grad(x, rows, upstream)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize(
    ("counter", "message"),
    [
        (torch.zeros(4), r"tokens_per_expert must be int64, got Float \(call .long\(\)\)"),
        (torch.zeros(5, dtype=torch.int64), r"must be \[4\].*, got shape \[5\]"),
        (torch.zeros(3, 4, dtype=torch.int64), r"must be \[4\].*, got shape \[3, 4\]"),
        (torch.zeros(4, dtype=torch.int64, device="meta"), "is on meta, but the plan is on cpu"),
    ],
    ids=["dtype", "length", "dimensions", "device"],
)
def test_combine_counter_that_does_not_fit_is_refused_in_forward(counter, message):
    with pytest.raises(ValueError, match=message):
        ops.combine(rows_of(CASES[0]), CASES[0].plan(), tokens_per_expert=counter)


def test_combine_row_and_plan_on_other_devices_are_refused():
    with pytest.raises(ValueError, match="slot_of_copy is on cpu, but rows is on meta"):
        ops.combine(rows_of(CASES[0]).to("meta"), CASES[0].plan())


def test_gradients_of_rows_of_nobody_are_no_anomaly():
    """Rows behind the last segment hold anything, a NaN too."""
    case = Case("padded", tokens=9, row_alignment=8)
    leaves = [case.tokens_of(), case.weights(), *case.expert_weights(torch.float32)]
    x, weights, gate_up, down = (leaf.requires_grad_() for leaf in leaves)
    plan = case.plan()
    rows, row_weights = ops.dispatch(x, weights, plan)
    assert rows.shape[0] > plan.expert_offsets[-1]
    with torch.autograd.set_detect_anomaly(True):
        y = ops.combine(ops.expert_mlp(rows, row_weights, plan, gate_up, down), plan)
        with poisoned_memory():
            y.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in (x, weights, gate_up, down))
