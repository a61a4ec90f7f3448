"""transport="peer": what it needs, who gets it, and how many rows budget="bounded" has.

The transport itself runs on GPUs alone: tests/gpu/test_peer.py.
"""

import os
import weakref
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from node_cases import lines_logged
from torch.utils.checkpoint import checkpoint

from torch_moe_ep import MoEConfig, apply_expert_parallel, init_device_mesh
from torch_moe_ep.budget import bounded_capacity
from torch_moe_ep.parallel import peers
from torch_moe_ep.parallel.agreement import leave_note
from torch_moe_ep.parallel.flags import raise_if_flagged
from torch_moe_ep.parallel.nodes import RANKS_PER_NODE
from torch_moe_ep.peer_dispatch import rows_dispatched_again
from torch_moe_ep.testing import LoneExperts, make_local_expert_parallel, random_routing


def note(host: str, gpu: str, reach: str, *, may_share: bool = False) -> peers.Note:
    return {
        "ep_size": 2,
        "is_required": True,
        "host": host,
        "gpu": gpu,
        "reach": list(reach),
        "may_share": may_share,
    }


@pytest.mark.parametrize(
    ("notes", "obstacle"),
    [
        ([note("h", "a", "b"), note("h", "b", "a")], None),
        ([note("h", "a", "bc"), note("h", "b", "ac"), note("h", "c", "ab")], None),
        ([note("h", "a", "b"), note("i", "b", "a")], "ranks 4 and 5 are on two hosts"),
        ([note("h", "a", ""), note("h", "b", "a")], "rank 4 cannot reach the GPU of rank 5"),
        ([note("h", "a", "b"), note("h", "b", "")], "rank 5 cannot reach the GPU of rank 4"),
        ([note("h", "a", "b"), note("h", "a", "b")], "ranks 4 and 5 share a GPU"),
        ([note("h", "a", "", may_share=True)] * 2, None),
        ([note("h", "", ""), note("h", "", "")], "rank 4 computes on the CPU"),
        ([note("h", "a", "b")] * 65, "the group has 65 ranks, more than 64"),
    ],
    ids=str,
)
def test_peers_are_gpus_of_one_host_that_reach_each_other(notes, obstacle):
    found = peers.group_obstacle(notes, first_rank=4)
    assert found == obstacle if obstacle is None else found.startswith(obstacle)


def test_peers_misfit_names_the_group_that_does_not_fit():
    apart = [note("h", "a", "b"), note("h", "b", "a"), note("h", "c", "d"), note("i", "d", "c")]
    said = peers.peers_misfit(apart)
    assert said is not None and "ranks 2 and 3 are on two hosts" in said
    assert 'take transport="auto"' in said
    assert peers.peers_misfit([{**one, "is_required": False} for one in apart]) is None
    assert peers.peers_misfit([{}, {}]) is None


def chosen_with(gpus: list[str], config: dict[str, str], ranks_per_node: str) -> bool:
    """What this rank chooses where every rank has left a note of these GPUs of one host."""
    rank = dist.get_rank()
    own = note("h", gpus[rank], "".join(set(gpus) - {gpus[rank]}), may_share=True)
    leave_note(peers.TOPIC, own)
    with mock.patch.dict(os.environ, {RANKS_PER_NODE: ranks_per_node}):
        return peers.uses_peers(MoEConfig(**config), 2)


@pytest.mark.parametrize(
    ("gpus", "config", "ranks_per_node", "chosen"),
    [
        ("ab", {}, "", True),
        ("aa", {}, "", False),
        ("aa", {"transport": "peer"}, "", True),
        ("ab", {}, "1", False),
        ("ab", {"transport": "peer"}, "1", True),
        ("ab", {"transport": "collective"}, "", False),
        ("ab", {"dispatcher": "all_gather"}, "", False),
        ("ab", {"num_chunks": 2}, "", True),
        ("aa", {"num_chunks": 2}, "", False),
    ],
    ids=str,
)
def test_auto_takes_peers_where_each_rank_has_a_gpu_of_its_own(
    ranks, gpus, config, ranks_per_node, chosen
):
    assert ranks(2).run(chosen_with, list(gpus), config, ranks_per_node) == [chosen] * 2


def choice_logged(gpus: list[str]) -> list[str]:
    with lines_logged() as lines:
        chosen_with(gpus, {}, "")
    return lines


def test_choice_of_peers_is_logged_once_by_rank_0(ranks):
    choice = 'transport: peer, budget="exact", 2 GPUs of an expert-parallel group map each other'
    assert ranks(2).run(choice_logged, list("ab")) == [[choice], []]


def message_on_the_cpu() -> tuple[str, bool]:
    """What an explicit wish says without GPUs, and whether "auto" does without."""
    said = ""
    try:
        apply_expert_parallel(
            LoneExperts(), init_device_mesh("cpu", 2), MoEConfig(transport="peer")
        )
    except ValueError as error:
        said = str(error)
    model = apply_expert_parallel(LoneExperts(), init_device_mesh("cpu", 2))
    return said, model.experts.uses_peers


def test_peer_transport_without_gpus_is_refused_on_every_rank(ranks):
    for said, is_used in ranks(2).run(message_on_the_cpu):
        assert 'transport="peer" needs GPUs of one host' in said
        assert "rank 0 computes on the CPU" in said and 'take transport="auto"' in said
        assert not is_used


@pytest.mark.parametrize(
    ("config", "num_copies", "num_ranks", "rows"),
    [
        ({"budget_factor": 1.5}, 2000, 2, 3456),
        ({"budget_factor": 2.0}, 2000, 2, 4480),
        ({"budget_factor": 9.0}, 2000, 2, 4480),  # no rank can receive more than all copies
        ({"budget_factor": 1.0}, 0, 8, 384),
        ({"max_received_rows": 1000}, 2000, 2, 896),
        ({"max_received_rows": 5}, 2000, 2, 128),
        ({"budget_factor": 1.5, "num_chunks": 3}, 2000, 2, 4480),  # padding in every chunk
    ],
    ids=str,
)
def test_bounded_capacity(config, num_copies, num_ranks, rows):
    config = MoEConfig(budget="bounded", **config)
    assert bounded_capacity(config, num_copies, num_ranks, num_local=4) == rows


def test_bounded_capacity_holds_any_routing_at_the_largest_factor():
    """Each of L experts may end in 127 rows of padding."""
    config = MoEConfig(budget="bounded", budget_factor=2.0)
    for copies in range(1, 700, 97):
        lengths = [2 * copies - 3, 1, 1, 1]
        needed = sum(-(-length // 128) * 128 for length in lengths if length > 0)
        assert bounded_capacity(config, copies, 2, 4) >= needed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": "none"}, 'budget must be "exact" or "bounded"'),
        ({"budget_factor": 0.5}, "budget_factor must be at least 1, got 0.5"),
        ({"budget_factor": float("nan")}, "budget_factor must be a finite number"),
        ({"received_rows": "x"}, 'received_rows must be "auto" or "keep" or "dispatch_again"'),
        ({"peer_sms": 0}, "peer_sms must be a number of multiprocessors, at least 1, got 0"),
        ({"transport": "peer", "dispatcher": "all_gather"}, '"peer" carries copies'),
    ],
    ids=str,
)
def test_settings_that_fit_nothing_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**fields)


def test_flags_of_any_rank_raise_with_the_rows_needed():
    raise_if_flagged([], [[0.0, 0.0], [0.0, 0.0]])
    with pytest.raises(ValueError, match=r"ids .* on ranks \[1\]"):
        raise_if_flagged([], [[0.0, 0.0], [1.0, 0.0]])
    with pytest.raises(ValueError, match=r"needed 640 rows .* of ranks \[0, 2\]"):
        raise_if_flagged([], [[0.0, 640.0], [0.0, 0.0], [0.0, 512.0]])


@pytest.mark.parametrize(
    ("fields", "way"),
    [
        ({}, "run_in_chunks"),
        ({"received_rows": "keep"}, "run_in_chunks"),
        ({"num_chunks": 2}, "run_in_chunks"),
        ({"received_rows": "dispatch_again"}, "run_over_peers"),
    ],
    ids=str,
)
def test_peers_read_and_write_the_buffers_in_one_operation_unless_rows_travel_again(fields, way):
    """With the operators one by one rows are copied out of the buffer and results into it."""
    experts = make_local_expert_parallel(LoneExperts().experts, MoEConfig(**fields))
    experts.uses_peers = True
    ids, weights = random_routing(4, 2, 8)
    with mock.patch(f"torch_moe_ep.layer.{way}", return_value=torch.ones(4, 16)) as run:
        experts.ep_group_name = "of peers"
        y = experts(torch.zeros(4, 16), ids, weights)
    assert run.call_count == 1 and torch.equal(y, torch.ones(4, 16))


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_rows_dispatched_again_are_not_what_autograd_keeps(is_checkpointed):
    """Trap 11: inside activation checkpointing nothing is kept at all, x neither."""
    x, plan = torch.randn(2, 3, requires_grad=True), object()
    leaf = torch.randn(3, requires_grad=True)
    kept: list[torch.Tensor] = []
    sources: list[weakref.ref[torch.Tensor]] = []

    def layer(x: torch.Tensor) -> torch.Tensor:
        source = x * 2
        rows = torch.cat([source, source]).detach()
        detached = source.detach()
        sources.append(weakref.ref(detached))
        with rows_dispatched_again(rows, detached, plan):
            return (rows * leaf).sum()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    again = torch.cat([x, x]).detach() * 5
    with (
        mock.patch("torch_moe_ep.ops.peer_dispatch", return_value=(again, None)) as dispatch,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        y = checkpoint(layer, x, use_reentrant=False) if is_checkpointed else layer(x)
        assert [tuple(tensor.shape) for tensor in kept].count((4, 3)) == 0
        assert (sources[0]() is None) == is_checkpointed
        y.backward()
    (source, weights, used), keywords = dispatch.call_args
    assert torch.equal(source, x * 2) and weights is None and used is plan
    assert keywords == {"keep": False} and dispatch.call_count == 1
    assert leaf.grad is not None and torch.equal(leaf.grad, again.sum(dim=0))


def test_hidden_states_changed_in_place_are_not_dispatched_again():
    """Autograd compares versions of what it saves, but not under hooks for saved tensors."""
    x, leaf = torch.randn(2, 3), torch.randn(3, requires_grad=True)
    rows = torch.cat([x, x])
    with mock.patch("torch_moe_ep.ops.peer_dispatch", return_value=(rows, None)):
        with rows_dispatched_again(rows, x.detach(), object()):
            y = (rows * leaf).sum()
        y.backward(retain_graph=True)
        x.mul_(2)
        with pytest.raises(RuntimeError, match="were changed in place between forward"):
            y.backward()
