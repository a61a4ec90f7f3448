"""Each layout of the grouped GEMM alone, with shapes that reach every tile, against fp32."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch

from torch_moe_ep import _library  # noqa: F401  (loads the operators)

from .cases import ORACLE_DEVICE, normal, poisoned_memory, relative_error, requires_gpu

pytestmark = requires_gpu

LAYOUTS = ["NT", "NN", "TN"]
NARROW = "sm80 within 99 KiB"  # the tile of devices that give a CTA no more
KERNELS = ["auto", "sm80", "torch"]
UNOWNED_ROWS = 256  # past the last segment: NaN


@dataclass(frozen=True)
class GemmCase:
    """Rows of each expert, N and K (TN: M)."""

    lengths: tuple[int, ...]
    columns: int
    a_columns: int

    def __str__(self) -> str:
        shown = "-".join(map(str, self.lengths[:4]))
        return f"E{len(self.lengths)}-{shown}-N{self.columns}-K{self.a_columns}"


# TN: experts of at most 256 rows are walked column by column, B is kept; others are not.
FEW_ROWS = GemmCase((256, 0, 128, 384, 256), 776, 8200)
# More columns than there are clusters: 2 rounds of 66 and a rest, at M of 5 tiles.
MANY_COLUMNS = GemmCase((128, 256, 0, 384, 256, 0, 128, 256) * 9, 776, 520)
CASES = [
    GemmCase((128,), 8, 8),
    GemmCase((0, 128, 0, 256), 72, 40),
    GemmCase((0, 0), 64, 64),
    GemmCase((128,) * 4, 512, 1024),  # single CTAs
    GemmCase((256, 384, 0, 512), 512, 4096),  # 256 x 128
    GemmCase((256, 384, 0, 512), 1000, 520),  # pairs, ping-pong
    GemmCase((4096, 128), 968, 4096),  # NT: 256 x 192; TN: 128 x 256
    GemmCase((256,) * 8, 1536, 2048),
    FEW_ROWS,
    MANY_COLUMNS,
    GemmCase((1024, 896, 1152), 1024, 520),  # pairs, 256 wide; TN: 128 x 128
    GemmCase((128,) * 300, 64, 64),
]


@dataclass
class Operands:
    """The tensors of one case and its segments."""

    a: torch.Tensor
    b: torch.Tensor
    offsets: torch.Tensor
    bounds: list[int]


def operands_of(case: GemmCase, layout: str) -> Operands:
    """Rows past the last segment hold NaN."""
    experts, n, k = len(case.lengths), case.columns, case.a_columns
    bounds = list(itertools.accumulate(case.lengths, initial=0))
    num_rows = bounds[-1] + UNOWNED_ROWS
    a = normal(num_rows, k, dtype=torch.bfloat16, seed=1)
    shape = {"NT": (experts, n, k), "NN": (experts, k, n), "TN": (num_rows, n)}[layout]
    b = normal(*shape, dtype=torch.bfloat16, seed=2, scale=k**-0.5)
    a[bounds[-1] :] = float("nan")
    if layout == "TN":
        b[bounds[-1] :] = float("nan")
    return Operands(a.cuda(), b.cuda(), torch.tensor(bounds, device="cuda"), bounds)


def product_of(inputs: Operands, layout: str, max_shared_bytes: int | None = None) -> torch.Tensor:
    """Ours; rows that nobody owns cut off."""
    with poisoned_memory():
        result = torch.ops.torch_moe_ep.grouped_gemm(
            inputs.a, inputs.b, inputs.offsets, layout, max_shared_bytes=max_shared_bytes
        )
    return result if layout == "TN" else result[: inputs.bounds[-1]]


def torch_product_of(inputs: Operands, layout: str, dtype: torch.dtype) -> torch.Tensor:
    """The same, one torch matmul an expert."""
    a, b = (tensor.to(ORACLE_DEVICE).to(dtype) for tensor in (inputs.a, inputs.b))
    parts = []
    for expert, (first, last) in enumerate(itertools.pairwise(inputs.bounds)):
        rows = a[first:last]
        if layout == "TN":
            parts.append((rows.T @ b[first:last])[None])
        else:
            parts.append(rows @ (b[expert].T if layout == "NT" else b[expert]))
    return torch.cat(parts)


@pytest.mark.parametrize("kernels", [*KERNELS, NARROW])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_grouped_gemm_equals_oracle(
    case: GemmCase, layout: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in rows that nobody owns and in memory that nobody wrote reaches no result."""
    monkeypatch.setenv("TORCH_MOE_EP_KERNELS", kernels.split(maxsplit=1)[0])
    inputs = operands_of(case, layout)
    ours = product_of(inputs, layout, 99 * 1024 if kernels == NARROW else None)
    oracle = torch_product_of(inputs, layout, torch.float32)
    peer = torch_product_of(inputs, layout, torch.bfloat16)
    allowed = max(2 * relative_error(peer, oracle), 2e-3)
    assert ours.shape == oracle.shape
    assert relative_error(ours, oracle) <= allowed


def swiglu_gradients(
    grad_y: torch.Tensor,
    down: torch.Tensor,
    z: torch.Tensor,
    row_weights: torch.Tensor,
    bounds: list[int],
) -> list[torch.Tensor]:
    """Gradient of z, activation and gradient of the row weights by autograd, in z's dtype."""
    found = []
    for expert, (first, last) in enumerate(itertools.pairwise(bounds)):
        of_z = z[first:last].detach().requires_grad_()
        weights = row_weights[first:last, None].detach().requires_grad_()
        gate, up = of_z.chunk(2, dim=1)
        activation = (torch.nn.functional.silu(gate) * up * weights).to(z.dtype)
        y = activation @ down[expert].T
        gradients = torch.autograd.grad(y, (of_z, weights), grad_y[first:last])
        found.append((gradients[0], activation.detach(), gradients[1][:, 0]))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


# K is H, the columns are I.
SWIGLU_CASES = [
    GemmCase((128, 0, 256), 72, 40),
    GemmCase((256, 384, 0, 512), 200, 520),
    GemmCase((1152, 1024), 1536, 4096),  # the fused form is what the layer takes
    GemmCase((0, 0), 64, 64),
]


@pytest.mark.parametrize("is_fused", [True, False], ids=["epilogue", "kernel"])
@pytest.mark.parametrize("case", SWIGLU_CASES, ids=str)
def test_swiglu_gradient_behind_the_gemm_equals_autograd(case: GemmCase, is_fused: bool) -> None:
    """Both forms, with NaN in rows that nobody owns."""
    if is_fused and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the epilogue is Hopper's")
    inputs = operands_of(case, "NN")
    owned = inputs.bounds[-1]
    z = normal(owned + UNOWNED_ROWS, 2 * case.columns, dtype=torch.bfloat16, seed=3).cuda()
    z[owned:] = float("nan")
    row_weights = normal(owned + UNOWNED_ROWS, dtype=torch.float32, seed=4).cuda()
    with poisoned_memory():
        ours = torch.ops.torch_moe_ep.swiglu_backward_gemm(
            inputs.a, inputs.b, z, row_weights, inputs.offsets, is_fused
        )
    exact = swiglu_gradients(
        *(inputs.a.float(), inputs.b.float(), z.float(), row_weights), inputs.bounds
    )
    peer = swiglu_gradients(inputs.a, inputs.b, z, row_weights, inputs.bounds)
    for found, theirs, wanted in zip(ours, peer, exact, strict=True):
        if owned == 0:
            continue
        allowed = max(2 * relative_error(theirs, wanted), 2e-3)
        assert relative_error(found[:owned], wanted) <= allowed


# Rows of each expert in each chunk, expert after expert.
CHUNKED_CASES = [
    (2, GemmCase((128, 0, 0, 256, 128, 128), 72, 40)),
    (3, GemmCase((128,) * 30, 512, 1024)),  # single CTAs
    (2, GemmCase((384, 128, 896, 640, 0, 512), 1000, 520)),  # pairs: a tile's half in another chunk
    (2, GemmCase((4096, 128, 2176, 4224), 968, 4096)),  # 256 x 192
    (2, GemmCase((256, 128, 128, 384, 0, 256), 776, 8200)),  # TN: column by column
    (4, GemmCase((128,) * 1200, 64, 64)),
]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("num_chunks", "case"), CHUNKED_CASES, ids=str)
def test_grouped_gemm_of_a_chunk_takes_its_segments_alone(
    num_chunks: int, case: GemmCase, layout: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in the rows of other chunks reaches no result of any layout."""
    monkeypatch.setenv("TORCH_MOE_EP_KERNELS", kernels)
    experts = GemmCase(case.lengths[::num_chunks], case.columns, case.a_columns)
    bounds = list(itertools.accumulate(case.lengths, initial=0))
    num_rows = bounds[-1] + UNOWNED_ROWS
    for chunk in range(num_chunks):
        lengths = case.lengths[chunk::num_chunks]
        alone = operands_of(replace(experts, lengths=lengths), layout)
        mine = torch.zeros(num_rows, dtype=torch.bool, device="cuda")
        for segment in range(chunk, len(case.lengths), num_chunks):
            mine[bounds[segment] : bounds[segment + 1]] = True

        def spread(rows: torch.Tensor, mine: torch.Tensor = mine) -> torch.Tensor:
            whole = torch.full((num_rows, rows.size(1)), float("nan"), dtype=rows.dtype).cuda()
            whole[mine] = rows[: int(mine.sum())]
            return whole

        b = spread(alone.b) if layout == "TN" else alone.b
        offsets = torch.tensor(bounds, device="cuda")
        with poisoned_memory():
            found = torch.ops.torch_moe_ep.grouped_gemm(
                spread(alone.a), b, offsets, layout, num_chunks, chunk
            )
        ours = found if layout == "TN" else found[mine]
        oracle = torch_product_of(alone, layout, torch.float32)
        peer = torch_product_of(alone, layout, torch.bfloat16)
        if oracle.numel():
            allowed = max(2 * relative_error(peer, oracle), 2e-3)
            assert relative_error(ours, oracle) <= allowed


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "case", [FEW_ROWS, MANY_COLUMNS, GemmCase((1024,) * 4, 1024, 2048)], ids=str
)
def test_grouped_gemm_twice_is_bit_equal(
    case: GemmCase, layout: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_MOE_EP_KERNELS", kernels)
    inputs = operands_of(case, layout)
    assert torch.equal(product_of(inputs, layout), product_of(inputs, layout))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "TT"}, "layout must be NT, NN or TN, got TT"),
        ({"b": torch.zeros(2, 8, 16)}, "does not fit a of shape"),
        ({"b": torch.zeros(8, 8)}, "b must be"),
    ],
    ids=["layout", "shape", "dims"],
)
def test_grouped_gemm_wrong_input_says_so(change: dict[str, object], message: str) -> None:
    arguments = {
        "a": torch.zeros(128, 8),
        "b": torch.zeros(1, 8, 8),
        "expert_offsets": torch.tensor([0, 128]),
        "layout": "NT",
        **change,
    }
    moved = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    with pytest.raises(ValueError, match=message):
        torch.ops.torch_moe_ep.grouped_gemm(**moved)
