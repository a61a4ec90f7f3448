"""All ranks look at one thing together and raise alike, before anything is changed.

Notes go through the default process group's store, not through a collective: at the points where
ranks may disagree about groups no collective is safe (ranks that ask for different meshes wait for
each other for ever inside torch), and a rank that does not come can be named.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

GRACE_S = 10.0  # what rank 0 may take over its verdict, and the others to read it
BEFORE_BACKEND = 0.8  # of its time-out: who stays away may be in a collective that waits for us

Judge = Callable[[list[Any]], str | None]


def meet(call: str) -> None:
    """Wait for every rank to come to a collective function, and name those that do not.

    At the head of what all ranks have to call, so that a call on some of them alone ends there
    and not in a collective that other ranks would take for another one.

    Args:
        call: the function's name, for keys and messages; the same on every rank.

    Raises:
        RuntimeError: as `agree`.

    Collective over all ranks, on the host alone: a few round trips to the store, whatever W.
    Without a process group nothing.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        _take_part(call, None, None)


def agree(topic: str, note: Any, judge: Judge) -> None:
    """Raise on every rank what `judge` says about the notes of all ranks.

    Args:
        topic: what the ranks are doing, for keys and messages; the same on every rank.
        note: what this rank has to say, of JSON's types.
        judge: called on rank 0 alone with the notes in rank order; None: all is well.

    Raises:
        ValueError: the judge's sentence, on every rank.
        RuntimeError: a rank did not come within the time-out (``TORCH_MOE_EP_TIMEOUT_S``, else 0.8
            of the process group's); the message names it.

    Collective over all ranks, on the host alone: W + 1 small entries of the store, which are
    removed again but for the last three.
    """
    if dist.get_world_size() > 1:
        _take_part(topic, note, judge)
        return
    verdict = judge([note])
    if verdict is not None:
        raise ValueError(verdict)


def _take_part(topic: str, note: Any, judge: Judge | None) -> None:
    """Leave a note; rank 0 waits for all of them and judges, the others wait for its verdict."""
    store = _get_default_store()
    rank = dist.get_rank()
    call = store.add(f"torch_moe_ep/{topic}/calls/{rank}", 1)
    key = f"torch_moe_ep/{topic}/{call}"
    store.set(f"{key}/{rank}", json.dumps(note))
    if rank > 0:
        _hear(store, key, topic)
        store.delete_key(f"{key}/{rank}")
        return
    _judge_all(store, key, topic, judge)
    for name in (rank, "verdict", "read"):  # all ranks are here, so nobody is in the call before
        store.delete_key(f"torch_moe_ep/{topic}/{call - 1}/{name}")


def leave_note(topic: str, note: Any) -> None:
    """Leave what this rank has to say, of JSON's types, for `notes_of_group` of the others.

    Local but for an entry of the store.
    """
    _get_default_store().set(_note_key(topic, dist.get_rank()), json.dumps(note))


def notes_of_group(topic: str, ep_size: int) -> list[Any]:
    """The notes of this rank's EP group, in rank order; reads the store.

    Call after a collective that follows every rank's `leave_note`, such as `agree`.
    """
    store = _get_default_store()
    first = dist.get_rank() // ep_size * ep_size
    ranks = range(first, first + ep_size)
    return [json.loads(store.get(_note_key(topic, rank))) for rank in ranks]


def _note_key(topic: str, rank: int) -> str:
    return f"torch_moe_ep/{topic}/{rank}"


def first_difference(
    settings: Sequence[dict[str, str]], groups: Sequence[object] = ()
) -> str | None:
    """Say where a rank's settings first differ from rank 0's, with both values; None: nowhere.

    With `groups`, one for each rank, from those of the first rank of its group.
    """
    for rank, other in enumerate(settings):
        first = groups.index(groups[rank]) if groups else 0
        for name in {**settings[first], **other}:
            here, there = settings[first].get(name, "nothing"), other.get(name, "nothing")
            if here != there:
                return (
                    f"ranks {first} and {rank} differ in {name}: {here} and {there}; make it the "
                    f"same on every rank."
                )
    return None


def _judge_all(store: dist.Store, key: str, topic: str, judge: Judge | None) -> None:
    num_ranks = dist.get_world_size()
    notes = [f"{key}/{rank}" for rank in range(num_ranks)]
    timeout = _timeout(store)
    if not _comes(store, notes, timeout):
        _give_up(store, key, topic, timeout)
    if store.check([f"{key}/verdict"]):  # others gave up on this rank: they are gone
        _heed(store, key)
    verdict = None if judge is None else judge([json.loads(store.get(note)) for note in notes])
    _announce(store, key, {"verdict": verdict}, num_ranks - 1 if verdict is not None else 0)
    if verdict is not None:
        raise ValueError(verdict)


def _hear(store: dist.Store, key: str, topic: str) -> None:
    timeout = _timeout(store)
    grace = timedelta(seconds=GRACE_S)
    is_judged = _comes(store, [f"{key}/0"], timeout) and _comes(
        store, [f"{key}/verdict"], timeout + grace
    )
    if not is_judged:
        _give_up(store, key, topic, timeout)
    _heed(store, key)


def _comes(store: dist.Store, keys: list[str], timeout: timedelta) -> bool:
    """Wait for entries of the store; False when the time is over, or the store has gone."""
    try:
        store.wait(keys, timeout)
    except RuntimeError:
        return False
    return True


def _give_up(store: dist.Store, key: str, topic: str, timeout: timedelta) -> NoReturn:
    """Raise with the ranks that left no note, and leave word for ranks that come later."""
    ranks = range(dist.get_world_size())
    absent = [0]  # unless the store tells: it goes with rank 0, or with the launcher that holds it
    with contextlib.suppress(RuntimeError):
        absent = [rank for rank in ranks if not store.check([f"{key}/{rank}"])] or absent
    message = (
        f"torch_moe_ep: ranks {absent} did not come to {topic} within "
        f"{timeout.total_seconds():g} s (dead, or elsewhere in the script); every rank has to "
        f"call it."
    )
    is_judge = dist.get_rank() == 0
    with contextlib.suppress(RuntimeError):
        _announce(store, key, {"absent": message}, len(ranks) - len(absent) - 1 if is_judge else 0)
    raise RuntimeError(message)


def _announce(store: dist.Store, key: str, verdict: dict[str, Any], num_readers: int) -> None:
    """Publish the verdict; wait until it was read, since the store may end with this process."""
    store.set(f"{key}/verdict", json.dumps(verdict))
    deadline = time.monotonic() + GRACE_S
    while store.add(f"{key}/read", 0) < num_readers and time.monotonic() < deadline:
        time.sleep(0.01)


def _heed(store: dist.Store, key: str) -> None:
    """Read the verdict and raise what it says."""
    said = json.loads(store.get(f"{key}/verdict"))
    store.add(f"{key}/read", 1)
    if "absent" in said:
        raise RuntimeError(said["absent"])
    if said["verdict"] is not None:
        raise ValueError(said["verdict"])


def _timeout(store: dist.Store) -> timedelta:
    seconds = os.environ.get("TORCH_MOE_EP_TIMEOUT_S")
    if seconds:
        if not seconds.isdecimal() or int(seconds) == 0:
            raise ValueError(
                f"TORCH_MOE_EP_TIMEOUT_S must be a positive whole number of seconds, got {seconds}"
            )
        return timedelta(seconds=int(seconds))
    timeout: timedelta = store.timeout  # type: ignore[attr-defined]
    return timeout * BEFORE_BACKEND
