"""The names of SMP v2 (``torch.sagemaker``) over torch_moe_ep: change the import, not the script.

    import torch_moe_ep.integrations.smp as tsm

Sub-modules have the same tails: ``tsm.state``, ``tsm.delayed_param``, ``tsm.grad_norm``,
``tsm.moe.moe_config``, ``tsm.distributed.checkpoint.state_dict_saver`` and so on.
``docs/coming-from-smp-v2.md`` lists every difference.
"""

from torch_moe_ep.integrations.smp import grad_norm, logger, state
from torch_moe_ep.integrations.smp.config import init, is_initialized
from torch_moe_ep.integrations.smp.fsdp import FullyShardedDataParallel
from torch_moe_ep.integrations.smp.moe.moe_config import MoEConfig
from torch_moe_ep.integrations.smp.transform import transform

__all__ = [
    "FullyShardedDataParallel",
    "MoEConfig",
    "grad_norm",
    "init",
    "is_initialized",
    "logger",
    "state",
    "transform",
]
