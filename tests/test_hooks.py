"""Process-group hooks: results untouched, whose groups they cover, what they count."""

import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from parallel_cases import Run, build, gradients_on_rank

from torch_moe_ep import apply_expert_parallel, hooks, init_device_mesh
from torch_moe_ep.metrics import StageTraffic, traffic
from torch_moe_ep.testing import LoneExperts, batch_of, random_routing

HIDDEN, TOKENS, TOP_K = 16, 5, 2
EP_STAGES = {"plan", "dispatch", "combine", "dispatch backward", "combine backward"}


@pytest.fixture
def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


RUNS = [
    Run("fsdp2", 4, 2),
    Run("hsdp2", 4, 2),
    Run("fsdp1", 4, 2),
    Run("fsdp1_hybrid", 4, 2),
    Run("ddp", 2, 2),
    Run("none", 2, 2),
    Run("fsdp2", 2, 2, config={"dispatcher": "all_gather"}, label="all_gather"),
    Run("fsdp2", 2, 2, config={"num_chunks": 3}, label="chunks"),
]


def hooked_gradients(run: Run):
    """Gradients, and what the hooks counted on each kind of group."""
    loss, gradients = gradients_on_rank(run)
    return loss, gradients, traffic()


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_hooks_leave_loss_and_gradients_alone_bit_for_bit(ranks, hooked_ranks, run):
    loss, gradients = ranks(run.world).run(gradients_on_rank, run)[0]
    hooked_loss, hooked, rows = hooked_ranks(run.world).run(hooked_gradients, run)[0]
    assert hooked_loss == loss
    assert hooked.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(hooked[name], gradient), name
    stages = {row.stage for row in rows}
    assert stages >= EP_STAGES
    if "fsdp" in run.wrap:
        assert stages >= {"all-gather", "reduce-scatter"}
    elif run.wrap == "ddp":
        assert "all-reduce" in stages


def one_layer() -> None:
    """Forward and backward of a lone layer, P = 2; what travels is known."""
    model = apply_expert_parallel(LoneExperts(), init_device_mesh("cpu", 2))
    traffic(reset=True)
    x = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    ids, weights = random_routing(TOKENS, TOP_K, 8, seed=dist.get_rank())
    model(x, ids, weights.requires_grad_()).sum().backward()


def traffic_of_one_layer() -> list[StageTraffic]:
    one_layer()
    rows = traffic(reset=True)
    assert traffic() == []
    return rows


def test_counters_are_exact(hooked_ranks):
    by_rank = [
        {row.stage: row for row in rows} for rows in hooked_ranks(2).run(traffic_of_one_layer)
    ]
    copies = TOKENS * TOP_K
    row_bytes = HIDDEN * 4
    for rows in by_rank:
        assert rows.keys() >= EP_STAGES
        assert rows["plan"][2:4] == (1, (8 + 1) * 8)
        # Rows and, apart, their weights in fp32.
        assert rows["dispatch"][2:4] == (2, copies * (row_bytes + 4))
        assert rows["combine backward"][2:4] == (1, copies * row_bytes)
        assert all(rows[stage].timed_calls == rows[stage].calls for stage in EP_STAGES)
        assert all(rows[stage].milliseconds > 0 for stage in EP_STAGES)
    for stage, size in (("combine", row_bytes), ("dispatch backward", row_bytes + 4)):
        sent = sum(rows[stage].bytes for rows in by_rank)
        assert sent == 2 * copies * size, stage


def attached_traffic() -> tuple[list[StageTraffic], list[StageTraffic], list[bool]]:
    mesh = init_device_mesh("cpu", 2)
    group = mesh["ep"].get_group()
    states = [hooks.is_attached(group)]
    hooks.attach(group)
    hooks.attach(group)
    states += [
        hooks.is_attached(group),
        hooks.is_attached(),
        hooks.is_attached(mesh["shard"].get_group()),
    ]
    apply_expert_parallel(LoneExperts(), mesh)
    traffic(reset=True)
    dist.all_reduce(torch.ones(3), group=group)
    dist.all_reduce(torch.ones(3))
    first = traffic(reset=True)
    hooks.detach(group)
    dist.all_reduce(torch.ones(3), group=group)
    return first, traffic(), [*states, hooks.is_attached(group)]


def test_attach_covers_the_one_group_until_it_is_detached(ranks):
    for first, second, states in ranks(4).run(attached_traffic):
        assert [row[:4] for row in first] == [("mesh_ep", "all-reduce", 1, 12)]
        assert second == []
        assert states == [False, True, False, False, False]


def what_torch_sees() -> list[object]:
    """Names, kinds and options of groups with hooks, and whether groups made of them have some."""
    world = dist.group.WORLD
    backend = world._get_backend(torch.device("cpu"))
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=77))
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    new = dist.new_group([0, 1, 2, 3])
    groups = [mesh["a"].get_group(), mesh["b"].get_group(), new]
    value = torch.ones(2) * dist.get_rank()
    dist.all_reduce(value, group=mesh["b"].get_group())
    dist.all_reduce(value, group=new)
    return [
        backend.name(),
        world._get_backend_name(),
        isinstance(backend, dist.ProcessGroupGloo),
        backend.options._timeout,
        backend.supports_splitting == backend.wrapped.supports_splitting,
        [hooks.is_attached(group) for group in groups],
        value.tolist(),
    ]


def test_groups_with_hooks_look_like_stock_ones_and_hand_them_on(hooked_ranks):
    for seen in hooked_ranks(4).run(what_torch_sees):
        name, group_name, is_gloo, timeout, is_split_alike, are_hooked, value = seen
        assert (name, group_name, is_gloo) == ("gloo", "gloo", True)
        assert timeout == timedelta(seconds=77)
        assert is_split_alike
        assert are_hooked == [True, True, True]
        assert value == [12.0, 12.0]


def split_halves(port: int) -> tuple[bool, list[float]]:
    """Split a group of one kind of device over a TCPStore.

    gloo splits once for each kind of device over the same keys, and a copy of a FileStore removes
    the file of the others: stock groups fail at both now and then.
    """
    rank = dist.get_rank()
    dist.destroy_process_group()
    dist.init_process_group("cpu:gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=4)
    hooks.attach()
    world = dist.group.WORLD
    # gloo knows the ranks of a process's first default group alone, and this is not the first.
    world._get_backend(torch.device("cpu")).options.global_ranks_in_group = list(range(4))
    half = world.split_group([0, 1] if rank < 2 else [2, 3], group_name=f"half{rank // 2}")
    value = torch.ones(2) * rank
    half.allreduce([value]).wait()
    return hooks.is_attached(half), value.tolist()


def test_parts_of_a_split_group_have_hooks(ranks, free_port):
    assert (
        ranks(4).run(split_halves, free_port) == [(True, [1.0] * 2)] * 2 + [(True, [5.0] * 2)] * 2
    )


class Found:
    """Results by name."""

    def __init__(self) -> None:
        self.values: dict[str, object] = {}

    def keep(self, name: str, *tensors: torch.Tensor) -> None:
        self.values[name] = [tensor.tolist() for tensor in tensors]


def filled(size: int) -> torch.Tensor:
    return torch.full((size,), -1.0)


def every_collective() -> dict[str, object]:
    """What each of c10d's functions returns on this rank."""
    own = torch.arange(4, dtype=torch.float32) + 10 * dist.get_rank()
    found = Found()
    reductions(own, found.keep)
    gathers(own, found.keep)
    exchanges(own, found.keep)
    objects: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(objects, {"rank": dist.get_rank()})
    found.values["objects"] = objects
    dist.barrier()
    dist.group.WORLD.monitored_barrier(timedelta(seconds=20))
    return found.values


def reductions(own: torch.Tensor, keep: Callable[..., None]) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    value = own.clone()
    dist.all_reduce(value)
    keep("all_reduce", value)
    value = own.clone()
    work = dist.all_reduce(value, op=dist.ReduceOp.MAX, async_op=True)
    work.wait()
    keep("asynchronous", value)
    assert work.is_completed() and work.is_success()
    value = own.clone()
    dist.broadcast(value, 1)
    keep("broadcast", value)
    value = own.clone()
    dist.reduce(value, 0)
    keep("reduce", *([value] if rank == 0 else []))
    value = filled(2)
    dist.reduce_scatter_tensor(value, own)
    keep("reduce_scatter_tensor", value)
    value = filled(2)
    dist.reduce_scatter(value, list(own.chunk(world)))
    keep("reduce_scatter", value)


def gathers(own: torch.Tensor, keep: Callable[..., None]) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    parts = [filled(4) for _ in range(world)]
    dist.all_gather(parts, own)
    keep("all_gather", *parts)
    value = filled(4 * world)
    dist.all_gather_into_tensor(value, own)
    keep("all_gather_into_tensor", value)
    parts = [filled(4) for _ in range(world)] if rank == 0 else None
    dist.gather(own, parts, 0)
    keep("gather", *(parts or []))
    value = filled(4)
    dist.scatter(value, [own + i for i in range(world)] if rank == 1 else None, 1)
    keep("scatter", value)
    gathered = dist._functional_collectives.all_gather_tensor(own, 0, dist.group.WORLD)
    keep("functional", gathered)


def exchanges(own: torch.Tensor, keep: Callable[..., None]) -> None:
    rank = dist.get_rank()
    value = filled(4)
    splits = [3, 1] if rank == 0 else [1, 3]
    sizes = [3, 1] if rank == 0 else [1, 3]
    dist.all_to_all_single(value, own, sizes, splits)
    keep("all_to_all_single", value)
    value = filled(3)
    (dist.send(own[:3], 1) if rank == 0 else dist.recv(value, 0))
    keep("recv", value)
    value = filled(3)
    (dist.send(own[:3], 1) if rank == 0 else dist.recv(value))
    keep("recv_any", value)


def test_every_collective_returns_what_it_returns_without_hooks(ranks, hooked_ranks):
    assert hooked_ranks(2).run(every_collective) == ranks(2).run(every_collective)


def names_of_threads() -> list[str]:
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


def threads_before_and_after_the_end() -> list[int]:
    dist.new_group([0, 1])
    counts = [names_of_threads().count("moe_ep_hooks")]
    dist.barrier()
    dist.destroy_process_group()
    return [*counts, names_of_threads().count("moe_ep_hooks")]


def test_one_thread_watches_and_ends_with_the_groups(hooked_ranks):
    assert hooked_ranks(2).run(threads_before_and_after_the_end) == [[1, 0], [1, 0]]


def refusals() -> list[str]:
    group = dist.new_group([0])
    said = []
    if dist.get_rank() == 1:
        with pytest.raises(ValueError) as caught:
            hooks.attach(group)
        said.append(str(caught.value))
    dist.barrier()
    dist.destroy_process_group()
    with pytest.raises(ValueError) as caught:
        hooks.attach()
    return [*said, str(caught.value)]


def test_attach_without_a_group_of_this_rank_is_refused(ranks):
    without, foreign = ranks(2).run(refusals)
    assert "torch.distributed is not initialised" in without[0]
    assert "group must be one that this rank is in" in foreign[0]


def untimed() -> list[StageTraffic]:
    hooks.configure(timing=False)
    try:
        one_layer()
        return traffic()
    finally:
        hooks.configure(timing=True)


def test_without_timing_calls_are_counted_and_nothing_is_timed(hooked_ranks):
    for rows in hooked_ranks(2).run(untimed):
        assert sum(row.calls for row in rows) > 0
        assert {(row.milliseconds, row.timed_calls) for row in rows} == {(0.0, 0)}


def steps(run: Run) -> list[StageTraffic]:
    """Two training steps with checkpointing inside: labels survive recomputation."""
    model = build(run)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for step in range(2):
        model(**batch_of(dist.get_rank(), step=step)).loss.backward()
    return traffic()


def test_recomputed_forwards_are_counted_under_their_stage(hooked_ranks):
    rows = hooked_ranks(2).run(steps, Run("fsdp2", 2, 2))[0]
    calls = {row.stage: row.calls for row in rows}
    layers, num_steps = 2, 2
    assert calls["plan"] == 2 * layers * num_steps
    assert calls["combine backward"] == layers * num_steps


def test_without_hooks_nothing_is_counted(ranks):
    assert ranks(2).run(traffic_of_one_layer) == [[], []]
