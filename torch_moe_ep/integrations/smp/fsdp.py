"""``FullyShardedDataParallel`` with what SMP patched into torch's."""

import inspect
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as TorchFSDP
from torch.distributed.fsdp import ShardingStrategy

from torch_moe_ep.integrations.smp import config as smp_config
from torch_moe_ep.parallel.mesh import dense_mesh

_parameters = inspect.signature(TorchFSDP.__init__).parameters


class FullyShardedDataParallel(TorchFSDP):
    """torch's FSDP1 with groups chosen from `hybrid_shard_degree`, and `post_param_init_fn`.

    Args:
        module: the model that `transform` returned.
        args: torch's arguments.
        post_param_init_fn: called with the wrapped module at the end.
        kwargs: torch's arguments. Process group and mesh of the script's own win. Else: degree 0
            leaves everything to the script, 1 takes NO_SHARD, n >= 2 HYBRID_SHARD over n P ranks
            whatever the script asked for (``_HYBRID_SHARD_ZERO2`` is kept), FULL_SHARD where that
            is all ranks.

    Collective over all ranks: creates process groups.
    """

    def __init__(
        self,
        module: nn.Module,
        *args: Any,
        post_param_init_fn: Callable[[nn.Module], None] | None = None,
        **kwargs: Any,
    ) -> None:
        names = list(_parameters)[2:]
        kwargs.update(zip(names, args, strict=False))
        super().__init__(module, **_with_groups(kwargs))
        if post_param_init_fn is not None:
            post_param_init_fn(self)


def _with_groups(kwargs: dict[str, Any]) -> dict[str, Any]:
    has_group = kwargs.get("process_group") is not None or kwargs.get("device_mesh") is not None
    degree = smp_config.current().hybrid_shard_degree if smp_config.is_initialized() else 0
    if has_group or degree == 0:
        return kwargs
    if degree == 1:
        return {**kwargs, "sharding_strategy": ShardingStrategy.NO_SHARD}
    shard_degree = degree * smp_config.current().expert_parallel_degree
    if shard_degree == dist.get_world_size():
        return {**kwargs, "sharding_strategy": ShardingStrategy.FULL_SHARD}
    strategy = kwargs.get("sharding_strategy")
    if strategy is not ShardingStrategy._HYBRID_SHARD_ZERO2:
        strategy = ShardingStrategy.HYBRID_SHARD
    mesh = dense_mesh(smp_config.mesh(), shard_degree)
    return {**kwargs, "sharding_strategy": strategy, "device_mesh": mesh}
