"""Dispatch over nodes under NCCL with several ranks on one GPU that play nodes: right values."""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile

from torch_moe_ep import MoEConfig, apply_expert_parallel, init_device_mesh, metrics, ops
from torch_moe_ep.parallel.nodes import RANKS_PER_NODE
from torch_moe_ep.testing import (
    LoneExperts,
    RankPool,
    assert_close,
    batch_of,
    random_routing,
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
WORLD = 4
NUM_EXPERTS = 16


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Four ranks that share the GPU."""
    with RankPool(WORLD, backend="nccl") as ranks:
        yield ranks


def case_of_rank(rank: int, top_k: int, dtype: torch.dtype) -> Case:
    """Ranks differ in their number of tokens; rank 1 has none."""
    return Case(0 if rank == 1 else 150 + 230 * rank, NUM_EXPERTS, top_k, 48, "skewed", dtype)


def ids_of_rank(case: Case, has_invalid: bool) -> torch.Tensor:
    ids = expert_ids_of(case, seed=dist.get_rank())
    if has_invalid:
        ids[::7, 0] = NUM_EXPERTS + 3
        ids[::11, -1] = -2
    return ids.cuda()


def differences_from_the_flat_path(
    per_node: int, top_k: int, dtype: torch.dtype, has_invalid: bool = False
) -> list[str]:
    """Names of what is not bit-equal; values are integers, so that every order of sums is exact."""
    rank = share_the_gpu()
    case = case_of_rank(rank, top_k, dtype)
    ids = ids_of_rank(case, has_invalid)
    name = dist.group.WORLD.group_name
    values = integers(case.num_tokens, case.hidden, dtype=dtype, seed=rank).cuda()
    weight_values = normal(case.num_tokens, top_k, seed=rank + 50).cuda()

    def run(plan, dispatch, combine) -> dict[str, torch.Tensor]:
        x, weights = values.clone().requires_grad_(), weight_values.clone().requires_grad_()
        rows, row_weights = dispatch(x, weights, plan)
        y = combine(rows, plan)
        rising = torch.arange(row_weights.numel(), device="cuda").float()
        torch.autograd.backward([y, row_weights], [torch.ones_like(y), rising])
        assert x.grad is not None and weights.grad is not None
        return {
            "rows": rows.detach(),
            "row_weights": row_weights.detach(),
            "y": y.detach(),
            "x.grad": x.grad,
            "weights.grad": weights.grad,
            "expert_offsets": plan.expert_offsets,
            "host_offsets": plan.host_offsets(),
            "counts": plan.counts,
        }

    flags = [torch.zeros(1, dtype=torch.int32, device="cuda") for _ in range(2)]
    with poisoned_memory():
        flat = ops.plan(ids, NUM_EXPERTS, group_name=name, invalid_flag=flags[0])
        expected = run(flat, ops.dispatch, ops.combine)
        plan = ops.node_plan(
            ids, NUM_EXPERTS, group_name=name, ranks_per_node=per_node, invalid_flag=flags[1]
        )
        ours = run(plan, ops.node_dispatch, ops.node_combine)
    far = [key for key in expected if not torch.equal(ours[key], expected[key])]
    is_flagged = has_invalid and case.num_tokens > 0
    return far + ["invalid_flag"] * ([int(flag) for flag in flags] != [is_flagged, is_flagged])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
@pytest.mark.parametrize("per_node", [1, 2, 4])
def test_nodes_rows_sums_and_gradients_equal_the_flat_path(
    pool: RankPool, per_node: int, top_k: int, dtype: torch.dtype
) -> None:
    said = pool.run(differences_from_the_flat_path, per_node, top_k, dtype, timeout_s=TIMEOUT_S)
    assert said == [[]] * WORLD


@pytest.mark.parametrize("per_node", [1, 2])
def test_nodes_invalid_ids_add_nothing_and_are_flagged(pool: RankPool, per_node: int) -> None:
    said = pool.run(
        differences_from_the_flat_path, per_node, 3, torch.float32, True, timeout_s=TIMEOUT_S
    )
    assert said == [[]] * WORLD


def refused(case: str) -> str:
    """What node_plan says on this rank, of an id of the last rank or of too many rows."""
    rank = share_the_gpu()
    ids, _ = random_routing(200, 2, NUM_EXPERTS, seed=rank)
    if case == "id" and rank == WORLD - 1:
        ids[3, 1] = -1
    check = {"TORCH_MOE_EP_CHECK": "1"} if case == "id" else {}
    with mock.patch.dict(os.environ, check), pytest.raises(ValueError) as caught:
        ops.node_plan(
            ids.cuda(),
            NUM_EXPERTS,
            group_name=dist.group.WORLD.group_name,
            ranks_per_node=2,
            max_rows=128 if case == "rows" else 0,
        )
    return str(caught.value)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("id", "got others on rank 3 of the expert-parallel group"),
        ("rows", "rows, but max_rows (MoEConfig.max_received_rows) is 128"),
    ],
)
def test_nodes_plan_refuses_on_every_rank(pool: RankPool, case: str, message: str) -> None:
    said = pool.run(refused, case, timeout_s=TIMEOUT_S)
    assert message in said[0]
    assert said == [said[0]] * WORLD


def make_expert_parallel(model: nn.Module, config: dict[str, object]) -> nn.Module:
    """The model over an EP group of all ranks, which play two nodes of two."""
    with mock.patch.dict(os.environ, {RANKS_PER_NODE: "2"}):
        return apply_expert_parallel(model, init_device_mesh("cuda", WORLD), MoEConfig(**config))


def layer_with(transport: str) -> tuple[dict[str, torch.Tensor], int, int]:
    """Output and gradients of lone experts, bytes of rows counted, and what they must be."""
    rank = share_the_gpu()
    experts = make_expert_parallel(LoneExperts(NUM_EXPERTS).cuda(), {"transport": transport})
    tokens = 0 if rank == 1 else 70 + 30 * rank
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(tokens, 16, generator=generator).cuda().requires_grad_()
    ids, weights = random_routing(tokens, 3, NUM_EXPERTS, seed=rank)
    weights = weights.cuda().requires_grad_()
    y = experts(x, ids.cuda(), weights)
    (y * torch.randn(y.shape, generator=generator).cuda()).sum().backward()
    assert x.grad is not None and weights.grad is not None
    grads = {name: value.cpu() for name, value in full_gradients(experts).items()}
    found = {"y": y.detach().cpu(), "x": x.grad.cpu(), "weights": weights.grad.cpu(), **grads}
    if transport == "collective":
        return found, 0, 0
    remote = sum(len(set(row) - {rank // 2}) for row in (ids // (NUM_EXPERTS // 2)).tolist())
    total = torch.tensor(remote, device="cuda")
    dist.all_reduce(total)
    counted = metrics.node_traffic(experts).row_bytes["experts"]
    return found, counted, 4 * int(total) * 16 * 4


def test_nodes_layer_equals_the_flat_path_and_counts_its_bytes(pool: RankPool) -> None:
    flat = pool.run(layer_with, "collective", timeout_s=TIMEOUT_S)
    ours = pool.run(layer_with, "hierarchical", timeout_s=TIMEOUT_S)
    for (mine, counted, wanted), (expected, _, _) in zip(ours, flat, strict=True):
        assert_close(mine, expected, 1e-5)
        assert counted == wanted > 0


def bfloat16_errors() -> list[tuple[float, float]]:
    """(hierarchical, flat) against the flat path in fp32: y, x, weights, expert weights."""
    rank = share_the_gpu()
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(300, 64, generator=generator).bfloat16()
    upstream = torch.randn(300, 64, generator=generator).bfloat16()
    ids, weights = random_routing(300, 4, NUM_EXPERTS, seed=rank)

    def run(dtype: torch.dtype, transport: str) -> list[torch.Tensor]:
        model = LoneExperts(NUM_EXPERTS, 64, 128).bfloat16().to(dtype).cuda()
        model = make_expert_parallel(model, {"transport": transport})
        leaves = [x.to(dtype).cuda().requires_grad_(), weights.cuda().requires_grad_()]
        y = model(leaves[0], ids.cuda(), leaves[1])
        y.backward(upstream.to(dtype).cuda())
        return [y, *(leaf.grad for leaf in leaves), *full_gradients(model).values()]

    exact = run(torch.float32, "collective")
    both = [run(torch.bfloat16, transport) for transport in ("hierarchical", "collective")]
    return [
        (relative_error(a.float(), c), relative_error(b.float(), c))
        for a, b, c in zip(*both, exact, strict=True)
    ]


def test_nodes_bfloat16_error_is_within_twice_the_flat_paths(pool: RankPool) -> None:
    for errors in pool.run(bfloat16_errors, timeout_s=TIMEOUT_S):
        for ours, flat in errors:
            assert ours <= 2 * flat, errors


def host_waits_of_a_layer() -> tuple[int, int]:
    """Waits of the host for the GPU in one layer's forward and backward, as the profiler saw."""
    rank = share_the_gpu()
    model = LoneExperts(NUM_EXPERTS).cuda().bfloat16()
    experts = make_expert_parallel(model, {"transport": "hierarchical"})
    x = torch.randn(300 + rank, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids, weights = random_routing(300 + rank, 2, NUM_EXPERTS)
    ids, weights = ids.cuda(), weights.cuda()
    waits = (0, 0)
    for _ in range(2):  # the first run builds communicators and gathers weights
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as forward:
            output = experts(x, ids, weights)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as backward:
            output.sum().backward()
        waits = (num_host_waits(forward), num_host_waits(backward))
    return waits


def test_nodes_layer_waits_once_on_the_host_in_forward_and_never_in_backward(
    pool: RankPool,
) -> None:
    assert pool.run(host_waits_of_a_layer, timeout_s=TIMEOUT_S) == [(1, 0)] * WORLD


def gradients_under_fsdp2() -> dict[str, torch.Tensor]:
    """Full gradients of one step on rank 0."""
    rank = share_the_gpu()
    model = tiny_mixtral(router_scale=20.0).cuda()
    model = make_expert_parallel(model, {"transport": "hierarchical"})
    model = wrap(model, "fsdp2", init_device_mesh("cuda", WORLD))
    batch = {key: value.cuda() for key, value in batch_of(rank).items()}
    model(**batch).loss.backward()
    return {name: value.cpu() for name, value in from_rank0(full_gradients(model)).items()}


def test_nodes_gradients_under_fsdp2_equal_one_process(pool: RankPool) -> None:
    """Traps 1 and 18: FSDP's and EP's communicators together."""
    ours = pool.run(gradients_under_fsdp2, timeout_s=TIMEOUT_S)[0]
    batches = [batch_of(rank) for rank in range(WORLD)]
    _, gradients = reference_gradients(lambda: tiny_mixtral(router_scale=20.0), batches)
    assert_close(ours, gradients, 1e-5, "gradients")
