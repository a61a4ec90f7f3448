"""The c10d backends "torch_moe_ep", "torch_moe_ep_gloo" and "torch_moe_ep_nccl".

torch asks a registered backend for one `Backend`, of the one kind CUSTOM, whatever the number of
devices: a group of gloo and NCCL cannot be had that way, and what asks for the kind is misled. It
also takes a whole `ProcessGroup`. So one is built here as torch builds its own, with the stock
backends under their own kinds, and the hooks are put around them.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from torch_moe_ep import label
from torch_moe_ep.hooks.library import native
from torch_moe_ep.parallel import order

BACKENDS = {
    "torch_moe_ep": ["cpu", "cuda"],
    "torch_moe_ep_gloo": ["cpu", "cuda"],
    "torch_moe_ep_nccl": ["cuda"],
}


def register_backends() -> None:
    """Register the names with torch; a second time does nothing. Local."""
    for name, devices in BACKENDS.items():
        if name not in c10d.Backend.backend_list:
            c10d.Backend.register_backend(
                name, _creator_of(name), extended_api=True, devices=devices
            )


def _creator_of(name: str) -> Any:
    def create(options: Any, backend_options: Any) -> dist.ProcessGroup:
        return _make_group(name, options, backend_options)

    return create


def _make_group(name: str, options: Any, backend_options: Any) -> dist.ProcessGroup:
    """A group with hooked stock backends. Collective over its ranks, as torch's own is."""
    group = dist.ProcessGroup(options.store, options.group_rank, options.group_size)
    kinds = dist.ProcessGroup.BackendType
    with_nccl = name == "torch_moe_ep_nccl" or (
        name == "torch_moe_ep" and c10d.is_nccl_available() and torch.cuda.is_available()
    )
    if name != "torch_moe_ep_nccl":
        gloo = _make_gloo(options)
        devices = ["cpu"] if with_nccl else ["cpu", "cuda"]
        for device in devices:
            group._register_backend(torch.device(device), kinds.GLOO, gloo)
    if with_nccl:
        nccl = _make_nccl(options, backend_options)
        group._register_backend(torch.device("cuda"), kinds.NCCL, nccl)
    group._set_default_backend(kinds.NCCL if with_nccl else kinds.GLOO)
    native.attach(group, options.global_ranks_in_group)
    label.enable()
    if not options.global_ranks_in_group:  # the default group
        order.start(options.store, options.group_rank, options.group_size)
    return group


def _make_gloo(options: Any) -> Any:
    if not c10d.is_gloo_available():
        raise RuntimeError("this torch has no gloo; take torch_moe_ep_nccl.")
    store = dist.PrefixStore("gloo/", options.store)
    backend = dist.ProcessGroupGloo(
        store, options.group_rank, options.group_size, timeout=_timeout(options)
    )
    backend.options.global_ranks_in_group = options.global_ranks_in_group
    backend.options.group_name = options.group_id
    backend._set_sequence_number_for_group()
    return backend


def _make_nccl(options: Any, backend_options: Any) -> Any:
    if not c10d.is_nccl_available():
        raise RuntimeError("this torch has no NCCL; take torch_moe_ep_gloo.")
    if backend_options is None:
        backend_options = dist.ProcessGroupNCCL.Options()
        backend_options.is_high_priority_stream = False
    backend_options._timeout = _timeout(options)
    source = _split_source()
    if source is not None and options.global_ranks_in_group:
        backend_options.split_from = source
        backend_options.split_color = c10d._process_group_color(options.global_ranks_in_group)
    backend_options.global_ranks_in_group = options.global_ranks_in_group
    backend_options.group_name = options.group_id
    store = dist.PrefixStore("nccl/", options.store)
    backend = dist.ProcessGroupNCCL(store, options.group_rank, options.group_size, backend_options)
    backend._set_sequence_number_for_group()
    return backend


def _split_source() -> Any:
    """The default group's NCCL backend, where torch would split new communicators from it."""
    if not dist.is_initialized():
        return None
    default = dist.group.WORLD
    if default is None or not default.bound_device_id:
        return None
    source = c10d._get_split_source(default)
    return getattr(source, "wrapped", source)


def _timeout(options: Any) -> timedelta:
    timeout = options.timeout
    return timeout if isinstance(timeout, timedelta) else timedelta(seconds=float(timeout))
