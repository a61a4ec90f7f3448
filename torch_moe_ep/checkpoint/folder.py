"""The files of a checkpoint folder, and work that rank 0 does for all.

A save of ``run/step-8`` writes into ``run/step-8.partial``, puts the marker there last, and then
renames the folder. Where ``run/step-8`` exists already it is moved to ``run/step-8.replaced`` for
the moment between two renames and removed after them. So at every moment, for every name, a
complete checkpoint that was there before is there still.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from torch_moe_ep.gather import shared_reason
from torch_moe_ep.parallel.agreement import first_difference
from torch_moe_ep.parallel.nodes import host_name

MARKER = "complete.json"
HUB_FOLDER = "hf"  # config and generation config, so that an export needs nothing else
PARTIAL = ".partial"
REPLACED = ".replaced"

T = TypeVar("T")


def read_marker(folder: Path) -> dict[str, Any] | None:
    """The marker of a complete checkpoint, or None. Not collective."""
    try:
        marker = json.loads((folder / MARKER).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    is_marker = isinstance(marker, dict) and isinstance(marker.get("step"), int)
    return marker if is_marker else None


def write_marker(folder: Path, marker: dict[str, Any]) -> None:
    """Declare a checkpoint complete, in one atomic rename. Not collective."""
    partial = folder / f"{MARKER}{PARTIAL}"
    with partial.open("w") as file:
        json.dump(marker, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / MARKER)
    sync_folder(folder)


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file under a folder, by path relative to it; the marker left out."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MARKER
    }


def partial_of(folder: Path) -> Path:
    """Where a save of `folder` is written until it is complete."""
    return folder.with_name(folder.name + PARTIAL)


def open_partial(folder: Path) -> Path:
    """Make the empty folder that a save writes into. Not collective.

    A save that was killed between its marker and its renames is brought to its end first.
    """
    partial = partial_of(folder)
    if read_marker(partial) is not None:
        publish(folder)
    remove_folder(partial)
    partial.mkdir(parents=True)
    return partial


def publish(folder: Path) -> None:
    """Give a complete partial folder its name; an older checkpoint of that name goes after it."""
    replaced = folder.with_name(folder.name + REPLACED)
    if folder.exists():
        remove_folder(replaced)
        folder.rename(replaced)
    partial_of(folder).rename(folder)
    sync_folder(folder.parent)
    remove_folder(replaced)


def remove_folder(folder: Path) -> None:
    """Remove a folder, its marker first: an interrupted removal leaves no valid checkpoint."""
    (folder / MARKER).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, also what a kill between two renames left of it."""
    for suffix in (REPLACED, PARTIAL, ""):
        remove_folder(folder.with_name(folder.name + suffix))


def find_complete(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """A checkpoint by its name: the folder that holds it now, and its marker.

    That is another than `folder` for the moment between a save's marker and its renames, and for
    good when the save was killed there.
    """
    for suffix in (PARTIAL, "", REPLACED):  # newest first
        candidate = folder.with_name(folder.name + suffix)
        marker = read_marker(candidate)
        if marker is not None:
            return candidate, marker
    return None


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints directly inside a folder by name, by ascending step. Not collective."""
    if not folder.is_dir():
        return []
    names = {
        child.name.removesuffix(PARTIAL).removesuffix(REPLACED)
        for child in folder.iterdir()
        if read_marker(child) is not None
    }
    steps = []
    for name in names:
        found = find_complete(folder / name)
        if found is not None:
            steps.append((found[1]["step"], name))
    return [folder / name for _, name in sorted(steps)]


def remove_partials(folder: Path) -> None:
    """Remove what killed saves left inside a folder. Not collective."""
    for child in folder.iterdir():
        if child.name.endswith(PARTIAL) and child.is_dir() and read_marker(child) is None:
            remove_folder(child)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder outlive a power cut, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems refuse; the rename itself is done
        pass
    finally:
        os.close(handle)


def on_rank0(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and return its result everywhere; when it fails there, raise everywhere.

    Args:
        work: its result is pickled.

    Raises:
        FileNotFoundError: that `work` raised one on rank 0, with its words.
        RuntimeError: what else failed on rank 0 (there chained to the original error).

    Collective over all ranks.
    """
    failure: Exception | None = None
    note: list[Any] = [None, None, None]
    if dist.get_rank() == 0:
        try:
            note[2] = work()
        except Exception as error:  # of any kind: raised on every rank below
            failure = error
            note[:2] = [type(failure).__name__, str(failure)]
    dist.broadcast_object_list(note, src=0)
    kind, text, result = note
    if kind == "FileNotFoundError":
        raise FileNotFoundError(text) from failure
    if kind is not None:
        raise RuntimeError(f"rank 0 failed: {kind}: {text}") from failure
    return result  # type: ignore[no-any-return]


def check_alike(settings: dict[str, str], of_node: dict[str, str]) -> None:
    """Raise on every rank when ranks call with different settings, such as names with a time in.

    Args:
        settings: alike on all ranks.
        of_node: alike on the ranks of a node: nodes may have folders of their own.

    Raises:
        ValueError: where ranks first differ, with both values.

    Collective over all ranks (one `all_gather_object`).
    """
    notes: list[Any] = [None] * dist.get_world_size()
    node = os.environ.get("GROUP_RANK", host_name())  # torchrun's number of the node
    dist.all_gather_object(notes, (settings, of_node, node))
    all_settings, all_of_node, nodes = zip(*notes, strict=True)
    difference = first_difference(all_of_node, nodes) or first_difference(all_settings)
    if difference is not None:
        raise ValueError(difference)


def raise_alike(failure: Exception | None) -> None:
    """Raise on every rank when any rank failed.

    Raises:
        ValueError: the words of the lowest rank that failed (chained to this rank's own error).

    Collective over all ranks (one `all_gather_object`).
    """
    shared = shared_failure(failure)
    if shared is not None:
        raise ValueError(shared) from failure


def shared_failure(failure: BaseException | None) -> str | None:
    """What the lowest rank that failed has to say, the same on every rank; None: none failed.

    Collective over all ranks (one `all_gather_object`).
    """
    note = None
    if failure is not None:
        is_plain = isinstance(failure, ValueError)
        note = str(failure) if is_plain else f"{type(failure).__name__}: {failure}"
    notes: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(notes, note)
    return shared_reason(notes)
