"""Optimizer steps over experts and dense parameters together.

Traps 2 (Adam hides a wrong scale: the SGD step is compared) and 20 (mixed meshes break foreach and
fused optimizers).
"""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel_cases import Run, backward, build

import torch_moe_ep
from torch_moe_ep.testing import assert_close, batch_of, tiny_mixtral
from torch_moe_ep.testing.parallel import from_rank0, full_parameters, wrap
from torch_moe_ep.testing.reference import reference_steps

STEPS = 3
ADAMW = {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.1}
SGD = {"lr": 0.5, "momentum": 0.9}


def make_optimizer(params: Any, kind: str, options: dict[str, Any]) -> torch.optim.Optimizer:
    return {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind](params, **options)


def parameters_after_steps(run: Run, kind: str, options: dict[str, Any], decay: float | None):
    """Parameters after three steps; `decay` asks for our parameter groups."""
    model = build(run)
    groups = (
        model.parameters()
        if decay is None
        else torch_moe_ep.param_groups(model, weight_decay=decay)
    )
    optimizer = make_optimizer(groups, kind, options)
    num_groups = len(optimizer.param_groups)
    for step in range(STEPS):
        backward(run, model, step)
        optimizer.step()
        optimizer.zero_grad()
    assert len(optimizer.param_groups) == num_groups
    return from_rank0(full_parameters(model))


def reference_parameters(
    run: Run, kind: str, options: dict[str, Any], decay: float | None, num_steps: int = STEPS
):
    model = tiny_mixtral(**run.model)
    groups = (
        model.parameters()
        if decay is None
        else torch_moe_ep.param_groups(model, weight_decay=decay)
    )
    optimizer = make_optimizer(groups, kind, options)
    steps = [[batch_of(rank, step=s) for rank in range(run.world)] for s in range(num_steps)]
    reference_steps(model, optimizer, steps)
    return {name: param.detach() for name, param in model.named_parameters()}


CASES = [
    (Run("fsdp2", 4, 2), "sgd", SGD),
    (Run("fsdp1", 4, 2), "sgd", SGD),
    (Run("fsdp1", 4, 2, options={"use_orig_params": False}, label="flat"), "sgd", SGD),
    (Run("fsdp1_hybrid", 4, 2, options={"use_orig_params": False}, label="flat"), "sgd", SGD),
    (Run("none", 2, 2), "sgd", SGD),
    *[
        (Run(wrap, 2, ep), "adamw", {**ADAMW, **way})
        for wrap, ep in (("fsdp2", 2), ("fsdp2", 1), ("fsdp1", 2), ("fsdp1", 1), ("ddp", 2))
        for way in ({"foreach": True}, {"foreach": False}, {"fused": True})
    ],
]


@pytest.mark.parametrize(
    ("run", "kind", "options"),
    CASES,
    ids=[f"{run}-{kind}-{'-'.join(k for k in o if k in ('foreach', 'fused'))}{o.get('foreach', '')}"
         for run, kind, o in CASES],
)  # fmt: skip
def test_trap_02_20_steps_equal_one_process(ranks, run, kind, options):
    actual = ranks(run.world).run(parameters_after_steps, run, kind, options, None)[0]
    if run.label == "flat":
        actual = {name: value for name, value in actual.items() if ".experts." in name}
    expected = reference_parameters(run, kind, options, None)
    assert_close(actual, {name: expected[name] for name in actual}, 2e-5, f"parameters of {run}")
    assert any(".experts." in name for name in actual)


@pytest.mark.parametrize("wrap", ["fsdp2", "fsdp1", "none"])
def test_param_groups_decay_all_but_norms(ranks, wrap):
    run, options = Run(wrap, 2, 2), {"lr": 1e-2, "eps": 1e-4, "foreach": True}
    actual = ranks(2).run(parameters_after_steps, run, "adamw", options, 0.2)[0]
    assert_close(actual, reference_parameters(run, "adamw", options, 0.2), 2e-5)


def schedule_on_rank(run: Run):
    """Learning rates and state keys seen by a user whose optimizer has one mixed group."""
    model = build(run)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, eps=1e-4, foreach=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    rates = []
    for step in range(2):
        backward(run, model, step)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        rates.append([group["lr"] for group in optimizer.param_groups])
    states = len(optimizer.state_dict()["state"])
    return rates, states, sum(1 for _ in model.parameters())


def test_trap_20_schedulers_and_state_see_one_group(ranks):
    rates, states, num_parameters = ranks(2).run(schedule_on_rank, Run("fsdp1", 2, 2))[0]
    assert rates == [[0.5], [0.25]]
    assert 0 < states <= num_parameters


def invalid_id_on_rank(run: Run):
    """An expert id out of range, raised on the device flag, stops the step on every rank."""
    model = build(run)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    backward(run, model)
    before = full_parameters(model)
    if dist.get_rank() == 1:
        experts = next(torch_moe_ep.parallel.state.iter_experts(model))
        experts.invalid_flag.fill_(1)
    try:
        optimizer.step()
    except ValueError as error:
        message = str(error)
    else:
        message = "no error"
    after = full_parameters(model)
    optimizer.step()
    return message, all(torch.equal(before[name], after[name]) for name in before)


def test_invalid_expert_id_flag_stops_step_on_every_rank(ranks):
    for message, is_unchanged in ranks(2).run(invalid_id_on_rank, Run("fsdp2", 2, 2)):
        assert "expert ids outside of" in message and "ranks [1]" in message
        assert is_unchanged


def optimizer_of_the_model_before_the_patch(kind: str) -> str:
    """What the step of an optimizer says that was built too early; a later one works."""
    model, mesh = tiny_mixtral(), torch_moe_ep.init_device_mesh("cpu", 2)
    early = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model = wrap(torch_moe_ep.apply_expert_parallel(model, mesh), kind, mesh)
    model(**batch_of(dist.get_rank())).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=1e-2).step()
    with pytest.raises(ValueError) as error:
        early.step()
    return str(error.value)


@pytest.mark.parametrize("kind", ["fsdp2", "none"])
def test_optimizer_built_before_the_patch_is_refused_at_its_step(ranks, kind):
    for said in ranks(2).run(optimizer_of_the_model_before_the_patch, kind):
        assert "AdamW holds expert weights of the model before apply_expert_parallel" in said
        assert "build the optimizer after" in said


def optimizer_between_patch_and_wrap(kind: str, options: dict[str, Any]) -> str:
    """What the step of an optimizer says that was built after the patch and before FSDP."""
    model, mesh = tiny_mixtral(), torch_moe_ep.init_device_mesh("cpu", 2)
    torch_moe_ep.apply_expert_parallel(model, mesh)
    early = torch.optim.SGD(model.parameters(), lr=0.5)
    model = wrap(model, kind, mesh, **options)
    model(**batch_of(dist.get_rank())).loss.backward()
    before = full_parameters(model)
    try:
        early.step()
    except ValueError as error:
        after = full_parameters(model)
        assert all(torch.equal(before[name], after[name]) for name in before)
        return str(error)
    expected = reference_parameters(Run(kind, 2, 2), "sgd", {"lr": 0.5}, None, num_steps=1)
    assert_close(full_parameters(model), expected, 2e-5, f"parameters of {kind}")
    return "trains all"


def test_optimizer_built_before_fsdp_is_refused_where_it_would_train_the_experts_alone(ranks):
    flat = {"use_orig_params": False}
    for kind, options in (("fsdp2", {}), ("fsdp1", flat)):
        for said in ranks(2).run(optimizer_between_patch_and_wrap, kind, options):
            assert "dense parameters that the model has no longer" in said
            assert "build the optimizer after FSDP" in said
    for kind in ("fsdp1", "ddp"):
        said = ranks(2).run(optimizer_between_patch_and_wrap, kind, {})
        assert said == ["trains all"] * 2


def steps_of_zero_redundancy(run: Run) -> tuple[str, dict[str, torch.Tensor]]:
    """What ZeroRedundancyOptimizer says of experts; parameters where it has dense ones alone."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = build(run)
    backward(run, model)
    before = full_parameters(model)
    with pytest.raises(ValueError) as error:
        ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **ADAMW).step()
    after = full_parameters(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    model.zero_grad()
    experts = [param for name, param in model.named_parameters() if ".experts." in name]
    dense = [param for name, param in model.named_parameters() if ".experts." not in name]
    optimizers = [
        ZeroRedundancyOptimizer(dense, torch.optim.AdamW, **ADAMW),
        torch.optim.AdamW(experts, **ADAMW),
    ]
    for step in range(STEPS):
        backward(run, model, step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return str(error.value), from_rank0(full_parameters(model))


@pytest.mark.parametrize("ep", [1, 2])
def test_zero_redundancy_optimizer_takes_the_dense_parameters_alone(ranks, ep):
    run = Run("ddp", 2, ep)
    results = ranks(2).run(steps_of_zero_redundancy, run)
    assert all("every rank holds experts of its own" in said for said, _ in results)
    expected = reference_parameters(run, "adamw", ADAMW, None)
    assert_close(results[0][1], expected, 2e-5, f"parameters of {run}")


def step_without_the_last_layer() -> bool:
    """A layer cut out of the patched model after the optimizer was built; its step goes on."""
    model, mesh = tiny_mixtral(), torch_moe_ep.init_device_mesh("cpu", 2)
    torch_moe_ep.apply_expert_parallel(model, mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.model.layers = model.model.layers[:-1]
    model(**batch_of(dist.get_rank())).loss.backward()
    before = model.lm_head.weight.detach().clone()
    optimizer.step()
    return not torch.equal(before, model.lm_head.weight)


def test_optimizer_may_hold_parameters_that_were_cut_out_of_the_model(ranks):
    assert ranks(2).run(step_without_the_last_layer) == [True, True]


def warnings_of_steps(run: Run, calls_average: bool) -> list[str]:
    """Messages of two steps of a script that clips and steps, and may forget to average."""
    model = build(run)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(2):
            model(**batch_of(dist.get_rank(), step=step)).loss.backward()
            if calls_average:
                torch_moe_ep.average_gradients(model)
            optimizer.step()
    return [str(w.message) for w in caught if "drift apart" in str(w.message)]


def test_dense_gradients_that_nothing_averages_are_warned_of_once_on_rank_0(ranks):
    bare = Run("none", 2, 2)
    said = ranks(2).run(warnings_of_steps, bare, False)
    assert len(said[0]) == 1 and said[1] == []
    assert "average_gradients(model) was not called" in said[0][0]
    assert ranks(2).run(warnings_of_steps, bare, True) == [[], []]
    for kind in ("fsdp2", "fsdp1", "ddp"):
        assert ranks(2).run(warnings_of_steps, Run(kind, 2, 2), False) == [[], []]
