"""All ranks look at one thing together and raise alike, before anything is changed.

Notes go through the default process group's store, not through a collective: at the points where
ranks may disagree about groups no collective is safe (ranks that ask for different meshes wait for
each other for ever inside torch), and a rank that does not come can be named.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

GRACE_S = 10.0  # what rank 0 may take over its verdict, and the others to read it

Judge = Callable[[list[Any]], str | None]


def agree(topic: str, note: Any, judge: Judge) -> None:
    """Raise on every rank what `judge` says about the notes of all ranks.

    Args:
        topic: what the ranks are doing, for keys and messages; the same on every rank.
        note: what this rank has to say, of JSON's types.
        judge: called on rank 0 alone with the notes in rank order; None: all is well.

    Raises:
        ValueError: the judge's sentence, on every rank.
        RuntimeError: a rank did not come within the time-out (``TORCH_MOE_EP_TIMEOUT_S``, else the
            store's); the message names it.

    Collective over all ranks, on the host alone: W + 1 small entries of the store.
    """
    if dist.get_world_size() == 1:
        verdict = judge([note])
        if verdict is not None:
            raise ValueError(verdict)
        return
    store = _get_default_store()
    rank = dist.get_rank()
    call = store.add(f"torch_moe_ep/{topic}/calls/{rank}", 1)
    key = f"torch_moe_ep/{topic}/{call}"
    store.set(f"{key}/{rank}", json.dumps(note))
    if rank == 0:
        _judge_all(store, key, topic, judge)
    else:
        _hear(store, key, topic)


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


def _judge_all(store: dist.Store, key: str, topic: str, judge: Judge) -> None:
    world_size = dist.get_world_size()
    timeout = _timeout(store)
    try:
        store.wait([f"{key}/{rank}" for rank in range(world_size)], timeout)
    except RuntimeError:
        present = [rank for rank in range(world_size) if store.check([f"{key}/{rank}"])]
        absent = sorted(set(range(world_size)) - set(present))
        message = (
            f"torch_moe_ep: ranks {absent} did not come to {topic} within "
            f"{timeout.total_seconds():g} s (dead, or elsewhere in the script)."
        )
        _announce(store, key, {"absent": message}, len(present) - 1)
        raise RuntimeError(message) from None
    verdict = judge([json.loads(store.get(f"{key}/{rank}")) for rank in range(world_size)])
    _announce(store, key, {"verdict": verdict}, world_size - 1 if verdict is not None else 0)
    if verdict is not None:
        raise ValueError(verdict)


def _announce(store: dist.Store, key: str, verdict: dict[str, Any], num_readers: int) -> None:
    """Publish the verdict; wait until it was read, since the store may end with this process."""
    store.set(f"{key}/verdict", json.dumps(verdict))
    deadline = time.monotonic() + GRACE_S
    while store.add(f"{key}/read", 0) < num_readers and time.monotonic() < deadline:
        time.sleep(0.01)


def _hear(store: dist.Store, key: str, topic: str) -> None:
    timeout = _timeout(store) + timedelta(seconds=GRACE_S)
    try:
        store.wait([f"{key}/verdict"], timeout)
    except RuntimeError:
        raise RuntimeError(
            f"torch_moe_ep: rank 0 did not come to {topic} within {timeout.total_seconds():g} s "
            f"(dead, or elsewhere in the script)."
        ) from None
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
    return timeout
