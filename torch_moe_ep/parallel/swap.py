"""Turn an experts module into an expert-parallel one, in place.

The module object stays (hooks, names, references) and its class becomes a subclass of the class
met, so isinstance checks, state-dict keys and `_init_weights` of the host keep working. Each
weight becomes a DTensor of global shape ``[E, ...]`` that holds this rank's experts: for E = 8
and P = 4, ep rank 1 holds experts 2 and 3.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from torch_moe_ep.config import MoEConfig
from torch_moe_ep.layer import ExpertParallelExperts
from torch_moe_ep.parallel.optimizer import remember_replaced
from torch_moe_ep.parallel.state import ExpertParallelState

WEIGHT_NAMES = ("gate_up_proj", "down_proj")

# What a rank holds beside its own experts while rank 0's weights are handed out: large enough
# that a broadcast is limited by the wire, small beside one expert of a large model (235 MB).
SYNC_CHUNK_BYTES = 64 * 1024**2

_classes: dict[type[nn.Module], type[nn.Module]] = {}


def swap_experts(
    module: nn.Module, state: ExpertParallelState, config: MoEConfig, sync_from_rank0: bool
) -> None:
    """Change one experts module's class and weights.

    Args:
        module: an experts module that passed the checks; weights on any device or meta.
        state: the model's state; gives mesh and device.
        config: handed to the layer; its `gradient` picks the weight-gradient scale.
        sync_from_rank0: take the weights of global rank 0 instead of this rank's.

    Copies this rank's slice of each weight to the mesh's device. Collective over all ranks with
    `sync_from_rank0` (a broadcast per SYNC_CHUNK_BYTES of each weight), else local.
    """
    ep_mesh = state.mesh["ep"]
    num_experts = _weight(module, WEIGHT_NAMES[0]).shape[0]
    for name in WEIGHT_NAMES:
        whole = _weight(module, name)
        remember_replaced(whole)
        module._parameters[name] = shard_weight(whole, state, sync_from_rank0)
    module.__class__ = expert_parallel_class(type(module))
    assert isinstance(module, ExpertParallelExperts)
    module.setup_expert_parallel(
        ep_group_name=ep_mesh.get_group().group_name if ep_mesh.size() > 1 else "",
        num_experts=num_experts,
        weight_grad_scale=weight_grad_scale(config, state.mesh.size(), ep_mesh.size()),
        config=config,
        device=state.device,
        ranks_per_node=state.ranks_per_node,
        uses_peers=state.uses_peers,
    )


def weight_grad_scale(config: MoEConfig, world_size: int, ep_size: int) -> float:
    """The factor on expert weight gradients, applied once, inside the expert operator.

    The reverse all-to-all leaves a sum over P ranks; FSDP then averages over W / P ranks, which
    gives P * (sum over W) / W. "mean" wants (sum over W) / W: 1 / P. "sum" wants the sum: W / P.
    """
    return 1.0 / ep_size if config.gradient == "mean" else world_size / ep_size


def expert_parallel_class(base: type[nn.Module]) -> type[nn.Module]:
    """The expert-parallel subclass of an experts class; one per class met."""
    if base not in _classes:
        name = f"ExpertParallel{base.__name__}"
        _classes[base] = type(name, (ExpertParallelExperts, base), {"__doc__": base.__doc__})
    return _classes[base]


def local_slice(full: torch.Tensor, state: ExpertParallelState) -> torch.Tensor:
    """This rank's part of a full weight ``[E, ...]`` as the FSDP shards hold it (a view).

    Experts first, then the FSDP chunk: E = 8, P = 2, S = 2, dimension 1 of length 256 gives ep
    rank 1, shard rank 0 the view ``full[4:8, 0:128]``.
    """
    return full[local_box(full.shape, state)]


def local_box(full_shape: torch.Size, state: ExpertParallelState) -> tuple[slice, ...]:
    """Where this rank's part lies in a full weight ``[E, a, b]``: `local_slice` as an index."""
    ep_mesh, mesh = state.mesh["ep"], state.mesh["shard"]
    return expert_box(
        full_shape,
        (ep_mesh.get_local_rank(), ep_mesh.size()),
        (mesh.get_local_rank(), mesh.size()),
    )


def expert_box(
    full_shape: torch.Size, ep: tuple[int, int], shard: tuple[int, int]
) -> tuple[slice, ...]:
    """Where one rank's part lies in a full weight ``[E, a, b]``.

    Args:
        full_shape: of the weight; P divides E.
        ep: (rank, P) in the EP group.
        shard: (rank, S) in the shard group.
    """
    num_local = full_shape[0] // ep[1]
    start = [ep[0] * num_local, 0, 0]
    length = [num_local, *full_shape[1:]]
    dim = shard_dim(torch.Size(length), shard[1])
    chunk = -(-length[dim] // shard[1])  # rounded up, as torch.chunk does
    first = min(shard[0] * chunk, length[dim])
    start[dim] += first
    length[dim] = min(chunk, length[dim] - first)
    return tuple(slice(a, a + n) for a, n in zip(start, length, strict=True))


def shard_slice(experts: torch.Tensor, state: ExpertParallelState) -> torch.Tensor:
    """This rank's FSDP chunk of its EP rank's weights ``[L, a, b]`` (a view)."""
    mesh = state.mesh["shard"]
    dim = shard_dim(experts.shape, mesh.size())
    chunks = experts.chunk(mesh.size(), dim=dim)
    rank = mesh.get_local_rank()
    return chunks[rank] if rank < len(chunks) else experts.narrow(dim, 0, 0)


def shard_dim(local_shape: torch.Size, shard_size: int) -> int:
    """The dimension over which FSDP shards an expert weight ``[L, a, b]``.

    The first of 1 and 2 that the shard degree divides: no strided placement. Else 0, where FSDP
    pads: ranks may then hold uneven numbers of experts.
    """
    return next((dim for dim in (1, 2) if local_shape[dim] % shard_size == 0), 0)


def shard_like(param: DTensor, local: torch.Tensor) -> DTensor:
    """A DTensor laid out as `param`, of which this rank holds `local`. Local."""
    return DTensor.from_local(
        local,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )


def _weight(module: nn.Module, name: str) -> nn.Parameter:
    param = module._parameters[name]
    assert param is not None
    return param


def shard_weight(
    param: nn.Parameter, state: ExpertParallelState, sync_from_rank0: bool
) -> nn.Parameter:
    """This EP rank's experts of a whole weight ``[E, a, b]``, as a DTensor on the mesh's device.

    Args:
        param: the whole weight, on any device or meta.
        state: the model's state; gives mesh and device.
        sync_from_rank0: take global rank 0's weight.

    Copies the slice. Collective over all ranks with `sync_from_rank0`, else local.
    """
    mesh = state.mesh["ep"]
    if sync_from_rank0:
        local = _from_rank0(param, state.device, mesh.get_local_rank(), mesh.size())
    else:
        local = param.detach().chunk(mesh.size(), dim=0)[mesh.get_local_rank()]
    if not local.is_meta:
        local = local.to(state.device)
    if local.untyped_storage().nbytes() != local.numel() * local.element_size():
        local = local.clone(memory_format=torch.contiguous_format)
    sharded = DTensor.from_local(local.contiguous(), mesh, [Shard(0)], run_check=False)
    return nn.Parameter(sharded, requires_grad=param.requires_grad)


def _from_rank0(
    param: nn.Parameter, device: torch.device, ep_rank: int, ep_size: int
) -> torch.Tensor:
    """This EP rank's experts ``[L, a, b]`` of global rank 0's weight ``[E, a, b]``.

    Rows ``[b]`` travel in chunks of at most SYNC_CHUNK_BYTES (or one row), so that a rank holds
    its own experts and one chunk, never the whole weight. Collective over all ranks.
    """
    num_rows = param.shape[0] * param.shape[1]
    num_local = num_rows // ep_size
    first = ep_rank * num_local
    row = param.shape[2:].numel()
    is_source = dist.get_rank() == 0
    rows = param.detach().reshape(num_rows, row) if is_source else param
    local = torch.empty(num_local, row, dtype=param.dtype, device=device)
    step = max(1, SYNC_CHUNK_BYTES // max(1, row * param.element_size()))
    for start in range(0, num_rows, step):
        end = min(start + step, num_rows)
        if is_source:
            chunk = rows[start:end].to(device).contiguous()
        else:
            chunk = torch.empty(end - start, row, dtype=param.dtype, device=device)
        dist.broadcast(chunk, src=0)
        begin, stop = max(start, first), min(end, first + num_local)
        if begin < stop:
            local[begin - first : stop - first] = chunk[begin - start : stop - start]
    return local.view(-1, *param.shape[1:])
