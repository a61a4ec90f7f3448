"""What went wrong on the GPU without the host looking, read once per step.

Looking at expert ids or at numbers of rows on the host would cost a sync per layer, so operators
set flags on the device instead: an id out of range (its copy contributes zero), and rows beyond
budget="bounded" (they are left out). The flags are read once per step, by the clip function or by
the optimizer's step hook, and every rank raises before any parameter changes. So does a rank
whose peers did not answer in time, with the peer transport.
"""

from collections.abc import Sequence

import torch

from torch_moe_ep.gather import all_gather
from torch_moe_ep.layer import ExpertParallelExperts
from torch_moe_ep.parallel.state import ExpertParallelState

NUM_FLAGS = 2


def local_flags(states: list[ExpertParallelState], device: torch.device) -> torch.Tensor:
    """This rank's flags, fp64 ``[NUM_FLAGS]``.

    1.0 where any experts module of this rank met an invalid id, and the most rows that a rank of
    its EP group would have needed beyond its capacity; zeros where all is well. Local, no host
    sync.
    """
    experts = _experts_of(states)
    if not experts:
        return torch.zeros(NUM_FLAGS, dtype=torch.float64, device=device)
    invalid = torch.cat([module.invalid_flag.reshape(1).to(device) for module in experts])
    flags = [invalid.ne(0).any().to(torch.float64)]
    needed = [module.slots_needed.to(device) for module in experts if module.uses_peers]
    flags.append(
        torch.cat(needed).max().to(torch.float64) if needed else torch.zeros_like(flags[0])
    )
    return torch.stack(flags)


def raise_if_flagged(states: list[ExpertParallelState], flags: Sequence[Sequence[float]]) -> None:
    """Clear this rank's flags and raise when a rank set one.

    Args:
        states: of the models whose flags they are.
        flags: of `local_flags`, of every rank.
    """
    ranks = [rank for rank, (is_invalid, _) in enumerate(flags) if is_invalid]
    needed = int(max(rows for _, rows in flags))
    if not ranks and needed == 0:
        return
    for module in _experts_of(states):
        module.invalid_flag.zero_()
        module.slots_needed.zero_()
    if ranks:
        raise ValueError(
            f"expert ids outside of [0, num_experts) reached the experts on ranks {ranks} since "
            f"the last step, no parameter was changed; check the router, or set "
            f"TORCH_MOE_EP_CHECK=1 to raise where it happens."
        )
    rooms = {module.capacity for module in _experts_of(states) if module.uses_peers}
    short = [rank for rank, (_, rows) in enumerate(flags) if rows > 0]
    raise ValueError(
        f'a rank needed {needed} rows in one layer since the last step, but budget="bounded" '
        f"has room for {min(rooms, default=0)} (expert-parallel groups of ranks {short}); no "
        f"parameter was changed. Raise MoEConfig.budget_factor, or max_received_rows where it is "
        f'set, or take budget="exact".'
    )


def wait_for_peers(states: list[ExpertParallelState]) -> None:
    """Wait for the GPU, and raise where a peer did not answer in time.

    A collective that follows would wait for that peer, and with it whoever reads its result, for
    as long as the backend lets it. Only with the peer transport; syncs the host.
    """
    flags = {
        module.ep_group_name: module.invalid_flag
        for module in _experts_of(states)
        if module.uses_peers
    }
    for name, flag in flags.items():
        torch.ops.torch_moe_ep.check_peers(flag, name)


def check_flags(states: list[ExpertParallelState]) -> None:
    """Exchange the flags over all ranks and raise on all of them alike.

    Collective over all ranks (one all-gather of two numbers); syncs the host.
    """
    if not states:
        return
    wait_for_peers(states)
    flags = all_gather(local_flags(states, states[0].device))
    raise_if_flagged(states, flags.tolist())


def _experts_of(states: list[ExpertParallelState]) -> list[ExpertParallelExperts]:
    return [module for state in states for module in state.experts.values()]
