"""Process-group hooks: who is at fault, what travelled, and in which order.

Importing this module registers three c10d backends. Each wraps the stock ones of its name in C++,
leaves results alone, and is inherited by every group that is made later, FSDP's own among them:

    import torch_moe_ep.hooks

    torch.distributed.init_process_group("torch_moe_ep_nccl")   # as "nccl"
    torch.distributed.init_process_group("torch_moe_ep_gloo")   # as "gloo"
    torch.distributed.init_process_group("torch_moe_ep")        # as no name: both where both are

`attach` puts the same around one group that exists. What the hooks add:

report         a collective that fails or is overdue raises with its number, layer and stage, and
               with every rank that did not come to it, is in another one, or has other sizes
counters       calls, bytes and milliseconds by group and stage: `torch_moe_ep.metrics.traffic`
order guard    a rank that issues its collectives in another order than before, or than the others,
               raises before it waits for ever

File by file::

library.py     loads the second compiled library
backends.py    the registered backends
attach.py      hooks around a group that exists

Outside of it ``torch_moe_ep/label.py`` names the layer whose forward runs, and
``torch_moe_ep/parallel/order.py`` tells the order guard when a model's forward begins and ends.
"""

from torch_moe_ep.hooks.attach import attach, configure, detach, is_attached
from torch_moe_ep.hooks.backends import BACKENDS, register_backends

__all__ = ["BACKENDS", "attach", "configure", "detach", "is_attached"]

register_backends()
