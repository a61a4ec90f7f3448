"""Per-parameter gradients of W ranks against one process that runs the W batches in turn.

Traps 1 (expert gradients P times too large), 3 (P = W), 4 (HSDP), 6 (router gradient), 24
(auxiliary loss lost in wrapping) and 27 (size-1 groups of FSDP1). Raw gradients are compared,
never what Adam makes of them (trap 2).
"""

import contextlib

import pytest
import torch
from node_cases import ranks_per_node
from parallel_cases import (
    AUX,
    TIED,
    UNEVEN,
    Run,
    backward,
    build,
    gradients_on_rank,
    reference_of,
)

from torch_moe_ep import MoEConfig, apply_expert_parallel, init_device_mesh
from torch_moe_ep.testing import LoneExperts, assert_close, random_routing
from torch_moe_ep.testing.parallel import full_gradients

TOLERANCE = 1e-5
GRIDS = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4))
FULL_GRIDS = ((8, 1), (8, 2), (8, 4), (8, 8))
MODELS = {
    "tied": TIED,
    "aux": AUX,
    "tied_aux": {**TIED, **AUX},
    "uneven": UNEVEN,
    "uneven_aux": {**UNEVEN, **AUX},
    # One normalised weight is the constant 1: only the auxiliary loss moves the router.
    "top1_aux": {"num_experts_per_tok": 1, **AUX},
    "top3_of_16": {"num_local_experts": 16, "num_experts_per_tok": 3},
    "top4_of_4": {"num_local_experts": 4, "num_experts_per_tok": 4},
    "top8_of_8": {"num_experts_per_tok": 8},
}
full = pytest.mark.full


def assert_gradients_equal_reference(pool, run: Run) -> None:
    """Every gradient within 1e-5 of the reference, and the mean loss."""
    results = pool.run(gradients_on_rank, run)
    loss, grads = reference_of(run)
    mean = sum(result[0] for result in results) / run.world
    assert abs(mean - loss) <= TOLERANCE * abs(loss)
    assert_close(results[0][1], grads, TOLERANCE, f"gradients of {run}")


def grid_runs():
    """Stock wrappers over every (W, P); W 8 and the rarer strategies in the full suite."""
    for wrap in ("fsdp2", "fsdp1", "none"):
        yield from (Run(wrap, world, ep) for world, ep in GRIDS)
    yield from (Run("ddp", world, ep) for world, ep in GRIDS if world > 1)
    for wrap in ("fsdp1_grad_op", "fsdp1_no_shard"):
        yield from (Run(wrap, world, ep) for world, ep in ((2, 2), (4, 2)))
    for wrap in ("fsdp1_hybrid", "fsdp1_hybrid_zero2"):
        yield from (Run(wrap, 4, ep) for ep in (1, 2, 4))
    for wrap in ("fsdp2", "fsdp1", "fsdp1_hybrid", "ddp", "none"):
        yield from (pytest.param(Run(wrap, *grid), marks=full) for grid in FULL_GRIDS)


@pytest.mark.parametrize("run", list(grid_runs()), ids=str)
def test_trap_01_02_03_gradients_equal_one_process(ranks, run):
    assert_gradients_equal_reference(ranks(run.world), run)


@pytest.mark.parametrize(
    "run",
    [
        Run("fsdp2", 2, 1, 1),
        Run("fsdp2", 4, 2, 1),
        Run("fsdp2", 4, 1, 2),
        Run("hsdp2", 4, 2, 1),
        Run("hsdp2", 4, 2, 2),
        Run("hsdp2", 4, 1, 2),
        Run("hsdp2", 4, 4),
        Run("fsdp1", 4, 2, 1),
        Run("fsdp1_hybrid", 4, 2, 1),
        Run("ddp", 4, 2, 1),
        Run("none", 4, 2, 1),
        pytest.param(Run("hsdp2", 8, 2, 2), marks=full),
        pytest.param(Run("fsdp2", 8, 2, 1), marks=full),
        pytest.param(Run("fsdp1_hybrid", 8, 2, 2), marks=full),
        pytest.param(Run("fsdp1_hybrid_zero2", 8, 4, 1), marks=full),
    ],
    ids=str,
)
def test_trap_04_gradients_equal_one_process_with_replicas(ranks, run):
    assert_gradients_equal_reference(ranks(run.world), run)


@pytest.mark.parametrize(
    "run",
    [Run("fsdp1", 1, 1), Run("fsdp1", 2, 2), Run("fsdp1", 4, 4), Run("fsdp1_grad_op", 4, 4),
     Run("fsdp1_no_shard", 2, 2), Run("fsdp1", 2, 1, 1)],
    ids=str,
)  # fmt: skip
def test_trap_27_fsdp1_gradients_with_groups_of_one_rank(ranks, run):
    assert_gradients_equal_reference(ranks(run.world), run)


def hybrid_without_shards(run: Run) -> str:
    with pytest.raises(ValueError) as caught:
        backward(run, build(run))
    return str(caught.value)


def test_trap_27_fsdp1_hybrid_on_shard_groups_of_one_rank_is_refused(ranks):
    """torch makes it NO_SHARD and then reduces over the one rank: no error, no average."""
    for message in ranks(2).run(hybrid_without_shards, Run("fsdp1_hybrid", 2, 1)):
        assert "over 1 ranks, but all 2 ranks" in message


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("wrap", "ep"), [("fsdp2", 2), ("fsdp1", 4)])
def test_trap_06_24_gradients_of_model_variants(ranks, wrap, ep, name):
    """Tied weights, the auxiliary loss, uneven routing, K from 1 to E, E up to 16."""
    assert_gradients_equal_reference(ranks(4), Run(wrap, 4, ep, model=MODELS[name], label=name))


@pytest.mark.parametrize("name", ["tied_aux", "uneven_aux", "top3_of_16"])
@pytest.mark.parametrize("wrap", ["ddp", "none", "fsdp1_no_shard", "hsdp2"])
def test_trap_06_24_gradients_of_model_variants_in_other_wrappers(ranks, wrap, name):
    assert_gradients_equal_reference(ranks(2), Run(wrap, 2, 2, model=MODELS[name], label=name))


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize("wrap", ["fsdp2", "fsdp1", "fsdp1_hybrid", "ddp", "none"])
def test_trap_06_24_gradients_of_every_variant_everywhere(ranks, wrap, ep, name):
    assert_gradients_equal_reference(ranks(4), Run(wrap, 4, ep, model=MODELS[name], label=name))


@pytest.mark.parametrize(
    "config",
    [
        {"max_slots": 16},
        {"recompute": "gate_up"},
        {"max_slots": 8, "recompute": "gate_up"},
        {"max_received_rows": 4096},
        {"transport": "collective"},
    ],
    ids=str,
)
def test_gradients_do_not_depend_on_memory_settings(ranks, config):
    run = Run("fsdp2", 4, 2, model=UNEVEN, config=config)
    assert_gradients_equal_reference(ranks(4), run)


def output_changed_in_place(config: dict, per_node: int) -> list[list[torch.Tensor]]:
    """Gradients where a sum is added in place to what the experts return, and to a copy of it."""
    found = []
    x = torch.randn(1, 12, 16, requires_grad=True)
    ids, weights = random_routing(12, 2, 8)
    for is_in_place in (True, False):
        with ranks_per_node(per_node) if per_node else contextlib.nullcontext():
            mesh = init_device_mesh("cpu", 2)
            model = apply_expert_parallel(LoneExperts(), mesh, MoEConfig(**config))
        x.grad = None
        y = model(x, ids, weights) if is_in_place else model(x, ids, weights).clone()
        y += x
        y.square().sum().backward()
        found.append([x.grad, *full_gradients(model).values()])
    return found


@pytest.mark.parametrize(
    ("config", "per_node"),
    [({}, 0), ({"num_chunks": 2}, 0), ({"dispatcher": "all_gather"}, 0), ({}, 1)],
    ids=["all_to_all", "chunks", "all_gather", "hierarchical"],
)
def test_output_of_the_experts_may_be_changed_in_place(ranks, config, per_node):
    for in_place, copied in ranks(2).run(output_changed_in_place, config, per_node):
        for found, expected in zip(in_place, copied, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "run",
    [
        Run("fsdp2", 4, 2, config={"gradient": "sum"}),
        Run("fsdp2", 4, 4, config={"gradient": "sum"}),
        Run("fsdp2", 4, 2, 1, config={"gradient": "sum"}),
        Run("fsdp1", 4, 2, config={"gradient": "sum"}),
        Run("none", 2, 1, config={"gradient": "sum"}),
        Run("fsdp2", 1, 1, config={"gradient": "sum"}),
    ],
    ids=str,
)
def test_gradient_sum_makes_expert_gradients_w_times_the_mean(ranks, run):
    assert_gradients_equal_reference(ranks(run.world), run)


@pytest.mark.full
def test_gradients_with_shard_degree_that_divides_no_weight_dimension(ranks):
    """W 6, P 2, S 3: FSDP falls back to uneven shards over the experts."""
    assert_gradients_equal_reference(ranks(6), Run("fsdp2", 6, 2))
