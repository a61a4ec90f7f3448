"""A warning when ranks of one EP group train on the same batch.

Every rank is a data-parallel rank, EP partners included: a sampler that gives them the same batch
trains on it P times. Nothing fails then, so the first training forward compares batches.
"""

import warnings
import zlib
from typing import Any

import torch
import torch.distributed as dist

from torch_moe_ep.gather import all_gather
from torch_moe_ep.parallel.state import ExpertParallelState


@torch.compiler.disable  # type: ignore[untyped-decorator]
def warn_of_equal_batches(
    state: ExpertParallelState, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Compare the first tensor of each rank's forward arguments over the EP group; warn if equal.

    Collective over the EP group (one all-gather of a number); copies the batch to the host once.
    """
    group = state.mesh["ep"].get_group()
    digest = torch.tensor([batch_digest(args, kwargs)], dtype=torch.int64, device=state.device)
    digests = all_gather(digest, group).flatten().tolist()
    same = [rank for rank, other in enumerate(digests) if other == int(digest)]
    if len(same) > 1:
        warnings.warn(
            f"ranks {[dist.get_global_rank(group, rank) for rank in same]} of one expert-parallel "
            f"group got the same batch; each of them is a data-parallel rank: give the sampler "
            f"num_replicas={dist.get_world_size()} and the global rank.",
            stacklevel=3,
        )


def batch_digest(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """CRC-32 of ``input_ids``, else of the first tensor among the arguments; -rank - 1 if none."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    batch = kwargs.get("input_ids", tensors[0] if tensors else None)
    if not isinstance(batch, torch.Tensor) or batch.numel() == 0:
        return -dist.get_rank() - 1
    data = batch.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(data.tobytes())
