"""Warnings of torch about torch, which a user can do nothing about."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

OF_FSDP1 = (
    "Please use DTensor instead and we are deprecating ShardedTensor",
    "`_get_pg_default_device` will be deprecated",
)


@contextmanager
def without_fsdp1_warnings() -> Iterator[None]:
    """Hide what FSDP1's state dicts say of torch's own ShardedTensor: a dozen lines a rank.

    Not for threads beside others that warn: Python's filters belong to the process.
    """
    with warnings.catch_warnings():
        for message in OF_FSDP1:
            warnings.filterwarnings("ignore", message=message)
        yield
