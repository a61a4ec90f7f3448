"""State dicts of one EP rank: what SMP scripts save into ``ep<degree>-<rank>``.

A checkpoint written by a group that holds one EP rank's experts cannot hold weights ``[E, ...]``.
Such weights are seen as ``[L, ...]``, this EP rank's experts, sharded and replicated as before and
over the same memory. These folders can only be read at the degree that wrote them;
`torch_moe_ep.save_checkpoint` writes one folder for all ranks, which any degree reads.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from torch_moe_ep.parallel.agreement import meet


def is_part(group: dist.ProcessGroup | None) -> bool:
    """Whether a group is fewer than all ranks, and so may lack EP ranks."""
    return group is not None and group.size() < dist.get_world_size()


def coordinators_folder(
    call: str,
    folder: str | os.PathLike[str],
    coordinator_rank: int,
    group: dist.ProcessGroup | None,
) -> str:
    """The folder that the coordinator (a global rank) named, on every rank of a group in `call`.

    Scripts name a folder for each EP rank also when one group holds them all; a checkpoint of
    that group is one folder, and its index is where the coordinator writes. Collective; a group of
    all ranks names those that do not come.
    """
    if not dist.is_initialized():
        return os.fspath(folder)
    if not is_part(group):
        meet(call)
    names = [os.fspath(folder)]
    dist.broadcast_object_list(names, src=coordinator_rank, group=group)
    return names[0]


def view_of_ep_rank(value: Any) -> Any:
    """The same nest of dicts and lists, its expert weights ``[L, ...]``; tensors share memory."""
    if isinstance(value, dict):
        return {key: view_of_ep_rank(item) for key, item in value.items()}
    if isinstance(value, list):
        return [view_of_ep_rank(item) for item in value]
    if not isinstance(value, DTensor):
        return value
    names = value.device_mesh.mesh_dim_names or ()
    if names[-1:] != ("ep",):
        return value
    rest = value.device_mesh[names[:-1]] if len(names) > 1 else None
    if rest is None:
        return value.to_local()
    num_local = value.shape[0] // value.device_mesh["ep"].size()
    shape = torch.Size((num_local, *value.shape[1:]))
    return DTensor.from_local(
        value.to_local(),
        rest,
        value.placements[:-1],
        run_check=False,
        shape=shape,
        stride=_contiguous_stride(shape),
    )


def _contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride = [1]
    for length in reversed(shape[1:]):
        stride.insert(0, stride[0] * length)
    return tuple(stride)


def copy_values_back(loaded: Any, target: Any) -> None:
    """Numbers and other values that are no tensors, from a view that was loaded to its source."""
    keys = loaded.keys() if isinstance(loaded, dict) else range(len(loaded))
    for key in keys:
        if isinstance(loaded[key], (dict, list)):
            copy_values_back(loaded[key], target[key])
        elif not isinstance(target[key], DTensor):
            target[key] = loaded[key]
