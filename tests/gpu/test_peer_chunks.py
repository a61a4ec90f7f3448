"""num_chunks with the peer transport: the bits of the collective transport with the same chunks.

Ranks share one GPU, or have one each where there are as many.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from chunk_cases import NUM_EXPERTS, Layer, results_of_two_steps
from torch.profiler import ProfilerActivity, profile

from benchmarks.launch_order import launches_of
from torch_moe_ep import MoEConfig, apply_expert_parallel, init_device_mesh, ops
from torch_moe_ep.testing import (
    LoneExperts,
    RankFailure,
    RankPool,
    random_routing,
    share_the_gpu,
)

from .cases import Case, expert_ids_of, integers, normal, poisoned_memory, requires_gpu
from .test_peer import (
    BOUNDED,
    PEER,
    allocated_over_steps,
    host_waits_of_a_layer,
    layer_with,
    overflow_says,
    train,
)

pytestmark = requires_gpu

TIMEOUT_S = 120.0
LAYER = Layer(hidden=128, width=256, device="cuda", tokens_apart=230)
COLLECTIVE = {"transport": "collective"}
BUDGETS = pytest.mark.parametrize("config", [PEER, BOUNDED], ids=["exact", "bounded"])


def slots_of_ranks(
    ids_of_ranks: list[torch.Tensor], num_chunks: int, tile: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Every copy's owner * 2**40 + slot, rank by rank, and every rank's segment offsets."""
    world = len(ids_of_ranks)
    local = NUM_EXPERTS // world
    slots = [[-1] * ids.numel() for ids in ids_of_ranks]
    offsets = []
    for owner in range(world):
        offsets.append([0])
        for expert in range(owner * local, (owner + 1) * local):
            for chunk in range(num_chunks):
                slot = offsets[-1][-1]
                for rank, ids in enumerate(ids_of_ranks):
                    tokens, top_k = ids.shape
                    first, end = (c * tokens // num_chunks for c in (chunk, chunk + 1))
                    for copy in range(first * top_k, end * top_k):
                        if ids.flatten()[copy] == expert:
                            slots[rank][copy] = owner * 2**40 + slot
                            slot += 1
                offsets[-1].append(-(-slot // tile) * tile)
    return slots, offsets


def plan_differences(num_chunks: int, top_k: int) -> list[str]:
    """What of a plan is not as the loops above place it; exact, with room, and without."""
    rank, world, name = share_the_gpu(), dist.get_world_size(), dist.group.WORLD.group_name
    cases = [
        Case(0 if r == 1 else 40 + 13 * r, NUM_EXPERTS, top_k, 8, "skewed") for r in range(world)
    ]
    ids_of_ranks = [expert_ids_of(case, seed=r) for r, case in enumerate(cases)]
    for ids in ids_of_ranks:
        ids[::7, 0] = NUM_EXPERTS + 3
    slots, offsets = slots_of_ranks(ids_of_ranks, num_chunks, tile=128)
    most = max(own[-1] for own in offsets)
    found = []
    for capacity in (0, most, 256):
        needed = torch.zeros(1, dtype=torch.int64, device="cuda")
        plan = ops.peer_plan_chunks(
            ids_of_ranks[rank].cuda(),
            NUM_EXPERTS,
            num_chunks,
            group_name=name,
            capacity=capacity,
            slots_needed=needed,
        )
        room = capacity or most
        kept = [slot if slot % 2**40 < room else -1 for slot in slots[rank]]
        assert plan.segment_offsets is not None
        expected = {
            "slot_of_copy": plan.slot_of_copy.tolist() == kept,
            "offsets": plan.segment_offsets.tolist() == [min(it, room) for it in offsets[rank]],
            "needed": needed.item() == (most if most > room else 0),
            "counts": capacity > 0 or torch.equal(plan.counts.cpu(), plan.host_counts),
        }
        found += [f"capacity {capacity}: {key}" for key, is_so in expected.items() if not is_so]
    return found


@pytest.mark.parametrize(
    ("world_size", "num_chunks", "top_k"), [(2, 1, 2), (2, 3, 2), (4, 2, 3), (4, 60, 1)]
)
def test_peer_plan_of_chunks_orders_expert_chunk_rank_and_token(
    gpu_ranks: Callable[[int], RankPool], world_size: int, num_chunks: int, top_k: int
) -> None:
    """Trap 16; also fewer tokens than chunks, none on a rank, ids that no expert has, no room."""
    found = gpu_ranks(world_size).run(plan_differences, num_chunks, top_k, timeout_s=TIMEOUT_S)
    assert found == [[]] * world_size


def message_of_too_many_counts() -> str:
    share_the_gpu()
    ids = torch.zeros(4, 2, dtype=torch.int64, device="cuda")
    with pytest.raises(ValueError) as caught:
        ops.peer_plan_chunks(ids, NUM_EXPERTS, 1025, group_name=dist.group.WORLD.group_name)
    return str(caught.value)


def test_peer_plan_of_too_many_chunks_is_refused(gpu_ranks: Callable[[int], RankPool]) -> None:
    for said in gpu_ranks(2).run(message_of_too_many_counts, timeout_s=TIMEOUT_S):
        assert "num_chunks times num_experts must be at most 8192" in said and "got 8200" in said


def movement_over_peers(num_chunks: int, top_k: int, dtype: torch.dtype) -> list[str]:
    """What forward's outputs differ in from the collective ones, with NaN where nobody wrote."""
    rank, group = share_the_gpu(), dist.group.WORLD.group_name
    tokens = 0 if rank == 1 else 150 + 230 * rank
    ids = expert_ids_of(Case(tokens, NUM_EXPERTS, top_k, 48, "skewed", dtype), seed=rank).cuda()
    x = integers(tokens, 48, dtype=dtype, seed=rank).cuda()
    weights = normal(tokens, top_k, seed=rank + 50).cuda()
    local = NUM_EXPERTS // dist.get_world_size()
    gate_up = normal(local, 64, 48, dtype=dtype, seed=1).cuda()
    down = normal(local, 48, 32, dtype=dtype, seed=2).cuda()

    def forward(plan: ops.ChunkPlan) -> list[torch.Tensor]:
        results: list[torch.Tensor] = torch.ops.torch_moe_ep.chunked_experts_forward(
            x, weights, *plan[:3], gate_up, down, *plan[3:], 0, None, None, True, True
        )
        return results

    with poisoned_memory():
        plan, _ = ops.plan_chunks(x, weights, ids, NUM_EXPERTS, num_chunks, group_name=group)
        expected = forward(plan)
        differing = []
        for capacity in (0, 4096 * num_chunks):
            over_peers = ops.peer_plan_chunks(
                ids, NUM_EXPERTS, num_chunks, group_name=group, capacity=capacity
            )
            output, *kept = forward(over_peers)
            used = expected[1].size(0)
            found = [output, *(part[:used] for part in kept)]
            names = ("output", "rows", "row_weights", "z")
            differing += [
                f"capacity {capacity}: {name}"
                for name, ours, theirs in zip(names, found, expected, strict=True)
                if not torch.equal(ours, theirs)
            ]
    return differing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("world_size", "num_chunks", "top_k"), [(2, 2, 1), (2, 3, 2), (4, 3, 3)])
def test_peer_chunks_move_rows_as_the_collective_transport_bit_for_bit(
    gpu_ranks: Callable[[int], RankPool],
    world_size: int,
    num_chunks: int,
    top_k: int,
    dtype: torch.dtype,
) -> None:
    """Trap 8."""
    found = gpu_ranks(world_size).run(
        movement_over_peers, num_chunks, top_k, dtype, timeout_s=TIMEOUT_S
    )
    assert found == [[]] * world_size


def results(layer: Layer, configs: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
    """Everything that two equal steps give, with each configuration."""
    share_the_gpu()
    return [results_of_two_steps(layer, dist.get_world_size(), config) for config in configs]


HALF = replace(LAYER, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("world_size", "num_chunks", "layer", "config"),
    [
        (2, 2, HALF, {}),
        (2, 3, replace(HALF, routing="piled"), {"recompute": "gate_up"}),
        (4, 3, replace(HALF, top_k=3), {}),
        (4, 2, LAYER, {}),
        (4, 40, replace(HALF, tokens_apart=5, routing="piled"), {}),  # more than tokens
        (4, 2, HALF, {"max_slots": 128}),
    ],
    ids=str,
)
def test_peer_layer_in_chunks_is_bit_equal_to_collective_forward_and_every_gradient(
    gpu_ranks: Callable[[int], RankPool],
    world_size: int,
    num_chunks: int,
    layer: Layer,
    config: dict[str, Any],
) -> None:
    """Traps 8, 9, 10 and 21: unwritten memory, no tokens, piles, two runs bit-equal."""
    config = {**config, "num_chunks": num_chunks}
    configs = [{**config, **one} for one in (COLLECTIVE, PEER, {**BOUNDED, "budget_factor": 4.0})]
    for found in gpu_ranks(world_size).run(results, layer, configs, timeout_s=TIMEOUT_S):
        expected, *ours = found
        for name, result in zip(("exact", "bounded"), ours, strict=True):
            different = [key for key in expected if not torch.equal(result[key], expected[key])]
            assert different == [], name


@pytest.mark.parametrize("how", [{}, {"keep": "routing"}, {"keep": "rows"}], ids=str)
def test_peer_chunks_under_checkpointing_change_no_bit(
    gpu_ranks: Callable[[int], RankPool], how: dict[str, Any]
) -> None:
    """Trap 11."""
    plain = {**PEER, "num_chunks": 2}
    checkpointed = {"use_reentrant": False, **how}
    configs = [plain, {**plain, **checkpointed}, {**BOUNDED, "num_chunks": 2, **checkpointed}]
    for expected, *ours in gpu_ranks(2).run(layer_with, configs, timeout_s=TIMEOUT_S):
        for result in ours:
            assert [key for key in expected if not torch.equal(result[key], expected[key])] == []


@BUDGETS
def test_peer_training_in_chunks_under_fsdp2_is_bit_equal_to_collective(
    gpu_ranks: Callable[[int], RankPool], config: dict[str, Any]
) -> None:
    """Trap 18: streams of our own beside FSDP's."""
    pool = gpu_ranks(4)
    expected = pool.run(train, {**COLLECTIVE, "num_chunks": 3}, timeout_s=TIMEOUT_S)
    ours = pool.run(train, {**config, "num_chunks": 3}, timeout_s=TIMEOUT_S)
    for (losses, gradients), (their_losses, theirs) in zip(ours, expected, strict=True):
        assert losses == their_losses
        assert [key for key in theirs if not torch.equal(gradients[key], theirs[key])] == []


@BUDGETS
def test_peer_chunks_make_no_call_that_waits_for_the_gpu(
    gpu_ranks: Callable[[int], RankPool], config: dict[str, Any]
) -> None:
    """Trap 17. budget="exact" looks at a counter in the host's own memory instead."""
    waits = gpu_ranks(2).run(
        host_waits_of_a_layer, {**config, "num_chunks": 3}, timeout_s=TIMEOUT_S
    )
    assert waits == [(0, 0), (0, 0)]


@pytest.mark.parametrize("world_size", [2, 4])
def test_peer_overflow_in_chunks_raises_on_every_rank_before_parameters_change(
    gpu_ranks: Callable[[int], RankPool], world_size: int
) -> None:
    """Trap 19."""
    found = gpu_ranks(world_size).run(overflow_says, True, 2, timeout_s=TIMEOUT_S)
    for message, is_same, has_moved in found:
        # 1000 copies of each chunk for each of two experts, in whole tiles of 128: 4 * 1024 rows.
        assert "a rank needed 4096 rows in one layer" in message
        assert "(expert-parallel groups of ranks [0, 1])" in message
        assert is_same and has_moved


def order_of_launches() -> tuple[list[str], bool]:
    """What forward launches, in order, and whether rows move on another stream than GEMMs."""
    share_the_gpu()
    model = LAYER.experts(2, {**PEER, "num_chunks": 3})
    found: list[Any] = []
    for _ in range(2):  # the first run maps memory
        x, ids, weights, _upstream = LAYER.inputs()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            model(x, ids, weights)
            torch.cuda.synchronize()
        found = launches_of(profiled)
        dist.barrier()
    kinds = ("push_rows", "swiglu", "pull_rows", "counted_copy", "gather_numbers")
    order = [kind for launch in found for kind in kinds if kind in launch.name]
    streams = {kind: {launch.stream for launch in found if kind in launch.name} for kind in kinds}
    return order, streams["push_rows"].isdisjoint(streams["swiglu"])


def test_peer_chunks_leave_before_the_gemms_of_the_chunk_before(
    gpu_ranks: Callable[[int], RankPool],
) -> None:
    order, is_apart = gpu_ranks(2).run(order_of_launches, timeout_s=TIMEOUT_S)[0]
    assert is_apart
    assert order[0] == "gather_numbers"
    moves = [kind for kind in order if kind in ("push_rows", "swiglu", "pull_rows")]
    first = ["push_rows", "push_rows", "swiglu", "pull_rows", "push_rows", "swiglu", "pull_rows"]
    assert moves == [*first, "swiglu", "pull_rows"]
    assert order.count("counted_copy") == 2  # rows and weights that backward reads, once


def captured_chunks() -> list[str]:
    """Where replays of a captured layer in chunks, both directions, differ from running it."""
    rank, name = share_the_gpu(), dist.group.WORLD.group_name
    hidden, width, tokens, local = 128, 256, 200, NUM_EXPERTS // dist.get_world_size()
    dtype = torch.bfloat16
    x = normal(tokens, hidden, dtype=dtype, seed=rank).cuda().requires_grad_()
    weights = torch.rand(tokens, 2, device="cuda").requires_grad_()
    gate_up = normal(local, 2 * width, hidden, dtype=dtype, seed=1, scale=0.1).cuda()
    down = normal(local, hidden, width, dtype=dtype, seed=2, scale=0.1).cuda()
    leaves = [x, weights, gate_up.requires_grad_(), down.requires_grad_()]
    ids = random_routing(tokens, 2, NUM_EXPERTS, seed=rank)[0].cuda()
    grad = normal(tokens, hidden, dtype=dtype, seed=rank + 7).cuda()

    def layer() -> list[torch.Tensor]:
        plan = ops.peer_plan_chunks(ids, NUM_EXPERTS, 3, group_name=name, capacity=2048)
        y = ops.chunked_experts(x, weights, plan, gate_up, down)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        ours = layer()
    found = []
    for step in range(3):
        ids.copy_(random_routing(tokens, 2, NUM_EXPERTS, seed=10 * step + rank)[0])
        graph.replay()
        torch.cuda.synchronize()
        replayed = [tensor.clone() for tensor in ours]
        names = ("y", "x", "weights", "gate_up", "down")
        found += [
            f"step {step}: {key}"
            for key, a, b in zip(names, replayed, layer(), strict=True)
            if not torch.equal(a, b)
        ]
    return found


def test_peer_chunks_in_a_cuda_graph_replay_with_other_routings(
    gpu_ranks: Callable[[int], RankPool],
) -> None:
    assert gpu_ranks(2).run(captured_chunks, timeout_s=TIMEOUT_S) == [[], []]


def streams_in_turn() -> list[str]:
    """Layers on streams in turn, each of which reads what came in the buffer that all share."""
    share_the_gpu()
    model = HALF.experts(2, {**BOUNDED, "num_chunks": 2})

    def gradients(streams: list[torch.cuda.Stream]) -> list[torch.Tensor]:
        found = []
        for stream in streams:
            with torch.cuda.stream(stream):
                model.zero_grad()
                x, ids, weights, upstream = HALF.inputs()
                model(x, ids, weights).backward(upstream)
                found.append([p.grad.to_local().clone() for p in model.parameters()])
        torch.cuda.synchronize()
        return [grad for grads in found for grad in grads]

    main = torch.cuda.current_stream()
    expected = gradients([main] * 4)
    found = gradients([torch.cuda.Stream() for _ in range(4)])
    pairs = zip(found, expected, strict=True)
    return [str(i) for i, (a, b) in enumerate(pairs) if not torch.equal(a, b)]


def test_peer_chunks_on_streams_in_turn_wait_for_each_others_rows(
    gpu_ranks: Callable[[int], RankPool],
) -> None:
    assert gpu_ranks(2).run(streams_in_turn, timeout_s=TIMEOUT_S) == [[], []]


def message_without_a_partner_after_the_plan(config: dict[str, Any]) -> str:
    """What rank 0 says in the step in which rank 1 dies once the counts have met."""
    rank = share_the_gpu()
    model = LoneExperts(8, hidden=128, width=256).cuda().bfloat16()
    mesh = init_device_mesh("cuda", 2)
    experts = apply_expert_parallel(model, mesh, MoEConfig(**config, num_chunks=2))
    optimizer = torch.optim.SGD(experts.parameters(), lr=0.1)
    x = torch.randn(50, 128, device="cuda", dtype=torch.bfloat16)
    ids, weights = random_routing(50, 2, 8)

    def step() -> None:
        experts(x, ids.cuda(), weights.cuda()).float().pow(2).mean().backward()
        optimizer.step()

    step()
    torch.cuda.synchronize()
    os.environ["TORCH_MOE_EP_TIMEOUT_S"] = "3"
    if rank == 1:

        def die(*_args: Any, **_kwargs: Any) -> None:
            torch.cuda.synchronize()
            time.sleep(12.0)
            os._exit(0)

        ops.chunked_experts = die  # type: ignore[assignment]
    with pytest.raises(RuntimeError) as caught:
        step()
    return str(caught.value)


@BUDGETS
def test_peer_rank_that_stays_away_from_a_chunk_is_named_with_the_stage(
    config: dict[str, Any],
) -> None:
    with RankPool(2, backend="nccl") as pool, pytest.raises(RankFailure) as caught:
        pool.run(
            message_without_a_partner_after_the_plan, config, timeout_s=TIMEOUT_S, grace_s=15.0
        )
    said = caught.value.results[0]
    assert "the exchange through peer memory failed on global rank 0" in said
    assert "global ranks that did not take part: 1 (" in said
    assert "stage dispatch" in said


def test_peer_memory_in_chunks_is_flat_over_steps(gpu_ranks: Callable[[int], RankPool]) -> None:
    """Trap 19."""
    config = {**BOUNDED, "num_chunks": 3}
    for early, late, taken in gpu_ranks(2).run(
        allocated_over_steps, config, 40, timeout_s=TIMEOUT_S
    ):
        assert late == early
        assert taken < 64 << 20  # NCCL's own, if anything
