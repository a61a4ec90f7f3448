"""plan on CUDA against the CPU version, place by place."""

from __future__ import annotations

import pytest
import torch

from torch_moe_ep import ops

from .cases import MOVEMENT_CASES, Case, expert_ids_of, poisoned_memory, requires_gpu

pytestmark = requires_gpu

ALIGNMENT = 128


def assert_plans_equal(ids: torch.Tensor, num_experts: int) -> None:
    expected = ops.plan(ids, num_experts, row_alignment=ALIGNMENT)
    plan = ops.plan(ids.cuda(), num_experts, row_alignment=ALIGNMENT)
    assert torch.equal(plan.slot_of_copy.cpu(), expected.slot_of_copy)
    assert torch.equal(plan.expert_offsets.cpu(), expected.expert_offsets)
    assert torch.equal(plan.counts.cpu(), expected.counts)
    assert plan.host_counts.shape == (0, num_experts)


@pytest.mark.parametrize("case", MOVEMENT_CASES, ids=str)
def test_plan_equals_cpu(case: Case) -> None:
    with poisoned_memory():
        assert_plans_equal(expert_ids_of(case), case.num_experts)


@pytest.mark.parametrize("num_experts", [1, 8, 100, 512])
def test_plan_many_copies_equals_cpu(num_experts: int) -> None:
    generator = torch.Generator().manual_seed(num_experts)
    ids = torch.randint(0, num_experts, (700_001, 2), generator=generator)
    assert_plans_equal(ids, num_experts)


def test_plan_invalid_ids_raise_the_flag_and_drop_the_copies() -> None:
    ids = expert_ids_of(Case(1000, 8, 2, 8))
    ids[3, 1], ids[500, 0], ids[999, 1] = -1, 8, 1 << 40
    flag = torch.zeros(1, dtype=torch.int32, device="cuda")
    plan = ops.plan(ids.cuda(), 8, invalid_flag=flag)
    assert flag.item() == 1
    slots, flat = plan.slot_of_copy.cpu(), ids.reshape(-1)
    is_valid = (flat >= 0) & (flat < 8)
    assert (slots[~is_valid] == -1).all()
    assert torch.equal(plan.counts.cpu()[0], torch.bincount(flat[is_valid], minlength=8))
    for expert in range(8):
        first = plan.expert_offsets[expert].item()
        mine = slots[flat == expert]
        assert torch.equal(mine, first + torch.arange(mine.numel()))


def test_plan_valid_ids_leave_the_flag() -> None:
    flag = torch.zeros(1, dtype=torch.int32, device="cuda")
    ops.plan(expert_ids_of(Case(100, 8, 2, 8)).cuda(), 8, invalid_flag=flag)
    assert flag.item() == 0


def test_plan_twice_is_bit_equal() -> None:
    """Trap 21."""
    ids = expert_ids_of(Case(20_000, 64, 8, 8, "skewed")).cuda()
    first, second = ops.plan(ids, 64), ops.plan(ids, 64)
    assert torch.equal(first.slot_of_copy, second.slot_of_copy)
    assert torch.equal(first.expert_offsets, second.expert_offsets)


def test_plan_too_many_rows_are_refused() -> None:
    ids = expert_ids_of(Case(1000, 8, 2, 8)).cuda()
    with pytest.raises((ValueError, RuntimeError), match="max_rows"):
        ops.plan(ids, 8, max_rows=1500)


def test_plan_unaligned_rows_are_refused() -> None:
    ids = expert_ids_of(Case(10, 8, 2, 8)).cuda()
    with pytest.raises(ValueError, match="row_alignment must be a multiple of 128 on CUDA"):
        ops.plan(ids, 8, row_alignment=1)


def test_plan_too_many_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 512"):
        ops.plan(torch.zeros(4, 2, dtype=torch.long, device="cuda"), 513)
