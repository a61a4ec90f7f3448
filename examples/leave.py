"""How a script ends when its ranks talk over gloo."""

import time

import torch.distributed as dist

GLOO_S = 0.2


def leave() -> None:
    """Leave the process group, together: gloo fails on a peer that goes while others are busy.

    gloo's thread wakes this one when the barrier is done and drops the barrier's tensor after
    that. Doing so takes the GIL, and in an interpreter that is ending by then the process aborts
    ("terminate called without an active exception", torch 2.11): hence the wait. Collective.
    """
    dist.barrier()
    dist.destroy_process_group()
    time.sleep(GLOO_S)
