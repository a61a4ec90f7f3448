"""Dispatch over nodes: a token crosses to a node once, and the rows are the flat dispatch's.

Ranks of this machine play nodes: 4 ranks as 2 x 2; in the full suite 8 ranks as 2 x 4 and 4 x 2.
"""

import math
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from node_cases import HIDDEN, NUM_EXPERTS, SPLITS, Split, remote_nodes_of, tokens_of_rank

from torch_moe_ep import ops
from torch_moe_ep.testing import random_routing, relative_error


def moved_both_ways(split: Split, top_k: int, dtype: torch.dtype, row_alignment: int):
    """What differs from the flat dispatch and combine of the same tokens; [] is all well."""
    x, ids, weights = tokens_of_rank(top_k, dtype)
    options = {"group_name": dist.group.WORLD.group_name, "row_alignment": row_alignment}
    flat = ops.plan(ids, NUM_EXPERTS, **options)
    plan = ops.node_plan(ids, NUM_EXPERTS, ranks_per_node=split.per_node, **options)

    def run(dispatch, combine, plan):
        rows, row_weights = dispatch(x, weights, plan)
        generator = torch.Generator().manual_seed(99)
        factors = torch.randn(rows.shape, generator=generator).to(dtype)
        weight_grads = torch.randn(row_weights.shape, generator=generator)
        y = combine(rows * factors, plan)
        upstream = torch.randn(y.shape, generator=generator).to(dtype)
        grads = torch.autograd.grad([y, row_weights], [x, weights], [upstream, weight_grads])
        return [rows, row_weights, y, *grads]

    ours, expected = run(ops.node_dispatch, ops.node_combine, plan), run(
        ops.dispatch, ops.combine, flat
    )  # fmt: skip
    names = ("rows", "row_weights", "y", "x.grad", "weights.grad")
    both = dict(zip(names, zip(ours, expected, strict=True), strict=True))
    exact = [name for name in ("rows", "row_weights", "weights.grad")
             if not torch.equal(*both[name])]  # fmt: skip
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    close = [name for name in ("y", "x.grad") if relative_error(*both[name]) > tolerance]
    segments = [torch.equal(plan.expert_offsets, flat.expert_offsets),
                torch.equal(plan.counts, flat.counts)]  # fmt: skip
    return exact + close + [f"segments {segments}"] * (not all(segments))


@pytest.mark.parametrize("row_alignment", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 3, 8, NUM_EXPERTS])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_rows_and_weight_gradients_are_bit_equal_to_the_flat_path(
    ranks, split, top_k, dtype, row_alignment
):
    """Trap 16 too: more than one local expert, K > 1."""
    said = ranks(split.world).run(moved_both_ways, split, top_k, dtype, row_alignment)
    assert said == [[]] * split.world


@pytest.mark.full
@pytest.mark.parametrize("top_k", range(1, NUM_EXPERTS + 1))
def test_rows_are_bit_equal_to_the_flat_path_for_every_number_of_experts(ranks, top_k):
    for split in (Split(4, 2), Split(4, 1), Split(4, 4)):
        said = ranks(4).run(moved_both_ways, split, top_k, torch.float32, 1)
        assert said == [[]] * 4


def moved_to_one_expert(split: Split) -> bool:
    """Every token of every rank to the last expert, twice: two copies of one expert."""
    x, _, _ = tokens_of_rank(2, torch.float32)
    ids = torch.full((x.shape[0], 2), NUM_EXPERTS - 1)
    name = dist.group.WORLD.group_name
    rows, _ = ops.dispatch(x, None, ops.plan(ids, NUM_EXPERTS, group_name=name))
    plan = ops.node_plan(ids, NUM_EXPERTS, group_name=name, ranks_per_node=split.per_node)
    ours, _ = ops.node_dispatch(x, None, plan)
    return torch.equal(ours, rows) and torch.equal(ops.node_combine(ours, plan), x + x)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_all_tokens_to_one_expert_twice(ranks, split):
    assert all(ranks(split.world).run(moved_to_one_expert, split))


def check_operators() -> None:
    """torch.library.opcheck of the three, on every rank alike since each run is collective."""
    x, ids, weights = tokens_of_rank(2, torch.float32, tokens=6)
    name = dist.group.WORLD.group_name
    counter = torch.zeros(2, dtype=torch.int64)
    flag = torch.zeros(1, dtype=torch.int32)
    library = torch.ops.torch_moe_ep
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (ids, NUM_EXPERTS, 1, 0, 1, name, flag, counter)
    torch.library.opcheck(library.node_plan.default, arguments, test_utils=tests)
    plan = ops.node_plan(ids, NUM_EXPERTS, group_name=name, ranks_per_node=1)
    arguments = (x, weights, *plan, counter)
    torch.library.opcheck(library.node_dispatch.default, arguments, test_utils=tests)
    rows = ops.node_dispatch(x, None, plan)[0].detach().requires_grad_()
    load = torch.zeros(NUM_EXPERTS, dtype=torch.int64)
    arguments = (rows, None, *plan, load, counter)
    torch.library.opcheck(library.node_combine.default, arguments, test_utils=tests)


def test_operators_pass_opcheck(ranks):
    ranks(2).run(check_operators)


def bytes_of_one_layer(split: Split, top_k: int, dtype: torch.dtype):
    """Counted and expected bytes: [ids, rows, weights] of dispatch, then all of the layer."""
    x, ids, weights = tokens_of_rank(top_k, dtype)
    counter = torch.zeros(2, dtype=torch.int64)
    plan = ops.node_plan(
        ids,
        NUM_EXPERTS,
        group_name=dist.group.WORLD.group_name,
        ranks_per_node=split.per_node,
        bytes_sent=counter,
    )
    after_plan = counter.tolist()
    rows, row_weights = ops.node_dispatch(x, weights, plan, bytes_sent=counter)
    after_dispatch = counter.tolist()
    y = ops.node_combine(rows, plan, bytes_sent=counter)
    torch.autograd.backward(
        [y, row_weights], [torch.ones_like(y), torch.ones_like(row_weights)]
    )  # fmt: skip
    totals = counter.clone()
    dist.all_reduce(totals)
    remote = torch.tensor(remote_nodes_of(ids, split))
    own = int(remote)
    dist.all_reduce(remote)
    row_bytes, extra = HIDDEN * x.element_size(), 4 * top_k
    # Dispatch and combine forward and backward; ids once, weights there and their gradients back.
    return (
        [after_plan, after_dispatch, totals.tolist()],
        [[0, own * extra], [own * row_bytes, 2 * own * extra],
         [4 * int(remote) * row_bytes, 3 * int(remote) * extra]],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("top_k", [1, 3, NUM_EXPERTS])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_bytes_between_nodes_are_distinct_remote_nodes_times_row_bytes(ranks, split, top_k, dtype):
    for counted, expected in ranks(split.world).run(bytes_of_one_layer, split, top_k, dtype):
        assert counted == expected


def expected_remote_nodes(num_nodes: int, num_experts: int, top_k: int) -> float:
    """Mean number of other nodes of a token of uniform routing: docs/transport.md."""
    elsewhere = num_experts - num_experts // num_nodes
    missed = math.comb(elsewhere, top_k) / math.comb(num_experts, top_k)
    return (num_nodes - 1) * (1 - missed)


def test_table_of_the_transport_page_holds_the_expectation():
    page = Path(__file__).parent.parent / "docs" / "transport.md"
    rows = re.findall(
        r"^\| (\d+), (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", page.read_text(), re.M
    )
    assert len(rows) == 3
    for experts, top_k, nodes, flat, hierarchical in rows:
        num_experts, num_copies, num_nodes = int(experts), int(top_k), int(nodes)
        assert float(flat) == pytest.approx(num_copies * (num_nodes - 1) / num_nodes, abs=5e-4)
        expected = expected_remote_nodes(num_nodes, num_experts, num_copies)
        assert float(hierarchical) == pytest.approx(expected, abs=5e-4)


def bytes_of_dispatch(split: Split, top_k: int, tokens: int) -> int:
    x, ids, _ = tokens_of_rank(top_k, torch.float32, tokens)
    counter = torch.zeros(2, dtype=torch.int64)
    name = dist.group.WORLD.group_name
    plan = ops.node_plan(ids, NUM_EXPERTS, group_name=name, ranks_per_node=split.per_node)
    ops.node_dispatch(x.detach(), None, plan, bytes_sent=counter)
    return int(counter[0])


@pytest.mark.parametrize("top_k", [1, 2, 4, 8])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_bytes_between_nodes_are_within_one_percent_of_the_expectation(ranks, split, top_k):
    tokens = 20_000
    sent = ranks(split.world).run(bytes_of_dispatch, split, top_k, tokens)
    nodes = expected_remote_nodes(split.num_nodes, NUM_EXPERTS, top_k)
    expected = split.world * tokens * nodes * HIDDEN * 4
    assert sum(sent) == pytest.approx(expected, rel=0.01)


def refused_by_plan(case: str) -> str:
    ids, _ = random_routing(3, 2, NUM_EXPERTS)
    options = {"group_name": dist.group.WORLD.group_name, "ranks_per_node": 2}
    if case == "nodes":
        options["ranks_per_node"] = 3
    if case == "rows" and dist.get_rank() == 2:
        ids = torch.zeros(50, 2, dtype=torch.int64)
    if case == "id" and dist.get_rank() == 2:
        ids[1, 0] = NUM_EXPERTS
    with pytest.raises(ValueError) as caught:
        ops.node_plan(ids, NUM_EXPERTS, max_rows=60, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("nodes", "ranks_per_node must divide the group's 4 ranks, got 3"),
        ("rows", "rows, but max_rows (MoEConfig.max_received_rows) is 60"),
        ("id", "expert_ids must be in [0, 16), got 1 others on rank 2 of the expert-parallel"),
    ],
)
def test_plan_refuses_on_every_rank(ranks, case, message):
    said = ranks(4).run(refused_by_plan, case)
    assert message in said[0]
    assert said == [said[0]] * 4


def autocast_bytes() -> tuple[torch.dtype, bool]:
    """Rows travel in the autocast dtype: half the bytes."""
    split = Split(4, 2)
    x, ids, weights = tokens_of_rank(2, torch.float32)
    counter = torch.zeros(2, dtype=torch.int64)
    name = dist.group.WORLD.group_name
    plan = ops.node_plan(ids, NUM_EXPERTS, group_name=name, ranks_per_node=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows, _ = ops.node_dispatch(x, weights, plan, bytes_sent=counter)
    return rows.dtype, int(counter[0]) == remote_nodes_of(ids, split) * HIDDEN * 2


def test_autocast_rows_travel_in_its_dtype(ranks):
    assert ranks(4).run(autocast_bytes) == [(torch.bfloat16, True)] * 4


def backward_under_autocast() -> tuple[bool, str]:
    """Whether combine's gradient stays fp32 where backward alone runs under autocast; and what is
    said of a counter that does not fit."""
    x, ids, weights = tokens_of_rank(2, torch.float32)
    name = dist.group.WORLD.group_name
    plan = ops.node_plan(ids, NUM_EXPERTS, group_name=name, ranks_per_node=2)
    rows = ops.node_dispatch(x, weights, plan)[0].clone().requires_grad_()
    upstream = torch.randn(x.shape)
    (expected,) = torch.autograd.grad(ops.node_combine(rows, plan), rows, upstream)
    output = ops.node_combine(rows, plan)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (grad,) = torch.autograd.grad(output, rows, upstream)
    with pytest.raises(ValueError) as caught:
        ops.node_combine(rows, plan, tokens_per_expert=torch.zeros(NUM_EXPERTS))
    return torch.equal(grad, expected), str(caught.value)


def test_combine_backward_under_autocast_casts_nothing_and_counters_are_checked(ranks):
    for is_equal, said in ranks(4).run(backward_under_autocast):
        assert is_equal
        assert said.startswith("tokens_per_expert must be int64, got Float")
