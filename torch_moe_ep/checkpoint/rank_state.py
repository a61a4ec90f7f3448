"""What a rank puts into a checkpoint: its shards, and byte tensors for everything else.

``host.common`` is written by rank 0: scheduler, and which generators stood alike on all ranks.
``host.rank<r>`` is rank r's: its random generators and its `data_state`. Both are torch.save
archives in uint8 tensors, read back with ``weights_only``. ``routing.<layer>.<name>`` are the
routing's own tensors.
"""

import io
import re
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from torch_moe_ep.checkpoint.rng import digests, reseed, rng_state
from torch_moe_ep.gather import sum_over_ranks
from torch_moe_ep.parallel.state import states_of

COMMON = "common"


def sharded_state(model: nn.Module, optimizer: Optimizer | None) -> dict[str, Any]:
    """This rank's weights, and optimizer state if there is one, by names of the unwrapped model.

    Collective under FSDP1, as torch's own state dicts are.
    """
    if optimizer is None:
        return {"model": get_model_state_dict(model)}
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def pack(value: Any, what: str) -> torch.Tensor:
    """Any plain value as uint8 ``[bytes]``.

    Raises:
        ValueError: `value` holds objects that ``torch.load(weights_only=True)`` refuses.
    """
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:  # pickle and torch raise errors of many kinds
        raise ValueError(
            f"{what} cannot be saved ({_obstacle(error)}); it may hold tensors, numbers, strings, "
            f"None, and dicts, lists and tuples of them."
        ) from error
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _obstacle(error: Exception) -> str:
    """What cannot be saved, by its class; torch says so far behind its advice for loading."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    if found is not None:
        return f"it holds a {found[1]}"
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def unpack(packed: torch.Tensor) -> Any:
    """What `pack` was given."""
    return torch.load(io.BytesIO(packed.numpy().tobytes()), weights_only=True)


def rank_key(rank: int) -> str:
    """The key of one rank's state."""
    return f"rank{rank}"


def collect_host(scheduler: LRScheduler | None, data_state: Any) -> dict[str, torch.Tensor]:
    """This rank's byte tensors, by key; rank 0 has the common one too.

    Raises:
        ValueError: a state that is not made of plain values.

    Collective over all ranks (one `all_gather_object`), also when it raises.
    """
    rank = dist.get_rank()
    rng = rng_state()
    alike = _generators_alike(digests(rng))
    host = {rank_key(rank): pack({"rng": rng, "data": data_state}, "data_state")}
    if rank == 0:
        common = {
            "alike": alike,
            "scheduler": None if scheduler is None else scheduler.state_dict(),
        }
        host[COMMON] = pack(common, "the scheduler's state")
    return host


def rng_of_rank(saved: dict[str, Any], alike: list[str], rank: int, has_same_world: bool) -> Any:
    """The generators' states that a rank goes on with.

    Args:
        saved: this rank's states; at another number of ranks rank 0's.
        alike: generators that stood alike on all ranks.
        rank: of this process.
        has_same_world: whether as many ranks load as saved.
    """
    if has_same_world:
        return saved
    apart = {name: value for name, value in saved.items() if name not in alike}
    return {**saved, **reseed(apart, rank)}


def routing_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The counters of tokens per expert since their last reset, summed over all ranks.

    Collective over all ranks (one all-reduce) where the model has experts. Syncs the host.
    """
    return sum_over_ranks(routing_counters(model))


def routing_counters(model: nn.Module) -> dict[str, torch.Tensor]:
    """This rank's counters int64 ``[E]`` themselves, by the key they are saved under."""
    return {
        f"{name}.tokens_per_expert": experts.tokens_per_expert
        for state in states_of(model)
        for name, experts in state.experts.items()
    }


def _generators_alike(digest: dict[str, str]) -> list[str]:
    found: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, digest)
    return [name for name in digest if len({other.get(name) for other in found}) == 1]
