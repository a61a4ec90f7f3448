"""``state_dict_saver``: write a sharded state dict into one folder."""

import os
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter, Metadata, SavePlanner, StorageWriter
from torch.distributed.checkpoint.state_dict_saver import _save_state_dict

from torch_moe_ep.integrations.smp.distributed.checkpoint.async_utils import AsyncCallsQueue
from torch_moe_ep.integrations.smp.distributed.checkpoint.ep_folder import (
    coordinators_folder,
    is_part,
    view_of_ep_rank,
)
from torch_moe_ep.integrations.smp.not_supported import NotSupportedError


def group_rank(global_rank: int, group: dist.ProcessGroup | None) -> int:
    """The rank in a group of a global rank; SMP's coordinators are global, torch's are not."""
    if group is None or not dist.is_initialized():
        return global_rank
    ranks = dist.get_process_group_ranks(group)
    if global_rank not in ranks:
        raise ValueError(
            f"coordinator_rank is a global rank and must be a member of process_group {ranks}, "
            f"got {global_rank}."
        )
    return ranks.index(global_rank)


def save_state_dict(
    state_dict: dict[str, Any],
    storage_writer: StorageWriter,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: SavePlanner | None = None,
) -> Metadata:
    """Save through a storage writer; `coordinator_rank` is a global rank.

    A group of fewer than all ranks writes its EP rank's experts alone, as SMP's scripts do.
    Collective over the group; blocks until the files are written.
    """
    if is_part(process_group):
        state_dict = view_of_ep_rank(state_dict)
    storage_writer.reset()
    coordinator = group_rank(coordinator_rank, process_group)
    return _save_state_dict(
        state_dict, storage_writer, process_group, coordinator, no_dist, planner
    )


def async_save(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str],
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    queue: AsyncCallsQueue | None = None,
    planner: SavePlanner | None = None,
    **_options: Any,
) -> None:
    """Save into a folder; returns when the files are written, so the queue stays empty.

    Args:
        state_dict: tensors, DTensors and sharded tensors.
        checkpoint_id: the folder; the coordinator's counts where the ranks of a group differ.
        process_group: the ranks that write together; None: all.
        coordinator_rank: a global rank of them.
        queue: accepted.
        planner: torch's.

    Collective over the group. `torch_moe_ep.save_checkpoint(async_save=True)` writes in the
    background, and resumes at another degree.
    """
    group_rank(coordinator_rank, process_group)  # refuses a rank outside of the group
    folder = coordinators_folder(
        "state_dict_saver.async_save", checkpoint_id, coordinator_rank, process_group
    )
    writer = FileSystemWriter(folder)
    save_state_dict(state_dict, writer, process_group, coordinator_rank, planner=planner)


class PyTorchDistSaveShardedStrategy:
    """SMP's writing strategy: a name for imports; using it says what to call."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        raise NotSupportedError("PyTorchDistSaveShardedStrategy", "call async_save instead.")
