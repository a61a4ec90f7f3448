"""Dispatch between GPUs that map each other's memory: rows go straight into their slots."""

from typing import NamedTuple

import torch

from torch_moe_ep.ops.one_device import check_one_device
from torch_moe_ep.ops.plan import CUDA_ROW_ALIGNMENT, _group_size, flag_on

_PeerPlanTensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

NUM_SMS = 16  # multiprocessors that move rows


class PeerPlan(NamedTuple):
    """Where each copy goes on its owner; tensors and numbers only.

    Attributes:
        slot_of_copy: int64 ``[N]``, ``owner * 2**40 + slot``: the rank of the group that owns the
            copy's expert, and the row there. -1 for an expert id out of range, and for a row
            beyond the capacity.
        expert_offsets: int64 ``[L + 1]``, first slot of each local expert, at most the capacity.
        counts: int64 ``[P, E]``, copies that each rank sends to each expert.
        host_counts: the same on the CPU; ``[0, E]`` with a capacity, where the host need not know.
        top_k: K.
        row_alignment: each expert's segment is padded to a multiple of this many rows.
        capacity: rows of every rank; 0: as many as the counts ask for.
        num_sms: multiprocessors that move rows.
        group_name: the EP process group.

    Example: 2 ranks of one expert, rank 1 has one token with the ids [1, 0], rank 0 sends 3 copies
    to expert 0 and none to expert 1: slot_of_copy on rank 1 is [2**40, 3].
    """

    slot_of_copy: torch.Tensor
    expert_offsets: torch.Tensor
    counts: torch.Tensor
    host_counts: torch.Tensor
    top_k: int
    row_alignment: int
    capacity: int
    num_sms: int
    group_name: str

    def host_offsets(self) -> torch.Tensor:
        """`expert_offsets` on the CPU, or ``[0]`` where the host does not know them. No sync."""
        offsets: torch.Tensor = torch.ops.torch_moe_ep.plan_host_offsets(
            self.host_counts, self.row_alignment, self.group_name
        )
        return offsets


def peer_plan(
    expert_ids: torch.Tensor,
    num_experts: int,
    *,
    group_name: str,
    capacity: int = 0,
    row_alignment: int = CUDA_ROW_ALIGNMENT,
    max_rows: int = 0,
    num_sms: int = NUM_SMS,
    invalid_flag: torch.Tensor | None = None,
    slots_needed: torch.Tensor | None = None,
) -> PeerPlan:
    """Compute where each copy goes on its owner; the slots are those of `plan`.

    Args:
        expert_ids: int64 ``[T, K]`` on CUDA, ids in [0, E), any strides.
        num_experts: E; a multiple of the group's P ranks (at most 64), at most 512.
        group_name: name of the EP process group, whose GPUs can map each other's memory.
        capacity: rows of every rank, the same on all of them, a multiple of `row_alignment`; 0:
            what the counts ask for.
        row_alignment: a multiple of 128; each expert's segment is padded to a multiple of it.
        max_rows: slots that any rank may need, 0 for no bound; with `capacity` 0 alone.
        num_sms: multiprocessors that dispatch and combine take for moving rows.
        invalid_flag: as in `plan`.
        slots_needed: int64 ``[1]`` on the device; grows to the rows that the rank with most would
            have needed where that is more than `capacity`. None: a fresh one that nobody reads.

    Returns:
        The plan for `peer_dispatch`, `expert_mlp` and `peer_combine`.

    Raises:
        ValueError: as `plan`, and a `capacity` that is no multiple.
        RuntimeError: a rank of the group did not come; the message names it.

    Collective over the group; the group's first call maps memory and waits on the host. After
    that: with a capacity no host sync, and a CUDA graph can hold it; without one the host waits
    for a counter that the device writes to its memory. Deterministic; not differentiable.
    """
    tensors: _PeerPlanTensors = torch.ops.torch_moe_ep.peer_plan(
        expert_ids,
        num_experts,
        row_alignment,
        max_rows,
        capacity,
        group_name,
        flag_on(expert_ids.device, invalid_flag),
        flag_on(expert_ids.device, slots_needed, torch.int64),
    )
    return PeerPlan(*tensors, expert_ids.size(1), row_alignment, capacity, num_sms, group_name)


def peer_dispatch(
    x: torch.Tensor, weights: torch.Tensor | None, plan: PeerPlan, *, keep: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write each token into its slots on the ranks that own its experts.

    Args:
        x: hidden states ``[T, H]``, float32, bfloat16 or float16, any strides.
        weights: router weights fp32 ``[T, K]``, any strides, or None.
        plan: the plan of these tokens; K is at most 32.
        keep: rows get memory of their own, by one copy of as many as came. False: they lie in the
            group's buffer, which the next `peer_dispatch` or `peer_combine` of any layer
            overwrites.

    Returns:
        rows ``[R, H]`` and row_weights fp32 ``[R]`` (``[0]`` without weights), the bits that
        `dispatch` returns. With a capacity R is the capacity, and rows behind the last segment
        belong to nobody.

    Raises:
        ValueError: a shape, dtype or device that does not fit the plan.
        RuntimeError: a rank of the group did not come; the message names it.

    Collective over the group, in backward as well; no host sync, but where the group's buffer
    grows. Deterministic. Differentiable in `x` and `weights`; its backward is `peer_combine`.
    Under autocast rows travel in the autocast dtype.
    """
    result: tuple[torch.Tensor, torch.Tensor] = torch.ops.torch_moe_ep.peer_dispatch(
        x, weights, *plan, keep
    )
    return result


@torch.library.register_fake("torch_moe_ep::peer_plan")
def _peer_plan_fake(
    expert_ids: torch.Tensor,
    num_experts: int,
    row_alignment: int,
    max_rows: int,
    capacity: int,
    group_name: str,
    invalid_flag: torch.Tensor,
    slots_needed: torch.Tensor,
) -> _PeerPlanTensors:
    num_ranks = _group_size(group_name)
    return (
        expert_ids.new_empty(expert_ids.numel()),
        expert_ids.new_empty(num_experts // num_ranks + 1),
        expert_ids.new_empty((num_ranks, num_experts)),
        expert_ids.new_empty((0 if capacity else num_ranks, num_experts), device="cpu"),
    )


@torch.library.register_fake("torch_moe_ep::peer_dispatch")
def _peer_dispatch_fake(
    x: torch.Tensor,
    weights: torch.Tensor | None,
    slot_of_copy: torch.Tensor,
    expert_offsets: torch.Tensor,
    counts: torch.Tensor,
    host_counts: torch.Tensor,
    top_k: int,
    row_alignment: int,
    capacity: int,
    num_sms: int,
    group_name: str,
    keep: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_one_device(x=x, weights=weights, slot_of_copy=slot_of_copy)
    num_slots = capacity or torch.library.get_ctx().new_dynamic_size()
    num_weights = 0 if weights is None else num_slots
    return x.new_empty((num_slots, x.size(1))), x.new_empty(num_weights, dtype=torch.float32)
