"""Wrap a patched model the ways users do, and read full tensors out of it."""

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import MixedPrecisionPolicy, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from torch_moe_ep.integrations import wrapper_names
from torch_moe_ep.integrations.peft import base_model

FSDP1_STRATEGIES = {
    "fsdp1": ShardingStrategy.FULL_SHARD,
    "fsdp1_grad_op": ShardingStrategy.SHARD_GRAD_OP,
    "fsdp1_no_shard": ShardingStrategy.NO_SHARD,
    "fsdp1_hybrid": ShardingStrategy.HYBRID_SHARD,
    "fsdp1_hybrid_zero2": ShardingStrategy._HYBRID_SHARD_ZERO2,
}
WRAPS = ("fsdp2", "hsdp2", *FSDP1_STRATEGIES, "ddp", "none")


def wrap(
    model: nn.Module,
    kind: str,
    mesh: DeviceMesh,
    *,
    mp_policy: MixedPrecisionPolicy | None = None,
    **options: Any,
) -> nn.Module:
    """Put stock data parallelism around a patched model, as a user's script would.

    Args:
        model: a patched Hugging Face decoder.
        kind: one of WRAPS. "hsdp2" and the hybrid strategies replicate over two halves of the
            ranks (W is even), with a mesh of `dense_mesh`; "none" returns the model.
        mesh: the mesh of `init_device_mesh`; names the device.
        mp_policy: FSDP2 only.
        options: further arguments of the FSDP1 constructor.

    Collective: creates process groups.
    """
    if kind in ("fsdp2", "hsdp2"):
        dense = halves(mesh) if kind == "hsdp2" else None
        shard: Callable[[nn.Module], Any] = partial(
            fully_shard, mesh=dense, mp_policy=mp_policy or MixedPrecisionPolicy()
        )
        for layer in decoder_layers(model):
            shard(layer)
        shard(model)
        return model
    if kind in FSDP1_STRATEGIES:
        if "hybrid" in kind:
            options.setdefault("device_mesh", halves(mesh))
        options.setdefault("use_orig_params", True)
        options.setdefault("auto_wrap_policy", ModuleWrapPolicy({type(decoder_layers(model)[0])}))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return FSDP1(
                model,
                sharding_strategy=FSDP1_STRATEGIES[kind],
                device_id=torch.device(mesh.device_type),
                **options,
            )
    if kind == "ddp":
        return DistributedDataParallel(model)
    assert kind == "none", f"kind must be one of {WRAPS}, got {kind!r}"
    return model


def halves(mesh: DeviceMesh) -> DeviceMesh:
    """A dense (replicate, shard) mesh with two replicas."""
    from torch_moe_ep import dense_mesh

    return dense_mesh(mesh, mesh.size() // 2)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a Hugging Face causal language model, also inside of a PeftModel."""
    layers = base_model(model).get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    return list(layers)


def plain_name(name: str) -> str:
    """A parameter's name without the names that wrappers put in."""
    return wrapper_names.plain_name(name.removeprefix("module."))


def full_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every trained parameter's full gradient by plain name. Collective over all ranks.

    One without a gradient fails: expert gradients are zeros, never None. Frozen parameters are left
    out. FSDP1 needs ``use_orig_params=True``.
    """
    found: dict[str, torch.Tensor] = {}
    with _summoned(model, with_grads=True):
        for name, param in model.named_parameters():
            if not param.requires_grad:
                continue
            assert param.grad is not None, f"{name} has no gradient on rank {dist.get_rank()}"
            found[plain_name(name)] = _full(param.grad).clone()
    return found


def full_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter's full value by plain name. Collective over all ranks."""
    with _summoned(model, with_grads=False):
        return {
            plain_name(name): _full(param.detach()).clone()
            for name, param in model.named_parameters()
        }


def from_rank0(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on rank 0, nothing elsewhere; asserts the same bits on every rank."""
    digest = {name: bits(tensor) for name, tensor in tensors.items()}
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    for rank, other in enumerate(digests):
        far = sorted(name for name in digest if other.get(name) != digests[0].get(name))
        assert not far, f"ranks 0 and {rank} hold different bits of {far}"
    return tensors if dist.get_rank() == 0 else {}


def bits(tensor: torch.Tensor) -> str:
    """A digest of a tensor's bytes."""
    data = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def _summoned(model: nn.Module, *, with_grads: bool) -> Iterator[None]:
    if isinstance(model, FSDP1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with FSDP1.summon_full_params(model, writeback=False, with_grads=with_grads):
                yield
    else:
        yield


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
