"""``MoELayer``: for isinstance, the class of expert-parallel experts modules."""

from torch_moe_ep.layer import ExpertParallelExperts as MoELayer

__all__ = ["MoELayer"]
