"""What `apply_expert_parallel` puts around the model's forward.

At the first forward the user's FSDP is in place, so this is where a wrong dense mesh can be
seen, and where experts that have no FSDP2 root above them get one of their own.

Why a root: FSDP2 lets both all-gather streams wait for the compute stream once per root forward.
If each experts module were its own root (FSDP1, DDP or nothing outside), every gather would wait
for all compute queued before it, fully exposed, and neither forward nor backward prefetch would
have a target. The hidden root is no child of the model: no key of it enters a state dict.
"""

import functools
import inspect
import itertools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel

from torch_moe_ep.integrations import trainer_methods
from torch_moe_ep.integrations.peft import dense_wrapper
from torch_moe_ep.layer import ExpertParallelExperts
from torch_moe_ep.ops.main_grad import WITH_FSDP
from torch_moe_ep.parallel import order
from torch_moe_ep.parallel.batch_check import warn_of_equal_batches
from torch_moe_ep.parallel.masters import settle_masters
from torch_moe_ep.parallel.state import ExpertParallelState, fsdp_param_groups, fsdp_state


class ExpertsRoot(nn.Module):
    """FSDP2 root over all experts of a model; runs the model's forward inside its own."""

    def __init__(self, experts: list[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, call: Callable[[], Any]) -> Any:
        """Run `call`, the model's forward with its arguments bound (hidden from FSDP's casts)."""
        return call()


def wrap_forward(state: ExpertParallelState) -> None:
    """Wrap ``model.forward`` (signature kept), and ``model.generate`` where there is one.

    It stays a method: hosts take ``model.forward.__func__`` (accelerate, TRL).
    """
    forward = state.model.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        if state.root is None:
            return forward(*args, **kwargs)
        return state.root(functools.partial(forward, *args, **kwargs))

    @functools.wraps(forward)
    def run(_model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not state.is_started:
            _start_eagerly(state)
        if state.gathered_ahead:
            _drop_stale_gathers_eagerly(state)
        if not state.is_batch_checked and state.model.training and torch.is_grad_enabled():
            state.is_batch_checked = True
            warn_of_equal_batches(state, args, kwargs)
        if torch.compiler.is_compiling() or not order.is_watching():
            return call(*args, **kwargs)
        with order.forward_of(state.model, state.wrappers(), next(iter(state.experts.values()))):
            return call(*args, **kwargs)

    bound = inspect.signature(forward)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    vars(run)["__signature__"] = bound.replace(parameters=[itself, *bound.parameters.values()])
    state.model.forward = types.MethodType(run, state.model)
    generate = getattr(state.model, "generate", None)
    if generate is not None and state.mesh.size() > state.mesh["replicate"].size():
        state.model.__dict__["generate"] = _synced_generate(generate)


def _synced_generate(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Let `generate` go on until every rank is done.

    Ranks finish at different lengths, and one that stopped early would leave the others waiting
    in an exchange of tokens for ever. An explicit `synced_gpus` wins.
    """
    parameters = inspect.signature(generate).parameters
    has_keywords = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if "synced_gpus" not in parameters and not has_keywords:
        return generate

    @functools.wraps(generate)
    def run(*args: Any, **kwargs: Any) -> Any:
        if "synced_gpus" not in list(parameters)[: len(args)]:
            kwargs.setdefault("synced_gpus", True)
        return generate(*args, **kwargs)

    return run


def _start(state: ExpertParallelState) -> None:
    """Guard, hidden root and prefetch lists, at the first forward.

    Local, but for a first forward in inference mode (see `_gather_for_training`).
    """
    _check_dense_world(state)
    settle_masters(state)
    _check_experts(state)
    _check_adapters(state)
    experts = list(state.experts.values())
    roots = [fsdp_state(module)._is_root for module in experts]
    if all(is_root is None for is_root in roots) and not state.fsdp2_modules():
        state.root = _make_root(state)
        _prefetch_forward(state, [])
        if torch.is_inference_mode_enabled():
            _gather_for_training(state.root, experts)
    elif all(is_root is False for is_root in roots):
        contexts = {id(fsdp_state(module)._state_ctx) for module in experts}
        if len(contexts) == 1:
            _prefetch_forward(state, state.fsdp2_modules())
    trainer_methods.register_trainer_methods()
    state.is_started = True


# Nothing of these for torch.compile to trace.
_start_eagerly: Callable[[ExpertParallelState], None] = torch.compiler.disable(_start)


def _make_root(state: ExpertParallelState) -> nn.Module:
    root = ExpertsRoot(list(state.experts.values()))
    fully_shard(
        root,
        mesh=state.mesh["shard"],
        mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False),
    )
    return root


def _gather_for_training(root: nn.Module, experts: list[ExpertParallelExperts]) -> None:
    """Gather each layer's experts once outside of inference mode, and free them again.

    FSDP2 keeps the tensors of its first gather for all later ones. Made in inference mode (a
    script that evaluates before it trains) they could not be saved for backward. Collective.
    """
    with torch.inference_mode(False), torch.no_grad():
        fsdp_state(root)._lazy_init()
        for module in experts:
            assert isinstance(module, FSDPModule)
            module.unshard()
            module.reshard()


def _prefetch_forward(state: ExpertParallelState, others: list[nn.Module]) -> None:
    """Gather the next layer, experts and what is sharded around them, while this one computes.

    Expert parallelism blocks the CPU on its token counts, so the CPU runs ahead too little for
    FSDP2's implicit prefetch: what is not asked for before rows are sent is gathered after them.
    Lists that the user has set stay.

    Args:
        state: with experts in the order of the forward; what is gathered ahead is noted there.
        others: the modules that the user gave to ``fully_shard``.
    """
    inside = {other: set(other.modules()) for other in others}
    for module, following in itertools.pairwise(state.experts.values()):
        assert isinstance(module, FSDPModule)
        assert isinstance(following, FSDPModule)
        around: list[Any] = [
            other for other, parts in inside.items() if following in parts and module not in parts
        ]
        if not fsdp_state(module)._states_to_forward_prefetch:
            module.set_modules_to_forward_prefetch([*around, following])
            state.gathered_ahead += [*around, following]


def _drop_stale_gathers(state: ExpertParallelState) -> None:
    """Forget what an earlier forward gathered ahead and left before it was used.

    An early exit, a skipped layer or an exception does that. FSDP2 forgets it in backward; without
    one, the next forward would compute with the weights as they were then. Local; waits for it.
    """
    for module in state.gathered_ahead:
        for group in fsdp_param_groups(module):
            result = group._all_gather_result
            if result is None:
                continue
            if result.all_gather_event is not None:
                torch.accelerator.current_stream().wait_event(result.all_gather_event)
            if isinstance(result.all_gather_work, dist.Work):
                result.all_gather_work.wait()
            group._all_gather_result = None


_drop_stale_gathers_eagerly: Callable[[ExpertParallelState], None] = torch.compiler.disable(
    _drop_stale_gathers
)


def _check_dense_world(state: ExpertParallelState) -> None:
    """Raise ValueError when dense gradients would not be averaged over all W ranks."""
    world_size = state.mesh.size()
    sizes: dict[int, str] = {}
    for module in state.fsdp2_modules():
        for group in fsdp_param_groups(module):
            dense_mesh = group.mesh_info.mesh
            if dense_mesh.device_type != state.mesh.device_type:
                raise ValueError(
                    f"fully_shard put dense parameters on {dense_mesh.device_type}, but the "
                    f"experts' mesh is on {state.mesh.device_type}; make it with "
                    f'init_device_mesh("{dense_mesh.device_type}", ...), or give fully_shard a '
                    f"mesh on {state.mesh.device_type} (its default prefers a GPU)."
                )
            sizes[dense_mesh.size()] = "fully_shard"
    for fsdp1 in state.fsdp1_modules():
        replicas = getattr(fsdp1, "_inter_node_pg", None)
        if fsdp1.sharding_strategy == ShardingStrategy.NO_SHARD:
            replicas = None  # a hybrid strategy on shard groups of one rank reduces over none
        size = dist.get_world_size(fsdp1.process_group)
        sizes[size * (replicas.size() if replicas is not None else 1)] = "FullyShardedDataParallel"
    for wrapper in state.wrappers():
        if isinstance(wrapper, DistributedDataParallel):
            sizes[dist.get_world_size(wrapper.process_group)] = "DistributedDataParallel"
    for size, kind in sizes.items():
        if size != world_size:
            raise ValueError(
                f"{kind} spreads dense parameters over {size} ranks, but all {world_size} ranks "
                f"see different data, so their gradients would be wrong; leave its mesh or "
                f"process group out, or make one with torch_moe_ep.dense_mesh(mesh, shard_degree)."
            )


def _check_adapters(state: ExpertParallelState) -> None:
    """PEFT parametrizes such a weight in each forward, which FSDP1's views do not allow."""
    name = dense_wrapper(state.model) if state.fsdp1_modules() else None
    if name is not None:
        raise ValueError(
            f"PEFT's target_parameters do not work under FSDP1 but on experts ({name}); use FSDP2, "
            f"or leave this weight out of target_parameters."
        )


def _check_experts(state: ExpertParallelState) -> None:
    for name, module in state.experts.items():
        named = [item for holder in module.holders() for item in holder._parameters.items()]
        for key, param in named:
            if param is None:
                continue
            if getattr(param, "main_grad", None) is not None:
                raise ValueError(f"{name}.{key} {WITH_FSDP}.")
            if param.is_meta:
                raise ValueError(
                    f"{name}.{key} is on the meta device; call model.to_empty(device=...) and load "
                    f"weights, or torch_moe_ep.parallel.initialize_experts(model)."
                )
