"""A script for launchers: each rank runs a layer over and over, and one of them kills itself.

torchrun --nproc-per-node 3 -m tests.killed_rank RANK
"""

import os
import signal
import sys

import torch
import torch.distributed as dist

from torch_moe_ep import apply_expert_parallel, init_device_mesh
from torch_moe_ep.testing import LoneExperts, random_routing


def main() -> None:
    """Run until killed, or until an exchange fails."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    model = apply_expert_parallel(LoneExperts(2 * world), init_device_mesh("cpu", world))
    for batch in range(1000):
        if batch == 2 and dist.get_rank() == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        x = torch.randn(3, 16, requires_grad=True)
        model(x, *random_routing(3, 2, 2 * world)).sum().backward()


if __name__ == "__main__":
    main()
