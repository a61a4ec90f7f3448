"""``transform``: expert parallelism for the model of an SMP script."""

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from torch_moe_ep.config import MoEConfig as NativeConfig
from torch_moe_ep.integrations.smp import config as smp_config
from torch_moe_ep.integrations.smp.moe.moe_config import MoEConfig
from torch_moe_ep.integrations.smp.tensor_parallel.transformer import note_layers
from torch_moe_ep.integrations.transformers import find_experts
from torch_moe_ep.parallel import apply_expert_parallel, initialize_experts
from torch_moe_ep.parallel.state import iter_experts

BROADCAST_ELEMENTS = 1 << 25  # bounds a chunk: 128 MiB of fp32


def transform(
    model: nn.Module,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    config: MoEConfig | None = None,
    load_state_dict_from_rank0: bool = False,
    cp_comm_type: str = "p2p",
) -> nn.Module:
    """Spread a model's experts as `init` was told, in place.

    Args:
        model: a Hugging Face mixture-of-experts model. Real on every rank, on meta on every rank
            (experts are then drawn here from `random_seed`, the same at every degree, and the
            rest by `DelayedParamIniter`), or with `load_state_dict_from_rank0` real on rank 0.
        device: moves the dense part there; None leaves it where it is.
        dtype: casts the model before; None leaves it.
        config: SMP's `MoEConfig`, or torch_moe_ep's own. None with P > 1 takes SMP's defaults,
            with a warning; None with P = 1 leaves a model as Hugging Face has it.
        load_state_dict_from_rank0: every rank takes rank 0's weights, in chunks of bounded size
            (dense ones 128 MiB in fp32, experts `parallel.swap.SYNC_CHUNK_BYTES`).
        cp_comm_type: accepted; context parallelism is not implemented.

    Returns:
        The model, to be wrapped by FSDP.

    Raises:
        RuntimeError: before `init` or without a process group.
        ValueError: what `apply_expert_parallel` refuses.

    Collective over all ranks.
    """
    mesh = smp_config.mesh()
    if dtype is not None:
        model.to(dtype)
    experts, _ = find_experts(model)
    note_layers(model, list(experts))
    native = _native_config(config, mesh["ep"].size())
    if load_state_dict_from_rank0:
        # apply_expert_parallel takes care of the experts, if it is to have them.
        skipped = set() if native is None else _expert_params(model)
        home = torch.device(mesh.device_type if device is None else device)
        _take_from_rank0(model, skipped, home)
    if native is not None:
        apply_expert_parallel(model, mesh, native, sync_from_rank0=load_state_dict_from_rank0)
        if any(p.is_meta for module in iter_experts(model) for p in module.parameters()):
            initialize_experts(model, seed=smp_config.current().random_seed)
    if device is not None:
        _move_dense(model, torch.device(device))
    return model


def _native_config(config: Any, ep_size: int) -> NativeConfig | None:
    if isinstance(config, NativeConfig):
        return config
    if config is not None and not isinstance(config, MoEConfig):
        raise ValueError(
            f"config must be a MoEConfig of torch_moe_ep.integrations.smp, got "
            f"{type(config).__name__}."
        )
    if config is None:
        if ep_size == 1:
            return None
        warnings.warn(
            "transform without a config takes SMP's defaults: Sinkhorn routing and a z loss, "
            "which are not Hugging Face's routing; pass "
            'config=MoEConfig(moe_load_balancing="none", moe_z_loss_coeff=0.0) for that.',
            stacklevel=3,
        )
        config = MoEConfig()
    native: NativeConfig = config.convert()
    return native


def _expert_params(model: nn.Module) -> set[int]:
    experts, _ = find_experts(model)
    modules = [*experts.values(), *iter_experts(model)]
    return {id(param) for module in modules for param in module.parameters(recurse=False)}


@torch.no_grad()
def _take_from_rank0(model: nn.Module, skipped: set[int], device: torch.device) -> None:
    """Give every rank rank 0's parameters and buffers, on `device`, but those `skipped` (by id)."""
    made: dict[int, torch.Tensor] = {}  # tied weights stay tied
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or id(tensor) in skipped:
                    continue
                if id(tensor) not in made:
                    full = _broadcast(tensor, device)
                    is_param = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = (
                        nn.Parameter(full, tensor.requires_grad) if is_param else full
                    )
                tensors[name] = made[id(tensor)]  # type: ignore[assignment]


def _broadcast(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if dist.get_rank() == 0 and tensor.is_meta:
        raise ValueError(
            "load_state_dict_from_rank0=True needs rank 0's weights, but they are on the meta "
            "device; load the model on rank 0."
        )
    if tensor.is_meta:
        full = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    else:
        full = tensor.detach().to(device).contiguous()
    for chunk in full.view(-1).split(BROADCAST_ELEMENTS):
        dist.broadcast(chunk, src=0)
    return full


def _move_dense(model: nn.Module, device: torch.device) -> None:
    experts = _expert_params(model)
    for module in model.modules():
        for param in module._parameters.values():
            if param is not None and id(param) not in experts and not param.is_meta:
                param.data = param.data.to(device)
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
