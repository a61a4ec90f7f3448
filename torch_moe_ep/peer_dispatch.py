"""The layer between GPUs that map each other's memory (transport="peer").

All layers share one buffer a rank, so what backward needs of the received rows is copied out of it
(`chunks`) or, with received_rows="dispatch_again", dispatched again (here).
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from torch_moe_ep import ops
from torch_moe_ep.config import MoEConfig
from torch_moe_ep.ops.plan import CUDA_ROW_ALIGNMENT

if TYPE_CHECKING:
    from torch_moe_ep.layer import ExpertParallelExperts


def run_over_peers(
    experts: "ExpertParallelExperts",
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The layer's forward without a copy of the received rows; arguments as the layer's.

    Collective over the EP group. Host syncs: budget="exact" waits for a counter in the host's
    memory, budget="bounded" for nothing after the first training forward (see `capacity_of`).
    """
    config = experts.moe_config
    x = experts.tokens_of(hidden_states)
    plan = ops.peer_plan(
        top_k_index,
        experts.num_global_experts,
        group_name=experts.ep_group_name,
        capacity=capacity_of(experts, *top_k_index.shape),
        max_rows=config.max_received_rows,
        num_sms=config.peer_sms,
        invalid_flag=experts.invalid_flag,
        slots_needed=experts.slots_needed,
    )
    rows, row_weights = ops.peer_dispatch(x, top_k_weights.float(), plan, keep=False)
    with rows_dispatched_again(rows, x.detach(), plan):
        y = experts.expert_mlp(rows, row_weights.clone(), plan)
    output = ops.peer_combine(y, plan, tokens_per_expert=experts.tokens_per_expert)
    return output.to(hidden_states.dtype).view(hidden_states.shape)


class _Again(NamedTuple):
    """What autograd keeps in place of rows."""

    x: Any


@contextlib.contextmanager
def rows_dispatched_again(
    rows: torch.Tensor, x: torch.Tensor, plan: "ops.PeerPlan"
) -> Iterator[None]:
    """A context in which autograd keeps `x` where it would keep `rows`, and dispatches it again.

    Args:
        rows: what `peer_dispatch` made of `x`, without keep.
        x: ``[T, H]``, detached.
        plan: of `rows`.

    Hooks around this context (activation checkpointing, offloading) get what they would get without
    it, and `x` for `rows`. Backward is collective over the group once more.
    """
    pack_outside, unpack_outside = _hooks_outside()
    address, shape = rows.data_ptr(), rows.shape
    sources = [x]  # emptied in the end: autograd holds `pack` as long as what it packed

    def pack(tensor: torch.Tensor) -> Any:
        is_rows = tensor.data_ptr() == address and tensor.shape == shape
        return _Again(pack_outside(sources[0])) if is_rows else pack_outside(tensor)

    def unpack(kept: Any) -> torch.Tensor:
        if not isinstance(kept, _Again):
            return unpack_outside(kept)
        source = unpack_outside(kept.x)
        # backward() inside an autocast region must not cast what forward did not.
        with torch.autocast(source.device.type, enabled=False):
            return ops.peer_dispatch(source, None, plan, keep=False)[0]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
    sources.clear()


def _hooks_outside() -> tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]:
    """The hooks for saved tensors in force, which torch would not call inside of others."""
    found = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return found if found is not None else (lambda tensor: tensor, lambda kept: kept)


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
