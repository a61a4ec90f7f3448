"""Optimizers over expert (DTensor) and dense (plain) parameters.

Under FSDP1, DDP or no FSDP the dense parameters are plain tensors and the experts DTensors.
torch's foreach and fused optimizers refuse a parameter group that holds both. Two public global
hooks split such groups by kind for the length of `step()` and join them after it: learning-rate
schedulers, checkpoints and the user see their own groups only. Groups of one kind (all of them
under FSDP2) are left alone.
"""

import weakref
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FlatParameter
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from torch_moe_ep.parallel.average import warn_of_unaveraged
from torch_moe_ep.parallel.flags import check_flags
from torch_moe_ep.parallel.state import ExpertParallelState, live_states
from torch_moe_ep.routing.bias import move_biases

Group = dict[str, Any]

_joined_groups: "weakref.WeakKeyDictionary[Optimizer, list[Group]]" = weakref.WeakKeyDictionary()
_replaced: "weakref.WeakValueDictionary[int, nn.Parameter]" = weakref.WeakValueDictionary()
_checked_for_stale: "weakref.WeakSet[Optimizer]" = weakref.WeakSet()
_are_hooks_registered = False


def param_groups(model: nn.Module, *, weight_decay: float) -> list[Group]:
    """Parameter groups for an optimizer: weight decay on all but norms and biases.

    Args:
        model: the model, patched or not, before or after FSDP.
        weight_decay: decay of everything else, experts, router and embeddings included.

    Returns:
        Two groups, ``{"params", "weight_decay"}``: with decay, without. Trainable parameters
        only, each once, in module order. An empty group is left out.

    Raises:
        ValueError: FSDP1 with ``use_orig_params=False``, which joins norms and weights in one
            tensor.

    Not collective. A norm is a module whose class name contains "norm".
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    seen: set[int] = set()
    for module in model.modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, param in module.named_parameters(recurse=False):
            if name.endswith("_flat_param"):
                raise ValueError(
                    "param_groups cannot tell norms from weights inside FSDP1's flat parameters; "
                    "wrap with use_orig_params=True."
                )
            if id(param) in seen or not param.requires_grad:
                continue
            seen.add(id(param))
            is_plain = is_norm or name == "bias" or name.endswith("_bias")
            (plain if is_plain else decayed).append(param)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def remember_replaced(param: nn.Parameter) -> None:
    """Note a whole expert weight that the patch takes out of the model; holds no reference to it.

    An optimizer that was built before the patch holds it still, and would step it in vain.
    """
    _replaced[id(param)] = param


def remember_dense(state: ExpertParallelState) -> None:
    """Note a patched model's dense parameters, which `fully_shard` replaces by others."""
    for name, param in state.model.named_parameters():
        if not isinstance(param, DTensor):
            state.dense_at_patch[name] = param


def register_step_hooks() -> None:
    """Register the two step hooks, once per process."""
    global _are_hooks_registered
    if not _are_hooks_registered:
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_after_step)
        _are_hooks_registered = True


def _before_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    _join_groups(optimizer)
    _check_not_replaced(optimizer)
    _check_not_stale(optimizer)
    states = _stepped_states(optimizer)
    if not states:
        return
    _check_not_zero(optimizer)
    unchecked = [state for state in states if not state.is_flag_checked]
    for state in states:
        warn_of_unaveraged(state)
        state.is_flag_checked = False
    check_flags(unchecked)
    _split_groups(optimizer)


def _after_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    _join_groups(optimizer)
    for state in _stepped_states(optimizer):
        move_biases(state.routers.values())


def _check_not_replaced(optimizer: Optimizer) -> None:
    if not _replaced:  # the usual case: nobody holds them, so they are gone
        return
    for group in optimizer.param_groups:
        if any(_replaced.get(id(param)) is param for param in group["params"]):
            raise ValueError(
                f"the {type(optimizer).__name__} holds expert weights of the model before "
                f"apply_expert_parallel, and would train nothing; build the optimizer after "
                f"apply_expert_parallel and FSDP."
            )


def _check_not_stale(optimizer: Optimizer) -> None:
    """Raise where dense parameters were replaced since: the experts, never replaced, hide it."""
    if optimizer in _checked_for_stale:
        return
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    for state in live_states():
        num_replaced = sum(id(param) in held for param in _replaced_dense(state))
        if num_replaced:
            raise ValueError(
                f"the {type(optimizer).__name__} holds {num_replaced} dense parameters that the "
                f"model has no longer (fully_shard and FSDP1's flat parameters replace them), and "
                f"would not train what is in their place; build the optimizer after FSDP."
            )
    _checked_for_stale.add(optimizer)


def _check_not_zero(optimizer: Optimizer) -> None:
    # By name: importing the class compiles torch's scripted optimizers, and warns.
    if any(cls.__name__ == "ZeroRedundancyOptimizer" for cls in type(optimizer).__mro__):
        raise ValueError(
            "ZeroRedundancyOptimizer has one rank step a parameter and send it to the others, but "
            "every rank holds experts of its own; give it the dense parameters alone, and the "
            "experts another optimizer, whose state is spread as they are."
        )


def _replaced_dense(state: ExpertParallelState) -> list[nn.Parameter]:
    """Dense parameters of the patch in whose place the model has others; not what was cut out."""
    present = dict(state.model.named_parameters())
    is_flat = any(isinstance(param, FlatParameter) for param in present.values())
    return [
        param
        for name, param in state.dense_at_patch.items()
        if (is_flat if (now := present.get(name)) is None else now is not param)
    ]


def _stepped_states(optimizer: Optimizer) -> list[ExpertParallelState]:
    """States of the patched models whose experts this optimizer steps; the same on all ranks."""
    stepped = {
        id(param)
        for group in optimizer.param_groups
        for param in group["params"]
        if isinstance(param, DTensor)
    }
    if not stepped:
        return []
    return [
        state
        for state in live_states()
        if any(
            id(param) in stepped
            for experts in state.experts.values()
            for param in experts.held_parameters()
        )
    ]


def _split_groups(optimizer: Optimizer) -> None:
    split: list[Group] = []
    for group in optimizer.param_groups:
        sharded = [param for param in group["params"] if isinstance(param, DTensor)]
        plain = [param for param in group["params"] if not isinstance(param, DTensor)]
        if sharded and plain:
            split += [{**group, "params": plain}, {**group, "params": sharded}]
        else:
            split.append(group)
    if len(split) != len(optimizer.param_groups):
        _joined_groups[optimizer] = optimizer.param_groups
        optimizer.param_groups = split


def _join_groups(optimizer: Optimizer) -> None:
    """Put the user's groups back; also after a step that raised, at the next one."""
    joined = _joined_groups.pop(optimizer, None)
    if joined is None:
        return
    options: dict[int, Group] = {
        id(param): group
        for group in optimizer.param_groups
        for param in group["params"]
        if isinstance(param, torch.Tensor)
    }
    for group in joined:
        stepped = options.get(id(group["params"][0])) if group["params"] else None
        if stepped is not None and stepped is not group:
            group.update({key: value for key, value in stepped.items() if key != "params"})
    optimizer.param_groups = joined
