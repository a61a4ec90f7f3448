"""Killing ranks at random moments of a save leaves the previous checkpoint loadable."""

import contextlib
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from parallel_cases import Run, build

import torch_moe_ep
from torch_moe_ep.checkpoint import folder as folder_module
from torch_moe_ep.checkpoint.folder import find_complete, open_partial, publish, write_marker
from torch_moe_ep.testing import RankFailure
from torch_moe_ep.testing.parallel import full_parameters

RUN = Run("fsdp2", 2, 2, model={"num_local_experts": 12})


def note(path: Path, text: str) -> None:
    partial = path.with_suffix(".new")
    partial.write_text(text)
    partial.replace(path)


def save_until_killed(root: str, first: int, is_async: bool) -> None:
    """Every weight of step n is n; `begun` and `ended` say which saves did so, `pids` who saves."""
    model = build(RUN)
    optimizer = torch.optim.AdamW(model.parameters())
    pids: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    is_writer = dist.get_rank() == 0
    for step in range(first, first + 1000):
        with torch.no_grad():
            for param in model.parameters():
                param.to_local().fill_(step)
        dist.barrier()
        begin = time.monotonic()
        if is_writer:
            note(Path(root) / "begun", f"{step} {' '.join(map(str, pids))}")
        # Every other save goes over the one before it, which must live until then.
        path = Path(root) / "checkpoints" / ("last" if step % 2 else f"step-{step}")
        torch_moe_ep.save_checkpoint(
            path, model, optimizer, step=step, async_save=is_async, num_kept=2
        )
        torch_moe_ep.wait_for_checkpoint()
        if is_writer:
            note(Path(root) / "ended", f"{step} {time.monotonic() - begin}")


def load_latest(root: str) -> int:
    model = build(RUN)
    optimizer = torch.optim.AdamW(model.parameters())
    path = torch_moe_ep.latest_checkpoint(f"{root}/checkpoints")
    assert path is not None
    step = torch_moe_ep.load_checkpoint(path, model, optimizer)
    for name, value in full_parameters(model).items():
        assert bool((value == step).all()), f"{name} of step {step} holds {value.unique()}"
    return step


def kill_in_a_save(root: Path, chance: random.Random, is_over: threading.Event) -> None:
    """Wait for the third save of this life, and for a random part of a save's time; then kill."""
    first = int((root / "first").read_text())
    while not is_over.is_set():
        begun = (root / "begun").read_text().split() if (root / "begun").exists() else ["-1"]
        if int(begun[0]) >= first + 2:
            break
        time.sleep(0.001)
    else:
        return
    seconds = float((root / "ended").read_text().split()[1])
    time.sleep(chance.uniform(0.0, 1.2 * seconds))
    pids = [int(pid) for pid in begun[1:]]
    for pid in pids if chance.random() < 0.7 else [chance.choice(pids)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def kill_and_load(ranks, root: Path, num_kills: int, *, is_async: bool) -> None:
    chance = random.Random(num_kills)
    step = 0
    for _ in range(num_kills):
        (root / "first").write_text(str(step + 1))
        is_over = threading.Event()
        killer = threading.Thread(target=kill_in_a_save, args=(root, chance, is_over))
        killer.start()
        try:
            with pytest.raises(RankFailure, match="died with exit code -9"):
                ranks(2).run(save_until_killed, str(root), step + 1, is_async)
        finally:
            is_over.set()
            killer.join()
        begun = int((root / "begun").read_text().split()[0])
        ended = int((root / "ended").read_text().split()[0])
        step = ranks(2).run(load_latest, str(root))[0]
        assert ended <= step <= begun


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_kill_in_a_save_leaves_the_previous_checkpoint(ranks, tmp_path, is_async):
    kill_and_load(ranks, tmp_path, 2, is_async=is_async)


@pytest.mark.full
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_twenty_kills_leave_the_previous_checkpoint(ranks, tmp_path, is_async):
    kill_and_load(ranks, tmp_path, 20, is_async=is_async)


class Killed(Exception):
    """Stands for a kill: nothing of the save runs after it."""


@pytest.mark.parametrize("place", range(4))
def test_kill_between_renames_leaves_one_that_load_finds(tmp_path, monkeypatch, place):
    """Replacing `last` of step 1 by step 2, killed before its n-th rename or removal."""
    last = tmp_path / "last"
    write_marker(open_partial(last), {"step": 1})
    publish(last)
    assert find_complete(last) == (last, {"step": 1})
    calls = []

    def counted(method):
        def run(*args, **kwargs):
            calls.append(method)
            if len(calls) == place + 1:
                raise Killed
            return method(*args, **kwargs)

        return run

    partial = open_partial(last)
    write_marker(partial, {"step": 2})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(folder_module.shutil, "rmtree", counted(folder_module.shutil.rmtree))
        if place < 3:
            with pytest.raises(Killed):
                publish(last)
        else:
            publish(last)
            assert len(calls) == 3
    _, marker = find_complete(last)
    assert marker == {"step": 2}
    assert torch_moe_ep.latest_checkpoint(tmp_path) == last
    open_partial(last)  # the next save of the same name
    assert find_complete(last)[1] == {"step": 2}
