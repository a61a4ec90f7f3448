"""What tests and benchmarks of distributed code share.

File by file::

ranks.py      RankPool: forked processes that run functions as ranks of one process group
error.py      relative_error, the one error measure
models.py     a tiny Mixtral, a lone experts module, seeded batches and routings
reference.py  the run every parallel run is compared with: one process, W batches in turn
parallel.py   wrap a patched model the ways users do; full gradients and parameters of it
"""

from torch_moe_ep.testing.error import assert_close, relative_error
from torch_moe_ep.testing.models import (
    LoneExperts,
    batch_of,
    make_local_expert_parallel,
    random_routing,
    tiny_mixtral,
)
from torch_moe_ep.testing.ranks import RankFailure, RankPool, share_the_gpu

__all__ = [
    "LoneExperts",
    "RankFailure",
    "RankPool",
    "assert_close",
    "batch_of",
    "make_local_expert_parallel",
    "random_routing",
    "relative_error",
    "share_the_gpu",
    "tiny_mixtral",
]
