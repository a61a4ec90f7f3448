"""A launcher that ends a rank in the middle of an exchange: what it still says, and what ends."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from torch_moe_ep import apply_expert_parallel, init_device_mesh
from torch_moe_ep.testing import LoneExperts, RankFailure, random_routing

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = "50"


def layer() -> torch.nn.Module:
    return apply_expert_parallel(LoneExperts(), init_device_mesh("cpu", 2))


def run(model: torch.nn.Module) -> None:
    model(torch.randn(3, 16), *random_routing(3, 2, 8))


def wait_for_the_partner_until_sigterm(has_handler: bool) -> None:
    """Rank 1 stays away; rank 0 gets SIGTERM while it waits, with a handler of Python's or not."""
    os.environ["TORCH_MOE_EP_TIMEOUT_S"] = TIMEOUT_S
    if has_handler:
        signal.signal(signal.SIGTERM, lambda *_: None)
    model = layer()
    run(model)
    if dist.get_rank() == 1:
        time.sleep(30.0)
    sends = [(1.0, signal.SIGTERM), *([(8.0, signal.SIGKILL)] if has_handler else [])]
    for seconds, number in sends:
        threading.Timer(seconds, os.kill, (os.getpid(), number)).start()
    run(model)


@pytest.mark.parametrize("has_handler", [False, True], ids=["default", "python_handler"])
def test_rank_ended_in_a_wait_says_whom_it_waited_for(ranks, has_handler):
    """The signal then does what it would have done: ends the process, or calls the handler."""
    with pytest.raises(RankFailure) as caught:
        ranks(2).run(wait_for_the_partner_until_sigterm, has_handler, timeout_s=60, grace_s=0.1)
    said = str(caught.value)
    assert "torch_moe_ep: the all-gather of numbers failed on global rank 0" in said
    assert "global ranks that did not take part: 1 " in said
    assert "SIGTERM, after waiting for " in said
    number = signal.SIGKILL if has_handler else signal.SIGTERM
    assert f"rank 0 died with exit code {-number}" in said


def status_of_a_child() -> int | None:
    """Rank 0 forks a child while it waits for rank 1; the child gets SIGTERM."""
    statuses: list[int] = []

    def fork_and_end() -> None:
        child = os.fork()
        if child == 0:
            time.sleep(30.0)
            os._exit(0)
        os.kill(child, signal.SIGTERM)
        statuses.append(os.waitpid(child, 0)[1])

    model = layer()
    run(model)
    if dist.get_rank() == 1:
        time.sleep(3.0)
    else:
        threading.Timer(1.0, fork_and_end).start()
    run(model)
    return statuses[0] if statuses else None


def test_children_forked_during_a_wait_end_by_sigterm(ranks):
    """They have the handler but not the thread behind it."""
    status, _ = ranks(2).run(status_of_a_child, timeout_s=20)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM


def end_outside_of_a_wait() -> None:
    run(layer())
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30.0)


def test_sigterm_outside_of_a_wait_ends_the_rank_at_once(ranks):
    with pytest.raises(RankFailure, match=f"died with exit code {-signal.SIGTERM}") as caught:
        ranks(2).run(end_outside_of_a_wait, timeout_s=20, grace_s=0.1)
    assert "SIGTERM, after waiting" not in str(caught.value)


@pytest.mark.parametrize("killed", [0])
def test_rank_killed_under_torchrun_is_named_by_every_other_and_nothing_is_left(killed):
    """Rank 0; torchrun holds the store."""
    environment = {**os.environ, "TORCH_MOE_EP_TIMEOUT_S": TIMEOUT_S, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    process = subprocess.Popen(
        [*launcher, "--nproc-per-node=3", "-m", "tests.killed_rank", str(killed)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    for rank in {0, 1, 2} - {killed}:
        assert (
            f"failed on global rank {rank}; global ranks that did not take part: {killed} " in said
        )
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
