"""Process-group hooks when a rank is at fault: the others name it, its layer and its stage."""

import os
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from torch_moe_ep import apply_expert_parallel, hooks, init_device_mesh, ops
from torch_moe_ep.testing import LoneExperts, RankFailure, random_routing

TIMEOUT_S = 2
ABSENCE_S = TIMEOUT_S + 8.0  # the time-out, what the others may take to answer, and a busy machine


@pytest.fixture(autouse=True)
def _short_time_out(monkeypatch):
    monkeypatch.setenv("TORCH_MOE_EP_TIMEOUT_S", str(TIMEOUT_S))


def run_layer(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.randn(3, 16, requires_grad=True), *random_routing(3, 2, 8))


def raised(call: Callable[[], object]) -> str:
    """The message of the error that a call raises."""
    os.environ["TORCH_MOE_EP_TIMEOUT_S"] = str(TIMEOUT_S)
    try:
        with pytest.raises(RuntimeError) as caught:
            call()
        return str(caught.value)
    finally:
        del os.environ["TORCH_MOE_EP_TIMEOUT_S"]


def message_with_one_absent(absent: int, stage: str) -> str:
    """What rank says when another one stays away before a stage; "" on the absent rank."""
    model = apply_expert_parallel(LoneExperts(), init_device_mesh("cpu", 2))
    for _ in range(2):  # the second one's begin compares the orders of the first
        run_layer(model).sum().backward()
    if dist.get_rank() == absent:
        if stage == "combine":
            expert_mlp = ops.expert_mlp

            def late(*args, **kwargs):
                time.sleep(ABSENCE_S)
                return expert_mlp(*args, **kwargs)

            ops.expert_mlp = late
            try:
                raised(lambda: run_layer(model))
            finally:
                ops.expert_mlp = expert_mlp
        else:
            time.sleep(ABSENCE_S)
        return ""
    return raised(lambda: run_layer(model))


@pytest.mark.parametrize(
    ("stage", "last"), [("plan", "dispatch backward"), ("combine", "dispatch")]
)
def test_rank_that_stays_away_is_named_with_layer_and_stage(hooked_ranks, stage, last):
    present, absent = hooked_ranks(2).run(message_with_one_absent, 1, stage, timeout_s=60)
    assert absent == ""
    assert f"layer experts, stage {stage}) of group" in present
    assert "failed on global rank 0; global ranks that did not take part: 1 " in present
    assert "rank 1 has not come to it: its last one is #" in present
    assert f"layer experts, stage {last}), which it has done" in present


def message_in_backward(absent: int) -> str:
    model = apply_expert_parallel(LoneExperts(), init_device_mesh("cpu", 2))
    output = run_layer(model)
    if dist.get_rank() == absent:
        time.sleep(ABSENCE_S)
        return ""
    return raised(lambda: output.sum().backward())


def test_rank_that_stays_away_from_backward_is_named(hooked_ranks):
    present = hooked_ranks(2).run(message_in_backward, 1, timeout_s=60)[0]
    assert "layer experts, stage combine backward) of group" in present
    assert "layer experts, stage combine), which it has done" in present


def message_of_sizes(which: str) -> str:
    """The message on this rank when ranks disagree about a size; sizes of 4 bytes an element.

    Compared before the start: gloo ends a process that is sent more than it expects, and takes
    less in silence.
    """
    rank = dist.get_rank()
    hooks.configure(check_sizes=True)

    def exchange() -> None:
        if which == "all_gather":
            own = torch.ones(4 if rank == 0 else 6)
            dist.all_gather_into_tensor(own.new_empty(2 * own.numel()), own)
        elif which in ("more than counted", "fewer than counted"):
            # Rank 1 sends a copy to rank 0 that it has not counted, or keeps one that it has.
            more = 1 if which == "more than counted" else -1
            ids = torch.tensor([[0, 7]]).expand(3, 2)
            plan = ops.plan(ids, 8, group_name=dist.group.WORLD.group_name)
            plan.host_counts[rank] += rank * torch.tensor([more, 0, 0, 0, 0, 0, 0, -more])
            ops.dispatch(torch.randn(3, 16), None, plan)
        elif which == "all_to_all":
            # Rank 0 sends five to rank 1, which expects three.
            sends, receives = ([1, 5], [1, 2]) if rank == 0 else ([2, 1], [3, 1])
            dist.all_to_all_single(
                torch.empty(sum(receives)), torch.ones(sum(sends)), receives, sends
            )
        else:
            value = torch.ones(4)
            if rank == 0:
                dist.all_reduce(value)
            else:
                dist.all_gather_into_tensor(torch.empty(8), value)

    try:
        dist.all_reduce(torch.ones(2))  # all is well
        return raised(exchange)
    finally:
        hooks.configure(check_sizes=False)


@pytest.mark.parametrize(
    ("which", "sentences"),
    [
        ("all_gather", ["rank 1 sends 24 bytes where 16 are expected",
                        "rank 0 sends 16 bytes where 24 are expected"]),
        ("all_to_all", ["rank 1 has room for 12 bytes where 20 are expected",
                        "rank 0 sends this rank 20 bytes where 12 are expected"]),
        ("more than counted", ["rank 1 sends this rank 256 bytes where 192 are expected",
                               "rank 0 has room for 192 bytes where 256 are expected"]),
        ("fewer than counted", ["rank 1 sends this rank 128 bytes where 192 are expected",
                                "rank 0 has room for 192 bytes where 128 are expected"]),
        ("operation", ["rank 1 has #2 (all-gather of Float, 16 bytes sent, 32 received) in its",
                       "rank 0 has #2 (all-reduce of Float, 16 bytes sent, 16 received) in its"]),
    ],
)  # fmt: skip
def test_ranks_that_disagree_are_told_of_expected_and_seen_sizes(hooked_ranks, which, sentences):
    said = hooked_ranks(2).run(message_of_sizes, which, timeout_s=60)
    for rank, sentence in enumerate(sentences):
        assert sentence in said[rank]
        assert f"failed on global rank {rank}; " in said[rank]


def die_in_backward() -> str:
    model = apply_expert_parallel(LoneExperts(), init_device_mesh("cpu", 2))
    output = run_layer(model)
    if dist.get_rank() == 1:
        os._exit(7)
    return raised(lambda: output.sum().backward())


def test_rank_that_is_dead_gives_no_answer_and_is_named(hooked_ranks):
    with pytest.raises(RankFailure, match="rank 1 died with exit code 7") as caught:
        hooked_ranks(2).run(die_in_backward, timeout_s=60, grace_s=ABSENCE_S + 10.0)
    said = caught.value.results[0]
    assert "global ranks that did not take part: 1 " in said
    assert "rank 1 gives no answer (dead, or without hooks)" in said


def message_on_subgroup() -> str:
    """Ranks 2 and 3 make an EP group of their own; rank 3 stays away."""
    model = apply_expert_parallel(LoneExperts(), init_device_mesh("cpu", 2))
    rank = dist.get_rank()
    if rank == 3:
        time.sleep(ABSENCE_S)
    return raised(lambda: run_layer(model)) if rank == 2 else ""


def test_ranks_are_named_by_their_global_numbers(hooked_ranks):
    said = hooked_ranks(4).run(message_on_subgroup, timeout_s=60)[2]
    assert "of group mesh_ep failed on global rank 2; " in said
    assert "did not take part: 3 " in said
    assert "rank 3 has not begun any collective of this group" in said


def message_with_attached_group() -> str:
    mesh = init_device_mesh("cpu", 2)
    model = apply_expert_parallel(LoneExperts(), mesh)
    hooks.attach(mesh["ep"].get_group())
    for _ in range(2):
        run_layer(model)
    if dist.get_rank() == 1:
        time.sleep(ABSENCE_S)
        return ""
    return raised(lambda: run_layer(model))


def test_attached_group_names_the_absent_rank_too(ranks):
    said = ranks(2).run(message_with_attached_group, timeout_s=60)[0]
    assert "rank 1 has not come to it" in said
    assert "layer experts, stage combine), which it has done" in said
