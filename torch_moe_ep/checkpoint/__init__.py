"""Checkpoints: sharded saves that resume training, and folders in Hugging Face's layout.

A checkpoint is a folder of torch.distributed.checkpoint (one file per rank, weights under their
global shapes), ``scheduler.pt`` where a scheduler was given, and ``complete.json``, written last:
a folder without it was interrupted and is never loaded.

File by file::

save.py, load.py, folder.py   checkpoints; what rank 0 does for all, errors that all ranks raise
hub_load.py                   load_hf: check, agree, then fill each rank's part
hub_names.py                  which tensors of a folder make up which weight
hub_files.py                  safetensors headers, and the one place that reads weights
export.py, hub_writer.py      export_hf: gather one weight at a time, write file by file
weights.py                    a wrapped model's weights one by one, whatever shards them
"""

from torch_moe_ep.checkpoint.export import export_hf
from torch_moe_ep.checkpoint.hub_load import load_hf
from torch_moe_ep.checkpoint.load import latest_checkpoint, load_checkpoint
from torch_moe_ep.checkpoint.save import save_checkpoint

__all__ = ["export_hf", "latest_checkpoint", "load_checkpoint", "load_hf", "save_checkpoint"]
