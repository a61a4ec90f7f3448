"""``optimizer.load_sharded_optimizer_state_dict``."""

from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import StorageReader
from torch.distributed.checkpoint.optimizer import load_sharded_optimizer_state_dict as _load

from torch_moe_ep.integrations.smp.not_supported import NotSupportedError


def load_sharded_optimizer_state_dict(
    model_state_dict: dict[str, Any],
    optimizer_key: str,
    storage_reader: StorageReader,
    planner: Any = None,
    process_group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Torch's function of this name, for dense models; experts' state is loaded by `load`.

    Raises:
        NotSupportedError: a group of fewer than all ranks; a checkpoint of torch_moe_ep is one
            folder for all ranks, so `torch_moe_ep.load_checkpoint` is the way.
    """
    if process_group is not None and process_group.size() != dist.get_world_size():
        raise NotSupportedError(
            "load_sharded_optimizer_state_dict(process_group=)",
            "call torch_moe_ep.load_checkpoint, or load optimizer state with "
            "distributed.checkpoint.state_dict_loader.load.",
        )
    result: dict[str, Any] = _load(model_state_dict, optimizer_key, storage_reader, planner)
    return result
