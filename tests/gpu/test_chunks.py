"""num_chunks under NCCL with several ranks on one GPU: right values and order, no timings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from chunk_cases import NUM_EXPERTS, Layer, results_of_two_steps, rows_of_chunks
from torch.profiler import ProfilerActivity, profile

from benchmarks.launch_order import EXPERTS, forward_on_two_ranks, launches_of
from torch_moe_ep import MoEConfig, apply_expert_parallel, init_device_mesh, ops
from torch_moe_ep.testing import (
    RankPool,
    assert_close,
    batch_of,
    relative_error,
    share_the_gpu,
    tiny_mixtral,
)
from torch_moe_ep.testing.parallel import from_rank0, full_gradients, wrap
from torch_moe_ep.testing.reference import reference_gradients

from .cases import Case, expert_ids_of, integers, normal, poisoned_memory, requires_gpu
from .test_several_ranks import num_host_waits

pytestmark = requires_gpu

TIMEOUT_S = 120.0
LAYER = Layer(hidden=128, width=256, device="cuda", tokens_apart=230)
# Ranks with a GPU each would take the peer transport: test_peer_chunks.py.
COLLECTIVE = {"transport": "collective"}


def movement_in_chunks(num_chunks: int, top_k: int, has_invalid: bool) -> list[str]:
    """What differs in any bit from chunks moved alone, with NaN in memory that nobody wrote."""
    rank, group = share_the_gpu(), dist.group.WORLD.group_name
    tokens = 0 if rank == 1 else 150 + 230 * rank
    case = Case(tokens, NUM_EXPERTS, top_k, 48, "skewed", torch.bfloat16)
    ids = expert_ids_of(case, seed=rank)
    if has_invalid:
        ids[::7, 0] = NUM_EXPERTS + 3
        ids[::11, -1] = -2
    ids = ids.cuda()
    x = integers(tokens, 48, dtype=case.dtype, seed=rank).cuda()
    weights = normal(tokens, top_k, seed=rank + 50).cuda()
    local = NUM_EXPERTS // dist.get_world_size()
    gate_up = normal(local, 64, 48, dtype=case.dtype, seed=1).cuda()
    down = normal(local, 48, 32, dtype=case.dtype, seed=2).cuda()
    with poisoned_memory():
        counts = ops.plan(ids, NUM_EXPERTS, group_name=group).counts
        alone = rows_of_chunks((x, weights, ids), (gate_up, down), num_chunks)
        chunks, packed = ops.plan_chunks(x, weights, ids, NUM_EXPERTS, num_chunks, group_name=group)
        differing = [] if torch.equal(chunks.counts.sum(0), counts) else ["counts"]
        outputs = []
        for buffer in (packed, (None, None)):  # packed with the plan, and chunk by chunk
            output, found, found_weights, z = torch.ops.torch_moe_ep.chunked_experts_forward(
                x, weights, *chunks[:3], gate_up, down, *chunks[3:], 0, *buffer, True, True
            )
            outputs.append(output)
            differing += [] if torch.equal(found, alone["rows"]) else ["rows"]
            differing += [] if torch.equal(found_weights, alone["row_weights"]) else ["weights"]
            differing += ["z"] if z.isnan().any() or output.isnan().any() else []
        differing += [] if torch.equal(*outputs) else ["output"]
    return differing


@pytest.mark.parametrize("has_invalid", [False, True])
@pytest.mark.parametrize("num_chunks", [2, 3])
@pytest.mark.parametrize(("world_size", "top_k"), [(2, 1), (4, 3)])
def test_ranks_movement_in_chunks_is_that_of_one_bit_for_bit(
    gpu_ranks: Callable[[int], RankPool],
    world_size: int,
    top_k: int,
    num_chunks: int,
    has_invalid: bool,
) -> None:
    found = gpu_ranks(world_size).run(
        movement_in_chunks, num_chunks, top_k, has_invalid, timeout_s=TIMEOUT_S
    )
    assert found == [[]] * world_size


def results(layer: Layer, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Everything that two equal steps give."""
    share_the_gpu()
    return results_of_two_steps(layer, dist.get_world_size(), {**config, **COLLECTIVE})


@pytest.mark.parametrize(
    ("world_size", "num_chunks", "layer", "config"),
    [
        (2, 2, LAYER, {}),
        (2, 3, replace(LAYER, routing="piled"), {"recompute": "gate_up"}),
        (4, 3, replace(LAYER, top_k=3), {}),
        (4, 40, replace(LAYER, tokens_apart=5, routing="piled"), {}),  # more than tokens
        (4, 2, LAYER, {"max_slots": 128}),
    ],
    ids=str,
)
def test_ranks_layer_in_chunks_equals_one_chunk_in_float32(
    gpu_ranks: Callable[[int], RankPool],
    world_size: int,
    num_chunks: int,
    layer: Layer,
    config: dict[str, Any],
) -> None:
    """Traps 8, 9, 10 and 21: unwritten memory, no tokens, piles, two runs bit-equal."""
    pool = gpu_ranks(world_size)
    whole = pool.run(results, layer, config, timeout_s=TIMEOUT_S)
    chunked = pool.run(results, layer, {**config, "num_chunks": num_chunks}, timeout_s=TIMEOUT_S)
    for ours, expected in zip(chunked, whole, strict=True):
        assert torch.equal(ours.pop("load"), expected.pop("load"))
        assert_close(ours, expected, 1e-5)


@pytest.mark.parametrize("num_chunks", [2, 3])
@pytest.mark.parametrize("recompute", ["none", "gate_up"])
def test_ranks_layer_in_chunks_in_bfloat16_errs_no_more_than_twice_one_chunk(
    gpu_ranks: Callable[[int], RankPool], recompute: str, num_chunks: int
) -> None:
    """Against fp32: a chunk's GEMMs are those of one chunk with other row counts."""
    pool = gpu_ranks(2)
    half = replace(LAYER, dtype=torch.bfloat16)
    config = {"recompute": recompute}
    exact = pool.run(results, LAYER, config, timeout_s=TIMEOUT_S)
    whole = pool.run(results, half, config, timeout_s=TIMEOUT_S)
    config = {**config, "num_chunks": num_chunks}
    chunked = pool.run(results, half, config, timeout_s=TIMEOUT_S)
    for ours, theirs, expected in zip(chunked, whole, exact, strict=True):
        for name, reference in expected.items():
            if reference.numel() and name != "load":
                allowed = 2 * relative_error(theirs[name].float(), reference)
                assert relative_error(ours[name].float(), reference) <= allowed, name


def host_waits_of_a_layer() -> tuple[int, int]:
    """Waits of the host for the GPU in one layer's forward and backward, as the profiler saw."""
    share_the_gpu()
    layer = replace(LAYER, dtype=torch.bfloat16)
    model = layer.experts(dist.get_world_size(), {"num_chunks": 3, **COLLECTIVE})
    waits = []
    for _ in range(2):  # the first run builds communicators and gathers weights
        x, ids, weights, upstream = layer.inputs()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as forward:
            y = model(x, ids, weights)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as backward:
            y.backward(upstream)
        waits = [num_host_waits(forward), num_host_waits(backward)]
    return waits[0], waits[1]


def test_ranks_chunks_wait_once_on_the_host_in_forward_and_never_in_backward(
    gpu_ranks: Callable[[int], RankPool],
) -> None:
    assert gpu_ranks(2).run(host_waits_of_a_layer, timeout_s=TIMEOUT_S) == [(1, 0), (1, 0)]


def names_in_order(launches: list[Any]) -> list[str]:
    """Exchanges and the activation of each chunk's experts, in the order of launches."""
    found = []
    for launch in launches:
        if launch.lane == EXPERTS:
            found.append("counts" if "AllGather" in launch.name else "rows")
        elif "swiglu" in launch.name:
            found.append("experts")
    return found


def test_ranks_next_chunk_is_launched_before_the_gemms_of_a_chunk() -> None:
    launches = forward_on_two_ranks(layers=2, num_chunks=3)
    rows = "rows"
    # Rows and weights of two chunks leave before the first is computed; results go back alone.
    layer = ["counts", rows, rows, rows, rows, "experts", rows, rows, rows, "experts", rows]
    assert names_in_order(launches) == [*layer, "experts", rows] * 2


def backward_launches() -> list[str]:
    """What this rank launches in the backward of a layer in two chunks."""
    rank = share_the_gpu()
    layer = Layer(hidden=128, width=256, device="cuda", tokens_apart=100)
    model = layer.experts(2, {"num_chunks": 2, **COLLECTIVE})
    found: list[str] = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(rank)
        x = torch.randn(300, 128, generator=generator).cuda().requires_grad_()
        ids = expert_ids_of(Case(300, NUM_EXPERTS, 2, 128, "even", torch.float32), seed=rank)
        y = model(x, ids.cuda(), torch.rand(300, 2, generator=generator).cuda())
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            y.sum().backward()
            torch.cuda.synchronize()
        found = names_in_order(launches_of(profiled))
        dist.barrier()
    return found


def test_ranks_gradients_of_the_next_chunk_are_launched_before_the_gemms_of_a_chunk() -> None:
    """Gradients come alone; those of rows go back with those of their weights."""
    with RankPool(2, backend="nccl") as pool:
        found = pool.run(backward_launches, timeout_s=TIMEOUT_S)[0]
    assert found == ["rows", "rows", "experts", "rows", "rows", "experts", "rows", "rows"]


def train(config: dict[str, Any], how: str) -> dict[str, torch.Tensor]:
    """Full gradients of a small Mixtral under FSDP2, with or without activation checkpointing."""
    rank = share_the_gpu()
    mesh = init_device_mesh("cuda", 2)
    model = tiny_mixtral(router_scale=20.0).cuda()
    config = {**config, **COLLECTIVE}
    model = wrap(apply_expert_parallel(model, mesh, MoEConfig(**config)), "fsdp2", mesh)
    if how != "plain":
        options = {"use_reentrant": how == "reentrant"}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)  # type: ignore[operator]
        model.train()
    batch = {key: value.cuda() for key, value in batch_of(rank).items()}
    model(**batch).loss.backward()
    return {name: value.cpu() for name, value in from_rank0(full_gradients(model)).items()}


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_training_in_chunks_equals_one_process(
    gpu_ranks: Callable[[int], RankPool], world_size: int
) -> None:
    """Trap 18, and trap 11: checkpointing of either kind changes no bit."""
    pool = gpu_ranks(world_size)
    plain = pool.run(train, {"num_chunks": 3}, "plain", timeout_s=TIMEOUT_S)[0]
    _, expected = reference_gradients(
        lambda: tiny_mixtral(router_scale=20.0), [batch_of(rank) for rank in range(world_size)]
    )
    assert_close(plain, expected, 1e-5)
    for how in ("recompute", "reentrant"):
        found = pool.run(train, {"num_chunks": 3}, how, timeout_s=TIMEOUT_S)[0]
        assert [name for name in plain if not torch.equal(found[name], plain[name])] == []
