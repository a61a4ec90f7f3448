"""Save a checkpoint to resume from."""

import functools
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from torch_moe_ep.checkpoint.folder import (
    MARKER,
    SCHEDULER,
    complete_checkpoints,
    on_rank0,
    write_marker,
)


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    step: int = 0,
    scheduler: LRScheduler | None = None,
    num_kept: int | None = None,
) -> None:
    """Save model, optimizer and scheduler into one checkpoint folder.

    Args:
        path: the checkpoint's own folder, on a file system that all ranks share. One that exists
            is overwritten.
        model: patched or not, under FSDP2, FSDP1, DDP or nothing.
        optimizer: its state is saved by parameter name.
        step: handed back by `load_checkpoint`, and what "latest" goes by.
        scheduler: its state dict is saved.
        num_kept: keep only this many complete checkpoints in the folder that holds `path`, the
            ones with the highest steps; `path` itself always stays. None keeps all.

    Raises:
        ValueError: num_kept below 1.
        RuntimeError: on every rank, when rank 0 could not write.

    Collective over all ranks; every rank writes its own shards. Syncs the host. Blocks until the
    files are written.
    """
    if num_kept is not None and num_kept < 1:
        raise ValueError(f"num_kept must be None or at least 1, got {num_kept}.")
    folder = Path(path)
    on_rank0(functools.partial(_open_folder, folder))
    if optimizer is None:
        state: dict[str, Any] = {"model": get_model_state_dict(model)}
    else:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
    save(state, checkpoint_id=folder)
    on_rank0(functools.partial(_close_folder, folder, step, scheduler, num_kept))


def _open_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in (MARKER, SCHEDULER):
        (folder / name).unlink(missing_ok=True)


def _close_folder(
    folder: Path, step: int, scheduler: LRScheduler | None, num_kept: int | None
) -> None:
    if scheduler is not None:
        torch.save(scheduler.state_dict(), folder / SCHEDULER)
    write_marker(folder, step)
    if num_kept is None:
        return
    others = [p for p in complete_checkpoints(folder.parent) if p.name != folder.name]
    for old in others[: max(0, len(others) + 1 - num_kept)]:
        (old / MARKER).unlink()  # first, so that an interrupted removal leaves no valid checkpoint
        shutil.rmtree(old)
