"""``init``: the nine keys, where they come from, and what of them cannot be."""

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from torch_moe_ep.integrations.smp import state
from torch_moe_ep.parallel.mesh import init_device_mesh

LAUNCHER_VARIABLE = "SM_HP_MP_PARAMETERS"


@dataclass(frozen=True)
class SmpConfig:
    """SMP's configuration keys and their defaults.

    Attributes:
        hybrid_shard_degree: ranks over which weights are sharded. 0: all (experts: W / P). 1: no
            sharding. n >= 2: experts over n, dense weights over n P, replicated over the rest.
        sm_activation_offloading: kept for scripts that read it from `state`.
        activation_loading_horizon: likewise.
        fsdp_cache_flush_warnings: likewise.
        allow_empty_shards: likewise; empty shards are always allowed.
        tensor_parallel_degree: 1.
        context_parallel_degree: 1.
        expert_parallel_degree: P; divides the ranks and the experts.
        random_seed: of the weights that `DelayedParamIniter` and `transform` draw.
    """

    hybrid_shard_degree: int = 0
    sm_activation_offloading: bool = True
    activation_loading_horizon: int = 2
    fsdp_cache_flush_warnings: bool = True
    allow_empty_shards: bool = False
    tensor_parallel_degree: int = 1
    context_parallel_degree: int = 1
    expert_parallel_degree: int = 1
    random_seed: int = 12345


_config: SmpConfig | None = None
_mesh: tuple[Any, DeviceMesh] | None = None  # (default group, its mesh)


def init(config: Mapping[str, Any] | str | os.PathLike[str] | None = None) -> None:
    """Read the configuration and set `state`.

    Args:
        config: a dict of `SmpConfig`'s keys, the path of a JSON file with them, or None. Keys in
            the environment variable ``SM_HP_MP_PARAMETERS`` (JSON) win over both.

    Raises:
        ValueError: an unknown key, a wrong type, a degree that does not divide or is not
            implemented, or other values than those of an earlier call.

    Before or after `init_process_group`: without a process group the launcher's ``WORLD_SIZE``
    and ``RANK`` are taken. Not collective. Again with the same values: nothing happens.
    """
    global _config
    wanted = _parse({**_read(config), **_launcher_values()})
    world_size, rank = _world()
    _check_degrees(wanted, world_size)
    if _config is not None and _config != wanted:
        changed = {k: v for k, v in asdict(wanted).items() if v != asdict(_config)[k]}
        raise ValueError(
            f"init was called before with other values ({changed} differ now); call it once, or "
            f"with the same values."
        )
    _config = wanted
    for field in fields(wanted):
        setattr(state, field.name, getattr(wanted, field.name))
    ep_size = wanted.expert_parallel_degree
    state.ep_size, state.ep_rank = ep_size, rank % ep_size
    state.ranker = state.Ranker(world_size, shard_degree(wanted, world_size) * ep_size)


def is_initialized() -> bool:
    """Whether `init` was called."""
    return _config is not None


def current() -> SmpConfig:
    """The configuration of `init`; raises RuntimeError before it."""
    if _config is None:
        raise RuntimeError("torch_moe_ep.integrations.smp is not initialised; call init() first.")
    return _config


def mesh() -> DeviceMesh:
    """The ``("replicate", "shard", "ep")`` mesh of the configuration.

    Collective at its first call: creates process groups.
    """
    global _mesh
    config = current()
    if not dist.is_initialized():
        raise RuntimeError("call torch.distributed.init_process_group() before transform.")
    world = dist.group.WORLD
    if _mesh is None or _mesh[0] is not world:
        _check_degrees(config, dist.get_world_size())
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
        made = init_device_mesh(
            device_type, config.expert_parallel_degree, config.hybrid_shard_degree
        )
        _mesh = (world, made)
    return _mesh[1]


def shard_degree(config: SmpConfig, world_size: int) -> int:
    """S: ranks over which each rank's experts are sharded."""
    return config.hybrid_shard_degree or world_size // config.expert_parallel_degree


def _read(config: Mapping[str, Any] | str | os.PathLike[str] | None) -> dict[str, Any]:
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return dict(config)
    if not isinstance(config, (str, os.PathLike)):
        raise ValueError(
            f"config must be a dict, the path of a JSON file or None, got {type(config).__name__}."
        )
    try:
        with open(config, encoding="utf-8") as file:
            return _mapping(json.load(file), os.fspath(config))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"config {os.fspath(config)} cannot be read as JSON: {error}") from error


def _launcher_values() -> dict[str, Any]:
    text = os.environ.get(LAUNCHER_VARIABLE, "").strip()
    if not text:
        return {}
    try:
        return _mapping(json.loads(text), LAUNCHER_VARIABLE)
    except json.JSONDecodeError as error:
        raise ValueError(f"{LAUNCHER_VARIABLE} is not JSON: {error}") from error


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold a JSON object, got {type(value).__name__}.")
    return value


def _parse(values: dict[str, Any]) -> SmpConfig:
    types = {field.name: type(field.default) for field in fields(SmpConfig)}
    for key, value in values.items():
        if key not in types:
            near = difflib.get_close_matches(str(key), types, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown key {key!r}; the nearest valid key is {near!r}.")
        if type(value) is not types[key]:
            default = SmpConfig.__dataclass_fields__[key].default
            raise ValueError(
                f"{key} must be {types[key].__name__}, got {value!r} "
                f"({type(value).__name__}); the default is {default!r}."
            )
    return SmpConfig(**values)


def _check_degrees(config: SmpConfig, world_size: int) -> None:
    for name in ("tensor_parallel_degree", "context_parallel_degree"):
        if getattr(config, name) != 1:
            raise ValueError(
                f"{name}={getattr(config, name)} is not implemented; the nearest valid choice is 1."
            )
    ep_size = config.expert_parallel_degree
    divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
    if ep_size not in divisors:
        raise ValueError(
            f"expert_parallel_degree must divide the number of ranks {world_size}, got {ep_size}; "
            f"the nearest valid choice is {_nearest(ep_size, divisors)}."
        )
    shards = [d for d in divisors if (world_size // ep_size) % d == 0]
    degree = config.hybrid_shard_degree
    if degree != 0 and degree not in shards:
        raise ValueError(
            f"hybrid_shard_degree must be 0 or divide {world_size} ranks / "
            f"expert_parallel_degree {ep_size} = {world_size // ep_size}, got {degree}; the "
            f"nearest valid choice is {_nearest(degree, shards)}."
        )


def _nearest(value: int, choices: list[int]) -> int:
    return min(choices, key=lambda choice: (abs(choice - value), choice))


def _world() -> tuple[int, int]:
    if dist.is_initialized():
        return dist.get_world_size(), dist.get_rank()
    return int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
