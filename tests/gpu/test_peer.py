"""The peer transport: the bits of the collective one, no host sync when bounded, no hang.

Ranks share one GPU, or have one each where there are as many.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from torch_moe_ep import MoEConfig, apply_expert_parallel, clip_grad_norm_, init_device_mesh, ops
from torch_moe_ep.memory import checkpoint_contexts
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

from .cases import Case, expert_ids_of, integers, normal, requires_gpu
from .test_several_ranks import num_host_waits

pytestmark = requires_gpu

TIMEOUT_S = 90.0
PEER = {"transport": "peer"}
CHECKPOINTING = ("use_reentrant", "keep")
BOUNDED = {"transport": "peer", "budget": "bounded"}
AGAIN = {"received_rows": "dispatch_again"}


MOVEMENTS = [
    # dtype, hidden, E, K, capacity, multiprocessors; with few of them a warp reads whole rows
    (torch.bfloat16, 4096, 8, 2, 0, 16),
    (torch.bfloat16, 4096, 8, 2, 0, 1),
    (torch.bfloat16, 48, 8, 1, 1024, 16),
    (torch.float16, 4160, 8, 1, 0, 1),
    (torch.float32, 33, 8, 3, 0, 16),
    (torch.float16, 34, 8, 2, 1280, 16),
    (torch.bfloat16, 33, 8, 1, 0, 2),
    (torch.bfloat16, 2880, 8, 8, 0, 2),
    (torch.float32, 1028, 64, 16, 0, 1),
]


def moved(
    case: Case, capacity: int, num_sms: int, *, is_peer: bool, keep: bool = True
) -> dict[str, torch.Tensor]:
    """What dispatch and combine make of a case, and their gradients."""
    rank, name = dist.get_rank(), dist.group.WORLD.group_name
    ids = expert_ids_of(case, seed=rank).cuda()
    x = normal(case.num_tokens, case.hidden, dtype=case.dtype, seed=rank).cuda().requires_grad_()
    weights = normal(case.num_tokens, case.top_k, seed=rank + 50).cuda().requires_grad_()
    if is_peer:
        plan = ops.peer_plan(
            ids, case.num_experts, group_name=name, capacity=capacity, num_sms=num_sms
        )
        rows, row_weights = ops.peer_dispatch(x, weights, plan, keep=keep)
    else:
        plan = ops.plan(ids, case.num_experts, group_name=name)
        rows, row_weights = ops.dispatch(x, weights, plan)
    used = int(plan.expert_offsets[-1])
    kept = {"rows": rows[:used].clone(), "row_weights": row_weights[:used].clone()}
    y = ops.peer_combine(rows * 3, plan) if is_peer else ops.combine(rows * 3, plan)
    scale = torch.arange(row_weights.numel(), device="cuda", dtype=torch.float32)
    scale[used:] = float("nan")  # belongs to nobody
    torch.autograd.backward([y, row_weights], [torch.ones_like(y), scale])
    assert x.grad is not None and weights.grad is not None
    return {**kept, "y": y, "x.grad": x.grad, "weights.grad": weights.grad}


def movement_differences() -> list[str]:
    """Where rows, sums or gradients of the peer operators differ from the collective ones."""
    rank = share_the_gpu()
    found = []
    for number, (dtype, hidden, num_experts, top_k, capacity, num_sms) in enumerate(MOVEMENTS):
        tokens = 0 if rank == 1 and number % 3 == 2 else 150 + 40 * rank
        case = Case(tokens, num_experts, top_k, hidden, "skewed", dtype)
        expected = moved(case, capacity, num_sms, is_peer=False)
        for keep in (True, False):
            ours = moved(case, capacity, num_sms, is_peer=True, keep=keep)
            found += [
                f"{case} capacity {capacity} SMs {num_sms} keep {keep}: {key}"
                for key in expected
                if not torch.equal(ours[key], expected[key])
            ]
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_peer_rows_sums_and_gradients_are_bit_equal_to_collective(gpu_ranks, world_size):
    """Trap 16, and trap 9: a rank without tokens, experts without rows."""
    for found in gpu_ranks(world_size).run(movement_differences, timeout_s=TIMEOUT_S):
        assert found == []


def checkpointed_as(config: dict[str, object], experts: torch.nn.Module) -> Callable[..., object]:
    """The experts under the activation checkpointing that a configuration names, if any."""
    if "use_reentrant" not in config:
        return experts
    if "keep" not in config:
        return partial(checkpoint, experts, use_reentrant=False)
    contexts = checkpoint_contexts(config["keep"])
    return partial(checkpoint, experts, use_reentrant=False, context_fn=contexts)


def layer_with(configs: list[dict[str, object]]) -> list[dict[str, torch.Tensor]]:
    """Output and gradients of lone experts by each configuration; traps 8 and 11."""
    rank = share_the_gpu()
    mesh = init_device_mesh("cuda", dist.get_world_size())
    found = []
    for config in configs:
        dtype = torch.bfloat16
        fields = {name: value for name, value in config.items() if name not in CHECKPOINTING}
        model = LoneExperts(8, hidden=128, width=256).cuda().to(dtype)
        experts = apply_expert_parallel(model, mesh, MoEConfig(**fields))
        tokens = 0 if rank == 1 else 170 + 30 * rank
        generator = torch.Generator().manual_seed(rank)
        x = torch.randn(tokens, 128, generator=generator).cuda().to(dtype).requires_grad_()
        ids, weights = random_routing(tokens, 2, 8, seed=rank)
        weights = weights.cuda().requires_grad_()
        grad = torch.randn(tokens, 128, generator=generator).cuda().to(dtype)
        run = checkpointed_as(config, experts)
        for _ in range(2):  # the second step finds the buffer used
            experts.zero_grad()
            x.grad = weights.grad = None
            y = run(x, ids.cuda(), weights)
            y.backward(grad)
        assert x.grad is not None and weights.grad is not None
        grads = {name: value.cpu() for name, value in full_gradients(experts).items()}
        found.append({"y": y.detach().cpu(), "x": x.grad.cpu(), "w": weights.grad.cpu(), **grads})
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_peer_layer_is_bit_equal_to_collective_forward_and_every_gradient(gpu_ranks, world_size):
    checkpointed = {"use_reentrant": False}
    configs = [
        {"transport": "collective"},
        PEER,
        BOUNDED,
        {**PEER, **AGAIN},
        {**BOUNDED, **AGAIN, "recompute": "gate_up"},
        {**PEER, **checkpointed},
        {**BOUNDED, **AGAIN, **checkpointed},
        {**PEER, **AGAIN, **checkpointed, "keep": "rows"},
    ]
    for expected, *ours in gpu_ranks(world_size).run(layer_with, configs, timeout_s=TIMEOUT_S):
        for config, result in zip(configs[1:], ours, strict=True):
            different = [key for key in expected if not torch.equal(result[key], expected[key])]
            assert different == [], config


def input_gradients_of(config: dict[str, object], is_frozen: bool) -> dict[str, torch.Tensor]:
    """Output, and gradients of tokens and router weights, of trained or frozen experts."""
    rank = share_the_gpu()
    model = LoneExperts(8, hidden=128, width=256).cuda().bfloat16()
    mesh = init_device_mesh("cuda", dist.get_world_size())
    experts = apply_expert_parallel(model, mesh, MoEConfig(**config))
    experts.requires_grad_(not is_frozen)
    tokens = 170 + 30 * rank
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(tokens, 128, generator=generator).cuda().bfloat16().requires_grad_()
    ids, weights = random_routing(tokens, 2, 8, seed=rank)
    weights = weights.cuda().requires_grad_()
    y = experts(x, ids.cuda(), weights)
    y.backward(torch.randn(tokens, 128, generator=generator).cuda().bfloat16())
    assert [name for name, p in experts.named_parameters() if (p.grad is None) != is_frozen] == []
    assert x.grad is not None and weights.grad is not None
    return {"y": y.detach().cpu(), "x": x.grad.cpu(), "w": weights.grad.cpu()}


@pytest.mark.parametrize("more", [{}, {"recompute": "gate_up"}, {"max_slots": 128}, AGAIN], ids=str)
@pytest.mark.parametrize("transport", ["collective", "peer"])
def test_frozen_experts_pass_on_the_gradients_of_trained_ones(gpu_ranks, transport, more):
    """They keep no rows for backward, unless products are computed again from them."""
    config = {"transport": transport, **more}
    trained = gpu_ranks(2).run(input_gradients_of, config, False, timeout_s=TIMEOUT_S)
    frozen = gpu_ranks(2).run(input_gradients_of, config, True, timeout_s=TIMEOUT_S)
    for found, expected in zip(frozen, trained, strict=True):
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def train(config: dict[str, object]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of three steps under FSDP2 with clipping, and the gradients of the first."""
    rank = share_the_gpu()
    mesh = init_device_mesh("cuda", 2)
    model = tiny_mixtral(router_scale=20.0).cuda()
    model = wrap(apply_expert_parallel(model, mesh, MoEConfig(**config)), "fsdp2", mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses: list[float] = []
    gradients: dict[str, torch.Tensor] = {}
    for step in range(3):
        batch = {key: value.cuda() for key, value in batch_of(rank, step=step).items()}
        loss = model(**batch).loss
        loss.backward()
        if step == 0:
            gradients = from_rank0(full_gradients(model))
        clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: value.cpu() for name, value in gradients.items()}


@pytest.mark.parametrize("config", [PEER, BOUNDED], ids=["exact", "bounded"])
def test_peer_training_under_fsdp2_is_bit_equal_to_collective(gpu_ranks, config):
    """Trap 18: kernels that wait for peers beside FSDP's collectives."""
    pool = gpu_ranks(4)
    expected = pool.run(train, {"transport": "collective"}, timeout_s=TIMEOUT_S)
    ours = pool.run(train, config, timeout_s=TIMEOUT_S)
    for (losses, gradients), (expected_losses, expected_gradients) in zip(
        ours, expected, strict=True
    ):
        assert losses == expected_losses
        assert [k for k, v in expected_gradients.items() if not torch.equal(gradients[k], v)] == []


def host_waits_of_a_layer(config: dict[str, object]) -> tuple[int, int]:
    """Calls that wait on the host in one layer's forward and backward, as the profiler saw."""
    rank = share_the_gpu()
    mesh = init_device_mesh("cuda", dist.get_world_size())
    model = LoneExperts(8, hidden=128, width=256).cuda().bfloat16()
    experts = apply_expert_parallel(model, mesh, MoEConfig(**config))
    x = torch.randn(300 + rank, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids, weights = random_routing(300 + rank, 2, 8)
    ids, weights = ids.cuda(), weights.cuda()
    waits = (0, 0)
    for _ in range(2):  # the first run maps memory
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as forward:
            output = experts(x, ids, weights)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as backward:
            output.sum().backward()
        waits = (num_host_waits(forward), num_host_waits(backward))
    return waits


@pytest.mark.parametrize("config", [PEER, BOUNDED], ids=["exact", "bounded"])
def test_peer_layer_makes_no_call_that_waits_for_the_gpu(gpu_ranks, config):
    """Trap 17. budget="exact" looks at a counter in the host's own memory instead."""
    waits = gpu_ranks(2).run(host_waits_of_a_layer, config, timeout_s=TIMEOUT_S)
    assert waits == [(0, 0), (0, 0)]


def overflow_says(use_clip: bool, num_chunks: int = 1) -> tuple[str, bool, bool]:
    """The message of a step whose rows had no room, whether weights changed, and the next step."""
    rank = share_the_gpu()
    mesh = init_device_mesh("cuda", 2)
    config = MoEConfig(**BOUNDED, budget_factor=1.0, num_chunks=num_chunks)
    model = LoneExperts(8, hidden=128, width=256).cuda().bfloat16()
    experts = apply_expert_parallel(model, mesh, config)
    optimizer = torch.optim.SGD(experts.parameters(), lr=0.1)
    x = torch.randn(1000, 128, device="cuda", dtype=torch.bfloat16)
    even, weights = random_routing(1000, 2, 8, seed=rank)
    crowded = torch.tensor([0, 1]).expand(1000, 2).contiguous()  # all to one rank

    def step(ids: torch.Tensor) -> None:
        optimizer.zero_grad()
        experts(x, ids.cuda(), weights.cuda()).float().pow(2).mean().backward()
        if use_clip:
            clip_grad_norm_(experts, 1.0)
        optimizer.step()

    step(even)
    before = [param.detach().to_local().clone() for param in experts.parameters()]
    message = ""
    try:
        step(crowded if rank < 2 else even)
    except ValueError as error:
        message = str(error)
    after = [param.detach().to_local() for param in experts.parameters()]
    is_same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    step(even)
    has_moved = not torch.equal(before[0], next(iter(experts.parameters())).detach().to_local())
    return message, is_same, has_moved


@pytest.mark.parametrize("use_clip", [True, False])
@pytest.mark.parametrize("world_size", [2, 4])
def test_peer_overflow_raises_on_every_rank_before_parameters_change(
    gpu_ranks, world_size, use_clip
):
    """Trap 19. With four ranks the second EP group, which has room, raises as well."""
    results = gpu_ranks(world_size).run(overflow_says, use_clip, timeout_s=TIMEOUT_S)
    for message, is_same, has_moved in results:
        # 2000 copies for each of two experts, in whole tiles of 128: 2 * 2048 rows.
        assert "a rank needed 4096 rows in one layer" in message
        assert "(expert-parallel groups of ranks [0, 1])" in message
        assert is_same and has_moved


def captured_layer() -> list[str]:
    """Where replays of a captured layer, forward and backward, differ from running it."""
    rank = share_the_gpu()
    name = dist.group.WORLD.group_name
    hidden, width, tokens, local = 128, 256, 200, 8 // dist.get_world_size()
    dtype = torch.bfloat16
    x = normal(tokens, hidden, dtype=dtype, seed=rank).cuda().requires_grad_()
    weights = torch.rand(tokens, 2, device="cuda").requires_grad_()
    gate_up = normal(local, 2 * width, hidden, dtype=dtype, seed=1, scale=0.1).cuda()
    down = normal(local, hidden, width, dtype=dtype, seed=2, scale=0.1).cuda()
    gate_up.requires_grad_(), down.requires_grad_()
    ids = random_routing(tokens, 2, 8, seed=rank)[0].cuda()
    grad = normal(tokens, hidden, dtype=dtype, seed=rank + 7).cuda()
    leaves = [x, weights, gate_up, down]

    def layer() -> list[torch.Tensor]:
        plan = ops.peer_plan(ids, 8, group_name=name, capacity=1024)
        rows, row_weights = ops.peer_dispatch(x, weights, plan)
        y = ops.peer_combine(ops.expert_mlp(rows, row_weights, plan, gate_up, down), plan)
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
        ids.copy_(random_routing(tokens, 2, 8, seed=10 * step + rank)[0])
        graph.replay()
        torch.cuda.synchronize()
        replayed = [tensor.clone() for tensor in ours]
        expected = layer()
        names = ("y", "x", "weights", "gate_up", "down")
        found += [
            f"step {step}: {key}"
            for key, a, b in zip(names, replayed, expected, strict=True)
            if not torch.equal(a, b)
        ]
    return found


def test_peer_layer_in_a_cuda_graph_replays_with_other_routings(gpu_ranks):
    assert gpu_ranks(2).run(captured_layer, timeout_s=TIMEOUT_S) == [[], []]


def message_without_the_last_rank(config: dict[str, object]) -> tuple[str, float]:
    """What a rank says whose partner stays away from the third step, and after how long."""
    rank = share_the_gpu()
    mesh = init_device_mesh("cuda", 2)
    model = LoneExperts(8, hidden=128, width=256).cuda().bfloat16()
    experts = apply_expert_parallel(model, mesh, MoEConfig(**config))
    optimizer = torch.optim.SGD(experts.parameters(), lr=0.1)
    x = torch.randn(50, 128, device="cuda", dtype=torch.bfloat16)
    ids, weights = random_routing(50, 2, 8)

    def step() -> None:
        experts(x, ids.cuda(), weights.cuda()).float().pow(2).mean().backward()
        optimizer.step()

    step(), step()
    torch.cuda.synchronize()
    os.environ["TORCH_MOE_EP_TIMEOUT_S"] = "3"
    if rank == 1:
        time.sleep(12.0)
        os._exit(0)
    start = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        step()
    return str(caught.value), time.monotonic() - start


@pytest.mark.parametrize("config", [PEER, BOUNDED], ids=["exact", "bounded"])
def test_peer_rank_that_stays_away_is_named(config):
    with RankPool(2, backend="nccl") as pool, pytest.raises(RankFailure) as caught:
        pool.run(message_without_the_last_rank, config, timeout_s=TIMEOUT_S, grace_s=15.0)
    said, seconds = caught.value.results[0]
    assert "the exchange through peer memory failed on global rank 0" in said
    assert "global ranks that did not take part: 1 (" in said
    assert "stage plan" in said
    assert seconds < 12


def allocated_over_steps(config: dict[str, object], num_steps: int) -> tuple[int, int, int]:
    """Bytes of the allocator after 10 steps and at the end, and of the GPU in between.

    The last are everybody's: nothing else may run on the GPU.
    """
    rank = share_the_gpu()
    mesh = init_device_mesh("cuda", 2)
    model = LoneExperts(8, hidden=128, width=256).cuda().bfloat16()
    experts = apply_expert_parallel(model, mesh, MoEConfig(**config))
    x = torch.randn(400, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    early, free = 0, 0
    for step in range(num_steps):
        ids, weights = random_routing(400, 2, 8, seed=rank + 2 * step)
        experts.zero_grad()
        x.grad = None
        experts(x, ids.cuda(), weights.cuda()).float().sum().backward()
        if step == 9:
            torch.cuda.synchronize()
            early, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    torch.cuda.synchronize()
    late, taken = torch.cuda.memory_allocated(), free - torch.cuda.mem_get_info()[0]
    dist.barrier()  # after the last look: NCCL's first one allocates
    return early, late, taken


@pytest.mark.parametrize("num_steps", [40, pytest.param(500, marks=pytest.mark.full)])
def test_peer_memory_is_flat_over_steps(gpu_ranks, num_steps):
    """Trap 19, with routings drawn anew in every step."""
    for early, late, taken in gpu_ranks(2).run(
        allocated_over_steps, BOUNDED, num_steps, timeout_s=TIMEOUT_S
    ):
        assert late == early
        assert taken < 64 << 20  # NCCL's own, if anything


def poisoned_buffer_differences() -> bool:
    """Rows beside what a NaN-filled earlier exchange left in the buffer: padding is zeros."""
    rank = share_the_gpu()
    name = dist.group.WORLD.group_name
    big = ops.peer_plan(torch.arange(4000, device="cuda").view(2000, 2) % 8, 8, group_name=name)
    ops.peer_dispatch(torch.full((2000, 64), float("nan"), device="cuda"), None, big)
    ids = random_routing(130 + rank, 2, 8, seed=rank)[0].cuda()
    x = integers(130 + rank, 64, dtype=torch.float32, seed=rank).cuda()
    for keep in (True, False):
        plan = ops.peer_plan(ids, 8, group_name=name)
        rows, weights = ops.peer_dispatch(
            x, torch.rand(130 + rank, 2, device="cuda"), plan, keep=keep
        )
        if not (torch.isfinite(rows).all() and torch.isfinite(weights).all()):
            return False
    return True


def test_peer_padding_is_zeros_whatever_the_buffer_held(gpu_ranks):
    """Trap 8."""
    assert gpu_ranks(2).run(poisoned_buffer_differences, timeout_s=TIMEOUT_S) == [True, True]
