"""Whether the GPUs of an EP group can map each other's memory, and so carry rows themselves.

Every rank says which GPU it has and which it can reach; ranks of another host, of GPUs that this
process does not see, and ranks that share a GPU are out of reach. For tests ranks may share a GPU:
``TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1`` lets torch map it twice.
"""

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from torch_moe_ep.config import MoEConfig
from torch_moe_ep.parallel.agreement import leave_note, notes_of_group
from torch_moe_ep.parallel.nodes import RANKS_PER_NODE, host_name

TOPIC = "peer"
MAX_PEERS = 64  # ranks of a group, as csrc/comm/peer_kernels.h has it
SHARED_GPU = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
_logger = logging.getLogger("torch_moe_ep")

Note = dict[str, Any]


def peer_note(config: MoEConfig, mesh: DeviceMesh) -> Note:
    """What this rank tells the others before they choose; of JSON's types.

    Leaves it in the store as well, for `uses_peers` of the others.
    """
    if not _may_use_peers(config, mesh["ep"].size()):
        return {}
    note: Note = {
        "ep_size": mesh["ep"].size(),
        "is_required": config.transport == "peer",
        "host": host_name(),
        "gpu": "",
        "reach": [],
        "may_share": False,
    }
    if mesh.device_type == "cuda":
        note.update(_gpus())
    leave_note(TOPIC, note)
    return note


def peers_misfit(notes: Sequence[Note]) -> str | None:
    """Say which EP group cannot use the peer transport where it is asked for, or None.

    Args:
        notes: of `peer_note`, in rank order, with the same configuration on every rank.
    """
    if not notes[0] or not notes[0]["is_required"]:
        return None
    ep_size = notes[0]["ep_size"]
    for first in range(0, len(notes), ep_size):
        obstacle = group_obstacle(notes[first : first + ep_size], first)
        if obstacle is not None:
            return (
                f'transport="peer" needs GPUs of one host that can map each other\'s memory, but '
                f'{obstacle}; take transport="auto", or an expert-parallel degree whose groups fit.'
            )
    return None


def group_obstacle(notes: Sequence[Note], first_rank: int = 0) -> str | None:
    """Why the ranks of one EP group cannot map each other, or None.

    Args:
        notes: of the group, in rank order.
        first_rank: of the group, for the sentence.
    """
    if len(notes) > MAX_PEERS:
        return f"the group has {len(notes)} ranks, more than {MAX_PEERS}"
    for rank, note in enumerate(notes, first_rank):
        if not note["gpu"]:
            return f"rank {rank} computes on the CPU"
        for other_rank, other in enumerate(notes, first_rank):
            names = f"ranks {rank} and {other_rank}"
            if rank == other_rank:
                continue
            if note["host"] != other["host"]:
                return f"{names} are on two hosts"
            if note["gpu"] == other["gpu"] and not note["may_share"]:
                return f"{names} share a GPU (for tests, {SHARED_GPU}=1 allows that)"
            if note["gpu"] != other["gpu"] and other["gpu"] not in note["reach"]:
                return f"rank {rank} cannot reach the GPU of rank {other_rank}"
    return None


def uses_peers(config: MoEConfig, ep_size: int) -> bool:
    """Whether this rank's EP group carries rows by peer access.

    Call after all ranks have left their `peer_note`. Reads the store; the same on all ranks of a
    group. Rank 0 logs the choice at INFO where it is this one. "auto" never takes it for ranks
    that share a GPU, nor where the user says which ranks make a node.
    """
    if not _may_use_peers(config, ep_size):
        return False
    notes = notes_of_group(TOPIC, ep_size)
    if group_obstacle(notes) is not None:
        return False
    shares = len({note["gpu"] for note in notes}) < ep_size
    if config.transport == "auto" and (shares or os.environ.get(RANKS_PER_NODE)):
        return False
    if dist.get_rank() == 0:
        _logger.info(
            'transport: peer, budget="%s", %d GPUs of an expert-parallel group map each other',
            config.budget,
            ep_size,
        )
    return True


def _may_use_peers(config: MoEConfig, ep_size: int) -> bool:
    return (
        ep_size > 1 and config.dispatcher == "all_to_all" and config.transport in ("auto", "peer")
    )


def _gpus() -> Note:
    here = torch.cuda.current_device()
    names = [
        str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())
    ]
    return {
        "gpu": names[here],
        "reach": [
            name
            for device, name in enumerate(names)
            if device != here and torch.cuda.can_device_access_peer(here, device)
        ],
        "may_share": os.environ.get(SHARED_GPU) == "1",
    }
