"""Which tile the sm_90a grouped GEMMs take: a pure host function, tested without a GPU."""

from __future__ import annotations

import pytest
import torch

from torch_moe_ep import _library  # noqa: F401  (loads the operators)
from torch_moe_ep._build_info import library_path, read_build_info

# Block M, block N, ping-pong, cluster M, cluster N, B kept.
LARGE_PAIR = [256, 192, 0, 1, 2, 0]
WIDE_PAIR = [128, 256, 0, 2, 1, 0]
WIDE_SINGLE = [128, 256, 0, 1, 1, 0]
TALL_PAIR = [256, 128, 0, 1, 2, 0]
PING_PONG_PAIR = [128, 192, 1, 2, 1, 0]
PING_PONG_SINGLE = [128, 192, 1, 1, 1, 0]
NARROW_PAIR = [128, 128, 1, 2, 1, 0]
FEW_ROWS_PAIR = [128, 192, 1, 1, 2, 1]

# Layout, experts, rows, N, K (TN: M), epilogue; H = 4096 and I = 14336 or 1024.
CASES = {
    "up of Mixtral": (("NT", 8, 33792, 28672, 4096, "swiglu"), PING_PONG_PAIR),
    "up of few rows": (("NT", 8, 1024, 28672, 4096, "swiglu"), PING_PONG_SINGLE),
    "plain up of many rows": (("NT", 8, 33792, 28672, 4096, "plain"), LARGE_PAIR),
    "plain up of some rows": (("NT", 8, 8192, 28672, 4096, "plain"), PING_PONG_PAIR),
    "down of Mixtral: no column wasted": (("NT", 8, 33792, 4096, 14336, "plain"), WIDE_PAIR),
    "down of 256 rows an expert": (("NT", 8, 3064, 4096, 14336, "plain"), TALL_PAIR),
    "down of 128 rows an expert": (("NT", 8, 2040, 4096, 14336, "plain"), WIDE_SINGLE),
    "down of narrow experts: short K": (("NT", 128, 278528, 4096, 1024, "plain"), PING_PONG_PAIR),
    "dX of narrow experts: short K": (("NN", 128, 278528, 4096, 2048, "plain"), PING_PONG_PAIR),
    "dA of narrow experts: 12 % waste": (("NN", 128, 278528, 1024, 4096, "plain"), WIDE_PAIR),
    "dA of Mixtral": (("NN", 8, 33792, 14336, 4096, "plain"), PING_PONG_PAIR),
    "down of narrow experts with 256 rows: short K": (
        ("NT", 128, 49152, 4096, 1024, "plain"),
        PING_PONG_PAIR,
    ),
    "dX of 256 rows an expert": (("NN", 8, 3064, 4096, 28672, "plain"), TALL_PAIR),
    "dSwiGLU of Mixtral": (("NN", 8, 33792, 14336, 4096, "swiglu_backward"), PING_PONG_PAIR),
    "dSwiGLU of Mixtral, 1024 rows an expert": (
        ("NN", 8, 9208, 14336, 4096, "swiglu_backward"),
        PING_PONG_PAIR,
    ),
    "dSwiGLU of few rows: not fused": (("NN", 8, 3064, 14336, 4096, "swiglu_backward"), []),
    "dSwiGLU of short K: not fused": (("NN", 8, 33792, 14336, 2048, "swiglu_backward"), []),
    "dSwiGLU of narrow experts, 12 % waste: not fused": (
        ("NN", 128, 278528, 1024, 4096, "swiglu_backward"),
        [],
    ),
    "dX of Mixtral": (("NN", 8, 33792, 4096, 28672, "plain"), WIDE_PAIR),
    "weight gradient of many rows": (("TN", 8, 33792, 4096, 28672, "plain"), WIDE_PAIR),
    "weight gradient of 2048 rows an expert": (
        ("TN", 8, 17408, 4096, 28672, "plain"),
        PING_PONG_PAIR,
    ),
    "weight gradient of 1024 rows an expert": (
        ("TN", 8, 9208, 4096, 28672, "plain"),
        PING_PONG_PAIR,
    ),
    "weight gradient of 256 rows an expert": (("TN", 8, 3064, 4096, 28672, "plain"), FEW_ROWS_PAIR),
    "weight gradient of narrow experts: 12 % waste": (
        ("TN", 128, 278528, 1024, 4096, "plain"),
        WIDE_PAIR,
    ),
    "weight gradient of narrow experts with few rows: 12 % waste": (
        ("TN", 128, 139264, 1024, 4096, "plain"),
        NARROW_PAIR,
    ),
    "weight gradient of narrow experts: 3 % waste": (
        ("TN", 128, 278528, 4096, 2048, "plain"),
        WIDE_PAIR,
    ),
    "weight gradient of narrow experts with few rows: 3 % waste": (
        ("TN", 128, 139264, 4096, 2048, "plain"),
        PING_PONG_PAIR,
    ),
    "no rows": (("NT", 8, 0, 4096, 14336, "plain"), WIDE_SINGLE),
}

needs_cuda_build = pytest.mark.skipif(
    not read_build_info(library_path()).with_cuda, reason="needs a build with CUDA"
)


@needs_cuda_build
@pytest.mark.parametrize(("shape", "expected"), CASES.values(), ids=CASES)
def test_tile_of_shape(shape: tuple[object, ...], expected: list[int]) -> None:
    assert torch.ops.torch_moe_ep.grouped_gemm_tile(*shape) == expected


@needs_cuda_build
def test_tile_of_a_chunk_is_that_of_its_share_of_the_rows() -> None:
    (layout, experts, rows, *rest), _ = CASES["up of Mixtral"]
    for num_chunks in (2, 40):
        found = torch.ops.torch_moe_ep.grouped_gemm_tile(layout, experts, rows, *rest, num_chunks)
        alone = (layout, experts, rows // num_chunks, *rest)
        assert found == torch.ops.torch_moe_ep.grouped_gemm_tile(*alone)
    assert found == PING_PONG_SINGLE


@needs_cuda_build
def test_tile_of_unknown_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="layout must be NT, NN or TN, got TT"):
        torch.ops.torch_moe_ep.grouped_gemm_tile("TT", 8, 128, 64, 64, "plain")


@needs_cuda_build
def test_tile_of_unknown_epilogue_is_refused() -> None:
    with pytest.raises(
        ValueError, match="epilogue must be plain, swiglu or swiglu_backward, got x"
    ):
        torch.ops.torch_moe_ep.grouped_gemm_tile("NN", 8, 128, 64, 64, "x")
