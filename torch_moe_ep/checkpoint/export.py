"""Export a model as Hugging Face stores it on the hub."""

import functools
import os
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.parallel import DistributedDataParallel

from torch_moe_ep.checkpoint.folder import on_rank0
from torch_moe_ep.parallel.state import states_of


def export_hf(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write config and weights so that ``AutoModelForCausalLM.from_pretrained(folder)`` works.

    The weights are gathered to rank 0's CPU memory, whole, and written by transformers' own
    `save_pretrained`: safetensors in the hub's layout, tied weights once.

    Args:
        model: a transformers model, patched or not, under FSDP2, FSDP1, DDP or nothing.
        folder: created when missing.

    Raises:
        ValueError: not a transformers model.
        RuntimeError: on every rank, when rank 0 could not write.

    Collective over all ranks (one gather per weight); syncs the host.
    """
    inner: Any = _inner_model(model)
    if not hasattr(inner, "save_pretrained"):
        raise ValueError(
            f"export_hf needs a transformers model, got {type(inner).__name__}; save "
            f"its state dict instead."
        )
    # With CPU offload FSDP1 hands out freed storage for weights that are on the CPU already.
    kinds = {param.device.type for param in model.parameters()}
    kinds |= {state.mesh.device_type for state in states_of(model)}
    is_offloaded = kinds != {"cpu"}
    options = StateDictOptions(full_state_dict=True, cpu_offload=is_offloaded)
    weights = get_model_state_dict(model, options=options)
    on_rank0(functools.partial(_write, inner, weights, Path(folder)))


def _write(inner: Any, weights: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    inner.save_pretrained(folder, state_dict=weights, safe_serialization=True)


def _inner_model(model: nn.Module) -> nn.Module:
    """The model without FSDP1, DDP or compile wrappers."""
    states = states_of(model)
    if states:
        return states[0].model
    if isinstance(model, DistributedDataParallel):
        return model.module  # type: ignore[no-any-return]
    return model
