"""What one patched model knows about itself: its mesh, its experts and who wraps it.

`ExpertParallelState` hangs on every experts module as ``expert_parallel_state``, so whatever
object the user holds (the model, an FSDP1 or DDP wrapper, a compiled model), its experts lead
here. `live_states` serves the hooks that torch calls without a model: optimizer steps and
DTensor dispatch.
"""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from torch_moe_ep.integrations.peft import is_peft_module
from torch_moe_ep.layer import ExpertParallelExperts
from torch_moe_ep.routing.router import RoutedRouter

_LIVE: "weakref.WeakSet[ExpertParallelState]" = weakref.WeakSet()
_WRAPPERS = (FullyShardedDataParallel, DistributedDataParallel)


@dataclass(eq=False)
class ExpertParallelState:
    """One patched model.

    Attributes:
        model: the one that `forward` was wrapped of, without PEFT's or any wrapper around it.
        mesh: ``("replicate", "shard", "ep")``.
        experts: module names, as they were at apply, to modules.
        routers: the same of routers that were swapped; empty where the model's own are left.
        linear_routers: names of experts to the router beside them, where it is a linear one.
        num_resets: how often the counters of experts, and those of routers, were set to zero.
        dense_at_patch: dense parameters as the patch found them, by name; keeps none of them alive.
        wrapper_refs: FSDP1 and DDP modules that took in experts of the model (see `wrappers`).
        root: the hidden FSDP2 root over the experts, where nothing else is one.
        gathered_ahead: FSDP2 modules that are gathered before their turn in a forward.
        ranks_per_node: 0 unless tokens cross between nodes once.
        uses_peers: rows travel by the peer transport.
        is_started: a forward has run, so wrappers and dtypes are settled.
        is_flag_checked: clipping has read the flags of this step already.
        is_batch_checked: the batches of the EP group's ranks have been compared.
        is_averaging_known: dense gradients are averaged, or the user was warned that nothing does.
    """

    model: nn.Module
    mesh: DeviceMesh
    experts: dict[str, ExpertParallelExperts]
    routers: dict[str, RoutedRouter] = field(default_factory=dict)
    linear_routers: dict[str, nn.Module] = field(default_factory=dict)
    num_resets: dict[str, int] = field(default_factory=lambda: {"experts": 0, "routers": 0})
    dense_at_patch: "weakref.WeakValueDictionary[str, nn.Parameter]" = field(
        default_factory=weakref.WeakValueDictionary
    )
    wrapper_refs: list["weakref.ref[nn.Module]"] = field(default_factory=list)
    root: nn.Module | None = None
    gathered_ahead: list[nn.Module] = field(default_factory=list)
    ranks_per_node: int = 0
    uses_peers: bool = False
    is_started: bool = False
    is_flag_checked: bool = False
    is_batch_checked: bool = False
    is_averaging_known: bool = False

    @property
    def device(self) -> torch.device:
        """Device of the expert computation on this rank."""
        if self.mesh.device_type == "cpu":
            return torch.device("cpu")
        index = torch.get_device_module(self.mesh.device_type).current_device()
        return torch.device(self.mesh.device_type, index)

    def wrappers(self) -> list[nn.Module]:
        """FSDP1 and DDP wrappers that hold experts of this model, also those outside of it."""
        found = [wrapper for ref in self.wrapper_refs if (wrapper := ref()) is not None]
        return [wrapper for wrapper in found if isinstance(wrapper, _WRAPPERS)]

    def fsdp1_modules(self) -> list[FullyShardedDataParallel]:
        """Every FSDP1 instance in and around the model, each once."""
        found: dict[int, FullyShardedDataParallel] = {}
        for top in [*self.wrappers(), self.model]:
            for module in top.modules():
                if isinstance(module, FullyShardedDataParallel):
                    found[id(module)] = module
        return list(found.values())

    def fsdp2_modules(self) -> list[nn.Module]:
        """Every FSDP2 module in and above the model that is not an experts module."""
        found: dict[int, nn.Module] = {}
        first = next(iter(self.experts.values()))
        context = fsdp_state(first)._state_ctx
        above = [module for state in context.all_states for module in state._modules]
        for module in [*above, *self.model.modules()]:
            is_own = isinstance(module, ExpertParallelExperts) or module is self.root
            if not is_own and is_fsdp2(module):
                found[id(module)] = module
        return list(found.values())


def is_fsdp2(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to a module."""
    return isinstance(module, FSDPModule)


def fsdp_state(module: nn.Module) -> Any:
    """The FSDP2 state of a module that `fully_shard` was applied to."""
    assert isinstance(module, FSDPModule)
    return module._get_fsdp_state()


def fsdp_param_groups(module: nn.Module) -> list[Any]:
    """The FSDP2 parameter groups of a module: one, or none where it manages no parameter.

    Newer torch keeps a list, for modules whose parameters are on several meshes.
    """
    state = fsdp_state(module)
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def track(state: ExpertParallelState) -> None:
    """Make a state reachable from its experts, from `live_states`, and from later wrappers."""
    _register_wrapper_hook()
    _LIVE.add(state)
    for experts in state.experts.values():
        for holder in experts.holders():
            holder.__dict__["expert_parallel_state"] = state


def live_states() -> list[ExpertParallelState]:
    """States of all patched models that still exist in this process."""
    return list(_LIVE)


def states_of(module: nn.Module) -> list[ExpertParallelState]:
    """States of the patched models inside `module`, each once, in module order."""
    found: dict[int, ExpertParallelState] = {}
    for experts in iter_experts(module):
        state = experts.__dict__.get("expert_parallel_state")
        if state is not None:
            found[id(state)] = state
    return list(found.values())


def iter_experts(module: nn.Module) -> Iterator[ExpertParallelExperts]:
    """The expert-parallel experts modules inside `module`, in module order."""
    for child in module.modules():
        if isinstance(child, ExpertParallelExperts):
            yield child


def has_sharded_fsdp1() -> bool:
    """Whether an FSDP1 instance of any patched model holds flat shards."""
    return any(
        module._handle is not None and module._handle.uses_sharded_strategy
        for state in live_states()
        for module in state.fsdp1_modules()
    )


_is_wrapper_hook_registered = False


def _register_wrapper_hook() -> None:
    global _is_wrapper_hook_registered
    if not _is_wrapper_hook_registered:
        register_module_module_registration_hook(_note_wrapper)
        _is_wrapper_hook_registered = True


def _note_wrapper(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    """Called by torch for every submodule assignment; remembers wrappers of patched models.

    A wrapper outside the model (FSDP1 without auto wrap, DDP) cannot be found from inside it.
    PEFT's tuners, which would wrap patched experts with factors of their own, are refused.
    """
    if not isinstance(submodule, nn.Module):
        return
    if name not in module._modules and is_peft_module(module) and states_of(submodule):
        raise ValueError(
            "the model is expert-parallel already: call get_peft_model first, then "
            "apply_expert_parallel."
        )
    if isinstance(module, _WRAPPERS):
        for state in states_of(submodule):
            if state.is_started and isinstance(module, FullyShardedDataParallel):
                raise ValueError(
                    "a forward ran between apply_expert_parallel and FullyShardedDataParallel, so "
                    "the experts settled without its mixed precision; wrap the model before its "
                    "first forward."
                )
            state.wrapper_refs.append(weakref.ref(module))
