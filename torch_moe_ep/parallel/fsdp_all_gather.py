"""`set_fsdp_all_gather`: FSDP2's all-gather without the multiprocessors that the experts need.

NCCL's all-gather is a kernel: it takes streaming multiprocessors (SMs) from the GEMMs under which
FSDP2 hides it. Two ways move the bytes with the GPU's copy engines:

nccl           NCCL's zero-CTA policy, on memory that the process group allocates. The policy is
               fixed when a communicator is made; whether a group's all-gathers take no SM with it
               is looked at in a trace of one.
copy_engine    every rank puts its shard where the others can read it (torch's symmetric memory),
               and each copies the others' shards. Two barriers of one block are all that runs on
               an SM.
"""

import logging
import socket
import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

from torch_moe_ep.gather import all_gather
from torch_moe_ep.parallel.copy_engine import CopyEngineAllGather, ShardBuffer
from torch_moe_ep.parallel.state import fsdp_param_groups, is_fsdp2

logger = logging.getLogger(__name__)

KINDS = ("auto", "nccl", "copy_engine")
PROBE_BYTES = 1 << 20
NOT_ON_GPUS = "its parameters are not on GPUs"
NOT_NCCL = "its process group is not NCCL's"
SEVERAL_HOSTS = "its process group spans several hosts"
SHARED_GPU = "two of its ranks share a GPU"
NOT_MAPPED = "its GPUs cannot map each other's memory"
# Why no copy engine can serve, mildest first; ranks compare the places.
OBSTACLES = ("", NOT_ON_GPUS, NOT_NCCL, SEVERAL_HOSTS, SHARED_GPU, NOT_MAPPED)


def set_fsdp_all_gather(model: nn.Module, kind: str = "auto") -> str:
    """Choose how FSDP2 gathers parameters, for every FSDP2 module of a model.

    Call it once, after `fully_shard` on all modules and before the first forward. Values are the
    same bits with every choice; of reduce-scatter "nccl" changes where its memory comes from.

    Args:
        model: the model, or a part of it, with `fully_shard` applied; the experts of a patched
            model are among its FSDP2 modules.
        kind: "nccl": NCCL's zero-CTA policy, for groups made with it
            (``ProcessGroupNCCL.Options().config.cta_policy``); "copy_engine": copies over symmetric
            memory; "auto": the first of the two that can be had.

    Returns:
        What was set: "nccl", "copy_engine", or "default" where neither can be had (on the CPU, over
        gloo, between hosts, on GPUs that cannot map each other): FSDP2's own then stays, which
        rank 0 logs once at INFO, with the reason.

    Raises:
        ValueError: an unknown kind, no FSDP2 module in the model, or one whose all-gather somebody
            has set already.

    Collective over all ranks, which decide alike; syncs the host. "copy_engine" keeps a buffer of
    the largest shard on each process group.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    groups = _param_groups(model)
    _check_untouched(groups)
    spread = [group for group in groups if _process_group(group).size() > 1]
    process_groups = {id(_process_group(group)): group for group in spread}
    reason = _worst([_obstacle(group) for group in process_groups.values()])
    if not spread:
        reason = "no FSDP2 module of it is spread over ranks"
    if not reason and kind in ("auto", "nccl"):
        if _is_zero_cta(spread):
            for group in spread:
                group.set_allocate_memory_from_process_group(True)
            return _said("nccl", "")
        if kind == "nccl":
            reason = "its process groups' all-gather runs on SMs (not made with NCCL's zero-CTA "
            reason += "policy, or torch does not register their memory for it)"
    if reason:
        return _said("default", reason)
    buffers = _make_buffers(spread)
    for group in spread:
        group._all_gather_comm = CopyEngineAllGather(buffers[_process_group(group).group_name])
    return _said("copy_engine", "")


def _param_groups(model: nn.Module) -> list[Any]:
    modules = [module for module in model.modules() if is_fsdp2(module)]
    if not modules:
        raise ValueError(
            "the model has no FSDP2 module; call set_fsdp_all_gather after fully_shard on all of "
            "its modules."
        )
    return [group for module in modules for group in fsdp_param_groups(module)]


def _check_untouched(groups: list[Any]) -> None:
    for group in groups:
        if not isinstance(group._all_gather_comm, DefaultAllGather):
            raise ValueError(
                f"an FSDP2 module of the model gathers by {type(group._all_gather_comm).__name__} "
                f"already; call set_fsdp_all_gather once, and no set_custom_all_gather before it."
            )


def _process_group(group: Any) -> dist.ProcessGroup:
    found: dist.ProcessGroup = group._all_gather_process_group
    return found


def _obstacle(group: Any) -> str:
    """What this rank sees in the way of one parameter group; "": nothing.

    Collective over its process group where that is NCCL's.
    """
    if group.device.type != "cuda":
        return NOT_ON_GPUS
    process_group = _process_group(group)
    if process_group._get_backend(group.device).name() != "nccl":
        return NOT_NCCL
    here = torch.cuda.current_device()
    name = zlib.crc32(socket.gethostname().encode())
    notes = all_gather(torch.tensor([name, here], device=group.device), process_group).tolist()
    if any(host != name for host, _ in notes):
        return SEVERAL_HOSTS
    devices = [device for _, device in notes]
    if len(set(devices)) < len(devices):
        return SHARED_GPU
    others = [device for device in devices if device != here]
    visible = torch.cuda.device_count()
    can_map = all(
        device < visible and torch.cuda.can_device_access_peer(here, device) for device in others
    )
    return "" if can_map else NOT_MAPPED


def _worst(obstacles: list[str]) -> str:
    """The last of OBSTACLES that any rank has. Collective over all ranks."""
    device = "cuda" if _has_cuda_group() else "cpu"
    own = torch.tensor([max(map(OBSTACLES.index, obstacles), default=0)], device=device)
    return OBSTACLES[int(all_gather(own).max())]


def _has_cuda_group() -> bool:
    world = dist.group.WORLD
    assert world is not None
    return torch.device("cpu") not in world._device_types


def _is_zero_cta(groups: list[Any]) -> bool:
    """Whether an all-gather on each process group of these runs no kernel of NCCL on any rank.

    Collective over all ranks; syncs the host.
    """
    found = {_process_group(group).group_name: _process_group(group) for group in groups}
    is_reached = all(_has_zero_cta_policy(group) for group in found.values())
    if not _all_ranks(is_reached):
        return False
    traced = [_probe(group) for group in found.values()]  # all of them: each is collective
    return _all_ranks(all(traced))


def _has_zero_cta_policy(group: dist.ProcessGroup) -> bool:
    device = torch.device("cuda", torch.cuda.current_device())
    backend: Any = group._get_backend(device)
    policy = getattr(backend.options.config, "cta_policy", None)
    zero = getattr(dist.ProcessGroupNCCL, "NCCL_CTA_POLICY_ZERO", None)
    return zero is not None and policy == zero and bool(backend.supports_tensor_alloc(device))


def _probe(group: dist.ProcessGroup) -> bool:
    """Trace one all-gather in the group's memory; whether it ran without a kernel of NCCL."""
    from torch.profiler import ProfilerActivity, profile

    device = torch.device("cuda", torch.cuda.current_device())
    backend = group._get_backend(device)
    num_bytes = PROBE_BYTES // group.size() * group.size()
    output = backend.allocate_tensor(num_bytes, dtype=torch.uint8, device=device)
    own = output.chunk(group.size())[group.rank()]
    dist.all_gather_into_tensor(output, own, group=group)  # connects
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        dist.all_gather_into_tensor(output, own, group=group)
        torch.cuda.synchronize()
    on_device = [event.name for event in trace.events() if "CUDA" in str(event.device_type)]
    return bool(on_device) and not any("nccl" in name.lower() for name in on_device)


def _all_ranks(is_so: bool) -> bool:
    device = "cuda" if _has_cuda_group() else "cpu"
    return bool(all_gather(torch.tensor([int(is_so)], device=device)).min())


def _make_buffers(groups: list[Any]) -> dict[str, ShardBuffer]:
    """One buffer for each process group, of the largest shard that is gathered on it."""
    sizes: dict[str, int] = {}
    found: dict[str, dist.ProcessGroup] = {}
    for group in groups:
        process_group = _process_group(group)
        found[process_group.group_name] = process_group
        num_bytes = max(_shard_bytes(group), sizes.get(process_group.group_name, 0))
        sizes[process_group.group_name] = num_bytes
    return {name: ShardBuffer(group, sizes[name]) for name, group in found.items()}


def _shard_bytes(group: Any) -> int:
    """At most this many bytes a rank gives to one all-gather: padded shards, in the wider dtype."""
    total = 0
    for param in group.fsdp_params:
        own = param.sharded_param.dtype
        dtypes = [own, param.mp_policy.param_dtype or own]
        total += param._sharded_param_data.numel() * max(dtype.itemsize for dtype in dtypes)
    return total


def _said(kind: str, reason: str) -> str:
    """Log the choice once, on rank 0."""
    if dist.get_rank() == 0:
        if reason:
            logger.info("set_fsdp_all_gather: FSDP2's own all-gather stays, since %s.", reason)
        else:
            logger.info("set_fsdp_all_gather: FSDP2 gathers by %s.", kind)
    return kind
