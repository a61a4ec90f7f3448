"""Write a Hugging Face folder as a stream of tensors, one safetensors file in memory at a time.

Files carry ``.partial`` in their names until the last tensor is in, and the index comes last of
all: a folder without model.safetensors and without an index was interrupted, and neither
transformers nor `load_hf` takes it for a model.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from torch_moe_ep.checkpoint.hub_files import INDEX, SINGLE
from torch_moe_ep.integrations.transformers4 import fused_names, hub_parts

MAX_SHARD_BYTES = 5 * 1024**3  # of a file, where nobody says otherwise
_OLD_FILES = re.compile(r"model(-\d{5}(-of-\d{5})?)?\.safetensors(\.index\.json)?(\.partial)?")
_LAYER = re.compile(r"^(.*?\.\d+)\.")

Tensors = dict[str, torch.Tensor]


def save_config(model: Any, folder: Path) -> None:
    """Write config, generation config and custom code of a transformers model, without weights.

    transformers counts the files of weights on a progress bar, of which there are none ("0it").
    """
    logging: Any = sys.modules.get("transformers.utils.logging")
    has_bar = logging is not None and logging.is_progress_bar_enabled()
    if has_bar:
        logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, state_dict={})
    finally:
        if has_bar:
            logging.enable_progress_bar()


class HubWriter:
    """Takes tensors one by one, under their hub names, and writes each file when it is full.

    Args:
        folder: created when missing; weights of an earlier export in it are removed.
        max_shard_bytes: no file holds more tensor bytes, except for one tensor that is larger.

    Not collective.
    """

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        self.folder = folder
        self.max_shard_bytes = max_shard_bytes
        self._open: Tensors = {}
        self._open_bytes = 0
        self._written: list[list[str]] = []  # the names in each file
        self._total_bytes = 0
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INDEX).unlink(missing_ok=True)  # first: it must not name files of two exports
        for path in folder.iterdir():
            if _OLD_FILES.fullmatch(path.name):
                path.unlink()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one CPU tensor (copied, so that a view does not keep what it is a part of)."""
        num_bytes = tensor.numel() * tensor.element_size()
        if self._open and self._open_bytes + num_bytes > self.max_shard_bytes:
            self._write()
        self._open[name] = tensor.clone(memory_format=torch.contiguous_format)
        self._open_bytes += num_bytes
        self._total_bytes += num_bytes

    def close(self, num_parameters: int) -> None:
        """Write the last file, give all their names, and then the index if there are several."""
        if self._open:
            self._write()
        num_files = len(self._written)
        weight_map: dict[str, str] = {}
        for place, names in enumerate(self._written):
            file = f"model-{place + 1:05d}-of-{num_files:05d}.safetensors"
            file = SINGLE if num_files == 1 else file
            self._partial(place).replace(self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        if num_files == 1:
            return
        metadata = {"total_parameters": num_parameters, "total_size": self._total_bytes}
        index = {"metadata": metadata, "weight_map": weight_map}
        partial = self.folder / f"{INDEX}.partial"
        partial.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        partial.replace(self.folder / INDEX)

    def _write(self) -> None:
        save_file(self._open, self._partial(len(self._written)), metadata={"format": "pt"})
        self._written.append(list(self._open))
        self._open, self._open_bytes = {}, 0

    def _partial(self, place: int) -> Path:
        return self.folder / f"model-{place + 1:05d}.safetensors.partial"


class HubConverter:
    """Turns the model's weights into the tensors of the hub, as few weights at a time as can be.

    transformers reverts its conversions on a whole state dict. Tried on meta tensors first: one
    weight at a time if that gives the same names, shapes and dtypes as the whole, else a layer at
    a time, else everything at once.

    Args:
        inner: the transformers model without wrappers.
        blanks: every weight to be written, as a meta tensor of its full shape.

    Not collective.
    """

    def __init__(self, inner: nn.Module, blanks: Tensors) -> None:
        self._inner = inner
        self._fused = fused_names(inner)
        self._group_of = self._grouping(blanks)
        self._waiting: dict[str, Tensors] = {}
        self._num_missing: dict[str, int] = {}
        for name in blanks:
            group = self._group_of(name)
            self._num_missing[group] = self._num_missing.get(group, 0) + 1

    def add(self, name: str, tensor: torch.Tensor) -> Tensors:
        """Take one full weight; returns the hub's tensors that are complete with it.

        The result may be views of `tensor`. A weight that waits for others is copied: FSDP1 frees
        its memory.
        """
        group = self._group_of(name)
        self._num_missing[group] -= 1
        waiting = self._waiting.setdefault(group, {})
        if self._num_missing[group] > 0:
            waiting[name] = tensor.clone()
            return {}
        del self._waiting[group]
        return self._revert({**waiting, name: tensor})

    def _revert(self, weights: Tensors) -> Tensors:
        if self._fused:
            parts: Tensors = {}
            for name, tensor in weights.items():
                parts.update(hub_parts(name, tensor, self._fused))
            return parts
        from transformers.core_model_loading import revert_weight_conversion

        reverted: Tensors = revert_weight_conversion(self._inner, weights)
        return reverted

    def _grouping(self, blanks: Tensors) -> Callable[[str], str]:
        wanted = _described(self._revert(dict(blanks)))
        for group_of in (_name_of, _layer_of):
            groups: dict[str, Tensors] = {}
            for name, blank in blanks.items():
                groups.setdefault(group_of(name), {})[name] = blank
            found: dict[str, Any] = {}
            try:
                for group in groups.values():
                    found.update(_described(self._revert(group)))
            except Exception:  # a conversion that lacks the other weights it joins may raise any
                continue
            if found == wanted:
                return group_of
        return lambda _name: ""


def _described(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def _name_of(name: str) -> str:
    return name


def _layer_of(name: str) -> str:
    """``model.layers.3`` of ``model.layers.3.mlp.gate.weight``; the name outside of a layer."""
    match = _LAYER.match(name)
    return name if match is None else match.group(1)
