"""``async_utils.AsyncCallsQueue``."""

import torch.distributed as dist


class AsyncCallsQueue:
    """The saves under way: none, as `async_save` here returns when its files are written."""

    def maybe_finalize_async_calls(
        self, blocking: bool = False, process_group: dist.ProcessGroup | None = None
    ) -> list[int]:
        """Finish saves that are done: there are none to finish. Not collective."""
        return []

    def get_num_unfinalized_calls(self) -> int:
        """Saves under way: 0."""
        return 0

    def close(self) -> None:
        """Nothing is open."""
