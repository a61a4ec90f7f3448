"""Routing that goes wrong in expert-parallel projects, over several ranks.

Traps 7 (auxiliary loss depends on P), 9 (an expert or a rank without tokens), 10 (ranks take
different branches), 12 (counters), 16 (rank-major taken for expert-major), 24 (auxiliary
loss lost).
"""

import pytest
import torch
import torch.distributed as dist
from parallel_cases import AUX, UNEVEN, Run, backward, build, reference_of

import torch_moe_ep
from torch_moe_ep import MoEConfig, apply_expert_parallel, init_device_mesh
from torch_moe_ep.parallel.state import iter_experts
from torch_moe_ep.testing import (
    LoneExperts,
    RankFailure,
    assert_close,
    batch_of,
    random_routing,
    relative_error,
    tiny_mixtral,
)
from torch_moe_ep.testing.parallel import from_rank0, full_gradients, wrap
from torch_moe_ep.testing.reference import reference_gradients

WATCHDOG_S = 60


def constant_experts(num_experts: int, hidden: int) -> LoneExperts:
    """Expert e maps x, whose element 0 is 1, to (e + 1) * x."""
    model = LoneExperts(num_experts, hidden, hidden)
    with torch.no_grad():
        model.experts.gate_up_proj.zero_()
        model.experts.gate_up_proj[:, :hidden, 0] = 3.0
        model.experts.gate_up_proj[:, hidden:] = torch.eye(hidden)
        factor = torch.nn.functional.silu(torch.tensor(3.0))
        for expert in range(num_experts):
            model.experts.down_proj[expert] = (expert + 1) / factor * torch.eye(hidden)
    return model


def constants_on_rank(ep: int, num_local: int, top_k: int) -> float:
    """Relative error of the output of identity experts with a constant each."""
    num_experts, hidden, rank = ep * num_local, 8, dist.get_rank()
    mesh = init_device_mesh("cpu", ep)
    model = apply_expert_parallel(constant_experts(num_experts, hidden), mesh)
    tokens = 5 + 4 * rank
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(rank))
    x[:, 0] = 1.0
    ids, weights = random_routing(tokens, top_k, num_experts, seed=rank)
    expected = (weights * (ids + 1)).sum(dim=1, keepdim=True) * x
    return relative_error(model(x, ids, weights), expected)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("num_local", [2, 4])
@pytest.mark.parametrize("ep", [2, 4])
def test_trap_16_every_copy_reaches_its_own_expert(ranks, ep, num_local, top_k):
    errors = ranks(ep).run(constants_on_rank, ep, num_local, top_k)
    assert max(errors) <= 1e-5


def routing_of(kind: str, tokens: int, num_experts: int, top_k: int, seed: int):
    """A routing of one rank: random, all to the first or the last expert, or no token at all."""
    if kind == "empty":
        tokens = 0
    ids, weights = random_routing(tokens, top_k, num_experts, seed=seed)
    if kind == "first":
        ids = torch.arange(top_k).repeat(tokens, 1)
    if kind == "last":
        ids = num_experts - 1 - torch.arange(top_k).repeat(tokens, 1)
    return ids, weights


def adversarial_on_rank(wrap_kind: str, ep: int, kinds: list[str], config: dict, steps: int):
    """Outputs' and gradients' errors against every rank's batch run in one process."""
    world, rank, num_experts = dist.get_world_size(), dist.get_rank(), 8
    mesh = init_device_mesh("cpu", ep)
    model = apply_expert_parallel(LoneExperts(num_experts), mesh, MoEConfig(**config))
    if wrap_kind == "fsdp2":
        torch.distributed.fsdp.fully_shard(model)
    reference = LoneExperts(num_experts)
    errors = []
    for step in range(steps):
        model.zero_grad()
        reference.zero_grad()
        for source in range(world):
            kind = kinds[(source + step) % world]
            ids, weights = routing_of(kind, 6 + source, num_experts, 2, seed=step * 9 + source)
            generator = torch.Generator().manual_seed(source)
            x = torch.randn(len(ids), 16, generator=generator)
            expected = reference(x, ids, weights)
            if len(ids) > 0:  # without a token the eager module builds no graph
                (expected.sum() / world).backward()
            if source == rank:
                mine = (x.clone().requires_grad_(), ids, weights, expected.detach())
        x, ids, weights, expected = mine
        y = model(x, ids, weights)
        y.sum().backward()
        errors.append(relative_error(y, expected))
        grads = full_gradients(model)
        for name, param in reference.named_parameters():
            wanted = torch.zeros_like(param) if param.grad is None else param.grad
            errors.append(relative_error(grads[name], wanted))
            unused = [e for e in range(num_experts) if not wanted[e].any()]
            assert not grads[name][unused].any(), "an expert without a token has a gradient"
    return max(errors)


@pytest.mark.parametrize(
    "kinds",
    [
        ["first", "random", "empty", "last"],
        ["first", "first", "first", "first"],
        ["empty", "empty", "empty", "random"],
        ["empty", "empty", "empty", "empty"],
    ],
    ids="-".join,
)
@pytest.mark.parametrize(("wrap_kind", "ep"), [("fsdp2", 2), ("fsdp2", 4), ("none", 4)])
def test_trap_09_10_adversarial_routing_neither_hangs_nor_errs(ranks, wrap_kind, ep, kinds):
    errors = ranks(4).run(adversarial_on_rank, wrap_kind, ep, kinds, {}, 4, timeout_s=WATCHDOG_S)
    assert max(errors) <= 1e-5


@pytest.mark.parametrize("config", [{"max_slots": 5}, {"recompute": "gate_up", "max_slots": 3}],
                         ids=str)  # fmt: skip
def test_trap_10_several_passes_on_some_ranks_only(ranks, config):
    kinds = ["first", "random", "empty", "last"]
    errors = ranks(4).run(adversarial_on_rank, "fsdp2", 4, kinds, config, 4, timeout_s=WATCHDOG_S)
    assert max(errors) <= 1e-5


def too_many_rows_on_rank(ep: int):
    """All tokens of all ranks to expert 0; the bound fits everybody's usual share."""
    mesh = init_device_mesh("cpu", ep)
    model = apply_expert_parallel(LoneExperts(), mesh, MoEConfig(max_received_rows=16))
    x = torch.randn(6, 16)
    with pytest.raises(Exception, match=str(6 * ep)) as caught:
        model(x, torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1))
    return str(caught.value)


def test_trap_10_too_many_rows_on_one_rank_raise_on_all(ranks):
    messages = ranks(4).run(too_many_rows_on_rank, 4, timeout_s=WATCHDOG_S)
    assert all("max_received_rows" in message for message in messages), messages


def aux_loss_on_rank(run: Run):
    """The auxiliary loss and the total loss of this rank's batch."""
    model = build(run)
    output = model(**batch_of(dist.get_rank()))
    output.loss.backward()
    grads = full_gradients(model)
    gates = {name: grad for name, grad in grads.items() if name.endswith("gate.weight")}
    return output.aux_loss.item(), output.loss.item(), from_rank0(gates)


@pytest.mark.parametrize("run", [
    Run("fsdp2", 4, 1, model={**AUX, **UNEVEN}),
    Run("fsdp2", 4, 2, model={**AUX, **UNEVEN}),
    Run("fsdp2", 4, 4, model={**AUX, **UNEVEN}),
    Run("fsdp1", 4, 2, model={**AUX, **UNEVEN}),
    Run("ddp", 4, 2, model={**AUX, **UNEVEN}),
], ids=str)  # fmt: skip
def test_trap_07_24_aux_loss_is_each_ranks_own_at_every_p(ranks, run):
    results = ranks(4).run(aux_loss_on_rank, run)
    model = tiny_mixtral(**run.model)
    for rank, (aux, total, _) in enumerate(results):
        expected = model(**batch_of(rank))
        assert aux == pytest.approx(expected.aux_loss.item(), rel=1e-5) and aux > 0
        assert total == pytest.approx(expected.loss.item(), rel=1e-5)
    grads = reference_of(run)[1]
    gates = {name: grad for name, grad in grads.items() if name.endswith("gate.weight")}
    assert len(gates) == 2
    assert_close(results[0][2], gates, 1e-5, "router gradients")


MICRO_BATCHES = 2


def padded_batch(rank: int, step: int) -> dict[str, torch.Tensor]:
    """One rank's batch with rows of different length: the end of the last row is padding."""
    batch = batch_of(rank, step=step)
    mask = torch.ones_like(batch["input_ids"])
    mask[-1, -(2 + rank) :] = 0
    batch["labels"][mask == 0] = -100
    return {**batch, "attention_mask": mask}


def padded_aux_on_rank(run: Run):
    """Auxiliary and total loss of each micro-batch of this rank, and rank 0's gradients."""
    model = build(run)
    losses = []
    for micro in range(MICRO_BATCHES):
        output = model(**padded_batch(dist.get_rank(), micro))
        (output.loss / MICRO_BATCHES).backward()
        losses.append((output.aux_loss.item(), output.loss.item()))
    if run.wrap == "none":
        torch_moe_ep.average_gradients(model)
    return losses, from_rank0(full_gradients(model))


@pytest.mark.parametrize("run", [
    Run("fsdp2", 4, 1, model={**AUX, **UNEVEN}),
    Run("fsdp2", 4, 4, model={**AUX, **UNEVEN}),
    Run("fsdp1", 4, 2, model={**AUX, **UNEVEN}),
    Run("none", 2, 2, model={**AUX, **UNEVEN}),
], ids=str)  # fmt: skip
def test_trap_07_aux_loss_with_padding_is_each_micro_batchs_own(ranks, run):
    results = ranks(run.world).run(padded_aux_on_rank, run)
    model = tiny_mixtral(**run.model)
    for rank, (losses, _) in enumerate(results):
        for micro, (aux, total) in enumerate(losses):
            batch = padded_batch(rank, micro)
            expected = model(**batch)
            assert aux == pytest.approx(expected.aux_loss.item(), rel=1e-5) and aux > 0
            assert total == pytest.approx(expected.loss.item(), rel=1e-5)
            del batch["attention_mask"]
            unmasked = model(**batch).aux_loss.item()
            assert aux != pytest.approx(unmasked, rel=1e-4), "the mask must matter"
    batches = [padded_batch(rank, m) for m in range(MICRO_BATCHES) for rank in range(run.world)]
    _, grads = reference_gradients(lambda: tiny_mixtral(**run.model), batches)
    assert_close(results[0][1], grads, 1e-5, f"gradients of {run}")


def aux_matters_on_rank(run: Run):
    model = build(run)
    backward(run, model)
    grads = full_gradients(model)
    return from_rank0({n: g for n, g in grads.items() if n.endswith("gate.weight")})


def test_trap_24_aux_loss_gradient_reaches_the_gate(ranks):
    """The router's gradient with the auxiliary loss is not the one without."""
    with_aux, without = (
        ranks(2).run(aux_matters_on_rank, Run("fsdp2", 2, 2, model=model))[0]
        for model in ({**AUX, **UNEVEN}, UNEVEN)
    )
    for name, grad in with_aux.items():
        assert relative_error(grad, without[name]) > 1e-2


def aux_before_and_after_on_rank(run: Run):
    """Auxiliary loss of one model as it came (output hooks in place), and patched and wrapped."""
    mesh = init_device_mesh("cpu", run.ep)
    batch = batch_of(dist.get_rank())
    model = tiny_mixtral(**run.model)
    before = model(**batch).aux_loss.item()
    model = wrap(apply_expert_parallel(model, mesh), run.wrap, mesh)
    output = model(**batch)
    output.loss.backward()
    if run.wrap == "none":
        torch_moe_ep.average_gradients(model)
    return before, output.aux_loss.item(), from_rank0(full_gradients(model))


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1", "none"])
def test_trap_24_aux_loss_of_a_model_that_ran_before_the_patch(ranks, kind):
    """transformers hooks the routers at the first forward: a router put in later has no hook."""
    run = Run(kind, 2, 2, model={**AUX, **UNEVEN})
    results = ranks(2).run(aux_before_and_after_on_rank, run)
    for before, after, _ in results:
        assert after == pytest.approx(before, rel=1e-5) and before > 0
    assert_close(results[0][2], reference_of(run)[1], 1e-5, f"gradients of {run}")


def counters_on_rank(run: Run, checkpointing: dict | None):
    """Counted copies per layer after forward and backward, and after one evaluation more."""
    model = build(run)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    model.train()
    backward(run, model)
    after = [experts.tokens_per_expert.sum().item() for experts in iter_experts(model)]
    model.eval()
    with torch.no_grad():
        model(**batch_of(dist.get_rank()))
    later = [experts.tokens_per_expert.sum().item() for experts in iter_experts(model)]
    return after, later


@pytest.mark.parametrize(
    "checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str
)
def test_trap_12_counters_equal_copies_with_checkpointing_and_evaluation(ranks, checkpointing):
    run = Run("fsdp2", 2, 2)
    for after, later in ranks(2).run(counters_on_rank, run, checkpointing):
        assert after == [24 * 2] * 2
        assert later == after


def test_watchdog_would_see_a_rank_that_waits(ranks):
    with pytest.raises(RankFailure, match="rank 0 hung"):
        ranks(2).run(wait_on_rank_0, timeout_s=3)


def wait_on_rank_0():
    """An exchange that rank 1 does not join."""
    mesh = init_device_mesh("cpu", 2)
    model = apply_expert_parallel(LoneExperts(), mesh)
    if dist.get_rank() == 0:
        model(torch.randn(3, 16), *random_routing(3, 2, 8))
    else:
        torch.distributed.distributed_c10d._get_default_store().wait(["never"])
