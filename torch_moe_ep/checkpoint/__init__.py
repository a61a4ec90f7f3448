"""Checkpoints: sharded saves that resume training, and folders in Hugging Face's layout.

A checkpoint is a folder of torch.distributed.checkpoint (one file per rank, weights under their
global shapes), with everything else inside as byte tensors, and ``complete.json``, written last:
a folder without it was interrupted and is never loaded. docs/checkpoints.md is for users.

File by file::

save.py, load.py              checkpoints, at once or in the background
rank_state.py, rng.py         what a rank saves: shards, scheduler, generators, data, counters
folder.py                     names, markers, renames; what rank 0 does, errors that all ranks raise
__main__.py, stored.py        the command line; a checkpoint as its files: info, verify
reshard.py, offline_export.py other grids and the hub's layout, from files to files
hub_load.py                   load_hf: check, agree, then fill each rank's part
hub_names.py                  which tensors of a folder make up which weight
hub_files.py                  safetensors headers, and the one place that reads weights
export.py, hub_writer.py      export_hf: gather one weight at a time, write file by file
quiet.py                      without torch's warnings about its own ShardedTensor
weights.py                    a wrapped model's weights one by one, whatever shards them
"""

from torch_moe_ep.checkpoint.export import export_hf
from torch_moe_ep.checkpoint.hub_load import load_hf
from torch_moe_ep.checkpoint.load import latest_checkpoint, load_checkpoint, load_data_state
from torch_moe_ep.checkpoint.save import save_checkpoint, wait_for_checkpoint

__all__ = [
    "export_hf",
    "latest_checkpoint",
    "load_checkpoint",
    "load_data_state",
    "load_hf",
    "save_checkpoint",
    "wait_for_checkpoint",
]
