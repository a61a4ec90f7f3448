"""dispatcher="all_gather" and global_token_shuffle: equal to the plain path, and to one process."""

import pytest
import torch
import torch.distributed as dist
from parallel_cases import UNEVEN, Run, build, reference_of

import torch_moe_ep
from torch_moe_ep import MoEConfig, apply_expert_parallel, init_device_mesh
from torch_moe_ep.metrics import expert_load
from torch_moe_ep.routing.shuffle import plan_shuffle
from torch_moe_ep.testing import LoneExperts, assert_close, batch_of, random_routing
from torch_moe_ep.testing.parallel import from_rank0, full_gradients


def layer_on_rank(
    ep: int, config: dict, top_k: int, dtype: torch.dtype, autocast: bool = False
) -> dict[str, torch.Tensor]:
    """Output, gradients and counters of lone experts; ranks hold different numbers of tokens."""
    mesh, rank = init_device_mesh("cpu", ep), dist.get_rank()
    model = apply_expert_parallel(LoneExperts(8).to(dtype), mesh, MoEConfig(**config))
    tokens = 0 if rank == 1 else 7 + 3 * rank
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(tokens, 16, generator=generator).to(dtype).requires_grad_()
    ids, weights = random_routing(tokens, top_k, 8, seed=rank)
    weights.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x, ids, weights)
    (y * torch.randn(y.shape, generator=generator)).sum().backward()
    grads = full_gradients(model)
    return {"y": y.detach(), "x": x.grad, "w": weights.grad, **grads,
            "counts": expert_load(model).tokens["experts"]}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("world", "ep", "top_k"), [(2, 2, 2), (4, 4, 2), (4, 2, 3)])
def test_all_gather_equals_all_to_all(ranks, world, ep, top_k, dtype):
    plain = ranks(world).run(layer_on_rank, ep, {}, top_k, dtype)
    gathered = ranks(world).run(layer_on_rank, ep, {"dispatcher": "all_gather"}, top_k, dtype)
    for ours, expected in zip(gathered, plain, strict=True):
        if top_k == 2 and dtype == torch.float32:  # a sum of two has one order
            assert all(torch.equal(ours[name], expected[name]) for name in expected)
        # Parts of three or in bf16 are rounded once more on their way home.
        assert_close(ours, expected, 1e-6 if dtype == torch.float32 else 2**-6)


def rows_under_autocast(config: dict) -> tuple[list[torch.dtype], dict[str, torch.Tensor]]:
    """Dtypes of the rows of hidden size that an all-gather takes along, and the layer's results."""
    seen: list[torch.dtype] = []
    gather = dist.all_gather_into_tensor

    def watched(output: torch.Tensor, rows: torch.Tensor, **options: object) -> object:
        if rows.shape[-1] == 16:
            seen.append(rows.dtype)
        return gather(output, rows, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather_into_tensor", watched)
        results = layer_on_rank(2, config, 2, torch.float32, autocast=True)
    return seen, results


def test_all_gather_under_autocast_moves_rows_in_its_dtype(ranks):
    """Hidden states in forward and the output's gradient in backward; results as all-to-all's."""
    plain = ranks(2).run(rows_under_autocast, {})
    gathered = ranks(2).run(rows_under_autocast, {"dispatcher": "all_gather"})
    for (seen, ours), (_, expected) in zip(gathered, plain, strict=True):
        assert seen == [torch.bfloat16] * 2
        assert ours["y"].dtype == ours["x"].dtype == torch.float32
        assert_close(ours, expected, 2**-6)


def model_on_rank(run: Run, checkpointing: bool) -> tuple[float, dict[str, torch.Tensor]]:
    model = build(run)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(**batch_of(dist.get_rank())).loss
    loss.backward()
    return loss.item(), from_rank0(full_gradients(model))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        {"dispatcher": "all_gather"},
        {"global_token_shuffle": True},
        {"dispatcher": "all_gather", "global_token_shuffle": True, "seed": 3},
    ],
    ids=["all_gather", "shuffle", "both"],
)
@pytest.mark.parametrize(("world", "ep"), [(2, 2), (4, 2), (4, 4)])
def test_dispatchers_equal_one_process_in_every_gradient(ranks, world, ep, config, checkpointing):
    if checkpointing and world == 4:
        pytest.skip("checkpointing is covered with two ranks")
    run = Run("fsdp2", world, ep, model=UNEVEN, config=config)
    results = ranks(world).run(model_on_rank, run, checkpointing)
    loss, grads = reference_of(Run("fsdp2", world, ep, model=UNEVEN))
    assert sum(result[0] for result in results) / world == pytest.approx(loss, rel=1e-5)
    assert_close(results[0][1], grads, 1e-5)


def outputs_on_rank(config: dict, lengths: list[int]) -> torch.Tensor:
    """Logits of one rank, whose batch differs in length from its neighbour's."""
    model = build(Run("none", 2, 2, model=UNEVEN, config=config))
    length = lengths[dist.get_rank()]
    with torch.no_grad():
        return model(batch_of(dist.get_rank(), tokens=2 * length)["input_ids"]).logits


@pytest.mark.parametrize("lengths", [[6, 6], [3, 9]], ids=str)
def test_shuffle_gives_the_outputs_of_the_plain_path(ranks, lengths):
    plain = ranks(2).run(outputs_on_rank, {}, lengths)
    shuffled = ranks(2).run(outputs_on_rank, {"global_token_shuffle": True}, lengths)
    for ours, expected in zip(shuffled, plain, strict=True):
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def input_gradients_on_rank(run: Run) -> list[torch.Tensor]:
    """Of one graph, run backward twice."""
    model = build(run)
    loss = model(**batch_of(dist.get_rank())).loss
    weight = model.get_input_embeddings().weight
    return [torch.autograd.grad(loss, weight, retain_graph=True)[0] for _ in range(2)]


def test_shuffle_goes_the_same_way_in_every_backward_of_a_graph(ranks):
    """With four ranks: two always send each other as many rows as they receive."""
    run = Run("none", 4, 4, model=UNEVEN, config={"global_token_shuffle": True})
    for first, second in ranks(4).run(input_gradients_on_rank, run):
        assert torch.equal(first, second)


def sinkhorn_choices_on_rank(config: dict) -> list[torch.Tensor]:
    model = build(Run("none", 2, 2, model=UNEVEN, config=config)).train()
    chosen = []
    for _, module in model.named_modules():
        if module.__class__.__name__.startswith("Routed"):
            module.register_forward_hook(lambda _m, _x, out: chosen.append(out[0].detach()))
    model(**batch_of(dist.get_rank()))
    return chosen


def test_shuffle_routes_tokens_of_both_ranks(ranks):
    config = {"routing": "sinkhorn"}
    plain = ranks(2).run(sinkhorn_choices_on_rank, config)
    mixed = ranks(2).run(sinkhorn_choices_on_rank, {**config, "global_token_shuffle": True})
    together = torch.cat([chosen[0] for chosen in plain])
    for rank in range(2):
        nearest = torch.cdist(mixed[rank][0], together).argmin(dim=1)
        assert 0 < int((nearest >= 24).sum()) < 24, "no token of the other rank was routed here"


@pytest.mark.parametrize("sizes", [[4, 4], [0, 5, 3], [2, 0, 0, 7]], ids=str)
def test_plan_shuffle_sends_what_is_received(sizes):
    plans = [plan_shuffle(sizes, rank, "key", torch.device("cpu")) for rank in range(len(sizes))]
    for rank, plan in enumerate(plans):
        assert plan.receive_counts == [other.send_counts[rank] for other in plans]
        assert sorted(plan.send_order.tolist()) == list(range(sizes[rank]))
        assert sorted(plan.place.tolist()) == list(range(sizes[rank]))


def test_dispatcher_and_shuffle_refuse_by_name():
    with pytest.raises(ValueError, match='dispatcher must be "all_to_all" or "all_gather"'):
        torch_moe_ep.MoEConfig(dispatcher="p2p")
    with pytest.raises(ValueError, match="global_token_shuffle must be True or False"):
        torch_moe_ep.MoEConfig(global_token_shuffle="yes")


def said_of_too_many_rows() -> str:
    """Rank 1 has no token: the rows are of the rank that has most."""
    config = torch_moe_ep.MoEConfig(dispatcher="all_gather", max_received_rows=71)
    mesh = torch_moe_ep.init_device_mesh("cpu", 2)
    model = torch_moe_ep.apply_expert_parallel(LoneExperts(), mesh, config)
    tokens = 18 * (1 - dist.get_rank())
    ids, weights = random_routing(tokens, 2, 8, seed=0)
    with pytest.raises(ValueError) as caught:
        model(torch.zeros(tokens, 16), ids, weights)
    return str(caught.value)


def test_all_gather_beyond_max_received_rows_raises_on_every_rank(ranks):
    for said in ranks(2).run(said_of_too_many_rows):
        assert "a rank needs 72 rows, but max_rows (MoEConfig.max_received_rows) is 71" in said
