"""What tests and benchmarks of distributed code share.

    ranks.py      RankPool: forked processes that run functions as ranks of one process group
    error.py      relative_error, the one error measure
    models.py     a tiny Mixtral and seeded batches
    reference.py  the run every parallel run is compared with: one process, W batches in turn
    parallel.py   wrap a patched model the ways users do; full gradients and parameters of it
"""

from torch_moe_ep.testing.error import assert_close, relative_error
from torch_moe_ep.testing.models import batch_of, tiny_mixtral
from torch_moe_ep.testing.ranks import RankFailure, RankPool

__all__ = [
    "RankFailure",
    "RankPool",
    "assert_close",
    "batch_of",
    "relative_error",
    "tiny_mixtral",
]
