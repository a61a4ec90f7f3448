"""Plan: where each copy of a token goes."""

from typing import NamedTuple, cast

import torch

from torch_moe_ep.ops.one_device import check_one_device

_PlanTensors = tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]

CUDA_ROW_ALIGNMENT = 128  # rows of a tile of the hand-written expert GEMMs


class DispatchPlan(NamedTuple):
    """Where each copy goes; tensors and numbers only.

    Copy n = t * K + k is token t on its way to its k-th expert. Inside an expert's segment rows are
    ordered by source rank, then by copy.

    Attributes:
        slot_of_copy: int64 ``[N]``. P = 1: the copy's slot. P > 1: its row in the send buffer, in
            expert order without padding. -1 for an expert id out of range (CUDA).
        slot_of_received: int64; the slot of each received row, rank-major. P = 1: ``[0]``.
        expert_offsets: int64 ``[L + 1]``, first slot of each local expert.
        counts: int64 ``[P, E]``, copies that each rank sends to each expert.
        host_counts: the same on the CPU; ``[0, E]`` where the host need not know (P = 1).
        top_k: K.
        row_alignment: each expert's segment is padded to a multiple of this many rows.
        group_name: the EP process group; "" for P = 1.

    Example: 3 tokens, ids [[1, 0], [1, 2], [0, 1]], E = 3, P = 1, no padding: expert 0 gets the
    copies 1 and 4, expert 1 gets 0, 2 and 5, expert 2 gets 3, so expert_offsets is [0, 2, 5, 6]
    and slot_of_copy [2, 0, 3, 5, 1, 4].
    """

    slot_of_copy: torch.Tensor
    slot_of_received: torch.Tensor
    expert_offsets: torch.Tensor
    counts: torch.Tensor
    host_counts: torch.Tensor
    top_k: int
    row_alignment: int
    group_name: str

    def host_offsets(self) -> torch.Tensor:
        """`expert_offsets` on the CPU, or ``[0]`` where the host does not know them. No sync."""
        if self.expert_offsets.device.type == "cpu":
            return self.expert_offsets
        offsets: torch.Tensor = torch.ops.torch_moe_ep.plan_host_offsets(
            self.host_counts, self.row_alignment, self.group_name
        )
        return offsets


class SendBuffer(NamedTuple):
    """What `plan_and_pack` packed for `dispatch` of the same tokens; read once.

    Attributes:
        rows: ``[N, H]``, copies in the order in which they are sent; ``[0, 0]`` for P = 1.
        weights: fp32 ``[N]``, their router weights; ``[0]`` for P = 1.
    """

    rows: torch.Tensor
    weights: torch.Tensor


def plan(
    expert_ids: torch.Tensor,
    num_experts: int,
    *,
    group_name: str = "",
    row_alignment: int | None = None,
    max_rows: int = 0,
    invalid_flag: torch.Tensor | None = None,
) -> DispatchPlan:
    """Compute where each copy goes.

    Args:
        expert_ids: int64 ``[T, K]``, ids in [0, E), any strides.
        num_experts: E; a multiple of the group's P ranks, at most 512 on CUDA.
        group_name: name of the EP process group (``group.group_name``); "" for P = 1.
        row_alignment: each expert's segment is padded to a multiple of this many rows; None takes
            1 on the CPU and 128 on CUDA, where only multiples of 128 are accepted.
        max_rows: slots that any rank may need, 0 for no bound.
        invalid_flag: int32 ``[1]`` on the device of the ids; CUDA sets it to 1 when an id is out of
            range (the copy then contributes zero). None: a fresh one that nobody reads.

    Returns:
        The plan for `dispatch`, `expert_mlp` and `combine`.

    Raises:
        ValueError: a shape or dtype that does not fit; on every rank of the group: ids out of range
            (on the CPU, or with ``TORCH_MOE_EP_CHECK=1``), or more slots than `max_rows`.
        RuntimeError: a collective failed; the message names the ranks that did not take part.

    P > 1: collective over the group (one all-gather of E numbers), one host sync on CUDA. P = 1: no
    collective, no host sync. Deterministic; not differentiable.
    """
    return _plan(
        expert_ids, num_experts, group_name, row_alignment, max_rows, invalid_flag, None, None
    )[0]


def plan_and_pack(
    x: torch.Tensor,
    weights: torch.Tensor | None,
    expert_ids: torch.Tensor,
    num_experts: int,
    *,
    group_name: str = "",
    row_alignment: int | None = None,
    max_rows: int = 0,
    invalid_flag: torch.Tensor | None = None,
) -> tuple[DispatchPlan, SendBuffer]:
    """`plan`, and while its counts travel pack the rows that `dispatch` will send.

    Args:
        x: hidden states ``[T, H]`` as `dispatch` gets them; under autocast already in its dtype.
        weights: router weights fp32 ``[T, K]`` as `dispatch` gets them, or None.
        expert_ids: as for `plan`, and so the others.
        num_experts: E.
        group_name: name of the EP process group; "" for P = 1.
        row_alignment: rows that a segment is padded to a multiple of.
        max_rows: slots that any rank may need, 0 for no bound.
        invalid_flag: int32 ``[1]``, set where an id is out of range (CUDA).

    Returns:
        The plan, and the send buffer; an empty one for P = 1.

    Errors, collectives and host syncs are those of `plan`, and what `dispatch` says of x.
    """
    given = None if weights is None else weights.detach()
    return _plan(
        expert_ids,
        num_experts,
        group_name,
        row_alignment,
        max_rows,
        invalid_flag,
        x.detach(),
        given,
    )


def _plan(
    expert_ids: torch.Tensor,
    num_experts: int,
    group_name: str,
    row_alignment: int | None,
    max_rows: int,
    invalid_flag: torch.Tensor | None,
    x: torch.Tensor | None,
    weights: torch.Tensor | None,
) -> tuple[DispatchPlan, SendBuffer]:
    row_alignment = row_alignment_on(expert_ids.device, row_alignment)
    invalid_flag = flag_on(expert_ids.device, invalid_flag)
    tensors: _PlanTensors = torch.ops.torch_moe_ep.plan(
        expert_ids, num_experts, row_alignment, max_rows, group_name, invalid_flag, x, weights
    )
    found = DispatchPlan(*tensors[:5], expert_ids.size(1), row_alignment, group_name)
    return found, SendBuffer(*tensors[5:])


@torch.library.register_fake("torch_moe_ep::plan")
def _plan_fake(
    expert_ids: torch.Tensor,
    num_experts: int,
    row_alignment: int,
    max_rows: int,
    group_name: str,
    invalid_flag: torch.Tensor,
    x: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> _PlanTensors:
    check_one_device(expert_ids=expert_ids, x=x, weights=weights)
    num_ranks = _group_size(group_name)
    num_received = 0 if not group_name else torch.library.get_ctx().new_dynamic_size()
    num_host_rows = num_ranks if group_name else 0
    num_packed = expert_ids.numel() if group_name and x is not None else 0
    like = expert_ids if x is None else x
    return (
        expert_ids.new_empty(expert_ids.numel()),
        expert_ids.new_empty(num_received),
        expert_ids.new_empty(num_experts // num_ranks + 1),
        expert_ids.new_empty((num_ranks, num_experts)),
        expert_ids.new_empty((num_host_rows, num_experts), device="cpu"),
        like.new_empty(
            (num_packed, like.size(1) if num_packed else 0),
            dtype=like.dtype if num_packed else torch.float32,
        ),
        like.new_empty(0 if weights is None else num_packed, dtype=torch.float32),
    )


@torch.library.register_fake("torch_moe_ep::plan_host_offsets")
def _plan_host_offsets_fake(
    host_counts: torch.Tensor, row_alignment: int, group_name: str
) -> torch.Tensor:
    num_ranks, num_experts = host_counts.shape
    return host_counts.new_empty(num_experts // num_ranks + 1 if num_ranks else 0)


def num_slots_fake(counts: torch.Tensor, num_copies: int, row_alignment: int, group: str) -> int:
    """R as fake kernels see it: the bound for P = 1, else known at run time alone."""
    if group:
        return cast("int", torch.library.get_ctx().new_dynamic_size())
    num_experts = counts.size(1)
    return (num_copies + num_experts * (row_alignment - 1)) // row_alignment * row_alignment


def row_alignment_on(device: torch.device, given: int | None) -> int:
    """Rows that a segment is padded to a multiple of: the caller's number, or the device's own."""
    if given is not None:
        return given
    return 1 if device.type == "cpu" else CUDA_ROW_ALIGNMENT


def flag_on(
    device: torch.device, given: torch.Tensor | None, dtype: torch.dtype = torch.int32
) -> torch.Tensor:
    """The caller's flag, or a fresh one that nobody reads."""
    return torch.zeros(1, dtype=dtype, device=device) if given is None else given


def _group_size(group_name: str) -> int:
    if not group_name:
        return 1
    from torch.distributed.distributed_c10d import _resolve_process_group

    size: int = _resolve_process_group(group_name).size()  # type: ignore[arg-type]
    return size
