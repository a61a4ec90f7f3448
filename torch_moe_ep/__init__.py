"""Expert parallelism for Hugging Face mixture-of-experts models inside PyTorch FSDP.

One call changes a model; the rest of a stock FSDP2, FSDP1 or DDP script stays:

    mesh = torch_moe_ep.init_device_mesh("cuda", expert_parallel_degree=4)
    torch_moe_ep.apply_expert_parallel(model, mesh)

``ops`` holds the differentiable operators, ``reference`` their readable twins in plain torch,
``metrics`` the experts' load, ``memory`` what activation checkpointing keeps and activations on the
host.

Names are imported at their first use, so that ``python -m torch_moe_ep.info`` can say what is
wrong with a build that cannot be loaded.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_moe_ep import hooks, memory, metrics, ops, reference
    from torch_moe_ep.checkpoint import (
        export_hf,
        latest_checkpoint,
        load_checkpoint,
        load_data_state,
        load_hf,
        save_checkpoint,
        wait_for_checkpoint,
    )
    from torch_moe_ep.config import MoEConfig
    from torch_moe_ep.parallel import (
        apply_expert_parallel,
        average_gradients,
        clip_grad_norm_,
        dense_mesh,
        init_device_mesh,
        initialize_experts,
        param_groups,
        set_fsdp_all_gather,
    )
    from torch_moe_ep.routing import set_aux_loss_scale

__all__ = [
    "MoEConfig",
    "apply_expert_parallel",
    "average_gradients",
    "clip_grad_norm_",
    "dense_mesh",
    "export_hf",
    "hooks",
    "init_device_mesh",
    "initialize_experts",
    "latest_checkpoint",
    "load_checkpoint",
    "load_data_state",
    "load_hf",
    "memory",
    "metrics",
    "ops",
    "param_groups",
    "reference",
    "save_checkpoint",
    "set_aux_loss_scale",
    "set_fsdp_all_gather",
    "wait_for_checkpoint",
]

_MODULES = ("hooks", "memory", "metrics", "ops", "reference")
_CHECKPOINT = (
    "export_hf",
    "latest_checkpoint",
    "load_checkpoint",
    "load_data_state",
    "load_hf",
    "save_checkpoint",
    "wait_for_checkpoint",
)


def __getattr__(name: str) -> Any:
    """Import a public name; raises ImportError, with the way out, where the library is unusable."""
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "parallel"
    if name == "MoEConfig":
        home = "config"
    elif name == "set_aux_loss_scale":
        home = "routing"
    elif name in _CHECKPOINT:
        home = "checkpoint"
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
