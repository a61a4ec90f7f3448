"""num_chunks: tokens travel under each other's GEMMs, and nothing else changes."""

import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
from chunk_cases import NUM_EXPERTS, Layer, results_of_two_steps, rows_of_chunks
from gpu.cases import poisoned_memory
from node_cases import ranks_per_node
from parallel_cases import (
    UNEVEN,
    Run,
    backward,
    bfloat16_errors,
    build,
    kept_outputs,
    reference_of,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from torch_moe_ep import MoEConfig, ops
from torch_moe_ep.memory import checkpoint_contexts
from torch_moe_ep.testing import (
    RankFailure,
    assert_close,
    random_routing,
    relative_error,
)
from torch_moe_ep.testing.parallel import from_rank0, full_gradients

MANY = 40  # more chunks than any rank has tokens


def experts_of_this_rank(layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up and down, the same on every rank."""
    local = NUM_EXPERTS // dist.get_world_size()
    generator = torch.Generator().manual_seed(5)
    gate_up = torch.randn(local, 2 * layer.width, layer.hidden, generator=generator)
    return gate_up, torch.randn(local, layer.hidden, layer.width, generator=generator)


def movement_in_chunks(num_chunks: int, top_k: int, alignment: int) -> list[str]:
    """What differs in any bit from plan, dispatch and the experts' forward."""
    layer = Layer(top_k=top_k)
    x, ids, weights, _ = layer.inputs()
    x, weights = x.detach(), weights.detach()
    group = dist.group.WORLD.group_name
    experts = experts_of_this_rank(layer)
    plan = ops.plan(ids, NUM_EXPERTS, group_name=group, row_alignment=alignment)
    offsets = plan.expert_offsets
    y, _ = torch.ops.torch_moe_ep.expert_mlp_forward(
        *ops.dispatch(x, weights, plan), offsets, offsets, *experts, 0
    )
    expected = {
        "output": ops.combine(y, plan), "counts": plan.counts,
        **rows_of_chunks((x, weights, ids), experts, num_chunks, row_alignment=alignment),
    }  # fmt: skip
    chunks, packed = ops.plan_chunks(
        x, weights, ids, NUM_EXPERTS, num_chunks, group_name=group, row_alignment=alignment
    )
    found = {"counts": chunks.counts.sum(0)}
    for buffer in (packed, (None, None)):  # packed with the plan, and chunk by chunk
        with poisoned_memory():
            results = torch.ops.torch_moe_ep.chunked_experts_forward(
                x, weights, *chunks[:3], *experts, *chunks[3:], 0, *buffer, True, True
            )
        found.update(zip(("output", "rows", "row_weights", "z"), results, strict=True))
        differing = [name for name in expected if not torch.equal(found[name], expected[name])]
        if differing:
            return differing
    return []


@pytest.mark.parametrize("alignment", [1, 4])
@pytest.mark.parametrize(
    ("world", "num_chunks", "top_k"), [(2, 1, 2), (2, 2, 1), (2, MANY, 3), (4, 3, 2), (4, MANY, 8)]
)
def test_movement_in_chunks_is_that_of_one_bit_for_bit(ranks, world, num_chunks, top_k, alignment):
    found = ranks(world).run(movement_in_chunks, num_chunks, top_k, alignment)
    assert found == [[]] * world


def shapes_that_the_fake_does_not_have(slots_per_pass: int) -> list[str]:
    """For each wish to keep rows and products, where opcheck finds other shapes than the fake's."""
    layer, found = Layer(), []
    x, ids, weights, _ = layer.inputs()
    x, weights = x.detach(), weights.detach()
    plan, _ = ops.plan_chunks(
        x, weights, ids, NUM_EXPERTS, 2, group_name=dist.group.WORLD.group_name
    )
    arguments = (x, weights, *plan[:3], *experts_of_this_rank(layer), *plan[3:], slots_per_pass)
    for keep in ((True, True), (True, False), (False, True), (False, False)):
        result = torch.library.opcheck(
            torch.ops.torch_moe_ep.chunked_experts_forward.default,
            (*arguments, None, None, *keep),
            test_utils=("test_schema", "test_faketensor"),
            raise_exception=False,
        )
        found += [f"{keep}: {said}" for said in result.values() if said != "SUCCESS"]
    return found


@pytest.mark.parametrize("slots_per_pass", [0, 3, 1000])
def test_fake_has_the_shapes_of_what_forward_keeps(ranks, slots_per_pass):
    found = ranks(2).run(shapes_that_the_fake_does_not_have, slots_per_pass)
    assert found == [[]] * 2


def gradients_of_one_chunk() -> list[str]:
    """Which gradients of a plan of one chunk differ in any bit from those of the four operators."""
    layer, group = Layer(top_k=3), dist.group.WORLD.group_name
    runs = []
    for is_chunked in (False, True):
        x, ids, weights, upstream = layer.inputs()
        experts = [weight.requires_grad_() for weight in experts_of_this_rank(layer)]
        if is_chunked:
            chunks, _ = ops.plan_chunks(x, weights, ids, NUM_EXPERTS, 1, group_name=group)
            y = ops.chunked_experts(x, weights, chunks, *experts)
        else:
            plan = ops.plan(ids, NUM_EXPERTS, group_name=group)
            rows, row_weights = ops.dispatch(x, weights, plan)
            y = ops.combine(ops.expert_mlp(rows, row_weights, plan, *experts), plan)
        y.backward(upstream)
        found = [y, *(leaf.grad for leaf in (x, weights, *experts))]
        runs.append(dict(zip(("y", "x", "weights", "gate_up", "down"), found, strict=True)))
    plain, chunked = runs
    return [name for name in plain if not torch.equal(plain[name], chunked[name])]


def test_one_chunk_is_the_four_operators_bit_for_bit(ranks):
    assert ranks(2).run(gradients_of_one_chunk) == [[]] * 2


@pytest.mark.parametrize(
    ("world", "ep", "num_chunks", "layer", "config"),
    [
        (1, 1, 3, Layer(), {}),
        (2, 2, 2, Layer(), {}),
        (2, 2, 3, Layer(routing="piled"), {"recompute": "gate_up"}),
        (2, 2, MANY, Layer(top_k=1), {}),
        (4, 2, 2, Layer(top_k=3), {"gradient": "sum"}),
        (4, 4, 3, Layer(), {"max_slots": 5}),
        (4, 4, 2, Layer(routing="piled", top_k=3), {"max_slots": 10_000}),
        (4, 4, MANY, Layer(routing="piled"), {}),
    ],
    ids=str,
)
def test_layer_in_chunks_equals_one_chunk(ranks, world, ep, num_chunks, layer, config):
    """Traps 8, 9, 10 and 12: unwritten memory, no tokens, piles on some ranks only, counters."""
    pool = ranks(world)
    whole = pool.run(results_of_two_steps, layer, ep, config)
    chunked = pool.run(results_of_two_steps, layer, ep, {**config, "num_chunks": num_chunks})
    for ours, expected in zip(chunked, whole, strict=True):
        assert torch.equal(ours.pop("load"), expected.pop("load"))
        assert_close(ours, expected, 1e-5)


def test_bfloat16_error_in_chunks_is_within_twice_hugging_faces(ranks):
    for errors in ranks(2).run(bfloat16_errors, {"num_chunks": 3}, NUM_EXPERTS, 2):
        for ours, theirs in errors:
            assert ours <= 2 * theirs, errors


NAMES = {
    "c10d::_allgather_base_": "counts",
    "c10d::alltoall_base_": "rows",
    "torch_moe_ep::expert_mlp_forward_chunk": "experts",
    "torch_moe_ep::expert_mlp_input_grads_chunk": "input gradients",
    "torch_moe_ep::expert_mlp_weight_grads": "weight gradients",
    "torch_moe_ep::expert_mlp_backward_chunks": "all gradients",
}


def order_of_a_step(config: dict) -> tuple[list[str], list[str]]:
    """What forward and backward issue, in order."""
    layer = Layer()
    model = layer.experts(2, config)
    found = []
    for is_last in (False, True):
        x, ids, weights, upstream = layer.inputs()
        with torch.profiler.profile() as forward:
            y = model(x, ids, weights)
        with torch.profiler.profile() as back:
            y.backward(upstream)
        if is_last:
            found = [forward, back]
    logs = []
    for profile in found:
        events = sorted(profile.events(), key=lambda event: event.time_range.start)
        logs.append([NAMES[event.name] for event in events if event.name in NAMES])
    return logs[0], logs[1]


def test_next_chunk_is_sent_before_the_gemms_of_a_chunk_and_counts_meet_once(ranks):
    """Rows leave with their weights, results come alone; gradients the other way round.

    Trap 17: the count exchange is the one wait of the host.
    """
    rows = "rows"
    forward = ["counts", rows, rows, rows, rows, "experts", rows, rows, rows, "experts", rows]
    forward += ["experts", rows]
    back = [rows, rows, "input gradients", rows, rows, rows, "input gradients", rows, rows]
    back += ["input gradients", rows, rows, "weight gradients"]
    assert ranks(2).run(order_of_a_step, {"num_chunks": 3}) == [(forward, back)] * 2


def test_passes_take_the_gradients_of_all_chunks_at_once(ranks):
    _, back = ranks(2).run(order_of_a_step, {"num_chunks": 2, "max_slots": 5})[0]
    assert back == ["rows", "rows", "all gradients", "rows", "rows", "rows", "rows"]


def saved_bytes(config: dict, is_frozen: bool = False) -> tuple[int, int]:
    """Bytes that backward keeps of one layer, without weights: of floats, of integers."""
    layer = Layer()
    model = layer.experts(2, config).requires_grad_(not is_frozen)
    weights_at = {param.to_local().untyped_storage().data_ptr() for param in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor):
        address = tensor.untyped_storage().data_ptr()
        if address not in weights_at:
            kept[address] = tensor
        return tensor

    x, ids, weights, upstream = layer.inputs()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x, ids, weights)
    y.backward(upstream)
    sizes = {True: 0, False: 0}
    for tensor in kept.values():
        sizes[tensor.is_floating_point()] += tensor.untyped_storage().nbytes()
    return sizes[True], sizes[False]


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("config", [{}, {"recompute": "gate_up"}, {"max_slots": 3}], ids=str)
def test_backward_keeps_the_bytes_of_one_chunk(ranks, config, is_frozen):
    whole = ranks(2).run(saved_bytes, config, is_frozen)
    chunked = ranks(2).run(saved_bytes, {**config, "num_chunks": 3}, is_frozen)
    for (floats, _), (expected, _) in zip(chunked, whole, strict=True):
        assert floats == expected > 0
    # Counts of every chunk [C, P, E], here and on the host, in place of one's and of all slots.
    extra = 2 * 2 * 2 * NUM_EXPERTS * 8
    assert all(mine[1] <= other[1] + extra for mine, other in zip(chunked, whole, strict=True))


def test_frozen_experts_keep_no_rows_where_the_products_are_kept(ranks):
    config = {"num_chunks": 3}
    trained = ranks(2).run(saved_bytes, config)
    frozen = ranks(2).run(saved_bytes, config, True)
    shares = [ours / whole for (ours, _), (whole, _) in zip(frozen, trained, strict=True)]
    row, products, weight = Layer.hidden, 2 * Layer.width, 1
    assert shares == [pytest.approx((products + weight) / (row + products + weight))] * 2


def gradients_of_frozen_experts(config: dict, keep: str) -> list[str]:
    """What differs in any bit from trained experts, and operators that give weight gradients.

    keep: of checkpoint_contexts; "": no checkpointing.
    """
    layer, runs = Layer(), []
    for is_frozen in (False, True):
        model = layer.experts(2, config).requires_grad_(not is_frozen)
        x, ids, weights, upstream = layer.inputs()
        contexts = {"context_fn": checkpoint_contexts(keep)} if keep else {}
        run = partial(checkpoint, model, use_reentrant=False, **contexts) if keep else model
        y = run(x, ids, weights)
        with torch.profiler.profile() as profile:
            y.backward(upstream)
        runs.append({"y": y, "x": x.grad, "weights": weights.grad})
    operators = {event.name for event in profile.events()}
    found = [name for name in runs[0] if not torch.equal(runs[0][name], runs[1][name])]
    found += sorted(operators & {"torch_moe_ep::expert_mlp_weight_grads"})
    return found + [
        name for name, parameter in model.named_parameters() if parameter.grad is not None
    ]


@pytest.mark.parametrize("keep", ["", "routing", "rows"])
@pytest.mark.parametrize("config", [{}, {"recompute": "gate_up"}, {"max_slots": 5}], ids=str)
def test_frozen_experts_in_chunks_have_no_weight_gradients(ranks, config, keep):
    found = ranks(2).run(gradients_of_frozen_experts, {**config, "num_chunks": 2}, keep)
    assert found == [[]] * 2


def model_results(run: Run, how: str) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss, full gradients, and exchanges of rows in a step, with or without checkpointing."""
    model = build(run)
    options = {
        "plain": None,
        "recompute": {"use_reentrant": False},
        "reentrant": {"use_reentrant": True},
        "keep_routing": {"use_reentrant": False, "context_fn": checkpoint_contexts("routing")},
        "keep_rows": {"use_reentrant": False, "context_fn": checkpoint_contexts("rows")},
    }[how]
    if options is not None:
        inner = getattr(model, "module", model)
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        inner.train()
    with torch.profiler.profile() as profile:
        loss = backward(run, model)
    num_exchanges = sum(event.name == "gloo:all_to_all" for event in profile.events())
    return loss, from_rank0(full_gradients(model)), num_exchanges


CHUNKED = {"num_chunks": 3}
RUNS = [
    Run("fsdp2", 2, 2, model=UNEVEN, config=CHUNKED),
    Run("fsdp1", 4, 2, model=UNEVEN, config=CHUNKED),
    Run("fsdp2", 4, 4, model=UNEVEN, config={"num_chunks": 2, "recompute": "gate_up"}),
    Run("none", 2, 2, model=UNEVEN, config={"num_chunks": MANY, "gradient": "sum"}),
    Run("fsdp2", 2, 1, model=UNEVEN, config=CHUNKED),
]


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_model_in_chunks_equals_one_process_in_every_gradient(ranks, run):
    results = ranks(run.world).run(model_results, run, "plain")
    loss, grads = reference_of(run)
    assert sum(result[0] for result in results) / run.world == pytest.approx(loss, rel=1e-5)
    assert_close(results[0][1], grads, 1e-5)


def test_trap_11_checkpointing_in_chunks_is_bit_equal_and_rows_kept_do_not_travel_again(ranks):
    run = RUNS[0]
    _, plain, once = ranks(2).run(model_results, run, "plain")[0]
    num_exchanges = {}
    for how in ("recompute", "reentrant", "keep_routing", "keep_rows"):
        _, grads, num_exchanges[how] = ranks(2).run(model_results, run, how)[0]
        assert [name for name in plain if not torch.equal(grads[name], plain[name])] == [], how
    assert num_exchanges["keep_rows"] == once
    # Two layers of three chunks: rows and weights there, rows back, computed again.
    assert num_exchanges["keep_routing"] == num_exchanges["recompute"] == once + 2 * 3 * 3


def kept_elements(keep: str) -> list[int]:
    """What a checkpointed layer keeps of its plan's send buffer, and of rows, weights and z."""
    layer = Layer()
    model = layer.experts(2, CHUNKED)
    forward, _ = checkpoint_contexts(keep)()
    x, ids, weights, _ = layer.inputs()
    with forward:
        model(x, ids, weights)
    plan = kept_outputs(forward, torch.ops.torch_moe_ep.plan_chunks.default)
    experts = kept_outputs(forward, torch.ops.torch_moe_ep.chunked_experts_forward.default)
    return [plan[0][3].val.numel(), *(part.val.numel() for it in experts for part in it[1:])]


def test_checkpointing_keeps_no_send_buffer_and_no_products(ranks):
    assert [kept[:1] for kept in ranks(2).run(kept_elements, "routing")] == [[0]] * 2
    for send_buffer, rows, row_weights, z in ranks(2).run(kept_elements, "rows"):
        assert (send_buffer, z) == (0, 0)
        assert rows == row_weights * Layer().hidden > 0


def outputs_without_gradients() -> list[torch.Tensor]:
    """Outputs with gradients, without, and in inference mode; and under autocast."""
    layer = Layer()
    model = layer.experts(2, CHUNKED)
    x, ids, weights, _ = layer.inputs()
    found = [model(x, ids, weights).detach()]
    with torch.no_grad():
        found.append(model(x, ids, weights))
    with torch.inference_mode():
        found.append(model(x, ids, weights).clone())
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x, ids, weights)
    y.sum().backward()
    return [*found, y.detach()]


def test_outputs_without_gradients_and_under_autocast(ranks):
    for plain, no_grad, inference, autocast in ranks(2).run(outputs_without_gradients):
        assert torch.equal(no_grad, plain) and torch.equal(inference, plain)
        assert autocast.dtype == plain.dtype
        if plain.numel():
            assert 0 < relative_error(autocast, plain) < 2e-2


def message_of_misfit(case: str) -> str:
    """What this rank says to a layer whose last rank is at fault, or whose rows do not fit."""
    is_last = dist.get_rank() == dist.get_world_size() - 1
    config = {"num_chunks": 2}
    if case == "differs" and is_last:
        config["num_chunks"] = 3
    if case == "rows":
        config["max_received_rows"] = 10
    ids, weights = random_routing(9, 2, NUM_EXPERTS)
    if case == "id" and is_last:
        ids[3, 1] = NUM_EXPERTS
    try:
        Layer().experts(2, config)(torch.randn(9, 16), ids, weights)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("differs", "ranks 0 and 1 differ in MoEConfig.num_chunks: 2 and 3"),
        ("rows", "rows, but max_rows (MoEConfig.max_received_rows) is 10"),
        ("id", "expert_ids must be in [0, 8), got 1 others on rank 1 of the expert-parallel"),
    ],
)
def test_what_does_not_fit_is_refused_on_every_rank(ranks, case, message):
    said = ranks(2).run(message_of_misfit, case)
    assert message in said[0]
    assert said[0] == said[1]


def die_between_chunks() -> str:
    """Rank 1 dies once the counts have met."""
    os.environ["TORCH_MOE_EP_TIMEOUT_S"] = "2"
    layer = Layer()
    model = layer.experts(2, CHUNKED)
    x, ids, weights, _ = layer.inputs()
    if dist.get_rank() == 1:
        ops.chunked_experts = lambda *_args, **_kwargs: os._exit(7)
    with pytest.raises(RuntimeError) as caught:
        model(x, ids, weights)
    return str(caught.value)


def test_rank_that_dies_after_the_plan_is_named(ranks):
    with pytest.raises(RankFailure, match="rank 1 died with exit code 7") as caught:
        ranks(2).run(die_between_chunks, timeout_s=60, grace_s=20.0)
    assert "the all-to-all of rows failed on global rank 0" in caught.value.results[0]
    assert "did not take part: 1 " in caught.value.results[0]


def nodes_with_chunks() -> int:
    with ranks_per_node(1):
        return Layer().experts(2, CHUNKED).experts.ranks_per_node


def test_auto_takes_the_flat_way_over_nodes_with_chunks(ranks):
    assert ranks(2).run(nodes_with_chunks) == [0, 0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_chunks": 0}, "num_chunks must be at least 1 .*, got 0"),
        ({"num_chunks": True}, "num_chunks must be a whole number, got True"),
        ({"num_chunks": 2.0}, "num_chunks must be a whole number, got 2.0"),
        ({"num_chunks": 2, "transport": "hierarchical"}, 'does not go with transport="hier'),
        ({"num_chunks": 2, "dispatcher": "all_gather"}, 'does not go with dispatcher="all_gather"'),
        ({"num_chunks": 2, "received_rows": "dispatch_again"}, "does not go with received_rows="),
    ],
    ids=str,
)
def test_num_chunks_that_cannot_be_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**config)


def test_plan_of_chunks_without_a_group_is_refused():
    ids, weights = random_routing(4, 2, NUM_EXPERTS)
    with pytest.raises(ValueError, match=r"got no group_name \(call plan\)"):
        ops.plan_chunks(torch.randn(4, 16), weights, ids, NUM_EXPERTS, 2, group_name="")


def test_plan_over_peers_is_refused_on_the_cpu():
    ids, weights = random_routing(4, 2, NUM_EXPERTS)
    counts, offsets = torch.zeros(2, 2, 8, dtype=torch.int64), torch.zeros(9, dtype=torch.int64)
    plan = ops.ChunkPlan(ids.flatten(), counts, counts, 2, 1, "group", offsets, 0, 16)
    gate_up, down = torch.randn(4, 64, 16), torch.randn(4, 16, 32)
    with pytest.raises(ValueError, match="is for GPUs that map each other's memory, got tokens on"):
        ops.chunked_experts(torch.randn(4, 16), weights, plan, gate_up, down)


def test_traced_forward_that_keeps_nothing_asks_for_no_unknown_size() -> None:
    """A size that no result has would be an error of the tracer."""
    experts, hidden, width, tokens, top_k = 2, 16, 8, 3, 2

    def forward(x: torch.Tensor) -> torch.Tensor:
        counts = torch.zeros(2, 2, 2 * experts, dtype=torch.int64)
        return torch.ops.torch_moe_ep.chunked_experts_forward(
            *(x, torch.ones(tokens, top_k), torch.zeros(tokens * top_k, dtype=torch.int64)),
            *(counts, counts, torch.ones(experts, 2 * width, hidden)),
            *(torch.ones(experts, hidden, width), top_k, 1, "", None, 0, 0, 0, None, None),
            *(False, False),
        )[0]

    traced = make_fx(forward, tracing_mode="symbolic")(torch.ones(tokens, hidden))
    (output,) = (node for node in traced.graph.nodes if node.op == "output")
    assert output.args[0].meta["val"].shape == (tokens, hidden)
