"""Shapes and routings that the GPU tests share, and helpers to make and poison data.

T tokens, E experts, K experts per token, H hidden size, I expert width.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

requires_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

# Set by tests.sanitize. initcheck looks at all kernels: NaN written into fresh memory would hide
# who reads it unwritten. Under some tools a library's GEMMs take minutes or break the tool off, so
# that oracles go to the CPU.
IS_UNDER_INITCHECK = "TESTS_UNDER_INITCHECK" in os.environ
ORACLE_DEVICE = os.environ.get("TESTS_ORACLE_DEVICE", "cuda")


@dataclass(frozen=True)
class Case:
    """One shape with one routing."""

    num_tokens: int
    num_experts: int
    top_k: int
    hidden: int
    routing: str = "random"
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"T{self.num_tokens}-E{self.num_experts}-K{self.top_k}-H{self.hidden}"
            f"-{self.routing}-{dtype}"
        )


MOVEMENT_CASES = [
    Case(0, 8, 2, 64),
    Case(1, 1, 1, 8),
    Case(127, 8, 2, 256),
    Case(128, 8, 2, 256, "one"),
    Case(129, 8, 2, 256, "one"),
    Case(300, 8, 8, 128),
    Case(300, 16, 16, 96, dtype=torch.float32),
    Case(513, 8, 2, 4096, "skewed"),
    Case(1000, 128, 8, 2048, "random"),
    Case(700, 512, 4, 64),
    Case(257, 8, 2, 33),
    Case(257, 8, 2, 33, dtype=torch.float32),
    Case(257, 8, 3, 34, dtype=torch.float16),
    Case(64, 6, 2, 1, "skewed"),
]


def expert_ids_of(case: Case, seed: int = 0) -> torch.Tensor:
    """Distinct expert ids ``[T, K]`` int64 on the CPU; ``skewed`` leaves the last expert empty."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(case.num_tokens, case.num_experts, generator=generator)
    if case.routing == "one":
        scores[:, : case.top_k] += 2
    elif case.routing == "skewed":
        scores /= torch.arange(1, case.num_experts + 1)
        if case.top_k < case.num_experts:
            scores[:, -1] = -1
    return scores.argsort(dim=1, descending=True)[:, : case.top_k].contiguous()


def integers(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Integers of at most 7 bits, which every dtype and every sum over K holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).to(dtype)


def normal(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int, scale: float = 1.0
) -> torch.Tensor:
    """Random normal data on the CPU, rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every allocation that nobody writes holds NaN (integers: the largest value)."""
    if IS_UNDER_INITCHECK:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """max|diff| / max|reference| over one tensor; NaN if any element is."""
    if reference.numel() == 0:
        return 0.0
    value, reference = value.cpu().double(), reference.cpu().double()
    return float((value - reference).abs().max() / reference.abs().max().clamp(min=1e-30))
