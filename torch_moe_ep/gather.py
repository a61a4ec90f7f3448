"""What every rank says, and sums of what they count, for the checks around the pipeline."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from torch_moe_ep import ops  # noqa: F401  registers the operator


def shared_reason(notes: Sequence[str | None]) -> str | None:
    """What to raise on all ranks, given each rank's objection: the lowest rank's that has one.

    Its rank stands before it unless all ranks say the same. None: nobody objects.
    """
    for rank, text in enumerate(notes):
        if text is not None:
            return text if all(other == text for other in notes) else f"rank {rank}: {text}"
    return None


def all_gather(row: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Gather a row of numbers: ``[n]`` of any dtype on every rank to ``[P, n]``, in rank order.

    Unlike torch's own collectives it has the time-out of the expert-parallel ones
    (``TORCH_MOE_EP_TIMEOUT_S``) and names the ranks that did not take part; over NCCL, where the
    host does not wait in it, process-group hooks do. Collective over the group (None: all ranks);
    without a process group the row itself.
    """
    if not dist.is_initialized():
        return row.unsqueeze(0)
    name = (group or dist.group.WORLD).group_name  # type: ignore[union-attr]
    gathered: torch.Tensor = torch.ops.torch_moe_ep.all_gather(row.contiguous(), name)
    return gathered


def sum_over_ranks(counters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The sums of flat counters of one dtype and device over all ranks, on the CPU; theirs stay.

    Collective over all ranks (one all-reduce) where there are any and a process group exists.
    Syncs the host.
    """
    if not counters:
        return {}
    flat = torch.cat(list(counters.values()))
    if dist.is_initialized():
        dist.all_reduce(flat)
    parts = torch.split(flat.cpu(), [counter.numel() for counter in counters.values()])
    return dict(zip(counters, parts, strict=True))
