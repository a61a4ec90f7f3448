"""What a rank holds while weights come in: its own part, and little beside it.

Letters: W ranks, P expert-parallel degree, S shard degree of the experts.
"""

import ctypes
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from parallel_cases import Run

import torch_moe_ep
from torch_moe_ep import apply_expert_parallel, init_device_mesh
from torch_moe_ep.parallel import swap
from torch_moe_ep.testing import tiny_mixtral
from torch_moe_ep.testing.parallel import from_rank0, full_parameters, wrap

MIB = 1024**2
SCALED = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_local_experts": 16,
}
EXPERT_BYTES = 4 * 4 * 16 * 3 * 256 * 1024  # fp32, layers, experts, matrices, H, I: 192 MiB
LAYER_BYTES = EXPERT_BYTES // 4
PIECE_BYTES = 4 * 256 * 1024  # one stored matrix of one expert
M_MMAP_THRESHOLD = -3  # of malloc.h
SLACK_BYTES = 16 * MIB  # dense weights and what Python and the allocator keep


class Peak:
    """The most anonymous memory of this process since the start, in bytes above it."""

    def __enter__(self) -> "Peak":
        _give_back_what_is_freed()
        self.start = self.highest = _anonymous_bytes()
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.is_over.set()
        self.thread.join()
        self.num_bytes = max(self.highest, _anonymous_bytes()) - self.start

    def _watch(self) -> None:
        while not self.is_over.wait(0.0005):
            self.highest = max(self.highest, _anonymous_bytes())


def _give_back_what_is_freed() -> None:
    """Large blocks go back to the system at once; glibc learns to keep those it has seen freed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 128 * 1024)


def _anonymous_bytes() -> int:
    """Without the pages of files, which the system can drop."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    pytest.skip("this system does not count a process's own memory")


def loaded_from_meta(run: Run, folder: str) -> int:
    mesh = init_device_mesh("cpu", run.ep, run.shard)
    with Peak() as peak:
        with torch.device("meta"):
            model = tiny_mixtral(**SCALED)
        model = wrap(apply_expert_parallel(model, mesh), run.wrap, mesh)
        torch_moe_ep.load_hf(model, folder)
    return peak.num_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("scaled")
    tiny_mixtral(**SCALED).save_pretrained(path, max_shard_size="100MB")
    return str(path)


@pytest.mark.parametrize("run", [Run("fsdp2", 4, 2), Run("fsdp2", 4, 4)], ids=str)
def test_load_hf_from_meta_holds_its_shards_and_one_piece(ranks, folder, run):
    """Peak host memory: experts / (P S) + dense / W + one stored matrix."""
    shards = EXPERT_BYTES // 4
    ranks(4).close()  # new workers: freed memory of a case before would be used again unseen
    for peak in ranks(4).run(loaded_from_meta, run, folder):
        assert shards < peak < shards + PIECE_BYTES + SLACK_BYTES


def synced_to_meta(run: Run) -> int:
    """Peak of a rank whose experts are on meta while rank 0's are handed out."""
    with torch.device("cpu" if dist.get_rank() == 0 else "meta"):
        model = tiny_mixtral(**SCALED)
    mesh = init_device_mesh("cpu", run.ep, run.shard)
    with pytest.MonkeyPatch.context() as patch, Peak() as peak:
        patch.setattr(swap, "SYNC_CHUNK_BYTES", 4 * MIB)
        apply_expert_parallel(model, mesh, sync_from_rank0=True)
    return peak.num_bytes


@pytest.mark.parametrize("run", [Run("none", 4, 1), Run("none", 4, 2)], ids=str)
def test_sync_from_rank0_holds_its_shards_one_layer_and_one_chunk(ranks, run):
    """Peak memory: experts / (P S) + one layer's experts / P, twice while FSDP slices + a chunk."""
    shards = EXPERT_BYTES // 4
    layer = LAYER_BYTES // run.ep
    ranks(4).close()
    for peak in ranks(4).run(synced_to_meta, run)[1:]:
        assert shards < peak < shards + 2 * layer + 4 * MIB + SLACK_BYTES


def synced_in_chunks(run: Run, limit: int):
    """Full parameters, and the bytes of each broadcast."""
    model = tiny_mixtral(**run.model)
    if dist.get_rank() != 0:
        for layer in model.model.layers:
            layer.mlp.experts.to("meta")
    mesh = init_device_mesh("cpu", run.ep, run.shard)
    sizes: list[int] = []
    broadcast = dist.broadcast

    def watched(tensor, *args, **kwargs):
        sizes.append(tensor.nbytes)
        return broadcast(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swap, "SYNC_CHUNK_BYTES", limit)
        patch.setattr(swap.dist, "broadcast", watched)
        apply_expert_parallel(model, mesh, sync_from_rank0=True)
    model = wrap(model, run.wrap, mesh)
    return from_rank0(full_parameters(model)), sizes


def loaded_per_rank(run: Run, folder: str):
    mesh = init_device_mesh("cpu", run.ep, run.shard)
    model = wrap(apply_expert_parallel(tiny_mixtral(seed=5, **run.model), mesh), run.wrap, mesh)
    torch_moe_ep.load_hf(model, folder)
    return from_rank0(full_parameters(model))


@pytest.mark.parametrize("limit", [5_000, 10**9])
@pytest.mark.parametrize(
    "run",
    [
        Run("fsdp2", 4, 1, model={"num_local_experts": 12}),
        Run("fsdp2", 4, 2, 1, model={"num_local_experts": 12}),
        Run("fsdp1", 4, 4, model={"num_local_experts": 12, "intermediate_size": 36}),
    ],
    ids=str,
)
def test_sync_from_rank0_in_chunks_equals_the_load_per_rank(ranks, tmp_path, run, limit):
    tiny_mixtral(**run.model).save_pretrained(tmp_path)
    found, sizes = ranks(4).run(synced_in_chunks, run, limit)[0]
    expected = ranks(4).run(loaded_per_rank, run, str(tmp_path))[0]
    assert set(found) == set(expected)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    row = 4 * 64  # H elements; the down projection's rows are I
    width = run.model.get("intermediate_size", 128)
    assert max(sizes) <= max(limit, row, 4 * width)
    assert len(sizes) >= (2 * 2 if limit == 10**9 else 2 * 12)
