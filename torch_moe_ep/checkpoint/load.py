"""Find a checkpoint and resume from it."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from torch_moe_ep.checkpoint.folder import SCHEDULER, complete_checkpoints, read_marker


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
    """Load a checkpoint of `save_checkpoint`, in place.

    Args:
        path: the checkpoint's folder.
        model: built, patched and wrapped as for training.
        optimizer: receives its saved state; the checkpoint must have one.
        scheduler: receives its saved state; the checkpoint must have one.

    Returns:
        The step that was saved.

    Raises:
        FileNotFoundError: no complete checkpoint, or no scheduler state, at `path`.
        CheckpointException: from torch, for a missing weight or another shape.

    Collective over all ranks; syncs the host. Weights and states come back bit for bit.
    """
    folder = Path(path)
    marker = read_marker(folder)
    if marker is None:
        raise FileNotFoundError(
            f"{folder} holds no complete checkpoint; latest_checkpoint(folder) finds the newest "
            f"one that was saved to the end."
        )
    if scheduler is not None and not (folder / SCHEDULER).is_file():
        raise FileNotFoundError(
            f"{folder} was saved without a scheduler; leave scheduler out of load_checkpoint."
        )
    state: dict[str, Any]
    if optimizer is None:
        state = {"model": get_model_state_dict(model)}
        load(state, checkpoint_id=folder)
        set_model_state_dict(model, state["model"])
    else:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        load(state, checkpoint_id=folder)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
    if scheduler is not None:
        scheduler.load_state_dict(torch.load(folder / SCHEDULER, weights_only=True))
    return int(marker["step"])
