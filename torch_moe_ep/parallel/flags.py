"""The invalid-id flag: expert ids out of range that a CUDA rank met without looking.

Looking at ids on the host would cost a sync per layer, so the dispatch operator sets a device
flag instead and such copies contribute zero. The flag is read once per step, by the clip function
or by the optimizer's step hook, and every rank raises before any parameter changes.
"""

import torch

from torch_moe_ep.gather import all_gather
from torch_moe_ep.parallel.state import ExpertParallelState


def local_flag(states: list[ExpertParallelState], device: torch.device) -> torch.Tensor:
    """1.0 where any experts module of this rank met an invalid id, else 0.0: fp64 ``[]``.

    Local, no host sync.
    """
    flags = [
        experts.invalid_flag.reshape(1).to(device)
        for state in states
        for experts in state.experts.values()
    ]
    if not flags:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.cat(flags).ne(0).any().to(torch.float64)


def raise_if_invalid(states: list[ExpertParallelState], ranks: list[int]) -> None:
    """Clear all flags and raise when `ranks`, the ranks that met an invalid id, is not empty."""
    if not ranks:
        return
    for state in states:
        for experts in state.experts.values():
            experts.invalid_flag.zero_()
    raise ValueError(
        f"expert ids outside of [0, num_experts) reached the experts on ranks {ranks} since the "
        f"last step, no parameter was changed; check the router, or set TORCH_MOE_EP_CHECK=1 to "
        f"raise where it happens."
    )


def check_flags(states: list[ExpertParallelState]) -> None:
    """Exchange the flag over all ranks and raise on all of them alike.

    Collective over all ranks (one all-gather of a number); syncs the host.
    """
    if not states:
        return
    device = states[0].device
    flags = all_gather(local_flag(states, device).reshape(1))
    raise_if_invalid(states, flags.flatten().nonzero().flatten().tolist())
