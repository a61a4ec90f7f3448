"""Which modules of a Hugging Face model are Mixtral-shaped experts (transformers 5.6 to 5.23).

transformers 4.57 has its own file, transformers4.py.

transformers 5 stores the experts of a layer fused in one module, ``gate_up_proj [E, 2I, H]``
(gate rows first) and ``down_proj [E, H, I]``, and describes the module by attributes. The match
goes by these, never by the model's name, and a module that has the two weights but differs in
anything else is a misfit with a reason: it is refused by name, never swapped in silence.
transformers itself is looked up only when it is already imported.

Attributes by version: ``has_gate``, ``has_bias``, ``is_transposed`` since 5.6; ``is_concatenated``
later (absent means concatenated); ``has_post_expert_norm`` and ``_is_expert_parallel`` last
(absent means no).
"""

import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from torch_moe_ep.integrations.transformers4 import find_blocks

# Classes of Mixtral's shape whose block does not call them in every forward.
_CONDITIONAL = {
    "Ernie4_5_VLMoeMoeExperts": "batches without images skip its vision experts, so ranks with "
    "and without images would wait for each other",
}


def find_experts(model: nn.Module) -> tuple[dict[str, nn.Module], list[str]]:
    """Find the experts modules of a model.

    Args:
        model: any module.

    Returns:
        Name to module of those that fit, in module order (the name is that of PEFT's outermost
        wrapper where there is one), and one sentence for each module that
        looks like experts (it owns ``gate_up_proj`` and ``down_proj``) but does not fit.

    Not collective. Runs the activation once on nine CPU numbers.
    """
    fits: dict[str, nn.Module] = {}
    misfits: list[str] = []
    for name, module in model.named_modules():
        if not _is_fused(module):
            continue
        while name.endswith(".base_layer"):  # inside of PEFT's wrappers, which take its place
            name = name.removesuffix(".base_layer")  # noqa: PLW2901
        reason = misfit_of(module)
        if reason is None:
            fits[name] = module
        else:
            misfits.append(f"{name} ({type(module).__name__}): {reason}")
    if not fits and not misfits and _version() < (5, 0):
        return find_blocks(model)
    return fits, misfits


def _version() -> tuple[int, int]:
    """Of the transformers that is imported; (5, 0) where none is."""
    version = getattr(sys.modules.get("transformers"), "__version__", "5.0")
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def name_foreign_experts(model: nn.Module) -> str | None:
    """Name the first module that is experts of another shape, by its class, or None.

    Not collective.
    """
    for name, module in model.named_modules():
        if re.search(r"Experts?$|Experts?GLU$|SparseMLP$", type(module).__name__):
            return f"{name} ({type(module).__name__})"
    return None


def find_routers(
    model: nn.Module, experts: dict[str, nn.Module]
) -> tuple[dict[str, nn.Module], list[str]]:
    """Find the routers whose rule can be replaced: linear, without bias, beside their experts.

    Args:
        model: any module.
        experts: of `find_experts`.

    Returns:
        Name of the router to module, in the order of `experts`, and one sentence for each experts
        module without such a router.

    Not collective.
    """
    fits: dict[str, nn.Module] = {}
    misfits: list[str] = []
    for name, module in experts.items():
        down = module._parameters["down_proj"]
        assert down is not None
        parent_name = name.rpartition(".")[0]
        found = {
            f"{parent_name}.{key}" if parent_name else key: child
            for key, child in model.get_submodule(parent_name).named_children()
            if child is not module and _is_linear_router(child, (down.shape[0], down.shape[1]))
        }
        if len(found) == 1:
            fits.update(found)
        else:
            misfits.append(f"{name} has {len(found) or 'no'} router(s) of Mixtral's kind beside it")
    return fits, misfits


def _is_linear_router(module: nn.Module, shape: tuple[int, int]) -> bool:
    """Whether a module is a router of ``weight [E, H]`` alone that takes hidden states alone."""
    params = {name: p for name, p in module._parameters.items() if p is not None}
    if set(params) != {"weight"} or tuple(params["weight"].shape) != shape:
        return False
    if module._modules or module._buffers or not isinstance(getattr(module, "top_k", None), int):
        return False
    arguments = inspect.signature(type(module).forward).parameters.values()
    return sum(a.default is inspect.Parameter.empty for a in arguments) == 2  # self, hidden_states


def native_expert_parallel(model: nn.Module) -> str | None:
    """Name the sign that transformers' own expert parallelism is on, or None. Not collective."""
    config: Any = getattr(getattr(model, "config", None), "distributed_config", None)
    if isinstance(config, dict):
        is_on = config.get("enable_expert_parallel") or (config.get("ep_size") or 1) > 1
    else:
        is_on = (
            getattr(config, "enable_expert_parallel", False)
            or (getattr(config, "ep_size", None) or 1) > 1
        )
    if is_on:
        return "config.distributed_config asks for it"
    for name, module in model.named_modules():
        if getattr(module, "_is_expert_parallel", False) is True:
            return f"{name} is marked _is_expert_parallel"
    return None


def quantised(model: nn.Module) -> str | None:
    """Name the sign that a model is quantised, or None. Not collective."""
    if getattr(model, "is_quantized", False) is True:
        return "model.is_quantized is set"
    if getattr(model, "hf_quantizer", None) is not None:
        return "model.hf_quantizer is set"
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        return "config.quantization_config is set"
    return None


def initializer_range(model: nn.Module) -> float:
    """Standard deviation of the model's initial weights (its config's, else 0.02)."""
    config = getattr(model, "config", None)
    text_config = getattr(config, "text_config", config)
    return float(getattr(text_config, "initializer_range", 0.02))


def _is_fused(module: nn.Module) -> bool:
    names = {*module._parameters, *getattr(module, "parametrizations", {})}
    return {"gate_up_proj", "down_proj"} <= names


def misfit_of(module: nn.Module) -> str | None:
    """Why an experts module cannot be made expert-parallel, one sentence; None where it can.

    Not collective. Runs the activation once on nine CPU numbers.
    """
    if not _is_fused(module):
        names = sorted(name for name, _ in module.named_parameters())
        return f"it holds {', '.join(names[:3])} instead of fused gate_up_proj and down_proj"
    checks: tuple[Callable[[nn.Module], str | None], ...] = (
        _interface_misfit,
        _shape_misfit,
        _gate_misfit,
    )
    for check in checks:
        reason = check(module)
        if reason is not None:
            return reason
    return None


def _interface_misfit(module: nn.Module) -> str | None:
    for known in type(module).__mro__:
        if known.__name__ in _CONDITIONAL:
            return _CONDITIONAL[known.__name__]
    if not hasattr(module, "has_gate"):
        return (
            "its class is none of the interchangeable experts of transformers 5.6 or newer (it has "
            "no has_gate), so what it computes is unknown"
        )
    wanted: dict[str, tuple[bool, str]] = {
        "has_gate": (True, "experts without a gate"),
        "has_bias": (False, "expert biases"),
        "is_transposed": (False, "transposed expert weights"),
        "is_concatenated": (True, "interleaved gate and up rows"),
        "has_post_expert_norm": (False, "a norm after each expert"),
    }
    for name, (value, what) in wanted.items():
        if getattr(module, name, value) is not value:
            return f"{what} ({name}={getattr(module, name)}) are not supported"
    return None


def _shape_misfit(module: nn.Module) -> str | None:
    names = {name for name, param in module._parameters.items() if param is not None}
    if names != {"gate_up_proj", "down_proj"}:
        return f"it owns the parameters {sorted(names)} instead of gate_up_proj and down_proj alone"
    gate_up, down = module._parameters["gate_up_proj"], module._parameters["down_proj"]
    assert gate_up is not None
    assert down is not None
    if not (gate_up.is_floating_point() and gate_up.element_size() >= 2):
        return f"quantised experts ({gate_up.dtype}) are not supported; load the model in bf16"
    if not (down.is_floating_point() and down.element_size() >= 2):
        return f"quantised experts ({down.dtype}) are not supported; load the model in bf16"
    if gate_up.dim() != 3 or down.dim() != 3:
        return f"weights must be 3-D, got {tuple(gate_up.shape)} and {tuple(down.shape)}"
    num_experts, hidden, width = down.shape
    if tuple(gate_up.shape) != (num_experts, 2 * width, hidden):
        return (
            f"gate_up_proj must be [E, 2I, H] for down_proj [E, H, I] = {tuple(down.shape)}, "
            f"got {tuple(gate_up.shape)}"
        )
    return None


def _gate_misfit(module: nn.Module) -> str | None:
    moe = sys.modules.get("transformers.integrations.moe")
    default_gate = getattr(moe, "_default_apply_gate", None)
    own_gate = getattr(type(module), "_apply_gate", None)
    if own_gate is not None and own_gate is not default_gate:
        return "its class gates in its own way (_apply_gate), which is not silu(gate) * up"
    activation: Any = getattr(module, "act_fn", None)
    if not callable(activation):
        return "it has no act_fn, so its activation is unknown"
    probe = torch.linspace(-4.0, 4.0, 9, device="cpu", dtype=torch.float32)
    try:
        with torch.no_grad():
            is_silu = torch.allclose(activation(probe), nn.functional.silu(probe), rtol=1e-5)
    except Exception as error:  # a foreign activation may raise anything
        return f"its activation {type(activation).__name__} cannot be evaluated ({error})"
    if not is_silu:
        name = getattr(activation, "__name__", type(activation).__name__)
        return f"its activation {name} is not SiLU"
    return None
