"""Checkpoints where every node has a folder of its own and something gathers them afterwards.

`save_checkpoint` wants a file system that all ranks share. SageMaker's /opt/ml/checkpoints is a
disk of each node instead, copied to one place in S3 while the job runs, and from there to all
nodes when the job starts again. So rank 0's rename makes a checkpoint of its own node's files
alone; the other nodes rename what they wrote here, and in S3 the parts meet under one name.
"""

import os
import shutil
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader

from torch_moe_ep.checkpoint.folder import complete_checkpoints, partial_of


def publish_here(path: Path, num_kept: int) -> None:
    """Give this node's part of a checkpoint its name, where rank 0 is on another node.

    Args:
        path: what `save_checkpoint` was given; it has returned.
        num_kept: of this node's parts, the newest ones.

    Collective over all ranks (a barrier).
    """
    partial = partial_of(path)
    if int(os.environ["LOCAL_RANK"]) == 0 and dist.get_rank() != 0 and partial.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
        parts = {file.parent for file in path.parent.glob("*/*.distcp")}
        for old in sorted(parts, key=lambda part: part.stat().st_mtime)[:-num_kept]:
            shutil.rmtree(old)
    dist.barrier()


def newest_whole(folder: Path) -> Path | None:
    """The newest complete checkpoint of which every node's files have arrived; None: none.

    A job may be killed when one node's files are in S3 already and another's are not.
    """
    for path in reversed(complete_checkpoints(folder)):
        if not missing_files(path):
            return path
    return None


def missing_files(path: Path) -> set[str]:
    """Names of the files that a checkpoint's metadata speaks of and that are not there."""
    storage = FileSystemReader(path).read_metadata().storage_data
    wanted = {info.relative_path for info in storage.values()}
    return {name for name in wanted if not (path / name).is_file()}
