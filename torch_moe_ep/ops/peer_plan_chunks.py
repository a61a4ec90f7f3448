"""peer_plan_chunks: where each copy goes when tokens travel in chunks between GPUs of one host."""

import torch

from torch_moe_ep.ops.peer_dispatch import NUM_SMS
from torch_moe_ep.ops.plan import CUDA_ROW_ALIGNMENT, _group_size, flag_on
from torch_moe_ep.ops.plan_chunks import ChunkPlan

_PeerChunkTensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def peer_plan_chunks(
    expert_ids: torch.Tensor,
    num_experts: int,
    num_chunks: int,
    *,
    group_name: str,
    capacity: int = 0,
    row_alignment: int = CUDA_ROW_ALIGNMENT,
    max_rows: int = 0,
    num_sms: int = NUM_SMS,
    invalid_flag: torch.Tensor | None = None,
    slots_needed: torch.Tensor | None = None,
) -> ChunkPlan:
    """Compute where each copy of tokens in chunks goes on its owner.

    Rows of a rank are ordered expert, chunk, source rank, token; each (expert, chunk) is padded to
    a multiple of `row_alignment`.

    Args:
        expert_ids: int64 ``[T, K]`` on CUDA, ids in [0, E), any strides.
        num_experts: E; a multiple of the group's P ranks (at most 64), at most 512.
        num_chunks: C, at least 1, the same on every rank; chunks may be empty. C E is at most 8192.
        group_name: name of the EP process group, whose GPUs can map each other's memory.
        capacity: rows of every rank for all chunks together, as in `peer_plan`.
        row_alignment: a multiple of 128.
        max_rows: slots that any rank may need for all chunks together, 0 for no bound; with
            `capacity` 0 alone.
        num_sms: multiprocessors that move rows.
        invalid_flag: as in `plan`.
        slots_needed: as in `peer_plan`.

    Returns:
        The plan for `chunked_experts`.

    Raises:
        ValueError: as `peer_plan`, and numbers of chunks or of experts beyond the above.
        RuntimeError: a rank of the group did not come; the message names it.

    Collective over the group, host syncs and first call as in `peer_plan`. Deterministic; not
    differentiable.
    """
    tensors: _PeerChunkTensors = torch.ops.torch_moe_ep.peer_plan_chunks(
        expert_ids,
        num_experts,
        num_chunks,
        row_alignment,
        max_rows,
        capacity,
        group_name,
        flag_on(expert_ids.device, invalid_flag),
        flag_on(expert_ids.device, slots_needed, torch.int64),
    )
    slot_of_copy, segment_offsets, counts, host_counts = tensors
    return ChunkPlan(
        slot_of_copy,
        counts,
        host_counts,
        expert_ids.size(1),
        row_alignment,
        group_name,
        segment_offsets,
        capacity,
        num_sms,
    )


@torch.library.register_fake("torch_moe_ep::peer_plan_chunks")
def _peer_plan_chunks_fake(
    expert_ids: torch.Tensor,
    num_experts: int,
    num_chunks: int,
    row_alignment: int,
    max_rows: int,
    capacity: int,
    group_name: str,
    invalid_flag: torch.Tensor,
    slots_needed: torch.Tensor,
) -> _PeerChunkTensors:
    num_ranks = _group_size(group_name)
    num_segments = num_experts // num_ranks * num_chunks
    num_known = 0 if capacity else num_chunks
    return (
        expert_ids.new_empty(expert_ids.numel()),
        expert_ids.new_empty(num_segments + 1),
        expert_ids.new_empty((num_chunks, num_ranks, num_experts)),
        expert_ids.new_empty((num_known, num_ranks, num_experts), device="cpu"),
    )
