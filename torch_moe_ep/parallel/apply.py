"""`apply_expert_parallel`: the one call of a user's script."""

from typing import TypeVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy

from torch_moe_ep.config import MoEConfig
from torch_moe_ep.integrations import peft
from torch_moe_ep.integrations.transformers import find_routers
from torch_moe_ep.integrations.transformers4 import FusedExperts, fuse_block
from torch_moe_ep.layer import ExpertParallelExperts
from torch_moe_ep.memory.fingerprint import watch_routing
from torch_moe_ep.parallel.adapters import swap_adapters
from torch_moe_ep.parallel.checks import Request, check_request
from torch_moe_ep.parallel.forward import wrap_forward
from torch_moe_ep.parallel.fsdp1 import ignore_in_ddp, mark_experts
from torch_moe_ep.parallel.fsdp2 import shard_experts
from torch_moe_ep.parallel.nodes import ranks_per_node
from torch_moe_ep.parallel.optimizer import register_step_hooks, remember_dense
from torch_moe_ep.parallel.peers import uses_peers
from torch_moe_ep.parallel.save_pretrained import gather_adapters_on_save, gather_on_save
from torch_moe_ep.parallel.state import ExpertParallelState, track
from torch_moe_ep.parallel.state_dict import register_state_dict_hooks
from torch_moe_ep.parallel.stock_clip import register_stock_clip_handlers
from torch_moe_ep.parallel.swap import swap_experts
from torch_moe_ep.routing.losses import follow_grad_scaler
from torch_moe_ep.routing.router import swap_router
from torch_moe_ep.routing.shuffle import shuffle_tokens

ModelT = TypeVar("ModelT", bound=nn.Module)


def apply_expert_parallel(
    model: ModelT,
    mesh: DeviceMesh,
    config: MoEConfig | None = None,
    *,
    mp_policy: MixedPrecisionPolicy | str | None = "inherit",
    offload_policy: OffloadPolicy | None = None,
    sync_from_rank0: bool = False,
    reshard_after_forward: bool = True,
) -> ModelT:
    """Spread a model's experts over the EP groups of a mesh, in place.

    Call it before FSDP, DDP and the optimizer, after `get_peft_model`; activation checkpointing
    may come before or after FSDP. Everything else of a stock FSDP2, FSDP1 or DDP script stays.

    Args:
        model: a Hugging Face mixture-of-experts model whose experts have Mixtral's shape, on the
            CPU, on the mesh's device or on meta. Experts end on the mesh's device (or on meta).
        mesh: the mesh of `init_device_mesh`.
        config: what is chosen; the default is exact Hugging Face behaviour.
        mp_policy: mixed precision of the experts. "inherit": parameter and reduce dtype of the
            FSDP around them, read at the first forward. None: none.
        offload_policy: FSDP2's offload policy for the experts' shards, gradients and optimizer
            state; the policy of the user's own `fully_shard` does not reach them.
        sync_from_rank0: take global rank 0's expert weights; other ranks may then hold anything,
            also meta tensors. Without it every rank must hold the same weights; a warning on rank
            0 says where one number of each expert weight differs.
        reshard_after_forward: free gathered expert weights after forward and gather them again
            in backward (FSDP2's meaning).

    Returns:
        The model. Expert weights are DTensors of their full shape ``[E, ...]``.

    Raises:
        ValueError: on every rank, before anything is changed, when the model, the mesh or the
            order of calls does not fit; the sentence says the way out. At the first forward when
            the dense parameters are spread over fewer ranks than see different data.

    Collective over all ranks; ranks compare notes through the process group's store first.
    """
    request = Request(
        model=model,
        mesh=mesh,
        config=MoEConfig() if config is None else config,
        mp_policy=mp_policy,
        offload_policy=offload_policy,
        sync_from_rank0=sync_from_rank0,
        reshard_after_forward=reshard_after_forward,
    )
    _patch(request, check_request(request))
    return model


def _patch(request: Request, found: dict[str, nn.Module]) -> None:
    """Swap and shard the experts found, then hook into what runs the model."""
    ep_size = request.mesh["ep"].size()
    over_peers = uses_peers(request.config, ep_size)
    state = ExpertParallelState(
        model=peft.base_model(request.model),
        mesh=request.mesh,
        experts={},
        ranks_per_node=0 if over_peers else ranks_per_node(request.config, ep_size),
        uses_peers=over_peers,
    )
    # Layer by layer: no rank holds more than one layer of its EP rank's experts whole.
    for name, proposed in found.items():
        _swap_layer(state, request, name, proposed)
    for name, module in found.items():
        for router in find_routers(state.model, {name: module})[0].values():
            state.linear_routers[name] = router
    if request.config.changes_router:
        _swap_routers(state, request)
    if request.config.global_token_shuffle:
        _shuffle_blocks(state, request.config.seed)
    _hook_into_model(state, request.model)
    remember_dense(state)
    register_step_hooks()
    register_stock_clip_handlers()


def _swap_layer(
    state: ExpertParallelState, request: Request, name: str, proposed: nn.Module
) -> None:
    """Swap and shard the experts at `name` and the adapters around them."""
    is_stand_in = isinstance(proposed, FusedExperts)
    module = fuse_block(state.model, name) if is_stand_in else proposed
    swap_experts(module, state, request.config, request.sync_from_rank0)
    assert isinstance(module, ExpertParallelExperts)
    module.layer_name = name
    state.experts[name] = module
    swap_adapters(module, peft.wrappers_of(state.model, name), state, request.sync_from_rank0)
    track(state)
    shard_experts(
        module,
        request.mesh,
        mp_policy=request.mp_policy,
        offload_policy=request.offload_policy,
        reshard_after_forward=request.reshard_after_forward,
    )


def _hook_into_model(state: ExpertParallelState, given: nn.Module) -> None:
    """Put hooks on the experts, and around forward and saving of the model that was given."""
    for name, experts in state.experts.items():
        for holder in experts.holders():
            mark_experts(holder)
            register_state_dict_hooks(holder)
        watch_routing(name, experts)
    for model in {id(m): m for m in (state.model, given)}.values():
        ignore_in_ddp(model)
    if peft.is_peft_model(given):
        gather_adapters_on_save(given)
    else:
        gather_on_save(state.model)
    wrap_forward(state)


def _swap_routers(state: ExpertParallelState, request: Request) -> None:
    follow_grad_scaler()
    routers, _ = find_routers(state.model, dict(state.experts))
    for (name, router), experts in zip(routers.items(), state.experts.values(), strict=True):
        num_experts = experts.num_global_experts
        state.routers[name] = swap_router(router, request.config, num_experts, state.device)


def _shuffle_blocks(state: ExpertParallelState, seed: int) -> None:
    """Wrap each mixture-of-experts block, the module that holds router and experts."""
    group = state.mesh["ep"].get_group()
    if group.size() == 1:
        return
    for name in state.experts:
        block = state.model.get_submodule(name.rpartition(".")[0])
        block.forward = shuffle_tokens(block.forward, group, f"{seed}/{name}/shuffle")
