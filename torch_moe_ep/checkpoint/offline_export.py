"""Export a checkpoint to Hugging Face's layout without process group, ranks or GPU."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torch_moe_ep.checkpoint.export import HubExport
from torch_moe_ep.checkpoint.folder import HUB_FOLDER
from torch_moe_ep.checkpoint.hub_writer import MAX_SHARD_BYTES
from torch_moe_ep.checkpoint.stored import Progress, StoredCheckpoint
from torch_moe_ep.checkpoint.weights import find_weights
from torch_moe_ep.integrations.peft import is_adapter_name
from torch_moe_ep.integrations.transformers import find_experts
from torch_moe_ep.integrations.transformers4 import FusedExperts, fuse_block

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


@torch.no_grad()
def export_stored(
    stored: StoredCheckpoint,
    folder: Path,
    progress: Progress,
    *,
    config: Path | None = None,
    tokenizer: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write what `export_hf` of the trained model would have written.

    Memory: one weight and its converted copy (a layer where transformers joins weights), and one
    file of the export.

    Args:
        stored: the checkpoint.
        folder: created when missing; an earlier export in it is replaced.
        progress: called with the bytes of each weight that was written.
        config: a folder with ``config.json``; None takes what the checkpoint holds.
        tokenizer: a folder whose tokenizer files are copied; None copies none.
        max_shard_bytes: several files and an index when the weights need more than this.

    Raises:
        ValueError: no config, one of another model, no tokenizer where one was named, or adapters.
        ImportError: transformers is not installed.
    """
    if any(is_adapter_name(name) for name in stored.tensors):
        raise ValueError(
            f"{stored.folder} holds a model with adapters: load it with load_checkpoint, save the "
            f"adapters with model.save_pretrained, and merge them in the unpatched model."
        )
    tokenizer_files = _tokenizer_files(tokenizer)
    model = _blank_model(stored, stored.folder / HUB_FOLDER if config is None else config)
    weights = find_weights(model)
    keys = {weight.names[0]: _key_of(weight.names, stored) for weight in weights}
    for weight in weights:
        entry = stored.tensors[keys[weight.names[0]]]
        if entry.size != weight.shape:
            raise ValueError(
                f"{weight.names[0]} is {tuple(entry.size)} in {stored.folder}, and "
                f"{tuple(weight.shape)} by its config; pass the config of this model."
            )
        weight.dtype = entry.properties.dtype
    export = HubExport(model, folder, max_shard_bytes, weights)
    export.begin()
    for weight in export.weights:
        tensor = stored.read(keys[weight.names[0]])
        export.add(weight.names[0], tensor)
        progress(tensor.nbytes)
    export.end()
    for path in tokenizer_files:
        shutil.copyfile(path, folder / path.name)


def _blank_model(stored: StoredCheckpoint, config: Path) -> nn.Module:
    """The model on the meta device, in the dtype of the stored weights."""
    import transformers

    if not (config / "config.json").is_file():
        raise ValueError(
            f"{config} holds no config.json; pass --config with a folder of the hub's layout."
        )
    settings = transformers.AutoConfig.from_pretrained(config)
    names = json.loads((config / "config.json").read_text()).get("architectures") or []
    kind: Any = getattr(transformers, names[0], None) if names else None
    if kind is None:
        raise ValueError(
            f"{config}/config.json names the architectures {names}, which transformers "
            f"{transformers.__version__} does not have; pass --config with a folder that names one."
        )
    with torch.device("meta"):
        model: Any = kind(settings)
        for name, module in find_experts(model)[0].items():
            if isinstance(module, FusedExperts):  # transformers 4.57, as apply has changed it
                fuse_block(model, name)
    generation = config / "generation_config.json"
    if generation.is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(config)
    first = next((dtype for dtype in _dtypes(model, stored)), None)
    if first is not None:
        model.to(first)
    return model  # type: ignore[no-any-return]


def _dtypes(model: nn.Module, stored: StoredCheckpoint) -> Iterator[torch.dtype]:
    for name, _ in model.named_parameters():
        if f"model.{name}" in stored.tensors:
            yield stored.tensors[f"model.{name}"].properties.dtype


def _key_of(names: list[str], stored: StoredCheckpoint) -> str:
    for name in names:
        if f"model.{name}" in stored.tensors:
            return f"model.{name}"
    raise ValueError(
        f"{stored.folder} holds nothing for {names[0]}; pass --config with the config of the model "
        f"that was trained."
    )


def _tokenizer_files(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not found:
        raise ValueError(f"{folder} holds no tokenizer files; leave --tokenizer out or correct it.")
    return found
