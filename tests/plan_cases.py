"""What the planner's formulas are compared with: bytes of real models, alone and on ranks."""

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torch_moe_ep import MoEConfig, apply_expert_parallel, init_device_mesh, memory
from torch_moe_ep.testing import batch_of, make_local_expert_parallel, tiny_mixtral
from torch_moe_ep.testing.parallel import wrap


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operators return, until they are freed, and their peak."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.live: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.peak = 0

    @property
    def total(self) -> int:
        """Bytes now: FSDP2 empties storages that it keeps."""
        storages = [ref() for ref in list(self.live.values())]  # collecting takes some out
        return sum(storage.nbytes() for storage in storages if storage is not None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
                self._note(local.untyped_storage())
        self.peak = max(self.peak, self.total)
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.known and key not in self.live:
            self.live[key] = weakref.ref(storage, lambda _: self.live.pop(key, None))


def kept_after_forward(model: nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """Bytes that a forward leaves for backward; the loss's own tensor among them."""
    live = LiveBytes([*model.parameters(), *model.buffers(), *batch.values()])
    with live:
        loss = model(**batch).loss
        kept = live.total
    loss.backward()
    return kept


def lone_model(config: Any, checkpointing: str) -> nn.Module:
    """A bf16 model with this package's experts on one rank."""
    from transformers import AutoModelForCausalLM

    config._experts_implementation = "eager"
    model: nn.Module = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    for layer in model.model.layers:
        make_local_expert_parallel(layer.mlp.experts)
    _checkpoint(model, checkpointing)
    return model


def _checkpoint(model: Any, checkpointing: str) -> None:
    options: dict[str, Any] = {"use_reentrant": False}
    if checkpointing == "rows":
        options["context_fn"] = memory.checkpoint_contexts("rows")
    if checkpointing != "none":
        model.gradient_checkpointing_enable(options)
    model.train()


def sharded_states(grids: list[tuple[int, int]], fields: dict[str, Any]) -> list[tuple[int, ...]]:
    """(parameter, gradient, optimizer) bytes of this rank in each (P, S) after a step."""
    return [_states_of(ep, shard, fields) for ep, shard in grids]


def _states_of(ep: int, shard: int, fields: dict[str, Any]) -> tuple[int, ...]:
    mesh = init_device_mesh("cpu", ep, shard)
    model = apply_expert_parallel(tiny_mixtral(**fields), mesh, MoEConfig())
    model = wrap(model, "fsdp2", mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    model(**batch_of(dist.get_rank())).loss.backward()
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values()]
    gradients = [param.grad for param in model.parameters()]
    return tuple(_bytes(some) for some in (list(model.parameters()), gradients, states))


def _bytes(tensors: list[Any]) -> int:
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in local)


def peaks_of_steps(grids: list[tuple[int, int]], fields: dict[str, Any], tokens: int) -> list[int]:
    """Bytes at the peak of a second step in each (P, S): fp32 states, bf16 compute."""
    return [_peak_of(ep, shard, fields, tokens) for ep, shard in grids]


def _peak_of(ep: int, shard: int, fields: dict[str, Any], tokens: int) -> int:
    mesh = init_device_mesh("cpu", ep, shard)
    model = apply_expert_parallel(tiny_mixtral(**fields), mesh)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = wrap(model, "fsdp2", mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = batch_of(dist.get_rank(), tokens=tokens)
    with LiveBytes([]) as live:
        for _ in range(2):
            live.peak = 0
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return live.peak


def kept_on_ranks(
    ep: int, checkpointings: list[str], fields: dict[str, Any], tokens: int
) -> list[int]:
    """Bytes that a bf16 forward leaves on this rank, for each kind of checkpointing."""
    mesh = init_device_mesh("cpu", ep, 1)
    found = []
    for checkpointing in checkpointings:
        model = apply_expert_parallel(tiny_mixtral(**fields).to(torch.bfloat16), mesh)
        _checkpoint(model, checkpointing)
        batch = batch_of(dist.get_rank(), tokens=tokens)
        model(**batch).loss.backward()  # FSDP2 sets itself up
        found.append(kept_after_forward(model, batch))
    return found
