"""The test harness itself: a failing, dead or hanging rank is named."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from torch_moe_ep.testing import RankFailure, relative_error
from torch_moe_ep.testing import ranks as harness


def add_ranks(offset):
    total = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(total)
    return total.item(), dist.get_rank()


def raise_on_rank_1():
    if dist.get_rank() == 1:
        raise ValueError("the reason")
    dist.barrier()


def die_on_rank_1():
    dist.barrier()
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def hang_on_rank_1():
    if dist.get_rank() == 1:
        time.sleep(60)


def test_pool_returns_results_in_rank_order(ranks):
    assert ranks(2).run(add_ranks, 1) == [(3.0, 0), (3.0, 1)]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (raise_on_rank_1, "ValueError: the reason"),
        (die_on_rank_1, "rank 1 died with exit code 3"),
        (hang_on_rank_1, "rank 1 hung: no answer within 2 s"),
    ],
    ids=["raised", "died", "hung"],
)
def test_pool_names_the_rank_and_recovers(ranks, function, said):
    pool = ranks(2)
    with pytest.raises(RankFailure, match=said):
        pool.run(function, timeout_s=2 if function is hang_on_rank_1 else 30)
    assert pool.run(add_ranks, 0)[0][0] == 1.0


def fail_to_join(*_args):
    raise RuntimeError(f"{harness.NO_MESH} with Connection closed by peer")


def spoil_the_next_start():
    harness._join = fail_to_join


def test_pool_starts_again_where_gloo_did_not_connect_the_ranks(ranks):
    """The case had not begun; fresh workers run it."""
    pool = ranks(2)
    pool.run(spoil_the_next_start)
    assert pool.run(add_ranks, 1) == [(3.0, 0), (3.0, 1)]


def test_relative_error_sees_nan_zero_and_scale():
    one = torch.tensor([1.0, -2.0])
    assert relative_error(one, one) == 0
    assert relative_error(one + torch.tensor([0.0, 0.5]), one) == 0.25
    assert relative_error(torch.tensor([float("nan"), -2.0]), one) == float("inf")
    assert relative_error(one, torch.zeros(2)) == float("inf")
