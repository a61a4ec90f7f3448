"""Checkpoints: sharded saves that resume training, and export to Hugging Face's layout.

A checkpoint is a folder of torch.distributed.checkpoint (one file per rank, weights under their
global shapes), ``scheduler.pt`` where a scheduler was given, and ``complete.json``, written last:
a folder without it was interrupted and is never loaded.
"""

from torch_moe_ep.checkpoint.export import export_hf
from torch_moe_ep.checkpoint.hub_load import load_hf
from torch_moe_ep.checkpoint.load import latest_checkpoint, load_checkpoint
from torch_moe_ep.checkpoint.save import save_checkpoint

__all__ = ["export_hf", "latest_checkpoint", "load_checkpoint", "load_hf", "save_checkpoint"]
