"""The planner: what a model needs on given GPUs, and how fast a step may be.

Every grid of ranks ``(replicate, shard, ep)`` that divides, with activation checkpointing and
offloading, is judged by formulas of bytes and seconds; nothing is run and no GPU is needed.
``python -m torch_moe_ep.plan`` prints the outcome, docs/planner.md has the formulas.

    shape     the numbers of a model
    weights   its parameters, and what a rank holds of each
    gpus      the numbers of a GPU, with their sources
    layout    one way to spread a model
    activations, memory   bytes on a GPU, at the moments that can be the peak
    traffic   bytes that a GPU sends in a step
    speed     seconds of a step, as a range
    search    all layouts, and the one to take
    table     text and JSON
"""

from torch_moe_ep.plan.gpus import GPUS, Gpu
from torch_moe_ep.plan.layout import PRECISIONS, Batch, Layout, Precision, layouts
from torch_moe_ep.plan.memory import Memory, memory_of
from torch_moe_ep.plan.search import Plan, plan, recommend
from torch_moe_ep.plan.shape import ModelShape, find_shape
from torch_moe_ep.plan.speed import Speed, speed_of
from torch_moe_ep.plan.traffic import Traffic, traffic_of

__all__ = [
    "GPUS",
    "PRECISIONS",
    "Batch",
    "Gpu",
    "Layout",
    "Memory",
    "ModelShape",
    "Plan",
    "Precision",
    "Speed",
    "Traffic",
    "find_shape",
    "layouts",
    "memory_of",
    "plan",
    "recommend",
    "speed_of",
    "traffic_of",
]
