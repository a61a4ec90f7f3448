"""dispatcher="all_gather": every rank sees all tokens of its EP group and computes its experts.

The simple form: tokens are gathered, each rank runs its own experts over the copies that are
theirs, and a reduce-scatter adds up the ranks' parts. It moves P T rows of H each way where
all-to-all moves about T K, and holds P T K rows: for small groups, for comparison, and for
scripts that ask for it.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from torch_moe_ep import label, ops
from torch_moe_ep.gather import all_gather
from torch_moe_ep.ops import DispatchPlan


class _GatherTokens(torch.autograd.Function):
    """``[T, ...]`` on every rank to ``[P T, ...]`` in rank order; backward adds up in fp32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group, ctx.layer = group, label.current_layer()
        return _GatherTokens.gather(x, group, ctx.layer, "dispatch")

    @staticmethod
    def gather(x: torch.Tensor, group: dist.ProcessGroup, layer: int, stage: str) -> torch.Tensor:
        gathered = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
        with label.stage(stage, layer):
            dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _scatter_sums(grads[0], ctx.group, ctx.layer, "dispatch backward"), None


class _ScatterSums(torch.autograd.Function):
    """``[P T, H]`` on every rank to this rank's ``[T, H]`` of the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group, ctx.layer = group, label.current_layer()
        return _scatter_sums(x, group, ctx.layer, "combine")

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _GatherTokens.gather(grads[0], ctx.group, ctx.layer, "combine backward"), None


def _scatter_sums(
    x: torch.Tensor, group: dist.ProcessGroup, layer: int, stage: str
) -> torch.Tensor:
    total = torch.empty(
        (x.shape[0] // group.size(), *x.shape[1:]), dtype=torch.float32, device=x.device
    )
    with label.stage(stage, layer):
        dist.reduce_scatter_tensor(total, x.float().contiguous(), group=group)
    return total.to(x.dtype)


class CountCopies(torch.autograd.Function):
    """The identity; backward adds `counts` to `counter`, so recomputation counts nothing."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, counts: torch.Tensor, counter: torch.Tensor
    ) -> torch.Tensor:
        """Args: any tensor, int64 ``[E]``, int64 ``[E]``."""
        ctx.counts, ctx.counter = counts, counter
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Count, and pass the gradient on."""
        ctx.counter += ctx.counts
        return grads[0], None, None


def gather_tokens(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    num_experts: int,
    group: dist.ProcessGroup,
    max_rows: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gather the tokens of a group, each rank's padded to the largest number of tokens.

    Args:
        x: ``[T, H]``; T may differ by rank.
        expert_ids: int64 ``[T, K]``.
        weights: fp32 ``[T, K]``.
        num_experts: E.
        group: the EP group.
        max_rows: copies of all ranks, P T' K, that a rank may hold; 0 for no bound.

    Returns:
        ``[P T', H]``, int64 ``[P T', K]`` with -1 in padding and fp32 ``[P T', K]``; T' is the
        largest T. Differentiable in x and weights.

    Raises:
        ValueError: on every rank of the group, when any has an id outside of [0, E), or for more
            copies than `max_rows`.

    Collective over the group (four all-gathers); syncs the host once, for T' and the ids' check.
    """
    num_invalid = ((expert_ids < 0) | (expert_ids >= num_experts)).sum()
    own = torch.stack([num_invalid.new_tensor(x.shape[0]), num_invalid])
    with label.stage("plan", label.current_layer()):
        notes = all_gather(own, group)
    sizes, invalid = notes.t().tolist()
    for rank, count in enumerate(invalid):
        if count > 0:
            raise ValueError(
                f"expert_ids must be in [0, {num_experts}), got {count} others on rank {rank} of "
                f"the expert-parallel group (check the router)"
            )
    num_padded = max(sizes)
    num_rows = group.size() * num_padded * expert_ids.shape[1]
    if 0 < max_rows < num_rows:
        raise ValueError(
            f"a rank needs {num_rows} rows, but max_rows (MoEConfig.max_received_rows) is "
            f"{max_rows}; raise it, or take fewer tokens a batch"
        )
    padding = (0, 0, 0, num_padded - x.shape[0])
    gather: Any = _GatherTokens.apply
    ids = functional.pad(expert_ids, padding, value=-1)
    return (
        gather(functional.pad(x, padding), group),
        gather(ids, group),
        gather(functional.pad(weights, padding), group),
    )


def plan_own_experts(
    expert_ids: torch.Tensor, first: int, num_local: int
) -> tuple[DispatchPlan, DispatchPlan]:
    """Plans over gathered copies: all of them, and this rank's experts' alone.

    Copies of other ranks' experts go to one more segment behind the last, which the second plan
    does not know: slots that belong to nobody.

    Args:
        expert_ids: int64 ``[T, K]``, global ids, -1 for padding.
        first: this rank's first expert.
        num_local: L.

    Returns:
        The plan for dispatch and combine, and the plan for expert_mlp. Local, no host sync.
    """
    local = expert_ids - first
    local = torch.where((local >= 0) & (local < num_local), local, num_local)
    whole = ops.plan(local, num_local + 1)
    own = whole._replace(
        expert_offsets=whole.expert_offsets[:-1].contiguous(),
        counts=whole.counts[:, :-1].contiguous(),
    )
    return whole, own


def scatter_sums(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """``[P T', H]`` of every rank to this rank's ``[T', H]`` of their sum; differentiable.

    Collective over the group (a reduce-scatter in fp32), no host sync.
    """
    apply: Any = _ScatterSums.apply
    total: torch.Tensor = apply(x, group)
    return total
