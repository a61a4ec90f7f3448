"""Hooks around groups that exist, and what the hooks do."""

import torch.distributed as dist

from torch_moe_ep import label
from torch_moe_ep.hooks.library import native
from torch_moe_ep.parallel import order


def attach(group: dist.ProcessGroup | None = None) -> None:
    """Put the hooks around one process group; groups made from it later have none.

    A group of a registered backend (see `torch_moe_ep.hooks`) has them already; a second time does
    nothing. Call it on every rank of the group, between collectives. On the default group it also
    starts the order guard, which then looks at what the hooked groups do.

    Args:
        group: None: the default group.

    Raises:
        ValueError: there is no process group, or this rank is not in it.

    Local: no traffic but a look into the group's store; no host sync.
    """
    if not dist.is_initialized():
        raise ValueError(
            "torch.distributed is not initialised; call "
            "torch.distributed.init_process_group() first."
        )
    if group is not None and not isinstance(group, dist.ProcessGroup):  # torch's "not a member"
        raise ValueError("group must be one that this rank is in; attach on its members only.")
    found = group or dist.group.WORLD
    assert found is not None
    native.attach(found, dist.get_process_group_ranks(found))
    label.enable()
    if found is dist.group.WORLD:
        order.start_for_default_group()


def detach(group: dist.ProcessGroup | None = None) -> None:
    """Take the hooks off a group; what they counted goes with them.

    Call it on every rank of the group, between collectives. Local.
    """
    found = group or dist.group.WORLD
    if found is None:
        return
    native.detach(found)
    if found is dist.group.WORLD:
        order.stop()


def is_attached(group: dist.ProcessGroup | None = None) -> bool:
    """Whether a group has hooks, by its backend's name or by `attach`."""
    found = group or dist.group.WORLD
    return found is not None and bool(native.has_hooks(found))


def configure(
    *,
    timing: bool | None = None,
    order_guard: bool | None = None,
    check_sizes: bool | None = None,
) -> None:
    """Choose what the hooks of this process do. At first: timing and order guard.

    Args:
        timing: take the time of calls: two event records a call on a GPU, two readings of the
            clock on a CPU. Calls overdue on a GPU are found by those events. None: as it is.
        order_guard: hold the order of collectives against the step before. The same on every rank.
            None: as it is.
        check_sizes: for debugging: ranks compare operation, type, layer, stage and sizes of every
            collective in the group's store before they start it, and all raise where these do not
            fit. gloo ends the process on such sizes, NCCL waits or returns garbage. One exchange
            through the store a collective; the same on every rank. At first what
            ``TORCH_MOE_EP_CHECK`` says. None: as it is.
    """
    if timing is not None:
        native.set_timed(timing)
    if order_guard is not None:
        order.set_wanted(order_guard)
    if check_sizes is not None:
        native.set_checked(check_sizes)
