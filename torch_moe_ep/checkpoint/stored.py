"""A checkpoint as its files, read without process group, model or GPU."""

import io
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from torch_moe_ep.checkpoint.folder import MARKER, file_sizes, find_complete

Progress = Callable[[int], object]


@dataclass(frozen=True)
class Item:
    """One stored piece: a block of a tensor, or an object (`chunk` is None), and where it lies."""

    name: str
    chunk: ChunkStorageMetadata | None
    file: str
    offset: int
    num_bytes: int


class StoredCheckpoint:
    """The tensors of a complete checkpoint by name, read block by block.

    Args:
        path: the checkpoint's folder.

    Raises:
        FileNotFoundError: no complete checkpoint there.
        ValueError: its metadata cannot be read.

    Opening reads the metadata alone, by torch's own reader (pickle). Not collective.
    """

    def __init__(self, path: Path) -> None:
        found = find_complete(path)
        if found is None:
            raise FileNotFoundError(
                f"{path} holds no complete checkpoint ({MARKER} is missing: the save was "
                f"interrupted, or this is the folder around checkpoints)."
            )
        self.folder, self.marker = found
        self._reader = FileSystemReader(self.folder)
        try:
            self.metadata = self._reader.read_metadata()
        except Exception as error:  # pickle raises errors of any kind
            raise ValueError(
                f"the metadata of {self.folder} cannot be read ({type(error).__name__}: {error}); "
                f"take an earlier checkpoint."
            ) from error
        self._reader.set_up_storage_reader(self.metadata, is_coordinator=True)
        self.tensors: dict[str, TensorStorageMetadata] = {
            name: entry
            for name, entry in self.metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    @property
    def num_bytes(self) -> int:
        """Bytes of everything that is stored, each block once."""
        return sum(item.num_bytes for item in self.items())

    def items(self) -> Iterator[Item]:
        """Every stored piece, in the order of the metadata."""
        for index, place in self.metadata.storage_data.items():
            entry = self.tensors.get(index.fqn)
            chunk = None
            if entry is not None:
                chunk = next(c for c in entry.chunks if index.offset in (None, c.offsets))
            yield Item(index.fqn, chunk, place.relative_path, place.offset, place.length)

    def read(self, name: str, box: ChunkStorageMetadata | None = None) -> torch.Tensor:
        """Read one block of one tensor (None: all of it) onto the CPU.

        Besides the block it holds one stored block at a time.

        Raises:
            ValueError: the stored blocks leave a part of it out.
        """
        entry = self.tensors[name]
        if box is None:
            box = ChunkStorageMetadata(torch.Size([0] * len(entry.size)), entry.size)
        target = torch.empty(box.sizes, dtype=entry.properties.dtype)
        reads = create_read_items_for_chunk_list(name, entry, [box])
        if sum(torch.Size(read.lengths).numel() for read in reads) != target.numel():
            raise ValueError(
                f"{name} of {self.folder} is not stored whole; take an earlier checkpoint."
            )
        self._reader.read_data(LoadPlan(reads), _Target(target)).wait()
        return target

    def read_bytes(self, item: Item) -> bytes:
        """Read one stored piece as it lies in its file."""
        with (self.folder / item.file).open("rb") as file:
            file.seek(item.offset)
            return file.read(item.num_bytes)

    def read_object(self, name: str) -> io.BytesIO:
        """Read the bytes of an object that is no tensor; nothing is unpickled."""
        place = self.metadata.storage_data[MetadataIndex(name)]
        item = Item(name, None, place.relative_path, place.offset, place.length)
        return io.BytesIO(self.read_bytes(item))


class _Target(DefaultLoadPlanner):
    """Has the reader copy everything into one tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.tensor = tensor

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        view = self.tensor
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            view = view.narrow(dim, start, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing to do: the view was written in place."""


def describe(stored: StoredCheckpoint) -> dict[str, Any]:
    """What a checkpoint holds: counts, bytes and what its marker says; every value is plain."""
    parts: dict[str, dict[str, int]] = {}
    for name, entry in stored.tensors.items():
        part = parts.setdefault(name.split(".")[0], {"tensors": 0, "elements": 0, "bytes": 0})
        part["tensors"] += 1
        part["elements"] += entry.size.numel()
        part["bytes"] += entry.size.numel() * entry.properties.dtype.itemsize
    weights = [entry for name, entry in stored.tensors.items() if name.startswith("model.")]
    return {
        "folder": str(stored.folder),
        **{key: value for key, value in stored.marker.items() if key != "files"},
        "parts": parts,
        "dtypes": sorted({str(entry.properties.dtype) for entry in weights}),
        "objects": len(stored.metadata.state_dict_metadata) - len(stored.tensors),
        "num_files": len(stored.marker.get("files", {})),
        "file_bytes": sum(stored.marker.get("files", {}).values()),
    }


def problems_of(stored: StoredCheckpoint, progress: Progress) -> list[str]:
    """Read everything and say what is wrong, a sentence each; nothing: it can be loaded.

    Files: every one that was there when the checkpoint was completed, with its size. Pieces: each
    is read whole, its checksums compared, its shape and dtype compared with the metadata. Tensors:
    their blocks cover them.

    Args:
        stored: the checkpoint.
        progress: called with the bytes of each piece that was read.
    """
    found: list[str] = []
    sizes = file_sizes(stored.folder)
    for name, size in stored.marker.get("files", {}).items():
        if name not in sizes:
            found.append(f"{name} is missing.")
        elif sizes[name] != size:
            found.append(f"{name} has {sizes[name]} bytes, and had {size} when it was completed.")
    for item in stored.items():
        problem = _problem_of_item(stored, item)
        if problem is not None:
            found.append(f"{item.name} in {item.file}: {problem}")
        progress(item.num_bytes)
    for name, entry in stored.tensors.items():
        covered = sum(chunk.sizes.numel() for chunk in entry.chunks)
        if covered != entry.size.numel():
            found.append(f"{name}: its blocks have {covered} elements, not {entry.size.numel()}.")
    return found


def _problem_of_item(stored: StoredCheckpoint, item: Item) -> str | None:
    try:
        data = stored.read_bytes(item)
        if len(data) != item.num_bytes:
            return f"the file ends {item.num_bytes - len(data)} bytes early."
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            return f"checksum of {damaged} does not fit its bytes."
        if item.chunk is None:
            return None
        tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        wanted = (tuple(item.chunk.sizes), stored.tensors[item.name].properties.dtype)
        if (tuple(tensor.shape), tensor.dtype) != wanted:
            return f"holds {tuple(tensor.shape)} of {tensor.dtype}, not {wanted[0]} of {wanted[1]}."
    except Exception as error:  # damaged archives raise errors of any kind
        return f"cannot be read ({type(error).__name__}: {error})."
    return None
