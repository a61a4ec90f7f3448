"""PEFT models: what is inside of them, and LoRA on fused experts in PEFT's layout.

PEFT (0.18 and newer) targets a fused weight by wrapping its module in a `ParamWrapper`; two
targeted weights nest two wrappers::

    mlp.experts               ParamWrapper of down_proj
      .lora_A.default.weight  [E * r, I]
      .lora_B.default.weight  [H, r * E]     the expert's index is innermost
      .base_layer             ParamWrapper of gate_up_proj
        .base_layer           the experts

PEFT itself is looked up only when it is already imported.
"""

import sys
from typing import Any

import torch
from torch import nn


def base_model(model: nn.Module) -> nn.Module:
    """The model inside of a PeftModel; any other model as it is. Not collective."""
    while is_peft_model(model):
        inner: nn.Module = model.get_base_model()  # type: ignore[operator]
        if inner is model:
            break
        model = inner
    return model


def is_peft_model(model: nn.Module) -> bool:
    """Whether a model is what `get_peft_model` returns. Not collective."""
    peft: Any = sys.modules.get("peft")
    return peft is not None and isinstance(model, (peft.PeftModel, peft.PeftMixedModel))


def is_peft_module(module: nn.Module) -> bool:
    """Whether a module is of PEFT's own, such as a tuner or an adapter. Not collective."""
    return any(known.__module__.split(".")[0] == "peft" for known in type(module).__mro__)


def has_adapters(model: nn.Module) -> bool:
    """Whether a model holds adapters of PEFT. Not collective."""
    return any(is_peft_module(module) for module in model.modules())


def is_adapter_name(name: str) -> bool:
    """Whether a parameter's name is one that PEFT adds to the base model's."""
    return ".lora_" in name


def base_name(name: str) -> str:
    """A parameter's name in the model without adapters."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def wrappers_of(model: nn.Module, name: str) -> list[nn.Module]:
    """The ParamWrappers around the experts at `name`, outermost first. Not collective."""
    found: list[nn.Module] = []
    module: Any = model.get_submodule(name)
    while _is_param_wrapper(module):
        found.append(module)
        module = module.base_layer
    return found


def foreign_adapter(model: nn.Module) -> str | None:
    """Name an adapter on experts that is not LoRA on a fused weight, or None. Not collective."""
    for name, module in model.named_modules():
        if "parametrizations" in module._modules and hasattr(module, "gate_up_proj"):
            return str(name)
        if not is_peft_module(module) or _is_param_wrapper(module):
            continue
        if hasattr(getattr(module, "base_layer", None), "gate_up_proj"):
            return str(name)
    return None


def dense_wrapper(model: nn.Module) -> str | None:
    """Name a ParamWrapper whose weight is not one of fused experts, or None. Not collective."""
    for name, module in model.named_modules():
        if _is_param_wrapper(module) and getattr(module, "num_experts", 1) == 1:
            return str(name)
    return None


def adapter_misfit(given: nn.Module, experts: dict[str, nn.Module]) -> str | None:
    """Why the adapters on a model's experts cannot be sharded, one sentence, or None.

    Args:
        given: the model of `apply_expert_parallel`.
        experts: of `find_experts` on its base model.

    Not collective.
    """
    model = base_model(given)
    for name in experts:
        wrappers: list[Any] = wrappers_of(model, name)
        if wrappers and not is_peft_model(given):
            return (
                f"{name} has LoRA adapters; pass the PeftModel that get_peft_model returned, so "
                f"that its save_pretrained can write them in PEFT's layout."
            )
        if any(wrapper.merged for wrapper in wrappers):
            return f"{name} has merged adapters; call unmerge_adapter() first."
        trained = {
            str(layer.weight.dtype)
            for wrapper in wrappers
            for layer in adapter_layers(wrapper)
            if layer.weight.requires_grad
        }
        if len(trained) > 1:
            return (
                f"trainable adapters of {name} must have one dtype, got {sorted(trained)}; cast "
                f"them alike."
            )
    return None


def adapter_settings(model: nn.Module, experts: dict[str, nn.Module]) -> dict[str, str]:
    """What ranks must have in common about adapters on experts, by names that users know."""
    settings: dict[str, str] = {}
    for name in experts:
        wrappers: list[Any] = wrappers_of(model, name)
        for wrapper in wrappers:
            factors = [(key, wrapper.r[key], wrapper.scaling[key]) for key in wrapper.lora_A]
            settings[f"the LoRA of {name}.{wrapper.parameter_name}"] = str(factors)
    return settings


def adapter_layers(wrapper: Any) -> list[Any]:
    """The linear layers that hold a wrapper's factors: for each adapter A, then B."""
    return [layer for key in wrapper.lora_A for layer in (wrapper.lora_A[key], wrapper.lora_B[key])]


def is_factor_b(wrapper: Any, layer: nn.Module) -> bool:
    """Whether a layer holds a B factor."""
    return any(layer is factor for factor in wrapper.lora_B.values())


def to_expert_major(weight: torch.Tensor, num_experts: int, is_b: bool) -> torch.Tensor:
    """A factor in PEFT's layout, A ``[E * r, in]`` or B ``[out, r * E]``, with E first (a view).

    E = 8, r = 4 and B ``[64, 32]`` give ``[8, 64, 4]``.
    """
    if not is_b:
        return weight.reshape(num_experts, -1, weight.shape[-1])
    return weight.reshape(weight.shape[0], -1, num_experts).permute(2, 0, 1)


def to_peft_layout(weight: torch.Tensor, is_b: bool) -> torch.Tensor:
    """The inverse of `to_expert_major`, contiguous."""
    if not is_b:
        return weight.reshape(-1, weight.shape[-1]).contiguous()
    return weight.permute(1, 2, 0).reshape(weight.shape[1], -1).contiguous()


def _is_param_wrapper(module: object) -> bool:
    layer: Any = sys.modules.get("peft.tuners.lora.layer")
    return layer is not None and isinstance(module, getattr(layer, "ParamWrapper", ()))
