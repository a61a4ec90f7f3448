"""``utils.utils.timeit``."""

import contextlib
import time
from collections.abc import Iterator

from torch_moe_ep.integrations.smp.logger import get_logger


@contextlib.contextmanager
def timeit(condition: bool, text: str, rank: int = 0) -> Iterator[None]:
    """Log how many seconds a block took, at level INFO.

    Args:
        condition: False logs nothing.
        text: what it was.
        rank: this rank, logged with it.
    """
    start = time.perf_counter()
    try:
        yield
    finally:
        if condition:
            seconds = time.perf_counter() - start
            get_logger().info("rank %d: %s took %.2f s", rank, text, seconds)
