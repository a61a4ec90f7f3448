"""dispatch and combine on one GPU, bit for bit against the CPU versions."""

from __future__ import annotations

import pytest
import torch

from torch_moe_ep import ops

from .cases import (
    MOVEMENT_CASES,
    Case,
    expert_ids_of,
    integers,
    normal,
    poisoned_memory,
    requires_gpu,
)

pytestmark = requires_gpu

ALIGNMENT = 128


@pytest.mark.parametrize("case", MOVEMENT_CASES, ids=str)
def test_dispatch_equals_cpu_with_written_padding(case: Case) -> None:
    ids = expert_ids_of(case)
    x = integers(case.num_tokens, case.hidden, dtype=case.dtype, seed=1)
    weights = normal(case.num_tokens, case.top_k, seed=2)
    cpu_plan = ops.plan(ids, case.num_experts, row_alignment=ALIGNMENT)
    expected_rows, expected_weights = ops.dispatch(x, weights, cpu_plan)
    with poisoned_memory():
        plan = ops.plan(ids.cuda(), case.num_experts)
        rows, row_weights = ops.dispatch(x.cuda(), weights.cuda(), plan)
    used = int(cpu_plan.expert_offsets[-1])
    assert torch.equal(rows[:used].cpu(), expected_rows[:used])
    assert torch.equal(row_weights[:used].cpu(), expected_weights[:used])


@pytest.mark.parametrize("case", MOVEMENT_CASES, ids=str)
def test_combine_equals_cpu_with_nan_in_rows_nobody_owns(case: Case) -> None:
    ids = expert_ids_of(case)
    cpu_plan = ops.plan(ids, case.num_experts, row_alignment=ALIGNMENT)
    plan = ops.plan(ids.cuda(), case.num_experts)
    num_rows = ops.dispatch(torch.zeros(case.num_tokens, 1, device="cuda"), None, plan)[0].size(0)
    rows = normal(num_rows, case.hidden, dtype=case.dtype, seed=3)
    is_owned = torch.zeros(num_rows, dtype=torch.bool)
    is_owned[cpu_plan.slot_of_copy] = True
    rows[~is_owned] = float("nan")
    expected = ops.combine(rows, cpu_plan)
    assert expected.isfinite().all()
    assert torch.equal(ops.combine(rows.cuda(), plan).cpu(), expected)


@pytest.mark.parametrize("case", MOVEMENT_CASES, ids=str)
def test_movement_gradients_equal_cpu(case: Case) -> None:
    ids = expert_ids_of(case)

    def gradients(device: str) -> list[torch.Tensor]:
        x = integers(case.num_tokens, case.hidden, dtype=case.dtype, seed=1).to(device)
        weights = normal(case.num_tokens, case.top_k, seed=2).to(device)
        x.requires_grad_()
        weights.requires_grad_()
        plan = ops.plan(ids.to(device), case.num_experts, row_alignment=ALIGNMENT)
        rows, row_weights = ops.dispatch(x, weights, plan)
        used = int(plan.expert_offsets[-1])
        doubled = torch.nn.functional.pad(rows[:used] * 2, (0, 0, 0, len(rows) - used))
        y = ops.combine(doubled, plan)
        grad_y = integers(*y.shape, dtype=case.dtype, seed=5).to(device)
        grad_row_weights = torch.full_like(row_weights, float("nan"))
        grad_row_weights[:used] = torch.arange(used, device=device, dtype=torch.float32)
        torch.autograd.backward([y, row_weights], [grad_y, grad_row_weights])
        assert x.grad is not None and weights.grad is not None
        return [y.detach().cpu(), x.grad.cpu(), weights.grad.cpu()]

    for ours, expected in zip(gradients("cuda"), gradients("cpu"), strict=True):
        assert torch.equal(ours, expected)


def test_movement_invalid_ids_contribute_zero() -> None:
    ids = expert_ids_of(Case(50, 4, 2, 8)).cuda()
    ids[7] = -1
    ids[9, 1] = 99
    flag = torch.zeros(1, dtype=torch.int32, device="cuda")
    x = integers(50, 16, dtype=torch.float32, seed=1).cuda()
    with poisoned_memory():
        plan = ops.plan(ids, 4, invalid_flag=flag)
        y = ops.combine(ops.dispatch(x, None, plan)[0], plan)
    factor = torch.full((50, 1), 2.0, device="cuda")
    factor[7], factor[9] = 0, 1
    assert torch.equal(y, x * factor)


def test_movement_one_rank_never_syncs_the_host() -> None:
    ids = expert_ids_of(Case(512, 8, 2, 64)).cuda()
    x = integers(512, 64, dtype=torch.bfloat16, seed=1).cuda().requires_grad_()
    weights = normal(512, 2, seed=2).cuda().requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan = ops.plan(ids, 8)
        rows, _ = ops.dispatch(x, weights, plan)
        ops.combine(rows, plan).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_movement_unaligned_storage_equals_aligned() -> None:
    ids = expert_ids_of(Case(100, 8, 2, 64)).cuda()
    plan = ops.plan(ids, 8)
    x = normal(100 * 64 + 1, dtype=torch.bfloat16, seed=1).cuda()[1:].view(100, 64)
    rows, _ = ops.dispatch(x, None, plan)
    expected, _ = ops.dispatch(x.clone(), None, plan)
    used = int(plan.expert_offsets[-1])
    assert torch.equal(rows[:used], expected[:used])


def test_movement_beyond_2_31_elements_is_exact() -> None:
    """Trap 15: rows and outputs of more than 2^31 elements each."""
    hidden, top_k, num_experts = 4096, 1, 8
    num_tokens = (1 << 31) // hidden + 1000
    generator = torch.Generator(device="cuda").manual_seed(0)
    ids = torch.randint(0, num_experts, (num_tokens, top_k), generator=generator, device="cuda")
    x = torch.empty(num_tokens, hidden, dtype=torch.bfloat16, device="cuda")
    x.random_(-128, 128, generator=generator)
    plan = ops.plan(ids, num_experts)
    rows, _ = ops.dispatch(x, None, plan)
    for first in range(0, num_tokens, 1 << 17):
        slots = plan.slot_of_copy[first : first + (1 << 17)]
        assert torch.equal(rows[slots], x[first : first + (1 << 17)])
    y = ops.combine(rows, plan)
    assert torch.equal(y, x)
    # Two copies a token: the sum, not the copy, passes 2^31.
    twice = ops.plan(ids.expand(-1, 2).contiguous(), num_experts)
    del rows, y
    rows, _ = ops.dispatch(x, None, twice)
    assert torch.equal(ops.combine(rows, twice), x * 2)


def test_movement_opcheck() -> None:
    ids = expert_ids_of(Case(20, 4, 2, 8)).cuda()
    plan = ops.plan(ids, 4)
    x = normal(20, 8, seed=1).cuda().requires_grad_()
    weights = normal(20, 2, seed=2).cuda().requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    flag = torch.zeros(1, dtype=torch.int32, device="cuda")
    namespace = torch.ops.torch_moe_ep
    torch.library.opcheck(namespace.plan.default, (ids, 4, 128, 0, "", flag), test_utils=tests)
    torch.library.opcheck(namespace.dispatch.default, (x, weights, *plan), test_utils=tests)
    rows, _ = ops.dispatch(x, weights, plan)
    rows = rows.detach().requires_grad_()
    torch.library.opcheck(namespace.combine.default, (rows, None, *plan), test_utils=tests)
