"""The three layouts of the expert GEMMs alone, against torch's grouped_mm and a dense GEMM.

    python -m benchmarks.grouped_gemm --rows 8192 32768 --routings even 1/i

NT: rows [R, K] x weights [E, N, K] -> [R, N]     (forward)
NN: rows [R, K] x weights [E, K, N] -> [R, N]     (gradient of the input)
TN: rows_a [R, M], rows_b [R, N] -> [E, M, N]     (gradient of the weight, ragged over R)

Every result is compared with an fp32 oracle before timing; a wrong one (error above twice that of
torch's grouped_mm) is printed as wrong and not timed. On a GPU ours are timed twice: with the
kernels that the device gets, and with TORCH_MOE_EP_KERNELS=sm80, the generic ones; on a CPU only
torch's own are timed. Rows per expert are rounded to 128.
"""

import argparse
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import common
from benchmarks.routing import copies_per_expert
from torch_moe_ep import _library  # noqa: F401  (loads the operators)

OURS = "torch_moe_ep"
GENERIC = "torch_moe_ep sm80"
GROUPED = "torch grouped_mm"
LOOP = "loop of torch mm"
KERNELS = "TORCH_MOE_EP_KERNELS"
WISH = os.environ.get(KERNELS, "auto")  # the user's, before a candidate sets its own
ALIGNMENT = 128

Gemm = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One GEMM: layout, operands and the segments of rows."""

    name: str
    layout: str
    a: torch.Tensor
    b: torch.Tensor
    offsets: torch.Tensor  # int64 [E + 1] on the device
    flops: float


def segment_lengths(num_rows: int, routing: str, num_experts: int) -> list[int]:
    """Rows of each expert: the routing's shares in multiples of 128, `num_rows` in all."""
    blocks = num_rows // ALIGNMENT
    if blocks == 0 or num_rows % ALIGNMENT:
        raise ValueError(f"rows must be a positive multiple of {ALIGNMENT}, got {num_rows}.")
    # top_k 1 has no limit of one copy per token; "two" then means the first two experts.
    counts = copies_per_expert(routing, blocks, num_experts, 1)
    return [count * ALIGNMENT for count in counts]


def cases_of(
    num_rows: int, routing: str, arguments: argparse.Namespace, device: torch.device
) -> list[Case]:
    """The six GEMMs of a layer, forward and backward."""
    experts, hidden, width = arguments.num_experts, arguments.hidden, arguments.width
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lengths = segment_lengths(num_rows, routing, experts)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(device)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).mul_(shape[-1] ** -0.5).to(dtype)

    rows_h, rows_i, rows_z = (normal(num_rows, n) for n in (hidden, width, 2 * width))
    gate_up, down = normal(experts, 2 * width, hidden), normal(experts, hidden, width)
    operands = [
        ("gate_up forward", "NT", rows_h, gate_up),
        ("down forward", "NT", rows_i, down),
        ("down input gradient", "NN", rows_h, down),
        ("gate_up input gradient", "NN", rows_z, gate_up),
        ("down weight gradient", "TN", rows_h, rows_i),
        ("gate_up weight gradient", "TN", rows_z, rows_h),
    ]
    shape = f"rows={num_rows} {routing} E={experts} H={hidden} I={width}"
    return [
        Case(f"{layout} {name} {shape}", layout, a, b, offsets, _flops(layout, num_rows, a, b))
        for name, layout, a, b in operands
    ]


def _flops(layout: str, num_rows: int, a: torch.Tensor, b: torch.Tensor) -> float:
    if layout == "TN":
        return 2.0 * num_rows * a.shape[1] * b.shape[1]
    return 2.0 * num_rows * b.shape[1] * b.shape[2]


def loop(case: Case, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """One matmul an expert; the offsets are known on the host."""
    bounds = case.offsets.tolist()
    pieces = []
    for expert, (first, last) in enumerate(itertools.pairwise(bounds)):
        rows = a[first:last]
        if case.layout == "NT":
            pieces.append(rows @ b[expert].T)
        elif case.layout == "NN":
            pieces.append(rows @ b[expert])
        else:
            pieces.append((rows.T @ b[first:last]).unsqueeze(0))
    return torch.cat(pieces)


def torch_grouped(case: Case, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Torch's grouped_mm in the same layout; views only, nothing is copied."""
    ends = case.offsets[1:].to(torch.int32)
    left = a.T if case.layout == "TN" else a
    right = b.transpose(1, 2) if case.layout == "NT" else b
    return torch._grouped_mm(left, right, offs=ends)


def implementations(case: Case) -> dict[str, Gemm]:
    """Name to function of what this build and device can run."""
    found: dict[str, Gemm] = {
        GROUPED: lambda a, b: torch_grouped(case, a, b),
        LOOP: lambda a, b: loop(case, a, b),
    }
    if case.a.is_cuda:
        wishes = {OURS: WISH, GENERIC: "sm80"}
        found = {**{name: _ours(case, wish) for name, wish in wishes.items()}, **found}
    return found


def _ours(case: Case, wish: str) -> Gemm:
    """Our grouped GEMM with TORCH_MOE_EP_KERNELS=wish, which is read at every call."""

    def run(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        os.environ[KERNELS] = wish
        result: torch.Tensor = torch.ops.torch_moe_ep.grouped_gemm(a, b, case.offsets, case.layout)
        return result

    return run


def run_case(case: Case, arguments: argparse.Namespace, device: torch.device) -> list[Any]:
    """Check against fp32, then time what is right."""
    oracle = loop(case, case.a.float(), case.b.float())
    functions = implementations(case)
    limit = 2 * common.relative_error(torch_grouped(case, case.a, case.b), oracle) + 1e-6
    rows: list[dict[str, Any]] = []
    candidates = [common.dense_gemm(device, case.a.dtype)]
    for name, function in functions.items():
        error = common.relative_error(function(case.a, case.b), oracle)
        if error <= limit:
            candidates.append(common.Candidate(name, partial(function, case.a, case.b), case.flops))
            continue
        print(f"{case.name}: {name} is wrong: error {error:.2g}, limit {limit:.2g}", flush=True)
        value = f"wrong: error {error:.2g}, limit {limit:.2g}"
        rows.append({"name": name, "case": case.name, "value": value, "unit": "error"})
    del oracle
    timings = common.time_turn_about(
        candidates, device, min_seconds=arguments.min_seconds, turns=arguments.turns
    )
    unit, scale = ("TFLOP/s", 1e12) if device.type == "cuda" else ("GFLOP/s", 1e9)
    return rows + common.speed_rows(timings, case.name, unit, scale)


def main() -> None:
    """Time the GEMMs asked for and keep the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_common_arguments(parser)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--rows", type=int, nargs="+", default=[8192, 32768] if on_gpu else [1024])
    parser.add_argument("--routings", nargs="+", default=["even", "1/i"] if on_gpu else ["even"])
    parser.add_argument("--num_experts", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=4096 if on_gpu else 512)
    parser.add_argument("--width", type=int, default=14336 if on_gpu else 1024)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rows: list[dict[str, Any]] = []
    for num_rows in arguments.rows:
        for routing in arguments.routings:
            for case in cases_of(num_rows, routing, arguments, device):
                of_case = run_case(case, arguments, device)
                # Case by case: a run that is cut off keeps what it has measured.
                common.write_results("grouped_gemm", of_case, arguments.output, arguments.commit)
                rows += of_case
    common.finish("grouped_gemm", rows, arguments)


if __name__ == "__main__":
    main()
