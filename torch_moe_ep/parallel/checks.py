"""Refusals: what `apply_expert_parallel` cannot do, said in one sentence with the way out.

Every rank looks at its own model, then all compare notes (`agreement`), so that all ranks raise
alike and nothing is changed when one of them objects.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    OffloadPolicy,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from torch_moe_ep.config import MoEConfig
from torch_moe_ep.gather import shared_reason
from torch_moe_ep.integrations import peft
from torch_moe_ep.integrations import transformers as hf
from torch_moe_ep.layer import ExpertParallelExperts
from torch_moe_ep.parallel.agreement import agree, first_difference
from torch_moe_ep.parallel.mesh import mesh_misfit
from torch_moe_ep.parallel.nodes import RANKS_PER_NODE, node_note, nodes_misfit, override_misfit
from torch_moe_ep.parallel.peers import peer_note, peers_misfit
from torch_moe_ep.parallel.swap import WEIGHT_NAMES
from torch_moe_ep.parallel.weight_check import warn_of_different_weights, weights_note

MIN_TORCH = (2, 11)


@dataclass(frozen=True)
class Request:
    """The arguments of `apply_expert_parallel`, as given."""

    model: nn.Module
    mesh: DeviceMesh
    config: MoEConfig
    mp_policy: object
    offload_policy: object
    sync_from_rank0: bool
    reshard_after_forward: bool


def check_request(request: Request) -> dict[str, nn.Module]:
    """Check a request on all ranks together.

    Returns:
        The experts modules to swap, by name.

    Raises:
        ValueError: on every rank, with the sentence of the lowest rank that objects, or with what
            ranks have not in common.
        RuntimeError: a rank did not come; the message names it.

    Collective over all ranks, through the store alone; changes nothing.
    """
    if not dist.is_initialized():
        raise ValueError(
            "torch.distributed is not initialised; call "
            "torch.distributed.init_process_group() before apply_expert_parallel."
        )
    experts: dict[str, nn.Module] = {}
    reason = _argument_misfit(request) or _model_misfit(request.model)
    if reason is None:
        experts, misfits = hf.find_experts(peft.base_model(request.model))
        reason = _experts_misfit(request, experts, misfits)
    note = {
        "reason": reason,
        "settings": _settings(request, experts) if reason is None else {},
        "is_meta": any(param.is_meta for _, param in _named_weights(experts)),
        "is_synced": request.sync_from_rank0,
        "weights": weights_note(dict(_named_weights(experts)))
        if reason is None and not request.sync_from_rank0
        else {},
        "node": node_note(request.config, request.mesh["ep"].size()) if reason is None else {},
        "peer": peer_note(request.config, request.mesh) if reason is None else {},
    }
    held: list[dict[str, str]] = []

    def judge(notes: list[dict[str, Any]]) -> str | None:
        held[:] = [other["weights"] for other in notes]
        return _verdict(notes)

    agree("apply_expert_parallel", note, judge)
    warn_of_different_weights(held)
    return experts


def _argument_misfit(request: Request) -> str | None:
    if torch_version() < MIN_TORCH:
        return f"torch 2.11 or newer is needed, found {torch.__version__}; upgrade torch."
    if not isinstance(request.model, nn.Module):
        return f"model must be a torch.nn.Module, got {type(request.model).__name__}."
    if not isinstance(request.config, MoEConfig):
        return f"config must be a torch_moe_ep.MoEConfig, got {type(request.config).__name__}."
    reason = mesh_misfit(request.mesh)
    if reason is not None:
        return reason
    policy = request.mp_policy
    if not (policy is None or policy == "inherit" or isinstance(policy, MixedPrecisionPolicy)):
        return (
            f'mp_policy must be "inherit", None or a MixedPrecisionPolicy of '
            f"torch.distributed.fsdp, got {policy!r}."
        )
    if not isinstance(request.reshard_after_forward, bool):
        return (
            f"reshard_after_forward must be True or False for experts, got "
            f"{request.reshard_after_forward!r}; torch cannot reshard them to a smaller group."
        )
    reason = override_misfit(request.config, request.mesh["ep"].size())
    return reason or _offload_misfit(request.offload_policy, request.mesh)


def _offload_misfit(policy: object, mesh: DeviceMesh) -> str | None:
    if policy is not None and not isinstance(policy, OffloadPolicy):
        return (
            f"offload_policy must be None or an OffloadPolicy of torch.distributed.fsdp, got "
            f"{policy!r}."
        )
    if isinstance(policy, CPUOffloadPolicy) and mesh.device_type == "cpu":
        return (
            "offload_policy=CPUOffloadPolicy() moves experts from an accelerator to the CPU, but "
            "the mesh is on the CPU; leave offload_policy out."
        )
    return None


def _model_misfit(model: nn.Module) -> str | None:
    if any(isinstance(module, ExpertParallelExperts) for module in model.modules()):
        return "the model is expert-parallel already; call apply_expert_parallel once per model."
    sign = hf.native_expert_parallel(model)
    if sign is not None:
        return (
            f"transformers' own expert parallelism is on ({sign}); load the model without "
            f"distributed_config (enable_expert_parallel, ep_size)."
        )
    sign = hf.quantised(model)
    if sign is not None:
        return f"quantised models are not supported ({sign}); load the model unquantised."
    name = peft.foreign_adapter(model)
    if name is not None:
        return (
            f"an adapter other than LoRA, or a parametrization, holds the expert weights at "
            f"{name}; use LoRA with target_parameters for experts, or adapters outside of them."
        )
    if _is_true(os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "")):
        return (
            "accelerate's cpu_ram_efficient_loading would broadcast rank 0's experts to all "
            "ranks; turn it off (fsdp_cpu_ram_efficient_loading: false) and pass "
            "sync_from_rank0=True instead."
        )
    return _managed_misfit(model)


def _managed_misfit(model: nn.Module) -> str | None:
    way_out = "call apply_expert_parallel first, then wrap the model and build the optimizer."
    for name, module in model.named_modules():
        if isinstance(module, (FSDPModule, FullyShardedDataParallel)):
            return f"FSDP was applied before the experts ({name or 'the model'}); {way_out}"
        if isinstance(module, DistributedDataParallel):
            return f"DistributedDataParallel was applied before the experts; {way_out}"
    for name, param in model.named_parameters():
        if isinstance(param, DTensor) or getattr(param, "_fsdp_flattened", False):
            return f"parameter {name} is sharded already; {way_out}"
    return None


def _experts_misfit(
    request: Request, experts: dict[str, nn.Module], misfits: list[str]
) -> str | None:
    if misfits:
        return (
            f"{misfits[0]}{f' (and {len(misfits) - 1} more)' if len(misfits) > 1 else ''}; only "
            f"Mixtral-shaped experts can be made expert-parallel, leave this model as it is."
        )
    if not experts:
        foreign = hf.name_foreign_experts(request.model)
        if foreign is not None:
            return (
                f"{foreign} holds experts of another shape than Mixtral's (fused gate_up_proj "
                f"[E, 2I, H] and down_proj [E, H, I]); leave this model as it is, `python -m "
                f"torch_moe_ep.info --models` lists those that fit."
            )
        return (
            "no experts module was found: a Hugging Face mixture-of-experts model is needed, of "
            "transformers 5.6 or newer, or of 4.57."
        )
    size = request.mesh["ep"].size()
    for name, module in experts.items():
        num_experts = _weights(module)[0].shape[0]
        if num_experts % size != 0:
            return (
                f"the expert-parallel degree must divide the number of experts: {name} has "
                f"{num_experts} experts for degree {size}; choose a divisor of {num_experts}."
            )
    checks: tuple[Callable[[Request, dict[str, nn.Module]], str | None], ...] = (
        _uniform_misfit,
        _device_misfit,
        _router_misfit,
        _adapter_misfit,
    )
    for check in checks:
        reason = check(request, experts)
        if reason is not None:
            return reason
    return None


def _uniform_misfit(_request: Request, experts: dict[str, nn.Module]) -> str | None:
    params = [param for _, param in _named_weights(experts)]
    if len({id(param) for param in params}) != len(params):
        return "two experts modules share a weight; untie them first."
    dtypes = {str(param.dtype) for param in params}
    if "torch.float64" in dtypes:
        return (
            "expert weights must be float32, bfloat16 or float16, got float64; cast the model "
            "(model.float())."
        )
    if len(dtypes) > 1:
        return f"expert weights must have one dtype, got {sorted(dtypes)}; cast them (model.to)."
    devices = {str(param.device) for param in params}
    if len(devices) > 1:
        return f"expert weights must be on one device, got {sorted(devices)}; move them (model.to)."
    for name, module in experts.items():
        if len({param.requires_grad for param in _weights(module)}) > 1:
            return (
                f"{name} is partly frozen; set requires_grad of gate_up_proj and down_proj alike."
            )
    return None


def _device_misfit(request: Request, experts: dict[str, nn.Module]) -> str | None:
    device = _weights(next(iter(experts.values())))[0].device
    device_type = request.mesh.device_type
    if device.type in ("meta", "cpu"):
        return None
    if device.type != device_type:
        return (
            f"the experts are on {device} but the mesh is on {device_type}; move the model to the "
            f"CPU or to {device_type}, or make the mesh for {device.type}."
        )
    current = torch.get_device_module(device_type).current_device()
    if device.index != current:
        return (
            f"the experts are on {device} but this rank's current device is "
            f"{device_type}:{current}; call torch.{device_type}.set_device(local_rank) before "
            f"loading the model."
        )
    return None


def _router_misfit(request: Request, experts: dict[str, nn.Module]) -> str | None:
    if not request.config.changes_router:
        return None
    _, misfits = hf.find_routers(peft.base_model(request.model), experts)
    if misfits:
        return (
            f"{misfits[0]}, so routing, router_dtype, z_loss_coeff and capacity_factor must stay "
            f"at their defaults for this model."
        )
    return None


def _adapter_misfit(request: Request, experts: dict[str, nn.Module]) -> str | None:
    return peft.adapter_misfit(request.model, experts)


def _weights(module: nn.Module) -> list[nn.Parameter]:
    """An experts module's weights ``[E, ...]``, in the order of `WEIGHT_NAMES`."""
    found = [module._parameters[name] for name in WEIGHT_NAMES]
    return [param for param in found if param is not None]


def _named_weights(experts: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    for name, module in experts.items():
        for key, param in zip(WEIGHT_NAMES, _weights(module), strict=True):
            yield f"{name}.{key}", param


def _settings(request: Request, experts: dict[str, nn.Module]) -> dict[str, str]:
    """What all ranks must have in common, by the names that users know."""
    mesh = request.mesh
    settings = {
        "the shape of mesh (replicate, shard, ep)": str(tuple(mesh.shape)),
        "mp_policy": repr(request.mp_policy),
        "offload_policy": repr(request.offload_policy),
        "sync_from_rank0": repr(request.sync_from_rank0),
        "reshard_after_forward": repr(request.reshard_after_forward),
        "TORCH_MOE_EP_CHECK": os.environ.get("TORCH_MOE_EP_CHECK", "unset"),
        RANKS_PER_NODE: os.environ.get(RANKS_PER_NODE, "unset"),
    }
    for field in fields(request.config):
        settings[f"MoEConfig.{field.name}"] = repr(getattr(request.config, field.name))
    settings |= peft.adapter_settings(peft.base_model(request.model), experts)
    for name, param in _named_weights(experts):
        settings[f"the shape of {name}"] = str(tuple(param.shape))
        settings[f"the dtype of {name}"] = str(param.dtype)
        settings[f"requires_grad of {name}"] = str(param.requires_grad)
    return settings


def _verdict(notes: list[dict[str, Any]]) -> str | None:
    reason = shared_reason([note["reason"] for note in notes])
    reason = reason or first_difference([note["settings"] for note in notes])
    reason = reason or _meta_misfit(notes) or nodes_misfit([note["node"] for note in notes])
    return reason or peers_misfit([note["peer"] for note in notes])


def _meta_misfit(notes: list[dict[str, Any]]) -> str | None:
    metas = [note["is_meta"] for note in notes]
    is_synced = notes[0]["is_synced"]
    if is_synced and metas[0]:
        return (
            "sync_from_rank0=True needs rank 0's experts, but they are on the meta device; load "
            "the model on rank 0 first."
        )
    if not is_synced and len(set(metas)) > 1:
        return (
            f"the experts are on the meta device on ranks "
            f"{[rank for rank, is_meta in enumerate(metas) if is_meta]} only; pass "
            f"sync_from_rank0=True, or load the model on every rank."
        )
    return None


def torch_version() -> tuple[int, int]:
    """Major and minor version of the running torch."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def _is_true(text: str) -> bool:
    return text.strip().lower() in ("1", "true", "yes", "on", "y", "t")
