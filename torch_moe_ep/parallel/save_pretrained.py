"""`model.save_pretrained` of a patched model: whole tensors, or an error, never one rank's experts.

Given no state dict, it gathers, on all ranks. Given one, as Trainer and accelerate pass it, the
tensors must be whole already.
"""

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from torch_moe_ep.integrations import peft
from torch_moe_ep.parallel.adapters import ExpertParallelAdapter
from torch_moe_ep.parallel.agreement import meet

TOPIC = "save_pretrained (of an expert-parallel model: call it on all ranks)"
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def gather_on_save(model: nn.Module) -> None:
    """Wrap a transformers model's `save_pretrained`; without a state dict it is collective."""
    save: Any = getattr(model, "save_pretrained", None)
    if save is None:
        return

    def run(save_directory: str, *args: Any, **kwargs: Any) -> Any:
        state_dict = kwargs.get("state_dict")
        if state_dict is not None or len(args) > 1:
            _refuse_shards(state_dict or {})
            return save(save_directory, *args, **kwargs)
        from torch_moe_ep.checkpoint import export_hf

        meet(TOPIC)
        size = kwargs.get("max_shard_size")
        options = {} if size is None else {"max_shard_bytes": _bytes(size)}
        return export_hf(model, save_directory, **options)

    model.__dict__["save_pretrained"] = run


def gather_adapters_on_save(model: nn.Module) -> None:
    """Wrap a PeftModel's `save_pretrained`: it writes the adapters in PEFT's layout.

    Without a state dict it is collective; rank 0 writes unless `is_main_process` says who does.
    """
    save: Any = model.save_pretrained

    def run(save_directory: str, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.pop("state_dict", None)
        if given is None:
            meet(TOPIC)
            given = model.state_dict()
        kwargs.setdefault("is_main_process", dist.get_rank() == 0)
        return save(save_directory, *args, state_dict=_whole_adapters(model, given), **kwargs)

    model.__dict__["save_pretrained"] = run


def _refuse_shards(state_dict: dict[str, Any]) -> None:
    name = next((key for key, value in state_dict.items() if isinstance(value, DTensor)), None)
    if name is not None:
        raise ValueError(
            f"save_pretrained got this rank's shard of {name}; leave state_dict out and call it on "
            f"all ranks (or torch_moe_ep.export_hf), or pass a full state dict."
        )


def _bytes(size: int | str) -> int:
    """A size such as 5000000 or "5GB"."""
    if isinstance(size, int):
        return size
    number, unit = size[:-2].strip(), size[-2:].upper()
    if unit not in UNITS or not number.isdecimal():
        raise ValueError(f'max_shard_size must be bytes or a text such as "5GB", got {size!r}.')
    return int(number) * UNITS[unit]


def _whole_adapters(model: nn.Module, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict with every adapter's tensor whole and in PEFT's layout.

    Collective where they are sharded.
    """
    factors: dict[str, bool] = {}
    for name, module in model.named_modules():
        if isinstance(module, ExpertParallelAdapter):
            for kind in ("lora_A", "lora_B"):
                for key in getattr(module, kind):
                    factors[f"{name}.{kind}.{key}.weight"] = kind == "lora_B"
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    whole: dict[str, Any] = {}
    for key, value in state_dict.items():
        if isinstance(value, DTensor) and (peft.is_adapter_name(key) or key in trained):
            value = value.full_tensor().cpu()  # noqa: PLW2901
        is_expert_major = key in factors and value.dim() == 3
        whole[key] = peft.to_peft_layout(value, factors[key]) if is_expert_major else value
    return whole
