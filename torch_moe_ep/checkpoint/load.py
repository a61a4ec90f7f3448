"""Find a checkpoint and resume from it."""

import functools
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from torch_moe_ep.checkpoint.folder import (
    HUB_FOLDER,
    complete_checkpoints,
    find_complete,
    on_rank0,
)
from torch_moe_ep.checkpoint.quiet import without_fsdp1_warnings
from torch_moe_ep.checkpoint.rank_state import (
    COMMON,
    rank_key,
    rng_of_rank,
    routing_counters,
    sharded_state,
    unpack,
)
from torch_moe_ep.checkpoint.rng import set_rng_state
from torch_moe_ep.checkpoint.save import meet_when_written
from torch_moe_ep.checkpoint.weights import check_wrappers

MISFITS = ("Size mismatch", "Missing key")  # how torch begins what its load planner finds


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The complete checkpoint with the highest step directly inside `folder`, or None.

    Interrupted saves are passed over. Not collective: reads the shared file system.
    """
    found = complete_checkpoints(Path(folder))
    return found[-1] if found else None


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    scheduler: LRScheduler | None = None,
) -> int:
    """Load a checkpoint of `save_checkpoint`, in place; at any P, S, number of replicas and W.

    At the same number of ranks the random generators of every rank go on where they were. At
    another one, generators that stood alike on all ranks (one seed for all) do so too; the others
    are seeded from (rank 0's saved state, rank): no two ranks alike, the same at every such
    resume, but not the sequence of the uninterrupted run. The counters of tokens per expert keep
    their sums.

    Args:
        path: the checkpoint's folder.
        model: built, patched and wrapped as for training, as it suits this run: FSDP2, FSDP1, DDP
            or nothing, whatever saved it; the wrapper, if it is FSDP1's.
        optimizer: receives its saved state; the checkpoint must have one.
        scheduler: receives its saved state; the checkpoint must have one.

    Returns:
        The step that was saved. `load_data_state` gives the data position.

    Raises:
        FileNotFoundError: on every rank: no complete checkpoint at `path`.
        ValueError: on every rank, before anything changes: it has no optimizer or no scheduler,
            a weight or state is missing or has another shape, or the model came without the FSDP1
            wrapper around it.
        RuntimeError: a save in the background failed (see `save_checkpoint`), or a rank did not
            come within the time-out; the message names it.
        CheckpointException: from torch, when a file cannot be read.

    Collective over all ranks; syncs the host. Weights and states come back bit for bit.
    """
    check_wrappers(model)
    meet_when_written("load_checkpoint")
    folder, marker = on_rank0(functools.partial(_find, Path(path)))
    saved = FileSystemReader(folder).read_metadata()
    if optimizer is not None and not marker["has_optimizer"]:
        raise ValueError(
            f"{folder} was saved without an optimizer; leave optimizer out of load_checkpoint."
        )
    rank, has_same_world = dist.get_rank(), marker["world_size"] == dist.get_world_size()
    own_key = rank_key(rank if has_same_world else 0)
    host = _read(folder, saved, [f"host.{COMMON}", f"host.{own_key}"])
    common, own = unpack(host[f"host.{COMMON}"]), unpack(host[f"host.{own_key}"])
    if scheduler is not None and common["scheduler"] is None:
        raise ValueError(
            f"{folder} was saved without a scheduler; leave scheduler out of load_checkpoint."
        )
    _load_model(folder, model, optimizer)
    _load_routing(folder, saved, model)
    if scheduler is not None:
        scheduler.load_state_dict(common["scheduler"])
    set_rng_state(rng_of_rank(own["rng"], common["alike"], rank, has_same_world))
    return int(marker["step"])


def load_data_state(path: str | os.PathLike[str], *, rank: int | None = None) -> Any:
    """The `data_state` that `save_checkpoint` was given.

    Args:
        path: the checkpoint's folder.
        rank: whose; None means this rank's. At another number of ranks None works when all ranks
            saved equal states; else deal the old ranks' states out by passing each old rank.

    Raises:
        FileNotFoundError: no complete checkpoint at `path`.
        ValueError: a rank that did not save, or None where the ranks' states differ.

    Not collective; reads the shared file system.
    """
    folder, marker = _find(Path(path))
    world_size = int(marker["world_size"])
    own, here = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if rank is not None and not 0 <= rank < world_size:
        raise ValueError(f"rank must be one of the {world_size} that saved {folder}, got {rank}.")
    if rank is None and here == world_size:
        rank = own
    ranks = range(world_size) if rank is None else [rank]
    saved = FileSystemReader(folder).read_metadata()
    packed = _read(folder, saved, [f"host.{rank_key(r)}" for r in ranks])
    data = [unpack(value)["data"] for value in packed.values()]
    if any(not _is_equal(other, data[0]) for other in data[1:]):
        raise ValueError(
            f"{folder} holds a data_state of each of {world_size} ranks, and {here} ranks load it; "
            f"pass rank=0 to rank={world_size - 1} and deal them out anew."
        )
    return data[0]


def _find(path: Path) -> tuple[Path, dict[str, Any]]:
    found = find_complete(path)
    if found is None:
        raise FileNotFoundError(
            f"{path} holds no complete checkpoint; latest_checkpoint(folder) finds the newest "
            f"one that was saved to the end."
        )
    return found


@without_fsdp1_warnings()
def _load_model(folder: Path, model: nn.Module, optimizer: Optimizer | None) -> None:
    state = sharded_state(model, optimizer)
    _load_fitting(folder, state)
    if optimizer is None:
        set_model_state_dict(model, state["model"])
        return
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )


def _load_fitting(folder: Path, state: dict[str, Any]) -> None:
    """Fill `state` from the files; torch's traceback of every rank becomes one sentence."""
    try:
        load(state, checkpoint_id=folder)
    except CheckpointException as error:
        reasons = [str(error.failures[rank][0]) for rank in sorted(error.failures)]
        misfit = next((reason for reason in reasons if reason.startswith(MISFITS)), None)
        if misfit is None:  # a damaged or missing file
            raise
        raise ValueError(
            f"{folder} does not fit the model or the optimizer: {misfit.removesuffix('.')}; build "
            f"both as the run that saved it did (its config is in {folder / HUB_FOLDER})."
        ) from None


def _load_routing(folder: Path, saved: Metadata, model: nn.Module) -> None:
    """Put the counters' sums on rank 0 and zeros elsewhere: their sum over all ranks is kept."""
    counters = routing_counters(model)
    known = [f"routing.{key}" for key in counters if f"routing.{key}" in saved.state_dict_metadata]
    sums = _read(folder, saved, known)
    for key, counter in counters.items():
        total = sums.get(f"routing.{key}")
        counter.zero_()
        if total is not None and dist.get_rank() == 0:
            counter.copy_(total)


def _read(folder: Path, saved: Metadata, keys: list[str]) -> dict[str, torch.Tensor]:
    """Some plain tensors of a checkpoint, whole, onto the CPU. Not collective."""
    found: dict[str, Any] = {}
    for key in keys:
        entry = saved.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        found[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
    if found:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(found, checkpoint_id=folder, no_dist=True)
    return found


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        both = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
        return both and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_equal(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_is_equal, one, other))
    return bool(one == other)
