"""Which ranks of an EP group share a node, and whether a token crosses between nodes once.

Detection goes by host name and boot id, as NCCL's does; ``TORCH_MOE_EP_RANKS_PER_NODE`` stands in
for it, so that ranks of one machine can play several nodes.
"""

import logging
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from torch_moe_ep.config import MoEConfig
from torch_moe_ep.parallel.agreement import leave_note, notes_of_group

RANKS_PER_NODE = "TORCH_MOE_EP_RANKS_PER_NODE"
TOPIC = "host"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_logger = logging.getLogger("torch_moe_ep")


def override_misfit(config: MoEConfig, ep_size: int) -> str | None:
    """Say what is wrong with ``TORCH_MOE_EP_RANKS_PER_NODE``, or None. Not collective."""
    text = os.environ.get(RANKS_PER_NODE)
    if not text or not _may_use_nodes(config, ep_size):
        return None
    if not text.isdecimal() or int(text) == 0:
        return f"{RANKS_PER_NODE} must be a positive whole number of ranks, got {text}."
    if int(text) % ep_size != 0 and ep_size % int(text) != 0:
        return (
            f"{RANKS_PER_NODE}={text} does not divide the {ep_size} ranks of an expert-parallel "
            f"group, nor they it, so its nodes would be uneven; choose a divisor of {ep_size}, or "
            f'take transport="collective".'
        )
    return None


def node_note(config: MoEConfig, ep_size: int) -> dict[str, Any]:
    """What this rank tells the others before they choose; of JSON's types.

    Leaves the rank's host in the store, for `ranks_per_node` of the others.
    """
    if not _may_use_nodes(config, ep_size):
        return {}
    host = host_name()
    leave_note(TOPIC, host)
    is_required = config.transport == "hierarchical" and not os.environ.get(RANKS_PER_NODE)
    return {"host": host, "ep_size": ep_size, "is_required": is_required}


def nodes_misfit(notes: Sequence[dict[str, Any]]) -> str | None:
    """Say which EP group has uneven nodes where even ones are asked for, or None.

    Args:
        notes: of `node_note`, in rank order, with the same configuration on every rank.
    """
    if not notes[0] or not notes[0]["is_required"]:
        return None
    ep_size = notes[0]["ep_size"]
    for first in range(0, len(notes), ep_size):
        hosts = [note["host"] for note in notes[first : first + ep_size]]
        if even_nodes(hosts) == 0:
            return (
                f'transport="hierarchical" needs nodes with equally many consecutive ranks of an '
                f"expert-parallel group, but ranks {first} to {first + ep_size - 1} are on "
                f"{hosts}; choose an expert-parallel degree that fits the nodes, set "
                f'{RANKS_PER_NODE}, or take transport="collective".'
            )
    return None


def ranks_per_node(config: MoEConfig, ep_size: int) -> int:
    """G of this rank's EP group when tokens shall cross between its nodes once; 0: the flat way.

    Call after all ranks have left their `node_note`. Reads the store; the same on all ranks of a
    group. Rank 0 logs the choice at INFO.
    """
    if not _may_use_nodes(config, ep_size):
        return 0
    text = os.environ.get(RANKS_PER_NODE)
    chosen = int(text) if text else even_nodes(notes_of_group(TOPIC, ep_size))
    if chosen >= ep_size:
        chosen = 0  # one node: nothing crosses
    if dist.get_rank() == 0:
        way = f"{ep_size // chosen} nodes of {chosen} ranks" if chosen else "one all-to-all"
        name = "hierarchical" if chosen else "collective"
        _logger.info("transport: %s, %s in an expert-parallel group", name, way)
    return chosen


def even_nodes(hosts: Sequence[str]) -> int:
    """How many ranks each node has, or 0 where nodes are uneven or their ranks not consecutive.

    Example: a a b b gives 2, a a b and a b a b give 0, a a a gives 3.
    """
    num_nodes = len(set(hosts))
    size, rest = divmod(len(hosts), num_nodes)
    runs = [set(hosts[first : first + size]) for first in range(0, len(hosts), size)]
    return size if rest == 0 and all(len(run) == 1 for run in runs) else 0


def _may_use_nodes(config: MoEConfig, ep_size: int) -> bool:
    return (
        ep_size > 1
        and config.dispatcher == "all_to_all"
        and config.num_chunks == 1
        and config.transport in ("auto", "hierarchical")
    )


def host_name() -> str:
    """The host of this process, apart from others of the same name by its boot id."""
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else ""
    return f"{socket.gethostname()}/{boot}"
