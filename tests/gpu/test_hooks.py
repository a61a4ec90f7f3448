"""Process-group hooks over NCCL with several ranks on one GPU: same bits, no added host waits."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from torch_moe_ep import apply_expert_parallel, hooks, init_device_mesh
from torch_moe_ep.metrics import traffic
from torch_moe_ep.testing import (
    LoneExperts,
    RankFailure,
    RankPool,
    batch_of,
    random_routing,
    share_the_gpu,
    tiny_mixtral,
)
from torch_moe_ep.testing.parallel import from_rank0, full_gradients, wrap

from .cases import requires_gpu
from .test_several_ranks import COLLECTIVE, num_host_waits

pytestmark = requires_gpu

TIMEOUT_S = 180.0
EP_STAGES = {"plan", "dispatch", "combine", "dispatch backward", "combine backward"}


@pytest.fixture(scope="module")
def pools() -> Iterator[Callable[[str, int], RankPool]]:
    """`pools(backend, W)` gives a pool of W ranks that share the GPU."""
    found: dict[tuple[str, int], RankPool] = {}

    def pool_of(backend: str, world_size: int) -> RankPool:
        if (backend, world_size) not in found:
            found[backend, world_size] = RankPool(world_size, backend=backend)
        return found[backend, world_size]

    yield pool_of
    for pool in found.values():
        pool.close()


def train(num_steps: int):
    """Gradients of the last of a few steps, and what the hooks counted."""
    rank = share_the_gpu()
    mesh = init_device_mesh("cuda", 2)
    model = wrap(apply_expert_parallel(tiny_mixtral().cuda(), mesh, COLLECTIVE), "fsdp2", mesh)
    for step in range(num_steps):
        model.zero_grad()
        batch = {key: value.cuda() for key, value in batch_of(rank, step=step).items()}
        model(**batch).loss.backward()
    gradients = from_rank0(full_gradients(model))
    torch.cuda.synchronize()
    return {name: value.cpu() for name, value in gradients.items()}, traffic()


@pytest.mark.parametrize("world_size", [2, 4])
def test_hooks_leave_gradients_alone_and_time_every_stage(pools, world_size):
    expected, _ = pools("nccl", world_size).run(train, 3, timeout_s=TIMEOUT_S)[0]
    found = pools("torch_moe_ep_nccl", world_size).run(train, 3, timeout_s=TIMEOUT_S)
    for name, gradient in expected.items():
        assert torch.equal(found[0][0][name], gradient), name
    for _, rows in found:
        by_stage = {row.stage: row for row in rows}
        assert by_stage.keys() >= {*EP_STAGES, "all-gather", "reduce-scatter"}
        for stage in EP_STAGES:
            assert by_stage[stage].timed_calls == by_stage[stage].calls
            assert by_stage[stage].milliseconds > 0


class Costs(NamedTuple):
    """What one forward and backward of a layer did."""

    host_waits: tuple[int, int]  # forward, backward
    launches: int  # kernels, copies and fills
    event_records: int
    hooked_calls: int


def costs_of_a_layer() -> Costs:
    rank = share_the_gpu()
    mesh = init_device_mesh("cuda", dist.get_world_size())
    experts = apply_expert_parallel(LoneExperts().cuda().bfloat16(), mesh, COLLECTIVE)
    x = torch.randn(300 + rank, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids, weights = random_routing(300 + rank, 2, 8)
    ids, weights = ids.cuda(), weights.cuda()
    for _ in range(3):  # the first runs build communicators, events and the order of a step
        torch.cuda.synchronize()
        calls_before = num_hooked_calls()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as forward:
            output = experts(x, ids, weights)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as backward:
            output.sum().backward()
            torch.cuda.synchronize()
        events = [*forward.events(), *backward.events()]
        found = Costs(
            (num_host_waits(forward), num_host_waits(backward)),
            sum(event.device_type == DeviceType.CUDA for event in events),
            sum(event.name.startswith("cudaEventRecord") for event in events),
            num_hooked_calls() - calls_before,
        )
    return found


def num_hooked_calls() -> int:
    return sum(row.calls for row in traffic())


def test_hooks_add_two_event_records_a_call_no_launch_and_no_host_wait(pools):
    plain = pools("nccl", 2).run(costs_of_a_layer, timeout_s=TIMEOUT_S)
    hooked = pools("torch_moe_ep_nccl", 2).run(costs_of_a_layer, timeout_s=TIMEOUT_S)
    for without, with_hooks in zip(plain, hooked, strict=True):
        assert without.hooked_calls == 0
        # The counts; rows and weights out; rows back; and in backward rows, rows and weights.
        assert with_hooks.hooked_calls >= 7
        assert with_hooks.host_waits == without.host_waits
        assert with_hooks.launches == without.launches
        added = with_hooks.event_records - without.event_records
        assert added == 2 * with_hooks.hooked_calls


def message_without_the_last_rank() -> str:
    rank = share_the_gpu()
    experts = apply_expert_parallel(LoneExperts().cuda(), init_device_mesh("cuda", 2), COLLECTIVE)
    os.environ["TORCH_MOE_EP_TIMEOUT_S"] = "3"
    x = torch.randn(5, 16, device="cuda")
    ids, weights = random_routing(5, 2, 8)
    for _ in range(2):
        experts(x, ids.cuda(), weights.cuda())
    if rank == 1:
        time.sleep(12.0)
        os._exit(0)
    with pytest.raises(RuntimeError) as caught:
        experts(x, ids.cuda(), weights.cuda())
    return str(caught.value)


def test_rank_that_stays_away_is_named_with_layer_and_stage():
    with RankPool(2, backend="torch_moe_ep_nccl") as pool, pytest.raises(RankFailure) as caught:
        pool.run(message_without_the_last_rank, timeout_s=TIMEOUT_S, grace_s=15.0)
    said = caught.value.results[0]
    assert "the all-gather of numbers failed" in said
    assert "layer experts, stage plan)" in said
    assert "rank 1 has not come to it: its last one is #" in said
    assert "layer experts, stage combine)" in said


def captured() -> list[float]:
    """A collective captured into a CUDA graph under hooks, replayed."""
    rank = share_the_gpu()
    group = dist.new_group([0, 1])
    value = torch.ones(4, device="cuda")
    dist.all_reduce(value, group=group)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dist.all_reduce(value, group=group)
    value.fill_(rank + 1.0)
    graph.replay()
    torch.cuda.synchronize()
    assert hooks.is_attached(group)
    return value.tolist()


def test_collective_in_a_cuda_graph_runs_under_hooks(pools):
    results = pools("torch_moe_ep_nccl", 2).run(captured, timeout_s=TIMEOUT_S)
    assert results == [[3.0] * 4] * 2
