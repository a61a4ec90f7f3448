"""The order guard: the rank that issues its collectives in another order raises, and no other."""

import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from parallel_cases import Run, build

import torch_moe_ep
from torch_moe_ep import hooks
from torch_moe_ep.layer import ExpertParallelExperts
from torch_moe_ep.testing import batch_of

TIMEOUT_S = 3


def train(model: torch.nn.Module, step: int) -> None:
    model(**batch_of(dist.get_rank(), step=step)).loss.backward()


def last_layer(model: torch.nn.Module) -> ExpertParallelExperts:
    return [m for m in model.modules() if isinstance(m, ExpertParallelExperts)][-1]


def extra_collective(model: torch.nn.Module, group: dist.ProcessGroup | None) -> None:
    """From here on the last layer's forward begins with a collective of its own."""
    last_layer(model).register_forward_pre_hook(
        lambda *_: dist.all_reduce(torch.ones(1), group=group, async_op=True) and None
    )


def message_of_departure(run: Run, departing: int, num_steps: int) -> str:
    """Train, then let one rank issue one collective more; the message where one is raised.

    On a group of one rank, so that nobody waits for it: the guard alone can see it.
    """
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    model = build(run)
    for step in range(num_steps):
        train(model, step)
    if dist.get_rank() == departing:
        extra_collective(model, alone)
    try:
        train(model, num_steps)
        train(model, num_steps + 1)
    except RuntimeError as error:
        return str(error)
    return ""


def test_rank_that_departs_from_later_steps_raises_before_it_issues(hooked_ranks):
    run = Run("fsdp2", 2, 2)
    said = hooked_ranks(2).run(with_time_out, message_of_departure, run, 1, 2, timeout_s=60)
    assert "torch_moe_ep: global rank 1 departs from the order of its collectives" in said[1]
    assert "in a step of training (forward 3, collective " in said[1]
    assert "expected all-gather of Long, " in said[1] or "expected " in said[1]
    assert "; came all-reduce of Float, on group undefined of 1 ranks" in said[1]
    assert "departs" not in said[0]


def with_time_out(function: Callable[..., str], *args: object) -> str:
    """Give every exchange a few seconds, and a rank the time to say what it found."""
    import os

    os.environ["TORCH_MOE_EP_TIMEOUT_S"] = str(TIMEOUT_S)
    try:
        return function(*args)
    finally:
        time.sleep(TIMEOUT_S + 4.0)
        del os.environ["TORCH_MOE_EP_TIMEOUT_S"]


def message_of_first_steps(departing: int) -> str:
    """One rank's first step has one collective more; the second step's begin compares."""
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    model = build(Run("none", dist.get_world_size(), 2))
    if dist.get_rank() == departing:
        extra_collective(model, alone)
    train(model, 0)
    with pytest.raises(RuntimeError) as caught:
        train(model, 1)
    return str(caught.value)


def test_first_steps_that_differ_are_found_when_the_second_begins(hooked_ranks):
    said = hooked_ranks(4).run(message_of_first_steps, 2)
    assert len(set(said)) == 1
    assert "global ranks 2 depart from ranks 0, 1, 3 in collective " in said[0]
    assert "all-reduce of Float, on group undefined of 1 ranks" in said[0]


def departs_on_all_ranks(run: Run) -> float:
    """Every rank changes its order alike: it is learned. Returns the last loss."""
    model = build(run)
    for step in range(2):
        train(model, step)
    extra_collective(model, None)
    for step in range(3):
        train(model, step)
    return model(**batch_of(dist.get_rank())).loss.item()


@pytest.mark.parametrize("run", [Run("fsdp2", 2, 2), Run("ddp", 2, 2)], ids=str)
def test_change_that_all_ranks_make_together_is_learned(hooked_ranks, run):
    assert all(loss > 0 for loss in hooked_ranks(2).run(departs_on_all_ranks, run))


def mixed_steps(run: Run) -> bool:
    """Training, deferred synchronisation, evaluation and checkpointing in turn, twice."""
    model = build(run)
    for _ in range(2):
        train(model, 0)
        if run.wrap == "fsdp2":
            model.set_requires_gradient_sync(False)
            train(model, 1)
            model.set_requires_gradient_sync(True)
        else:
            with model.no_sync():
                train(model, 1)
        train(model, 2)
        dist.all_reduce(torch.ones(1))  # a script's own, outside of forward and backward
        model.eval()
        with torch.no_grad():
            model(**batch_of(dist.get_rank()))
        model.train()
    torch_moe_ep.clip_grad_norm_(model, 1.0)
    return True


@pytest.mark.parametrize(
    "run",
    [Run("fsdp2", 4, 2), Run("fsdp1", 4, 2), Run("ddp", 2, 2), Run("fsdp1_hybrid", 4, 2)],
    ids=str,
)
def test_kinds_of_steps_have_orders_of_their_own(hooked_ranks, run):
    assert all(hooked_ranks(run.world).run(mixed_steps, run))


def two_forwards_one_backward() -> bool:
    """The number of forwards before a backward changes from step to step, on every rank alike."""
    model = build(Run("fsdp2", 2, 2))
    for num_forwards in (1, 2, 1, 3, 2):
        losses = [
            model(**batch_of(dist.get_rank(), step=step)).loss for step in range(num_forwards)
        ]
        sum(losses).backward()
    return True


def test_forwards_without_a_backward_of_their_own_pass(hooked_ranks):
    assert all(hooked_ranks(2).run(two_forwards_one_backward))


def recomputes(run: Run) -> bool:
    """Reentrant checkpointing around the whole model: a forward inside of a backward."""
    model = build(run)
    weight = torch.ones((), requires_grad=True)

    def loss_of(scale: torch.Tensor) -> torch.Tensor:
        return model(**batch_of(dist.get_rank())).loss * scale

    for _ in range(3):
        torch.utils.checkpoint.checkpoint(loss_of, weight, use_reentrant=True).backward()
    return weight.grad is not None


def test_forward_inside_of_a_backward_is_a_kind_of_its_own(hooked_ranks):
    assert all(hooked_ranks(2).run(recomputes, Run("none", 2, 2)))


def unguarded(departing: int) -> str:
    hooks.configure(order_guard=False)
    try:
        return message_of_departure(Run("none", 2, 2), departing, 2)
    finally:
        hooks.configure(order_guard=True)


def test_guard_that_is_off_lets_everything_pass(hooked_ranks):
    assert hooked_ranks(2).run(unguarded, 1) == ["", ""]
