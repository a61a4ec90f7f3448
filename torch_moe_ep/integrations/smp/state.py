"""``state``: degrees, ranks and groups, set by `init`.

Every value is a module variable that a script may also write, for example to turn the library
off before `init`. `ep_process_group` creates process groups at its first use, on all ranks.
"""

from typing import Any

import torch.distributed as dist

from torch_moe_ep.integrations.smp.not_supported import NotSupportedError

hybrid_shard_degree = 0
sm_activation_offloading = True
activation_loading_horizon = 2
fsdp_cache_flush_warnings = True
allow_empty_shards = False
tensor_parallel_degree = 1
context_parallel_degree = 1
expert_parallel_degree = 1
random_seed = 12345

ep_size = 1
ep_rank = 0
tp_size = 1
tp_rank = 0
cp_size = 1
cp_rank = 0


class Ranker:
    """Which ranks hold copies of the same shards, for W ranks of which `group_size` shard.

    Rank r belongs to replica r // group_size. For W = 8 and S P = 4: replicas 0 1 2 3 and
    4 5 6 7, and the ranks 0 and 4 hold the same.
    """

    def __init__(self, world_size: int, group_size: int) -> None:
        self.world_size = world_size
        self.group_size = group_size

    def get_rep_rank(self, global_rank: int) -> int:
        """The number of the replica that a rank belongs to; 0 writes checkpoints."""
        return global_rank // self.group_size

    def get_rep_groups(self) -> list[list[int]]:
        """For each shard, the global ranks that hold it."""
        return [
            list(range(first, self.world_size, self.group_size)) for first in range(self.group_size)
        ]


ranker = Ranker(1, 1)

_NOT_SUPPORTED = {
    "world_process_group": "use torch.distributed.group.WORLD.",
    "tp_process_group": "tensor parallelism is not implemented.",
    "cp_process_group": "context parallelism is not implemented.",
    "get_rng_state_tracker": "it serves tensor parallelism, which is not implemented.",
}


def __getattr__(name: str) -> Any:
    """`ep_process_group`; SMP's other names say that they are not supported."""
    if name == "ep_process_group":
        from torch_moe_ep.integrations.smp.config import mesh

        group: dist.ProcessGroup = mesh()["ep"].get_group()
        return group
    if name in _NOT_SUPPORTED:
        raise NotSupportedError(f"state.{name}", _NOT_SUPPORTED[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
