"""The collective transport when a rank is at fault: every other one raises and names it."""

import os
import socket
import time

import pytest
import torch
import torch.distributed as dist

from torch_moe_ep import MoEConfig, apply_expert_parallel, init_device_mesh, ops
from torch_moe_ep.testing import LoneExperts, RankFailure, random_routing

TIMEOUT_S = 2
# The others give up, wait three seconds for each other, and say who was missing.
ABSENCE_S = TIMEOUT_S + 3.0 + 3.0


def message_with_one_absent(absent: int, batches_before: int) -> str:
    """What this rank says when `absent` stays away after some batches; "" on the absent rank."""
    os.environ["TORCH_MOE_EP_TIMEOUT_S"] = str(TIMEOUT_S)
    try:
        model = apply_expert_parallel(LoneExperts(), init_device_mesh("cpu", 2))
        for _ in range(batches_before):
            model(torch.randn(3, 16), *random_routing(3, 2, 8)).sum().backward()
        if dist.get_rank() == absent:
            time.sleep(ABSENCE_S)
            return ""
        with pytest.raises(RuntimeError) as caught:
            model(torch.randn(3, 16), *random_routing(3, 2, 8))
        return str(caught.value)
    finally:
        del os.environ["TORCH_MOE_EP_TIMEOUT_S"]


@pytest.mark.parametrize("batches_before", [0, 1], ids=["never_came", "one_batch_behind"])
def test_rank_that_stays_away_is_named_within_the_time_out(ranks, batches_before):
    present, absent = ranks(2).run(message_with_one_absent, 1, batches_before, timeout_s=60)
    assert absent == ""
    assert "torch_moe_ep: the all-gather of numbers failed on global rank 0" in present
    assert "global ranks that did not take part: 1 " in present


def failed_on_global_rank() -> str:
    """The message on rank 2 of an EP group (2, 3) whose rank 3 stays away."""
    os.environ["TORCH_MOE_EP_TIMEOUT_S"] = str(TIMEOUT_S)
    try:
        model = apply_expert_parallel(LoneExperts(), init_device_mesh("cpu", 2))
        if dist.get_rank() == 3:
            time.sleep(ABSENCE_S)
        if dist.get_rank() != 2:
            return ""
        with pytest.raises(RuntimeError) as caught:
            model(torch.randn(3, 16), *random_routing(3, 2, 8))
        return str(caught.value)
    finally:
        del os.environ["TORCH_MOE_EP_TIMEOUT_S"]


def test_ranks_are_named_by_their_global_numbers(ranks):
    said = ranks(4).run(failed_on_global_rank, timeout_s=60)
    assert "failed on global rank 2" in said[2]
    assert "did not take part: 3 " in said[2]


def die() -> None:
    os._exit(7)


def message_when_the_partner_dies(dying: int, stage: str, batches_before: int) -> str:
    os.environ["TORCH_MOE_EP_TIMEOUT_S"] = str(TIMEOUT_S)
    model = apply_expert_parallel(LoneExperts(), init_device_mesh("cpu", 2))
    for _ in range(batches_before):
        model(torch.randn(3, 16), *random_routing(3, 2, 8)).sum().backward()
    if dist.get_rank() == dying:
        setattr(ops, stage, lambda *_args, **_kwargs: die())
    with pytest.raises(RuntimeError) as caught:
        model(torch.randn(3, 16), *random_routing(3, 2, 8))
    return str(caught.value)


@pytest.mark.parametrize(
    ("stage", "batches_before"), [("plan", 1), ("dispatch", 0), ("expert_mlp", 0), ("combine", 1)]
)
def test_rank_that_dies_in_a_stage_is_named_by_the_other(ranks, stage, batches_before):
    with pytest.raises(RankFailure, match="rank 1 died with exit code 7") as caught:
        ranks(2).run(
            message_when_the_partner_dies,
            1,
            stage,
            batches_before,
            timeout_s=60,
            grace_s=ABSENCE_S + 10.0,
        )
    assert "failed on global rank 0" in caught.value.results[0]
    assert "global ranks that did not take part: 1 " in caught.value.results[0]


def message_when_the_store_dies(port: int) -> str:
    rank = dist.get_rank()
    dist.destroy_process_group()
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    return message_when_the_partner_dies(0, "dispatch", 1)


def test_rank_0_that_dies_with_the_store_is_named(ranks):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(RankFailure, match="rank 0 died with exit code 7") as caught:
        ranks(2).run(message_when_the_store_dies, port, timeout_s=60, grace_s=ABSENCE_S + 10.0)
    said = caught.value.results[1]
    assert "failed on global rank 1" in said
    assert f"(127.0.0.1:{port}) does not answer: global rank 0 is dead" in said


def refused_time_out() -> None:
    os.environ["TORCH_MOE_EP_TIMEOUT_S"] = "soon"
    try:
        with pytest.raises(
            ValueError, match=r"TORCH_MOE_EP_TIMEOUT_S must be a positive whole.*soon"
        ):
            ops.plan(
                torch.zeros(2, 1, dtype=torch.int64), 4, group_name=dist.group.WORLD.group_name
            )
        with pytest.raises(
            ValueError, match=r"TORCH_MOE_EP_TIMEOUT_S must be a positive whole.*soon"
        ):
            init_device_mesh("cpu", 2)
    finally:
        del os.environ["TORCH_MOE_EP_TIMEOUT_S"]


def test_time_out_that_is_no_number_is_refused(ranks):
    ranks(2).run(refused_time_out)


def message_of_invalid_id(bad_rank: int, dispatcher: str) -> str:
    config = MoEConfig(dispatcher=dispatcher)
    model = apply_expert_parallel(LoneExperts(), init_device_mesh("cpu", 2), config)
    ids, weights = random_routing(3, 2, 8)
    if dist.get_rank() == bad_rank:
        ids[1, 0] = 8
    with pytest.raises(ValueError) as caught:
        model(torch.randn(3, 16), ids, weights)
    return str(caught.value)


@pytest.mark.parametrize("dispatcher", ["all_to_all", "all_gather"])
def test_expert_id_out_of_range_on_one_rank_raises_on_all(ranks, dispatcher):
    said = ranks(2).run(message_of_invalid_id, 1, dispatcher, timeout_s=30)
    assert said[0] == said[1]
    assert "expert_ids must be in [0, 8), got 1 others on rank 1 of the expert-parallel" in said[0]
