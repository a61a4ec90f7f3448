"""plan_chunks: where each copy goes when a rank's tokens travel in chunks."""

from typing import NamedTuple

import torch

from torch_moe_ep.ops.one_device import check_one_device
from torch_moe_ep.ops.plan import SendBuffer, _group_size, flag_on, row_alignment_on

_ChunkPlanTensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class ChunkPlan(NamedTuple):
    """Where each copy goes, chunk by chunk; tensors and numbers only.

    Chunk c of C holds the tokens from ``c * T // C`` on, on each rank of its own T tokens.

    Attributes:
        slot_of_copy: int64 ``[N]``, the copy's row in the send buffer, which holds chunk after
            chunk, each in expert order and beginning at K times its first token; -1 for an expert
            id out of range (CUDA).
            Over peers ``owner * 2**40 + slot``: the rank that owns the copy's expert, and the row
            there; -1 for a row beyond the capacity as well.
        counts: int64 ``[C, P, E]``, copies of each chunk that each rank sends to each expert.
        host_counts: the same on the CPU; ``[0, P, E]`` with a capacity, where the host need not
            know.
        top_k: K.
        row_alignment: each expert's segment is padded to a multiple of this many rows, in a chunk
            and in the whole.
        group_name: the EP process group.
        segment_offsets: int64 ``[L C + 1]``, first slot of each (local expert, chunk), over peers;
            else None.
        capacity: over peers, rows of every rank; 0: as many as the counts ask for.
        num_sms: over peers, multiprocessors that move rows.
    """

    slot_of_copy: torch.Tensor
    counts: torch.Tensor
    host_counts: torch.Tensor
    top_k: int
    row_alignment: int
    group_name: str
    segment_offsets: torch.Tensor | None = None
    capacity: int = 0
    num_sms: int = 0


def plan_chunks(
    x: torch.Tensor,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    num_experts: int,
    num_chunks: int,
    *,
    group_name: str,
    row_alignment: int | None = None,
    max_rows: int = 0,
    invalid_flag: torch.Tensor | None = None,
) -> tuple[ChunkPlan, SendBuffer]:
    """Compute where each copy goes, and pack the rows to send while the counts travel.

    Args:
        x: hidden states ``[T, H]`` as `chunked_experts` gets them.
        weights: router weights fp32 ``[T, K]``.
        expert_ids: int64 ``[T, K]``, ids in [0, E), any strides.
        num_experts: E; a multiple of the group's P ranks, at most 512 on CUDA.
        num_chunks: C, at least 1, the same on every rank; chunks may be empty.
        group_name: name of the EP process group, of two ranks or more.
        row_alignment: None takes 1 on the CPU and 128 on CUDA.
        max_rows: slots that any rank may need for all chunks together, 0 for no bound.
        invalid_flag: int32 ``[1]``, set where an id is out of range (CUDA).

    Returns:
        The plan and the send buffer for `chunked_experts`.

    Raises:
        ValueError: a shape or dtype that does not fit, or no group; on every rank of the group what
            `plan` refuses.
        RuntimeError: a collective failed; the message names the ranks that did not take part.

    Collective over the group (one all-gather of C E numbers), one host sync on CUDA. Deterministic;
    not differentiable.
    """
    row_alignment = row_alignment_on(expert_ids.device, row_alignment)
    invalid_flag = flag_on(expert_ids.device, invalid_flag)
    tensors: _ChunkPlanTensors = torch.ops.torch_moe_ep.plan_chunks(
        expert_ids,
        num_experts,
        num_chunks,
        row_alignment,
        max_rows,
        group_name,
        invalid_flag,
        x.detach(),
        weights.detach(),
    )
    plan = ChunkPlan(*tensors[:3], expert_ids.size(1), row_alignment, group_name)
    return plan, SendBuffer(*tensors[3:])


@torch.library.register_fake("torch_moe_ep::plan_chunks")
def _plan_chunks_fake(
    expert_ids: torch.Tensor,
    num_experts: int,
    num_chunks: int,
    row_alignment: int,
    max_rows: int,
    group_name: str,
    invalid_flag: torch.Tensor,
    x: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> _ChunkPlanTensors:
    check_one_device(expert_ids=expert_ids, x=x, weights=weights)
    counts_shape = (num_chunks, _group_size(group_name), num_experts)
    num_packed = expert_ids.numel() if x is not None else 0
    like = expert_ids.new_empty((0, 0), dtype=torch.float32) if x is None else x
    return (
        expert_ids.new_empty(expert_ids.numel()),
        expert_ids.new_empty(counts_shape),
        expert_ids.new_empty(counts_shape, device="cpu"),
        like.new_empty((num_packed, like.size(1))),
        like.new_empty(0 if weights is None else num_packed, dtype=torch.float32),
    )
