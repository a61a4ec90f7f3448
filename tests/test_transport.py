"""The collective transport when a rank is at fault: every other one raises and names it."""

import contextlib
import os
import socket
import time
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from parallel_cases import kept_outputs

from torch_moe_ep import MoEConfig, apply_expert_parallel, init_device_mesh, ops
from torch_moe_ep.memory import checkpoint_contexts
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
    ("stage", "batches_before"),
    [("plan_and_pack", 1), ("dispatch", 0), ("expert_mlp", 0), ("combine", 1)],
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


def message_when_the_partner_raises(stage_of_group: list[str]) -> str:
    """In each EP group of two the second rank raises in the group's stage and stays alive."""
    os.environ["TORCH_MOE_EP_TIMEOUT_S"] = str(TIMEOUT_S)
    model = apply_expert_parallel(LoneExperts(), init_device_mesh("cpu", 2))
    group, place = divmod(dist.get_rank(), 2)
    raises = mock.Mock(side_effect=RuntimeError("a mistake of this rank's"))
    broken = mock.patch.object(ops, stage_of_group[group], raises)
    try:
        with broken if place == 1 else contextlib.nullcontext(), pytest.raises(RuntimeError) as e:
            model(torch.randn(3, 16), *random_routing(3, 2, 8))
        return str(e.value)
    finally:
        del os.environ["TORCH_MOE_EP_TIMEOUT_S"]


@pytest.mark.parametrize(
    "stages", [["plan_and_pack", "dispatch"], ["expert_mlp", "combine"]], ids="-".join
)
def test_rank_that_raises_in_a_stage_is_named_by_the_other(ranks, stages):
    said = ranks(4).run(message_when_the_partner_raises, stages, timeout_s=60)
    for first in (0, 2):
        assert f"failed on global rank {first}; " in said[first]
        assert f"global ranks that did not take part: {first + 1} " in said[first]
        assert said[first + 1] == "a mistake of this rank's"


def message_within_the_groups_own_time_out() -> str:
    """What rank 0 says whose partner stays away from a group with a time-out of 1.25 s."""
    group = dist.new_group(timeout=timedelta(seconds=1.25))
    if dist.get_rank() == 1:
        return ""
    with pytest.raises(RuntimeError) as caught:
        ops.plan(torch.zeros(2, 1, dtype=torch.int64), 4, group_name=group.group_name)
    return str(caught.value)


def test_time_out_is_four_fifths_of_the_process_groups(ranks):
    said, _ = ranks(2).run(message_within_the_groups_own_time_out, timeout_s=30)
    assert "global ranks that did not take part: 1 " in said and "1000ms" in said


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


def packed_beside_plain(top_k: int, has_weights: bool) -> list[bool]:
    """`plan_and_pack` and `dispatch` of it against `plan` and `dispatch`: outputs, gradients."""
    rank, name = dist.get_rank(), dist.group.WORLD.group_name
    tokens = 0 if rank == 1 else 5 + rank
    ids, weights = random_routing(tokens, top_k, 8, seed=rank)
    generator = torch.Generator().manual_seed(rank)
    leaves = [
        torch.randn(tokens, 16, generator=generator).requires_grad_(),
        weights.requires_grad_(),
    ]
    found = []
    for is_packed in (False, True):
        x, given = leaves[0], leaves[1] if has_weights else None
        if is_packed:
            plan, packed = ops.plan_and_pack(x, given, ids, 8, group_name=name)
        else:
            plan, packed = ops.plan(ids, 8, group_name=name), None
        rows, row_weights = ops.dispatch(x, given, plan, packed)
        wanted = leaves if has_weights else leaves[:1]
        grads = torch.autograd.grad(rows.square().sum() + row_weights.square().sum(), wanted)
        found.append([*plan[:5], rows, row_weights, *grads])
    return [torch.equal(a, b) for a, b in zip(*found, strict=True)]


@pytest.mark.parametrize("has_weights", [False, True])
@pytest.mark.parametrize(("world", "top_k"), [(2, 1), (4, 3)])
def test_rows_packed_while_counts_travel_are_those_of_dispatch(ranks, world, top_k, has_weights):
    for same in ranks(world).run(packed_beside_plain, top_k, has_weights):
        assert all(same) and len(same) == 8 + has_weights


def message_of_another_send_buffer() -> list[str]:
    name = dist.group.WORLD.group_name
    ids, weights = random_routing(6, 2, 8)
    x = torch.randn(6, 16)
    said = []
    for other in (torch.randn(6, 8), x.bfloat16()):
        plan, packed = ops.plan_and_pack(other, None, ids, 8, group_name=name)
        with pytest.raises(ValueError) as caught:
            ops.dispatch(x, None, plan, packed)
        said.append(str(caught.value))
    plan, packed = ops.plan_and_pack(x, None, ids, 8, group_name=name)
    with pytest.raises(ValueError) as caught:
        ops.dispatch(x, weights, plan, packed)
    return [*said, str(caught.value)]


def test_send_buffer_of_other_tokens_is_refused(ranks):
    for said in ranks(2).run(message_of_another_send_buffer):
        assert "send_rows must be [12, 16] Float from the plan of this x, got [12, 8]" in said[0]
        assert "got [12, 16] BFloat16" in said[1]
        assert "send_weights must come from the plan" in said[2]


def rows_kept_by_plan(keep: str) -> list[int]:
    """Elements of the send buffers that a checkpointed layer keeps."""
    model = apply_expert_parallel(LoneExperts(), init_device_mesh("cpu", 2))
    forward, _ = checkpoint_contexts(keep)()
    with forward:
        model(torch.randn(6, 16, requires_grad=True), *random_routing(6, 2, 8))
    kept = kept_outputs(forward, torch.ops.torch_moe_ep.plan.default)
    return [outputs[5].val.numel() for outputs in kept]


@pytest.mark.parametrize("keep", ["routing", "rows"])
def test_checkpointing_keeps_the_plan_and_no_send_buffer(ranks, keep):
    assert ranks(2).run(rows_kept_by_plan, keep) == [[0], [0]]
