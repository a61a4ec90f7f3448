"""A few numbers of every rank, for the checks around the pipeline."""

import torch
import torch.distributed as dist

from torch_moe_ep import ops  # noqa: F401  registers the operator


def all_gather(row: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Gather a row of numbers: ``[n]`` of any dtype on every rank to ``[P, n]``, in rank order.

    Unlike torch's own collectives it has the time-out of the expert-parallel ones
    (``TORCH_MOE_EP_TIMEOUT_S``) and names the ranks that did not take part. Collective over the
    group (None: all ranks); without a process group the row itself.
    """
    if not dist.is_initialized():
        return row.unsqueeze(0)
    name = (group or dist.group.WORLD).group_name  # type: ignore[union-attr]
    gathered: torch.Tensor = torch.ops.torch_moe_ep.all_gather(row.contiguous(), name)
    return gathered
