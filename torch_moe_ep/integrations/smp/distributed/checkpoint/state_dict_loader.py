"""``state_dict_loader``: read a sharded state dict from one folder."""

import os
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader, LoadPlanner, StorageReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from torch_moe_ep.integrations.smp.distributed.checkpoint.ep_folder import (
    coordinators_folder,
    copy_values_back,
    is_part,
    view_of_ep_rank,
)
from torch_moe_ep.integrations.smp.distributed.checkpoint.state_dict_saver import group_rank


def load_state_dict(
    state_dict: dict[str, Any],
    storage_reader: StorageReader,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: LoadPlanner | None = None,
) -> None:
    """Load into the tensors of `state_dict`; `coordinator_rank` is a global rank.

    Raises:
        KeyError: on every rank of the group, when the checkpoint lacks a key.

    Collective over the group.
    """
    source = state_dict
    if is_part(process_group):
        state_dict = view_of_ep_rank(source)
    storage_reader.reset()
    coordinator = group_rank(coordinator_rank, process_group)
    metadata = storage_reader.read_metadata()
    missing = sorted(set(state_dict) - set(_top_level(metadata)))
    if missing:
        raise KeyError(f"the checkpoint has no {missing[0]!r} ({len(missing)} keys are missing)")
    try:
        _load_state_dict(state_dict, storage_reader, process_group, coordinator, no_dist, planner)
    except CheckpointException as error:
        lost = [e for e, _ in error.failures.values() if "Missing key" in str(e)]
        if lost:
            raise KeyError(str(lost[0])) from error
        raise
    if state_dict is not source:
        copy_values_back(state_dict, source)


def load(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: StorageReader | None = None,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    planner: LoadPlanner | None = None,
) -> None:
    """`load_state_dict` by keywords, from a reader or a folder.

    Where the ranks of a group name different folders, the coordinator's counts.
    """
    if storage_reader is None:
        if checkpoint_id is None:
            raise ValueError("load needs a storage_reader or a checkpoint_id.")
        storage_reader = FileSystemReader(checkpoint_id)
    if isinstance(storage_reader, FileSystemReader):
        group_rank(coordinator_rank, process_group)  # refuses a rank outside of the group
        folder = coordinators_folder(
            "state_dict_loader.load", storage_reader.path, coordinator_rank, process_group
        )
        storage_reader = FileSystemReader(folder)
    load_state_dict(state_dict, storage_reader, process_group, coordinator_rank, planner=planner)


def _top_level(metadata: Any) -> set[str]:
    """Keys of the state dict that was saved; nested ones are stored flattened."""
    planned = metadata.planner_data or {}
    paths = [path[0] if isinstance(path, tuple) else path for path in planned.values()]
    return {*metadata.state_dict_metadata, *map(str, paths)}
