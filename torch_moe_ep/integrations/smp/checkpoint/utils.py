"""``checkpoint.utils``: keep the newest checkpoint folders."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from torch_moe_ep.integrations.smp.logger import get_logger
from torch_moe_ep.parallel.agreement import meet

_RANK_FOLDER = re.compile(r"(ep|tp|cp)\d+-\d+")


def SORT_BY_LAST_INT(name: str) -> int:  # noqa: N802  SMP's name
    """Sort key: the last whole number in a folder's name; -1 without one."""
    numbers = re.findall(r"\d+", os.path.basename(name))
    return int(numbers[-1]) if numbers else -1


def limit_num_subdirs(
    path: str | os.PathLike[str],
    num: int,
    sort_fn: Callable[[str], Any] | None = None,
    regex: str | None = None,
    log: bool = True,
) -> None:
    """Remove the oldest checkpoint folders beside the one that was just written.

    Args:
        path: that folder, perhaps with the part of a rank at its end (``.../steps-20/ep2-0``),
            which is left out: a checkpoint goes or stays as a whole.
        num: how many to keep; below 1 keeps all. The one at `path` always stays.
        sort_fn: key of a folder's name, the largest is the newest; None sorts by name.
        regex: only folders whose name matches count.
        log: log what is removed.

    Collective over all ranks where a process group exists: all wait for each other, then rank 0
    removes, then all wait again.
    """
    newest = Path(os.path.abspath(path))
    while _RANK_FOLDER.fullmatch(newest.name):
        newest = newest.parent
    meet("limit_num_subdirs")
    if num >= 1 and (not dist.is_initialized() or dist.get_rank() == 0):
        names = [entry.name for entry in newest.parent.iterdir() if entry.is_dir()]
        names = [name for name in names if regex is None or re.search(regex, name)]
        others = sorted((name for name in names if name != newest.name), key=sort_fn)
        for name in others[: max(0, len(others) - (num - 1))]:
            if log:
                get_logger().info("removing checkpoint %s", newest.parent / name)
            shutil.rmtree(newest.parent / name)
    if dist.is_initialized():
        dist.barrier()
