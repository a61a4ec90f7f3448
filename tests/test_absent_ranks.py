"""Calls that all ranks have to make, made by some: those wait, then name the ones that stayed away.

`if rank == 0: save_checkpoint(...)` is the usual way to get there.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from parallel_cases import Run, backward, build
from torch.distributed.distributed_c10d import _get_default_store

import torch_moe_ep
from torch_moe_ep import metrics
from torch_moe_ep.integrations.smp.checkpoint.utils import limit_num_subdirs
from torch_moe_ep.integrations.smp.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch_moe_ep.parallel import agreement
from torch_moe_ep.parallel.state import states_of

TIMEOUT_S = 3  # ranks that are present come within it on a busy machine too

CALLS = {
    "wait_for_checkpoint": lambda *_: torch_moe_ep.wait_for_checkpoint(),
    "save_checkpoint": lambda model, folder: torch_moe_ep.save_checkpoint(f"{folder}/two", model),
    "load_checkpoint": lambda model, folder: torch_moe_ep.load_checkpoint(f"{folder}/one", model),
    "export_hf": lambda model, folder: torch_moe_ep.export_hf(model, f"{folder}/hf"),
    "load_hf": lambda model, folder: torch_moe_ep.load_hf(model, f"{folder}/hf"),
    "expert_load": lambda model, _: metrics.expert_load(model),
    "router_losses": lambda model, _: metrics.router_losses(model),
    "Recorder": lambda model, _: metrics.Recorder(model),
    "dense_mesh": lambda model, _: torch_moe_ep.dense_mesh(states_of(model)[0].mesh, 1),
    "limit_num_subdirs": lambda _, folder: limit_num_subdirs(f"{folder}/one", 1),
    "state_dict_saver.async_save": lambda _, folder: state_dict_saver.async_save(
        {}, checkpoint_id=f"{folder}/smp"
    ),
    "state_dict_loader.load": lambda _, folder: state_dict_loader.load(
        {}, checkpoint_id=f"{folder}/smp"
    ),
}


@contextmanager
def timeout(seconds: int) -> Iterator[None]:
    os.environ["TORCH_MOE_EP_TIMEOUT_S"] = str(seconds)
    try:
        yield
    finally:
        del os.environ["TORCH_MOE_EP_TIMEOUT_S"]


def message_of(call: Callable[..., Any], *args: Any) -> str:
    with timeout(TIMEOUT_S), pytest.raises(RuntimeError) as caught:
        call(*args)
    return str(caught.value)


def wait_for(ranks: list[int]) -> None:
    _get_default_store().wait([f"done {rank}" for rank in ranks], timedelta(seconds=60))


def say_done() -> None:
    _get_default_store().set(f"done {dist.get_rank()}", "")


def messages_without(rank: int, absent: list[int], names: list[str], folder: str) -> list[str]:
    """What each call says on this rank; absent ones call when the others are done."""
    world = dist.get_world_size()
    model = build(Run("none", world, world))
    dist.barrier()  # ranks that are present come together
    if rank in absent:
        wait_for([r for r in range(world) if r not in absent])
    said = [message_of(CALLS[name], model, folder) for name in names]
    say_done()
    return said


@pytest.mark.parametrize(
    ("world", "absent", "names"),
    [
        (2, [1], ["save_checkpoint", "export_hf"]),
        (4, [1], ["save_checkpoint"]),
        (4, [0, 2], ["export_hf"]),
    ],
    ids=["2", "4", "4_without_rank_0"],
)
def test_ranks_that_stay_away_are_named_by_the_others(ranks, tmp_path, world, absent, names):
    """And by themselves, when they come after the others gave up."""
    said = ranks(world).run(
        messages_without, absent, names, str(tmp_path), arg_of_rank=list(range(world)), timeout_s=60
    )
    assert said == [said[0]] * world
    for name, text in zip(names, said[0], strict=True):
        assert f"ranks {absent} did not come to {name} within {TIMEOUT_S} s" in text
    assert not any(tmp_path.iterdir())


def messages_at_once(rank: int, folder: str) -> list[str]:
    """What each call says to rank 0 alone, which does not wait here; then a call of both."""
    model = build(Run("none", 2, 2, config={"routing": "aux_loss"}))
    torch_moe_ep.save_checkpoint(f"{folder}/one", model, async_save=True)
    if rank == 1:
        wait_for([0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "_comes", lambda store, keys, _timeout: store.check(keys))
        said = [message_of(call, model, folder) for call in CALLS.values()]
    say_done()
    torch_moe_ep.wait_for_checkpoint()
    return said


def test_collective_calls_meet_before_they_do_anything_else(ranks, tmp_path):
    said, late = ranks(2).run(messages_at_once, str(tmp_path), arg_of_rank=[0, 1])
    assert late == said
    for name, text in zip(CALLS, said, strict=True):
        assert f"ranks [1] did not come to {name} within {TIMEOUT_S} s" in text
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def message_of_averaging(rank: int) -> str:
    run = Run("none", 2, 2)
    model = build(run)
    backward(run, model, 0)
    if rank == 1:
        wait_for([0])
        return ""
    said = message_of(torch_moe_ep.average_gradients, model)
    say_done()
    return said


def test_rank_that_averages_no_gradients_is_named(ranks):
    said, _ = ranks(2).run(message_of_averaging, arg_of_rank=[0, 1], timeout_s=60)
    assert "global ranks that did not take part: 1" in said


def keys_of_meetings() -> tuple[int, int]:
    store = _get_default_store()
    counts = []
    for num_meetings in (2, 5):
        for _ in range(num_meetings):
            agreement.meet("save_checkpoint")
        dist.barrier()
        counts.append(store.num_keys())
        dist.barrier()
    return counts[0], counts[1]


def test_meetings_leave_no_more_behind_the_more_they_are(ranks):
    for first, later in ranks(4).run(keys_of_meetings):
        assert first == later
