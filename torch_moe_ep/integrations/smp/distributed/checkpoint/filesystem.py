"""``filesystem``: torch's reader and writer under SMP's names."""

from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter


class DistributedFileSystemReader(FileSystemReader):
    """Reads one checkpoint folder: torch's own reader."""


class DistributedFileSystemWriter(FileSystemWriter):
    """Writes one checkpoint folder: torch's own writer."""


__all__ = ["DistributedFileSystemReader", "DistributedFileSystemWriter"]
