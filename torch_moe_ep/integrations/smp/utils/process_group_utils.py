"""``utils.process_group_utils.get_global_ranks``."""

import torch.distributed as dist


def get_global_ranks(group: dist.ProcessGroup | None = None) -> list[int]:
    """Global ranks of a group's members, in group order; None: all ranks. Not collective."""
    return dist.get_process_group_ranks(group)
