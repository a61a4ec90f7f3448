"""The grid of ranks: ``("replicate", "shard", "ep")``, ep innermost.

W ranks see different data. P of them form an expert-parallel group, S an FSDP shard group of the
experts, R = W / (P * S) replicas. Rank of (r, s, e) is (r * S + s) * P + e, so an EP group is P
consecutive ranks and sits inside a node whenever P divides the node's ranks.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.device_mesh import init_device_mesh as _torch_init_device_mesh

from torch_moe_ep.parallel.agreement import agree, first_difference, meet

MESH_DIMS = ("replicate", "shard", "ep")


def init_device_mesh(
    device_type: str, expert_parallel_degree: int, hybrid_shard_degree: int = 0
) -> DeviceMesh:
    """Make the mesh that `apply_expert_parallel` wants, over all ranks.

    Args:
        device_type: ``"cuda"`` or ``"cpu"``.
        expert_parallel_degree: P, ranks that share one set of experts.
        hybrid_shard_degree: S, ranks over which FSDP shards each rank's experts; 0 means W / P
            (no replicas).

    Returns:
        A mesh of shape (W / (P * S), S, P) named ``("replicate", "shard", "ep")``. For W = 8,
        P = 2, S = 2: rank 5 is replicate 1, shard 0, ep 1.

    Raises:
        ValueError: on every rank: P * S does not divide W, ranks ask for different meshes, or
            "cuda" without a GPU. No process group.
        RuntimeError: a rank did not come within the time-out; the message names it.

    Collective: creates process groups.
    """
    world_size = _world_size()
    has_no_gpu = device_type == "cuda" and not torch.cuda.is_available()
    settings = {
        "device_type": f"{device_type} without a GPU" if has_no_gpu else device_type,
        "expert_parallel_degree": str(expert_parallel_degree),
        "hybrid_shard_degree": str(hybrid_shard_degree),
    }
    agree("init_device_mesh", settings, first_difference)
    if has_no_gpu:
        raise ValueError(
            'init_device_mesh("cuda", ...) needs GPUs and torch sees none; take "cpu", or look at '
            "CUDA_VISIBLE_DEVICES and the driver."
        )
    shape = grid_shape(world_size, expert_parallel_degree, hybrid_shard_degree)
    return _torch_init_device_mesh(device_type, shape, mesh_dim_names=MESH_DIMS)


def grid_shape(
    world_size: int, expert_parallel_degree: int, hybrid_shard_degree: int
) -> tuple[int, int, int]:
    """(R, S, P) of W ranks; `hybrid_shard_degree` 0 means S = W / P. Not collective.

    Raises:
        ValueError: a degree out of range, or P * S does not divide W.
    """
    for name, degree in (
        ("expert_parallel_degree", expert_parallel_degree),
        ("hybrid_shard_degree", hybrid_shard_degree),
    ):
        if not hasattr(degree, "__index__"):
            raise ValueError(
                f"{name} must be a whole number of ranks, got {degree!r} ({type(degree).__name__})."
            )
    if expert_parallel_degree < 1:
        raise ValueError(
            f"expert_parallel_degree must be at least 1, got {expert_parallel_degree}."
        )
    if hybrid_shard_degree < 0:
        raise ValueError(
            f"hybrid_shard_degree must be 0 (shard over W / P ranks) or positive, got "
            f"{hybrid_shard_degree}."
        )
    group_size = expert_parallel_degree * max(1, hybrid_shard_degree)
    if world_size < 1 or world_size % group_size != 0:
        names, values = "expert_parallel_degree", f"{expert_parallel_degree}"
        if hybrid_shard_degree > 0:
            names, values = f"{names} * hybrid_shard_degree", f"{values} * {hybrid_shard_degree}"
        raise ValueError(
            f"{names} must divide the number of ranks: {values} does not divide {world_size}; "
            f"change a degree or the number of ranks."
        )
    shard_degree = hybrid_shard_degree or world_size // expert_parallel_degree
    replicas = world_size // (expert_parallel_degree * shard_degree)
    return replicas, shard_degree, expert_parallel_degree


def dense_mesh(mesh: DeviceMesh, shard_degree: int) -> DeviceMesh:
    """Make the mesh for the user's own HSDP of the dense (non-expert) parameters.

    Dense parameters are the same on all W ranks, so their mesh spans all of them; its shard
    degree is independent of the experts'.

    Args:
        mesh: the mesh of `init_device_mesh`.
        shard_degree: ranks over which FSDP shards the dense parameters.

    Returns:
        A mesh of shape (W / shard_degree, shard_degree) named ``("replicate", "shard")``, for
        ``fully_shard(..., mesh=)`` or FSDP1's ``device_mesh=``.

    Raises:
        ValueError: shard_degree does not divide W.
        RuntimeError: a rank did not come within the time-out; the message names it.

    Collective: creates process groups.
    """
    world_size = mesh.size()
    if shard_degree < 1 or world_size % shard_degree != 0:
        raise ValueError(
            f"shard_degree must divide the number of ranks, got {shard_degree} for {world_size} "
            f"ranks; choose one of its divisors."
        )
    meet("dense_mesh")
    return _torch_init_device_mesh(
        mesh.device_type,
        (world_size // shard_degree, shard_degree),
        mesh_dim_names=("replicate", "shard"),
    )


def mesh_misfit(mesh: object) -> str | None:
    """Say what is wrong with a mesh argument, or None. Not collective."""
    if not isinstance(mesh, DeviceMesh):
        return (
            f"mesh must be a DeviceMesh of torch_moe_ep.init_device_mesh, got "
            f"{type(mesh).__name__}."
        )
    if mesh.mesh_dim_names != MESH_DIMS:
        return (
            f"mesh must have the dimensions {MESH_DIMS}, got {mesh.mesh_dim_names}; make it with "
            f"torch_moe_ep.init_device_mesh."
        )
    if mesh.size() != _world_size():
        return (
            f"mesh must span all {_world_size()} ranks, got {mesh.size()}; make it with "
            f"torch_moe_ep.init_device_mesh."
        )
    return None


def _world_size() -> int:
    if not dist.is_initialized():
        raise ValueError(
            "torch.distributed is not initialised; call "
            "torch.distributed.init_process_group() first (under torchrun it needs no argument)."
        )
    return dist.get_world_size()
