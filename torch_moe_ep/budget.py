"""How many rows a call over peers may bring to a rank (`MoEConfig.budget`)."""

import math
from typing import TYPE_CHECKING

import torch

from torch_moe_ep.config import MoEConfig
from torch_moe_ep.ops.plan import CUDA_ROW_ALIGNMENT

if TYPE_CHECKING:
    from torch_moe_ep.layer import ExpertParallelExperts


def capacity_of(experts: "ExpertParallelExperts", num_tokens: int, top_k: int) -> int:
    """Rows that this call may bring to a rank; 0: as many as there are.

    budget="bounded" fixes the number at the first training forward, from the largest T of the
    group, which costs one all-gather and a host sync. Evaluation has no step that would notice
    rows beyond it, so it runs as budget="exact", but inside the capture of a CUDA graph.
    """
    config = experts.moe_config
    if config.budget == "exact":
        return 0
    if not experts.training and not torch.cuda.is_current_stream_capturing():
        return 0
    if experts.capacity == 0:
        own = torch.tensor([num_tokens], device=experts.invalid_flag.device)
        tokens = torch.ops.torch_moe_ep.all_gather(own, experts.ep_group_name).flatten().tolist()
        num_local = experts.num_global_experts // len(tokens)
        experts.capacity = bounded_capacity(config, max(tokens) * top_k, len(tokens), num_local)
    return experts.capacity


def bounded_capacity(config: MoEConfig, num_copies: int, num_ranks: int, num_local: int) -> int:
    """Rows of a rank with budget="bounded".

    Args:
        config: gives the factor, or the rows themselves (`max_received_rows`).
        num_copies: T K of the rank that has most.
        num_ranks: P; no rank can receive more than P T K copies.
        num_local: L; each expert's segment may end in 127 rows of padding, in each chunk.

    Example: T K = 2000, P = 2, L = 4, factor 1.5: 3000 copies and at most 508 rows of padding are
    3456 rows, in whole tiles of 128.
    """
    tile = CUDA_ROW_ALIGNMENT
    if config.max_received_rows > 0:
        return max(config.max_received_rows // tile, 1) * tile
    copies = math.ceil(min(config.budget_factor, num_ranks) * num_copies)
    num_segments = num_local * config.num_chunks
    return max((copies + num_segments * (tile - 1)) // tile, 1) * tile
