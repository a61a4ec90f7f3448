"""``distributed.checkpoint``: torch's distributed checkpoint with coordinators by global rank."""

from torch_moe_ep.integrations.smp.distributed.checkpoint.state_dict_loader import load_state_dict
from torch_moe_ep.integrations.smp.distributed.checkpoint.state_dict_saver import save_state_dict

__all__ = ["load_state_dict", "save_state_dict"]
