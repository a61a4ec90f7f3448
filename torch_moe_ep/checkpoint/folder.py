"""The files of a checkpoint folder, and work that rank 0 does for all."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from torch_moe_ep.parallel.gather import shared_reason

MARKER = "complete.json"
SCHEDULER = "scheduler.pt"


def read_marker(folder: Path) -> dict[str, Any] | None:
    """The marker of a complete checkpoint, or None. Not collective."""
    try:
        marker = json.loads((folder / MARKER).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    return marker if isinstance(marker, dict) and "step" in marker else None


def write_marker(folder: Path, step: int) -> None:
    """Declare a checkpoint complete, in one atomic rename. Not collective."""
    partial = folder / f"{MARKER}.partial"
    with partial.open("w") as file:
        json.dump({"step": step, "world_size": dist.get_world_size()}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / MARKER)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints directly inside a folder, by ascending step. Not collective."""
    if not folder.is_dir():
        return []
    found = [(marker["step"], child.name, child) for child in folder.iterdir()
             if (marker := read_marker(child)) is not None]  # fmt: skip
    return [child for _, _, child in sorted(found)]


def on_rank0(work: Callable[[], None]) -> None:
    """Run `work` on rank 0; when it fails there, raise on every rank.

    Raises:
        RuntimeError: what failed on rank 0 (there chained to the original error).

    Collective over all ranks.
    """
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            work()
        except Exception as error:  # of any kind: raised on every rank below
            failure = error
    note = [None if failure is None else f"{type(failure).__name__}: {failure}"]
    dist.broadcast_object_list(note, src=0)
    if note[0] is not None:
        raise RuntimeError(f"rank 0 failed: {note[0]}") from failure


def raise_alike(failure: Exception | None) -> None:
    """Raise on every rank when any rank failed.

    Raises:
        ValueError: the words of the lowest rank that failed (chained to this rank's own error).

    Collective over all ranks (one `all_gather_object`).
    """
    note = None
    if failure is not None:
        is_plain = isinstance(failure, ValueError)
        note = str(failure) if is_plain else f"{type(failure).__name__}: {failure}"
    notes: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(notes, note)
    shared = shared_reason(notes)
    if shared is not None:
        raise ValueError(shared) from failure
