"""Expert parallelism over NCCL with several ranks on one GPU: right values, no timings."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from benchmarks.launch_order import EXPERTS, forward_on_two_ranks, gathers_before_rows
from torch_moe_ep import MoEConfig, apply_expert_parallel, init_device_mesh, ops
from torch_moe_ep.testing import (
    LoneExperts,
    RankFailure,
    RankPool,
    assert_close,
    batch_of,
    random_routing,
    relative_error,
    share_the_gpu,
    tiny_mixtral,
)
from torch_moe_ep.testing.parallel import from_rank0, full_gradients, wrap
from torch_moe_ep.testing.reference import reference_gradients, reference_steps

from .cases import Case, expert_ids_of, integers, normal, requires_gpu

pytestmark = requires_gpu

NUM_STEPS = 3
LEARNING_RATE = 0.5
TIMEOUT_S = 120.0
COLLECTIVE = MoEConfig(transport="collective")  # whatever the ranks' GPUs could do themselves


def case_of_rank(rank: int, top_k: int) -> Case:
    """Ranks differ in their number of tokens; rank 1 has none."""
    return Case(0 if rank == 1 else 150 + 40 * rank, 8, top_k, 48, "skewed", torch.float32)


def move_with_constant_experts(top_k: int) -> list[bool]:
    """Expert e multiplies by e + 1: every copy reached its own expert and came back (trap 16)."""
    rank = share_the_gpu()
    case = case_of_rank(rank, top_k)
    ids = expert_ids_of(case, seed=rank).cuda()
    x = integers(case.num_tokens, case.hidden, dtype=case.dtype, seed=rank).cuda().requires_grad_()
    weights = normal(case.num_tokens, top_k, seed=rank + 50).cuda().requires_grad_()
    plan = ops.plan(ids, case.num_experts, group_name=dist.group.WORLD.group_name)
    rows, row_weights = ops.dispatch(x, weights, plan)
    local = case.num_experts // dist.get_world_size()
    lengths = plan.expert_offsets.diff()
    factors = torch.arange(local, device="cuda").repeat_interleave(lengths) + rank * local + 1
    is_padding = torch.ones(rows.size(0), dtype=torch.bool, device="cuda")
    is_padding[plan.slot_of_received] = False
    y = ops.combine(rows * factors[:, None].float(), plan)
    torch.autograd.backward([y, row_weights], [torch.ones_like(y), factors.float()])
    assert x.grad is not None and weights.grad is not None
    factor_of_copy = (ids + 1).float()
    sums = factor_of_copy.sum(dim=1, keepdim=True)
    return [
        rows.size(0) == int(plan.expert_offsets[-1]),
        not rows[is_padding].any() and not row_weights[is_padding].any(),
        torch.equal(y, x * sums),
        torch.equal(x.grad, sums.expand_as(x)),
        torch.equal(weights.grad, factor_of_copy),
    ]


def mlp_errors(dtype: torch.dtype) -> list[float]:
    """Errors of y and of the gradients against the same operators with P = 1 on each rank."""
    rank = share_the_gpu()
    world_size = dist.get_world_size()
    case = case_of_rank(rank, 2)
    ids = expert_ids_of(case, seed=rank).cuda()
    gate_up = normal(8, 2 * 96, case.hidden, dtype=dtype, seed=1, scale=0.1).cuda()
    down = normal(8, case.hidden, 96, dtype=dtype, seed=2, scale=0.1).cuda()
    x_values = normal(case.num_tokens, case.hidden, dtype=dtype, seed=rank).cuda()
    weights_values = normal(case.num_tokens, 2, seed=rank + 9).cuda()

    def run(group_name: str, experts: slice, scale: float) -> list[torch.Tensor]:
        leaves = [
            value.clone().requires_grad_()
            for value in (x_values, weights_values, gate_up[experts], down[experts])
        ]
        plan = ops.plan(ids, 8, group_name=group_name)
        rows, row_weights = ops.dispatch(*leaves[:2], plan)
        y = ops.combine(
            ops.expert_mlp(rows, row_weights, plan, *leaves[2:], weight_grad_scale=scale), plan
        )
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    local = 8 // world_size
    mine = slice(rank * local, (rank + 1) * local)
    ours = run(dist.group.WORLD.group_name, mine, 1 / world_size)
    expected = run("", slice(0, 8), 1.0)
    for index in (3, 4):
        total = expected[index].float()
        dist.all_reduce(total)
        expected[index] = total[mine] / world_size
    return [relative_error(a.float(), b.float()) for a, b in zip(ours, expected, strict=True)]


def refused_rows(max_rows: int) -> str:
    """The message of a plan whose rows do not fit on one of the ranks."""
    rank = share_the_gpu()
    ids = torch.zeros(200, 1, dtype=torch.long, device="cuda") + (rank == 0)
    try:
        ops.plan(ids, 8, group_name=dist.group.WORLD.group_name, max_rows=max_rows)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def refused_id() -> str:
    """The message of a plan in which the last rank names an expert that does not exist."""
    rank = share_the_gpu()
    os.environ["TORCH_MOE_EP_CHECK"] = "1"
    ids = torch.arange(20, device="cuda").view(10, 2) % 8
    if rank == dist.get_world_size() - 1:
        ids[3, 1] = -1
    try:
        ops.plan(ids, 8, group_name=dist.group.WORLD.group_name)
    except ValueError as error:
        return str(error)
    finally:
        del os.environ["TORCH_MOE_EP_CHECK"]
    return ""


def host_waits_of_a_layer() -> tuple[int, int]:
    """Waits of the host for the GPU in one layer's forward and backward, as the profiler saw."""
    rank = share_the_gpu()
    mesh = init_device_mesh("cuda", dist.get_world_size())
    experts = apply_expert_parallel(LoneExperts().cuda().bfloat16(), mesh, COLLECTIVE)
    x = torch.randn(300 + rank, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids, weights = random_routing(300 + rank, 2, 8)
    ids, weights = ids.cuda(), weights.cuda()
    waits = []
    for _ in range(2):  # the first run builds communicators and gathers weights
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as forward:
            output = experts(x, ids, weights)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as backward:
            output.sum().backward()
        waits = [num_host_waits(forward), num_host_waits(backward)]
    return waits[0], waits[1]


def num_host_waits(profiled: profile) -> int:
    """Calls that wait for the GPU; the profiler itself ends with one wait for the device."""
    names = [event.name for event in profiled.events()]
    waits = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
    return sum(name in waits for name in names) + max(0, names.count("cudaDeviceSynchronize") - 1)


def message_of_cpu_mesh_beside_gpu_mesh() -> str:
    """fully_shard without a mesh takes the GPU; the experts were put on the CPU."""
    share_the_gpu()
    mesh = init_device_mesh("cpu", 2)
    model = wrap(apply_expert_parallel(tiny_mixtral(), mesh), "fsdp2", mesh)
    with pytest.raises(ValueError) as caught:
        model(**batch_of(dist.get_rank()))
    return str(caught.value)


def message_without_the_last_rank() -> str:
    """What a rank says whose partner stays away from the second batch."""
    rank = share_the_gpu()
    mesh = init_device_mesh("cuda", 2)
    experts = apply_expert_parallel(LoneExperts().cuda(), mesh, COLLECTIVE)
    os.environ["TORCH_MOE_EP_TIMEOUT_S"] = "3"
    x = torch.randn(5, 16, device="cuda")
    ids, weights = random_routing(5, 2, 8)
    experts(x, ids.cuda(), weights.cuda())
    if rank == 1:
        time.sleep(9.0)  # the other gives up after 3 s and waits 3 s for this one to say the same
        os._exit(0)
    with pytest.raises(RuntimeError) as caught:
        experts(x, ids.cuda(), weights.cuda())
    return str(caught.value)


def layer_with(config: dict[str, object]) -> dict[str, torch.Tensor]:
    """Output and gradients of lone experts; ranks hold different numbers of tokens."""
    rank = share_the_gpu()
    mesh = init_device_mesh("cuda", dist.get_world_size())
    experts = apply_expert_parallel(LoneExperts(8).cuda(), mesh, MoEConfig(**config))
    tokens = 0 if rank == 1 else 70 + 30 * rank
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(tokens, 16, generator=generator).cuda().requires_grad_()
    ids, weights = random_routing(tokens, 2, 8, seed=rank)
    weights = weights.cuda().requires_grad_()
    y = experts(x, ids.cuda(), weights)
    (y * torch.randn(y.shape, generator=generator).cuda()).sum().backward()
    assert x.grad is not None and weights.grad is not None
    grads = {name: value.cpu() for name, value in full_gradients(experts).items()}
    return {"y": y.detach().cpu(), "x": x.grad.cpu(), "weights": weights.grad.cpu(), **grads}


def train(
    expert_parallel_degree: int, kind: str, transport: str
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of three SGD steps under FSDP and the full gradients of the first."""
    rank = share_the_gpu()
    mesh = init_device_mesh("cuda", expert_parallel_degree)
    config = MoEConfig(transport=transport)
    model = apply_expert_parallel(tiny_mixtral(router_scale=20.0).cuda(), mesh, config)
    model = wrap(model, kind, mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    losses: list[float] = []
    gradients: dict[str, torch.Tensor] = {}
    for step in range(NUM_STEPS):
        batch = {key: value.cuda() for key, value in batch_of(rank, step=step).items()}
        loss = model(**batch).loss
        loss.backward()
        if step == 0:
            gradients = from_rank0(full_gradients(model))
        optimizer.step()
        optimizer.zero_grad()
        mean_loss = loss.detach().clone()
        dist.all_reduce(mean_loss, op=dist.ReduceOp.AVG)
        losses.append(mean_loss.item())
    return losses, {name: value.cpu() for name, value in gradients.items()}


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_ranks_copies_reach_their_experts_and_return(
    gpu_ranks: Callable[[int], RankPool], world_size: int, top_k: int
) -> None:
    """Trap 16."""
    for checks in gpu_ranks(world_size).run(move_with_constant_experts, top_k, timeout_s=TIMEOUT_S):
        assert all(checks), checks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_expert_mlp_equals_one_rank(
    gpu_ranks: Callable[[int], RankPool], world_size: int, dtype: torch.dtype
) -> None:
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for errors in gpu_ranks(world_size).run(mlp_errors, dtype, timeout_s=TIMEOUT_S):
        assert max(errors) <= tolerance, errors


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_too_many_rows_are_refused_on_every_rank(
    gpu_ranks: Callable[[int], RankPool], world_size: int
) -> None:
    """Trap 19."""
    for message in gpu_ranks(world_size).run(refused_rows, 128, timeout_s=TIMEOUT_S):
        assert "max_rows" in message or "max_received_rows" in message


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_invalid_expert_id_on_one_raises_on_every_rank_when_checked(
    gpu_ranks: Callable[[int], RankPool], world_size: int
) -> None:
    for message in gpu_ranks(world_size).run(refused_id, timeout_s=TIMEOUT_S):
        assert f"got others on rank {world_size - 1} of the expert-parallel group" in message


@pytest.mark.parametrize("transport", ["collective", "peer"])
@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1"])
@pytest.mark.parametrize(("world_size", "expert_parallel_degree"), [(2, 2), (4, 2), (4, 4)])
def test_ranks_training_equals_one_process(
    gpu_ranks: Callable[[int], RankPool],
    world_size: int,
    expert_parallel_degree: int,
    kind: str,
    transport: str,
) -> None:
    """Traps 1 and 18: FSDP's and EP's communicators together; gradients of one process."""
    arguments = (expert_parallel_degree, kind, transport)
    results = gpu_ranks(world_size).run(train, *arguments, timeout_s=TIMEOUT_S)

    def make_model() -> torch.nn.Module:
        return tiny_mixtral(router_scale=20.0)

    steps = [[batch_of(rank, step=step) for rank in range(world_size)] for step in range(NUM_STEPS)]
    _, gradients = reference_gradients(make_model, steps[0])
    assert_close(results[0][1], gradients, 1e-5, "gradients")
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    losses, _ = reference_steps(model, optimizer, steps)
    for ours, _ in results:
        assert ours == pytest.approx(losses, rel=1e-4)


def test_ranks_layer_waits_once_on_the_host_in_forward_and_never_in_backward(
    gpu_ranks: Callable[[int], RankPool],
) -> None:
    assert gpu_ranks(2).run(host_waits_of_a_layer, timeout_s=TIMEOUT_S) == [(1, 0), (1, 0)]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_all_gather_dispatcher_equals_all_to_all(
    gpu_ranks: Callable[[int], RankPool], world_size: int
) -> None:
    """A sum of two has one order: bit-equal."""
    pool = gpu_ranks(world_size)
    plain = pool.run(layer_with, {"transport": "collective"}, timeout_s=TIMEOUT_S)
    gathered = pool.run(layer_with, {"dispatcher": "all_gather"}, timeout_s=TIMEOUT_S)
    for ours, expected in zip(gathered, plain, strict=True):
        assert [name for name in expected if not torch.equal(ours[name], expected[name])] == []


def test_ranks_experts_on_another_device_than_fsdp_are_refused(
    gpu_ranks: Callable[[int], RankPool],
) -> None:
    for said in gpu_ranks(2).run(message_of_cpu_mesh_beside_gpu_mesh, timeout_s=TIMEOUT_S):
        assert "fully_shard put dense parameters on cuda, but the experts' mesh is on cpu" in said


def test_ranks_partner_that_stays_away_is_named_before_nccl_gives_up() -> None:
    with RankPool(2, backend="nccl") as pool, pytest.raises(RankFailure) as caught:
        pool.run(message_without_the_last_rank, timeout_s=TIMEOUT_S, grace_s=10.0)
    said = caught.value.results[0]
    assert "the all-gather of numbers failed on global rank 0" in said
    assert "global ranks that did not take part: 1 " in said


def test_ranks_counts_are_gathered_before_rows_are_packed_and_fsdp_gathers_beside() -> None:
    """In the order of launches; the next layer's all-gather is on its way while rows travel."""
    launches = forward_on_two_ranks(layers=3)
    names = [
        "counts" if "AllGather" in it.name else "rows" if "SendRecv" in it.name else "pack"
        for it in launches
        if it.lane == EXPERTS or "pack_rows" in it.name
    ]
    # A layer: counts, send buffer packed, rows and weights sent, received ones packed, rows back.
    assert names == ["counts", "pack", "rows", "rows", "pack", "rows"] * 3
    # Root, first and second layer before the first rows leave, then one layer ahead.
    assert gathers_before_rows(launches)[::3] == [3, 4, 4]


def rows_beside_poisoned_memory() -> bool:
    """Memory freed by the operators is taken and poisoned at once, while rows travel."""
    rank = share_the_gpu()
    hidden, tokens = 4096, 2000 + rank
    ids, weights = random_routing(tokens, 2, 8, seed=rank)
    ids, weights = ids.cuda(), weights.cuda()
    x = integers(tokens, hidden, dtype=torch.float32, seed=rank).cuda()
    for _ in range(3):
        plan, packed = ops.plan_and_pack(x, weights, ids, 8, group_name=dist.group.WORLD.group_name)
        rows, _ = ops.dispatch(x, weights, plan, packed)
        del packed
        poison = [torch.full((2 * tokens, hidden), float("nan"), device="cuda") for _ in range(4)]
        y = ops.combine(rows, plan)
        poison += [torch.full((2 * tokens, hidden), float("nan"), device="cuda") for _ in range(4)]
        if not torch.equal(y, 2 * x):
            return False
        del poison
    return True


def test_ranks_no_buffer_is_reused_while_rows_travel(gpu_ranks: Callable[[int], RankPool]) -> None:
    assert gpu_ranks(2).run(rows_beside_poisoned_memory, timeout_s=TIMEOUT_S) == [True, True]
