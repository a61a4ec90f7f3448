"""Routing modes over several ranks: traps 7 and 24, checkpointing, micro-batches, the bias.

The reference of a run with losses is one process whose unpatched model adds them to its loss by
hand, from the router logits that transformers records.
"""

import functools

import pytest
import torch
import torch.distributed as dist
from parallel_cases import AUX, Run, build
from torch import nn

import torch_moe_ep
from torch_moe_ep import MoEConfig, apply_expert_parallel, init_device_mesh
from torch_moe_ep.integrations.transformers import find_experts, find_routers
from torch_moe_ep.metrics import router_losses
from torch_moe_ep.routing.router import swap_router
from torch_moe_ep.testing import assert_close, batch_of, tiny_mixtral
from torch_moe_ep.testing.parallel import from_rank0, full_gradients

UNEVEN = {"router_scale": 40.0}
LOSSES = {"routing": "aux_loss", "z_loss_coeff": 0.05, "aux_loss_coeff": 0.5}
Z_LOSS = {"routing": "none", "z_loss_coeff": 0.05}


def losses_by_hand(router_logits, config: dict) -> torch.Tensor:
    """z loss and load-balancing loss of all layers, written out."""
    total = torch.zeros(())
    for logits in router_logits:
        total = total + config["z_loss_coeff"] * logits.exp().sum(-1).log().square().mean()
        if config["routing"] == "aux_loss":
            ids = logits.topk(2).indices.flatten()
            share = torch.bincount(ids, minlength=8) / ids.numel()
            total = (
                total + config["aux_loss_coeff"] * 8 * (share * logits.softmax(-1).mean(0)).sum()
            )
    return total


def freeze(config: dict) -> tuple:
    return tuple(sorted(config.items()))


@functools.cache
def reference(world: int, config: tuple) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Mean printed loss, mean of the losses by hand, gradients of their sum."""
    model = tiny_mixtral(**UNEVEN)
    printed = by_hand = 0.0
    for rank in range(world):
        output = model(**batch_of(rank), output_router_logits=True)
        loss = nn.functional.cross_entropy(
            output.logits[:, :-1].flatten(0, 1), batch_of(rank)["labels"][:, 1:].flatten()
        )
        extra = losses_by_hand(output.router_logits, dict(config))
        ((loss + extra) / world).backward()
        printed += loss.item() / world
        by_hand += extra.item() / world
    return printed, by_hand, {n: p.grad for n, p in model.named_parameters()}


def run_on_rank(run: Run, checkpointing: str) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, reported losses and gradients of a patched run."""
    model = build(run)
    if checkpointing:
        inner: nn.Module = model.module if hasattr(model, "module") else model
        inner.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        inner.train()
    loss = model(**batch_of(dist.get_rank())).loss
    loss.backward()
    if run.wrap == "none":
        torch_moe_ep.average_gradients(model)
    reported = router_losses(model)
    total = sum(reported.z_loss.values()) + sum(reported.aux_loss.values())
    return loss.item(), total, from_rank0(full_gradients(model))


def case(wrap_kind: str, world: int, ep: int, config: dict, checkpointing: str = ""):
    run = Run(wrap_kind, world, ep, model=UNEVEN, config=config)
    name = f"{run}_{config['routing']}{checkpointing and '_' + checkpointing}"
    return pytest.param(run, checkpointing, id=name)


@pytest.mark.parametrize(
    ("run", "checkpointing"),
    [
        case("fsdp2", 2, 1, LOSSES),
        case("fsdp2", 2, 2, LOSSES),
        case("fsdp2", 4, 2, Z_LOSS),
        case("fsdp1", 4, 2, LOSSES),
        case("ddp", 2, 2, LOSSES),
        case("none", 2, 2, Z_LOSS),
        case("fsdp2", 2, 2, LOSSES, "reentrant"),
        case("fsdp2", 2, 2, LOSSES, "non_reentrant"),
        case("fsdp1", 2, 2, LOSSES, "non_reentrant"),
    ],
)
def test_trap_7_losses_count_once_in_gradient_and_metrics(ranks, run, checkpointing):
    results = ranks(run.world).run(run_on_rank, run, checkpointing)
    printed, by_hand, grads = reference(run.world, freeze(run.config))
    assert sum(loss for loss, _, _ in results) / run.world == pytest.approx(printed, rel=1e-5)
    for _, reported, _ in results:
        assert reported == pytest.approx(by_hand, rel=1e-5)
    assert_close(results[0][2], grads, 1e-5, str(run))


def micro_batches_on_rank(num: int, says_so: bool, scaler_class: str) -> dict[str, torch.Tensor]:
    """Gradients of `num` micro-batches, the loss divided by `num` and perhaps scaled."""
    model = build(Run("fsdp2", 2, 2, model=UNEVEN, config=LOSSES))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaler_class else None
    torch_moe_ep.set_aux_loss_scale(1 / num if says_so else 1.0)
    try:
        for step in range(num):
            loss = model(**batch_of(dist.get_rank() * num + step)).loss / num
            (loss if scaler is None else scaler.scale(loss)).backward()
    finally:
        torch_moe_ep.set_aux_loss_scale(1.0)
    grads = full_gradients(model)
    if scaler is not None:
        grads = {name: grad / 1024.0 for name, grad in grads.items()}
    return from_rank0(grads)


@pytest.mark.parametrize("scaler", ["", "scaled"])
def test_aux_loss_scale_of_three_micro_batches_and_grad_scaler_equal_six_batches(ranks, scaler):
    grads = ranks(2).run(micro_batches_on_rank, 3, True, scaler)[0]
    _, _, expected = reference(6, freeze(LOSSES))
    assert_close(grads, expected, 1e-5)


def test_micro_batches_without_the_scale_count_the_losses_n_times(ranks):
    grads = ranks(2).run(micro_batches_on_rank, 3, False, "")[0]
    _, _, expected = reference(6, freeze({**LOSSES, "z_loss_coeff": 0.15, "aux_loss_coeff": 1.5}))
    assert_close(grads, expected, 1e-5)


def global_scope_on_rank(world_rows: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Reported loss and gradients with global shares; this rank holds its part of 8 rows."""
    config = {**LOSSES, "z_loss_coeff": 0.0, "aux_scope": "global"}
    model = build(Run("fsdp2", dist.get_world_size(), 2, model=UNEVEN, config=config))
    ids = batch_of(0, tokens=world_rows * 12, rows=world_rows)["input_ids"]
    logits = model(ids.chunk(dist.get_world_size())[dist.get_rank()]).logits
    (0.0 * logits.sum()).backward()
    gates = {n: g for n, g in full_gradients(model).items() if n.endswith("gate.weight")}
    return sum(router_losses(model).aux_loss.values()), from_rank0(gates)


@pytest.mark.parametrize("world", [2, 4])
def test_trap_7_global_scope_equals_the_joined_batch_at_every_world_size(ranks, world):
    results = ranks(world).run(global_scope_on_rank, 8)
    model = tiny_mixtral(**UNEVEN)
    output = model(batch_of(0, tokens=96, rows=8)["input_ids"], output_router_logits=True)
    config = {**LOSSES, "z_loss_coeff": 0.0}
    loss = losses_by_hand(output.router_logits, config)
    loss.backward()
    assert results[0][0] == pytest.approx(loss.item(), rel=1e-5)
    grads = {n: p.grad for n, p in model.named_parameters() if n.endswith("gate.weight")}
    assert_close(results[0][1], grads, 1e-5)


def mode_on_rank(config: dict) -> tuple[float, float, int, dict[str, torch.Tensor]]:
    """Loss, transformers' aux loss, recorded layers and gradients at P = 2."""
    model = build(Run("fsdp2", 2, 2, model={**UNEVEN, **AUX}, config=config))
    output = model(**batch_of(dist.get_rank()))
    output.loss.backward()
    recorded = (output.aux_loss.item(), len(output.router_logits))
    return output.loss.item(), *recorded, from_rank0(full_gradients(model))


def routed_reference(config: dict) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """The same with the unpatched model, whose routers alone are changed, in one process."""
    model = tiny_mixtral(**UNEVEN, **AUX)
    routers, _ = find_routers(model, find_experts(model)[0])
    for router in routers.values():
        swap_router(router, MoEConfig(**config), 8, torch.device("cpu"))
    outputs = [model(**batch_of(rank)) for rank in range(2)]
    for output in outputs:
        (output.loss / 2).backward()
    return (
        [output.loss.item() for output in outputs],
        [output.aux_loss.item() for output in outputs],
        {name: param.grad for name, param in model.named_parameters()},
    )


@pytest.mark.parametrize("capacity_factor", [0.0, 1.25])
@pytest.mark.parametrize(
    "routing", ["huggingface", "none", "aux_loss", "sinkhorn", "balanced", "bias"]
)
def test_trap_24_every_mode_equals_one_process_and_the_recorder_fires(
    ranks, routing, capacity_factor
):
    config = {"routing": routing, "aux_loss_coeff": 0.0, "capacity_factor": capacity_factor}
    results = ranks(2).run(mode_on_rank, config)
    losses, aux_losses, grads = routed_reference(config)
    for rank, (loss, aux_loss, num_layers, _) in enumerate(results):
        assert num_layers == 2
        assert loss == pytest.approx(losses[rank], rel=1e-5)
        assert aux_loss == pytest.approx(aux_losses[rank], rel=1e-5)
    assert_close(results[0][3], grads, 1e-5, routing)


def bias_on_rank(steps: int, folder: str) -> tuple[float, float, bool, bool]:
    """Imbalance before and after training with the bias; resumed; absent from the export."""
    run = Run("fsdp2", 2, 2, model={"router_scale": 10.0},
              config={"routing": "bias", "bias_update_rate": 0.01})  # fmt: skip
    model = build(run)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    loads = []
    for step in range(steps):
        model(**batch_of(dist.get_rank(), tokens=512, rows=16, step=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 0 or step == steps - 11:
            load = torch_moe_ep.metrics.expert_load(model, reset=True)
            loads.append(load.worst_imbalance)
    load = torch_moe_ep.metrics.expert_load(model)  # of the last ten steps
    loads.append(load.worst_imbalance)
    biases = {n: b.clone() for n, b in model.named_buffers() if n.endswith("expert_bias_steps")}
    assert len(biases) == 2 and all(bias.any() for bias in biases.values())
    torch_moe_ep.save_checkpoint(f"{folder}/save", model)
    fresh = build(run)
    torch_moe_ep.load_checkpoint(f"{folder}/save", fresh)
    is_same = all(torch.equal(dict(fresh.named_buffers())[n], b) for n, b in biases.items())
    torch_moe_ep.export_hf(model, f"{folder}/hf")
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(f"{folder}/hf")
    has_bias = any("bias_steps" in name for name in loaded.state_dict())
    return loads[0], loads[-1], is_same, has_bias


def test_bias_evens_the_load_is_resumed_and_not_exported(ranks, tmp_path):
    for before, after, is_same, has_bias in ranks(2).run(bias_on_rank, 30, str(tmp_path)):
        assert after - 1 < 0.4 * (before - 1)
        assert is_same and not has_bias


def dropped_on_rank() -> tuple[torch_moe_ep.metrics.RouterLosses, list[int], int]:
    """Metrics, copies per expert of the first layer and the bound on it."""
    config = {"routing": "none", "capacity_factor": 1.0}
    model = build(Run("none", 2, 2, model=UNEVEN, config=config))
    model(**batch_of(dist.get_rank())).loss.backward()
    load = torch_moe_ep.metrics.expert_load(model)
    return router_losses(model, reset=True), next(iter(load.tokens.values())).tolist(), 2 * 6


def test_capacity_bounds_the_load_and_reports_what_it_dropped(ranks):
    for losses, load, bound in ranks(2).run(dropped_on_rank):
        assert max(load) <= bound
        first = "model.layers.0.mlp.gate"
        assert losses.num_dropped[first] > 0
        assert losses.dropped_share[first] == pytest.approx(losses.num_dropped[first] / 96)


def test_router_losses_of_hugging_face_routing_says_what_to_choose(ranks):
    ranks(2).run(refused_on_rank)


def refused_on_rank() -> None:
    model = apply_expert_parallel(tiny_mixtral(), init_device_mesh("cpu", 2))
    with pytest.raises(ValueError, match="the model's routers are Hugging Face's own"):
        router_losses(model)
    other = tiny_mixtral()
    other.model.layers[0].mlp.gate.bias = nn.Parameter(torch.zeros(8))
    with pytest.raises(ValueError, match=r"has no router.* must stay at their defaults"):
        apply_expert_parallel(other, init_device_mesh("cpu", 2), MoEConfig(routing="none"))
    assert not hasattr(other.model.layers[1].mlp.experts, "expert_parallel_state")
