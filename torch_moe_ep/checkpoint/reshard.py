"""Rewrite a checkpoint for another grid: the files that its ranks would have written.

`load_checkpoint` needs none of this, it reads any grid's files. Files of the own grid let every
rank read one file from its beginning to its end, and let an old layout be dropped.
"""

import io
import itertools
import shutil
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import (
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from torch_moe_ep.checkpoint.folder import (
    HUB_FOLDER,
    file_sizes,
    open_partial,
    publish,
    write_marker,
)
from torch_moe_ep.checkpoint.stored import Progress, StoredCheckpoint
from torch_moe_ep.parallel.mesh import MESH_DIMS, grid_shape
from torch_moe_ep.parallel.swap import WEIGHT_NAMES, expert_box


def reshard(
    stored: StoredCheckpoint,
    folder: Path,
    world_size: int,
    expert_parallel_degree: int,
    hybrid_shard_degree: int,
    progress: Progress,
) -> None:
    """Write a checkpoint anew, one file per rank of the grid; values and names stay.

    Generators, data positions and the number of ranks they belong to stay those of the ranks that
    trained. Memory: one block of the new layout and one of the old.

    Args:
        stored: the checkpoint to read.
        folder: of the new one; must not exist.
        world_size: W.
        expert_parallel_degree: P.
        hybrid_shard_degree: S; 0 means W / P.
        progress: called with the bytes of each block that was written.

    Raises:
        ValueError: the folder exists, or the degrees do not divide W or the experts.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists; name a folder that does not, or remove it first.")
    grid = grid_shape(world_size, expert_parallel_degree, hybrid_shard_degree)
    plans = _plans(stored, world_size, grid)
    partial = open_partial(folder)
    writer = FileSystemWriter(partial)
    writer.set_up_storage_writer(True)
    writer.prepare_local_plan(plans[0])
    plans, metadata = create_default_global_save_plan(plans)
    metadata.planner_data = stored.metadata.planner_data
    planner = _Copier(stored, progress)
    results: list[list[WriteResult]] = [
        writer.write_data(plan, planner).wait() for plan in writer.prepare_global_plan(plans)
    ]
    writer.finish(metadata, results)
    if (stored.folder / HUB_FOLDER).is_dir():
        shutil.copytree(stored.folder / HUB_FOLDER, partial / HUB_FOLDER)
    marker = {**stored.marker, "grid": dict(zip(MESH_DIMS, grid, strict=True))}
    write_marker(partial, {**marker, "files": file_sizes(partial)})
    publish(folder)


class _Copier(DefaultSavePlanner):
    """Gives the writer each block when it is its turn, read from the old checkpoint."""

    def __init__(self, stored: StoredCheckpoint, progress: Progress) -> None:
        super().__init__()
        self.stored = stored
        self.progress = progress

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        name = write_item.index.fqn
        if write_item.tensor_data is None:
            return self.stored.read_object(name)
        block = self.stored.read(name, write_item.tensor_data.chunk)
        self.progress(block.nbytes)
        return block


def _plans(stored: StoredCheckpoint, world_size: int, grid: tuple[int, int, int]) -> list[SavePlan]:
    """What each rank writes: blocks of experts as `local_box` has them, dense rows as FSDP2 does.

    Replicas hold equal experts: the first one writes. Objects and numbers are rank 0's.
    """
    items: list[list[WriteItem]] = [[] for _ in range(world_size)]
    experts = [f"{name}.{key}" for name in stored.marker["experts"] for key in WEIGHT_NAMES]
    _, num_shards, num_owners = grid
    for name, entry in stored.tensors.items():
        is_expert = any(_is_of(name, expert, entry.size, stored) for expert in experts)
        if is_expert:
            _check_divides(name, entry.size[0], num_owners)
            boxes = {
                shard * num_owners + owner: expert_box(
                    entry.size, (owner, num_owners), (shard, num_shards)
                )
                for shard, owner in itertools.product(range(num_shards), range(num_owners))
            }
        elif name.startswith(("model.", "optimizer.")) and entry.size.numel() > 1:
            boxes = dict(enumerate(_rows(entry.size, world_size)))
        else:
            boxes = {0: tuple(slice(0, length) for length in entry.size)}
        for rank, box in boxes.items():
            offsets = torch.Size([part.start for part in box])
            sizes = torch.Size([part.stop - part.start for part in box])
            if sizes.numel() == 0 and rank > 0:
                continue
            items[rank].append(
                WriteItem(
                    index=MetadataIndex(name, offsets),
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        ChunkStorageMetadata(offsets, sizes), entry.properties, entry.size
                    ),
                )
            )
    for name in stored.metadata.state_dict_metadata:
        if name not in stored.tensors:
            items[0].append(WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO))
    return [SavePlan(rank_items) for rank_items in items]


def _is_of(name: str, expert: str, size: torch.Size, stored: StoredCheckpoint) -> bool:
    """Whether a tensor is an expert weight, or optimizer state of its shape."""
    weight = f"model.{expert}"
    is_state = name.startswith(f"optimizer.state.{expert}.")
    return name == weight or (is_state and size == stored.tensors[weight].size)


def _check_divides(name: str, num_experts: int, num_owners: int) -> None:
    if num_experts % num_owners != 0:
        raise ValueError(
            f"the expert-parallel degree must divide the number of experts: {name} has "
            f"{num_experts} experts, got {num_owners}; choose a divisor of {num_experts}."
        )


def _rows(size: torch.Size, world_size: int) -> list[tuple[slice, ...]]:
    """The rows of each rank, as torch.chunk deals them out: rounded up, the last ranks fewer."""
    share = -(-size[0] // world_size)
    rest = [slice(0, length) for length in size[1:]]
    starts = [min(rank * share, size[0]) for rank in range(world_size)]
    return [(slice(start, min(start + share, size[0])), *rest) for start in starts]
