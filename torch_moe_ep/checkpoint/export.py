"""Export a model as Hugging Face stores it on the hub."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from torch_moe_ep.checkpoint.folder import on_rank0
from torch_moe_ep.checkpoint.hub_writer import (
    MAX_SHARD_BYTES,
    HubConverter,
    HubWriter,
    save_config,
)
from torch_moe_ep.checkpoint.weights import (
    Weight,
    check_is_model,
    each_tensor,
    find_weights,
    inner_model,
)
from torch_moe_ep.integrations.peft import has_adapters
from torch_moe_ep.parallel.agreement import meet


@torch.no_grad()
def export_hf(
    model: nn.Module, folder: str | os.PathLike[str], *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write config and weights so that ``AutoModelForCausalLM.from_pretrained(folder)`` works.

    Names, dtypes and bits are those of transformers' own `save_pretrained` on the unpatched model:
    the hub's layout, tied weights once. Weights are gathered one at a time (under FSDP1 one unit
    at a time) and written file by file: rank 0's CPU memory holds one weight and its converted
    copy, or a layer where transformers joins weights, and one file; other ranks keep nothing.

    Args:
        model: a transformers model, patched or not, under FSDP2, FSDP1, DDP or nothing.
        folder: created when missing; an earlier export in it is replaced. Until the export is
            complete it holds neither model.safetensors nor an index.
        max_shard_bytes: several files and an index when the weights need more than this.

    Raises:
        ValueError: not a transformers model, one with adapters, or max_shard_bytes below 1.
        RuntimeError: on every rank, when rank 0 could not write. A rank did not come within the
            time-out; the message names it.

    Collective over all ranks (one gather and one small broadcast per weight); syncs the host.
    """
    check_is_model(model)
    inner: Any = inner_model(model)
    if not hasattr(inner, "save_pretrained"):
        raise ValueError(
            f"export_hf needs a transformers model, got {type(inner).__name__}; save "
            f"its state dict instead."
        )
    if has_adapters(inner):
        raise ValueError(
            "export_hf writes whole models: save the adapters with model.save_pretrained(folder), "
            "then load them into the unpatched model and merge the adapters there."
        )
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}.")
    meet("export_hf")
    export = HubExport(inner, Path(folder), max_shard_bytes, find_weights(model))
    on_rank0(export.begin)
    for weight, tensor in each_tensor(model, export.weights, writeback=False):
        on_rank0(functools.partial(export.add, weight.names[0], _gathered(tensor)))
    on_rank0(export.end)


class HubExport:
    """What one process does of an export: begin, add every weight, end. Not collective.

    Args:
        inner: the transformers model without wrappers; its weights are not looked at.
        folder: created when missing.
        max_shard_bytes: see `export_hf`.
        weights: of the model.

    Attributes:
        weights: those of them that `add` is to be called with, in any order; transformers leaves
            the others out of its files.
    """

    def __init__(
        self, inner: Any, folder: Path, max_shard_bytes: int, weights: Sequence[Weight]
    ) -> None:
        self.inner = inner
        self.folder = folder
        self.max_shard_bytes = max_shard_bytes
        ignored = getattr(inner, "_keys_to_ignore_on_save", None) or ()
        self.weights = [weight for weight in weights if weight.names[0] not in ignored]

    def begin(self) -> None:
        """Write the config and make way for the weights."""
        self.writer = HubWriter(self.folder, self.max_shard_bytes)
        save_config(self.inner, self.folder)
        blanks = {
            weight.names[0]: torch.empty(weight.shape, dtype=weight.dtype, device="meta")
            for weight in self.weights
        }
        self.converter = HubConverter(self.inner, blanks)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one full weight by its name in the model."""
        for hub_name, part in self.converter.add(name, tensor.cpu()).items():
            self.writer.add(hub_name, part)

    def end(self) -> None:
        """Write what is left and the index."""
        self.writer.close(sum(weight.shape.numel() for weight in self.weights))


def _gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor; collective for DTensors. Offloaded shards visit their mesh's device."""
    if not isinstance(tensor, DTensor):
        return tensor
    device_type = tensor.device_mesh.device_type
    on_mesh: Any = tensor if tensor.device.type == device_type else tensor.to(device_type)
    full: torch.Tensor = on_mesh.full_tensor()
    return full
