"""The layer over peers where rows are dispatched again in backward (received_rows).

All layers share one buffer a rank, so what backward needs of the received rows is copied out of it
(`chunks`) or, here, dispatched again.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from torch_moe_ep import ops
from torch_moe_ep.budget import capacity_of

if TYPE_CHECKING:
    from torch_moe_ep.layer import ExpertParallelExperts


def run_over_peers(
    experts: "ExpertParallelExperts",
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The layer's forward without a copy of the received rows; arguments as the layer's.

    Returns the sums ``[T, H]`` in the dtype that travelled; the layer casts and shapes them.

    Collective over the EP group. Host syncs: budget="exact" waits for a counter in the host's
    memory, budget="bounded" for nothing after the first training forward (see `budget`).
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
    return ops.peer_combine(y, plan, tokens_per_expert=experts.tokens_per_expert)


class _Again(NamedTuple):
    """What autograd keeps in place of rows: what it would keep of x, and x's version."""

    x: Any
    version: int


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
    it, and `x` for `rows`. Backward is collective over the group once more, and raises RuntimeError
    where `x` was changed in place since.
    """
    pack_outside, unpack_outside = _hooks_outside()
    address, shape = rows.data_ptr(), rows.shape
    sources = [x]  # emptied in the end: autograd holds `pack` as long as what it packed

    def pack(tensor: torch.Tensor) -> Any:
        is_rows = tensor.data_ptr() == address and tensor.shape == shape
        if not is_rows:
            return pack_outside(tensor)
        return _Again(pack_outside(sources[0]), sources[0]._version)

    def unpack(kept: Any) -> torch.Tensor:
        if not isinstance(kept, _Again):
            return unpack_outside(kept)
        source = unpack_outside(kept.x)
        if source is kept.x and source._version != kept.version:  # under hooks torch does not look
            raise RuntimeError(
                "the experts' hidden states were changed in place between forward and backward, "
                "which dispatches them again; change a copy (x = x + y for x += y), or take "
                'received_rows="keep".'
            )
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
