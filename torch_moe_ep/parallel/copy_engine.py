"""An all-gather as copies between the GPUs of one host that map each other's memory."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather


class CopyEngineAllGather(AllGather):
    """FSDP2's all-gather as copies between GPUs that map each other.

    Args:
        buffer: the shard buffer of the process group; shared by all modules on that group.
    """

    def __init__(self, buffer: "ShardBuffer") -> None:
        self.buffer = buffer

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Memory for the gathered parameters: the caching allocator's."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Gather ``[n]`` of every rank to ``[P n]``, in rank order, on the current stream.

        Collective over `group`; no host sync. Nothing to wait for but the stream, so None is
        returned with `async_op`, too.
        """
        del group, async_op
        self.buffer.gather(output_tensor, input_tensor)
        return None


class ShardBuffer:
    """Symmetric memory for one shard of every rank of a process group.

    Args:
        group: the process group; its GPUs can map each other.
        num_bytes: of the largest shard.

    Collective over the group; syncs the host.
    """

    def __init__(self, group: dist.ProcessGroup, num_bytes: int) -> None:
        from torch.distributed import _symmetric_memory as symmetric_memory

        symmetric_memory.enable_symm_mem_for_group(group.group_name)
        device = torch.device("cuda", torch.cuda.current_device())
        self.memory = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
        self.handle = symmetric_memory.rendezvous(self.memory, group.group_name)
        self.rank, self.world_size = group.rank(), group.size()
        self.last: torch.cuda.Event | None = None

    def gather(self, output: torch.Tensor, own: torch.Tensor) -> None:
        """Gather ``[n]`` to ``[P n]`` on the current stream. Collective; no host sync.

        The buffer is one: a call waits for the one before it, also on another stream. The first
        barrier says that every shard is in place, the second that all have read it.
        """
        stream = torch.cuda.current_stream()
        if self.last is not None:
            stream.wait_event(self.last)
        num_bytes = own.numel() * own.element_size()
        self.memory[:num_bytes].view(own.dtype).copy_(own)
        self.handle.barrier(channel=0)
        parts = output.chunk(self.world_size)
        for step in range(1, self.world_size):  # each rank reads from another one at a time
            source = (self.rank + step) % self.world_size
            shard = self.handle.get_buffer(source, (num_bytes,), torch.uint8)
            parts[source].copy_(shard.view(own.dtype).view(own.shape))
        if parts[self.rank].data_ptr() != own.data_ptr():
            parts[self.rank].copy_(own)
        self.handle.barrier(channel=0)
        self.last = stream.record_event()
