"""SwiGLU's gradient behind the GEMM before it: in its epilogue, or by a kernel of its own.

    python -m benchmarks.swiglu_backward                      # one GPU of compute capability 9.0
    python -m benchmarks.swiglu_backward --rows 4096 32768

Both make the gradient of z, the activation again, and the gradient of the row weights from the
gradient of y. Every result is compared with the other form's before timing. FLOPs are those of the
GEMM. `fuses_swiglu_backward` in csrc/expert_mlp/sm90/choose_tile.cpp says which one the layer
takes; this is what it goes by.
"""

import argparse
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import common
from benchmarks.grouped_gemm import segment_lengths
from torch_moe_ep import _library  # noqa: F401  (loads the operators)

FORMS = {"in the epilogue": True, "a kernel of its own": False}
CLOSE = 2e-2  # of the largest value; both round to bf16, at other places


@dataclass(frozen=True)
class Shape:
    """E experts of width I, hidden H."""

    num_experts: int
    hidden: int
    width: int


MIXTRAL, FINE_GRAINED = Shape(8, 4096, 14336), Shape(128, 4096, 1024)


def operands_of(
    shape: Shape, num_rows: int, routing: str, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """grad_y, down, z, row weights and expert offsets."""
    lengths = segment_lengths(num_rows, routing, shape.num_experts)
    return (
        torch.randn(num_rows, shape.hidden, device=device).bfloat16(),
        (torch.randn(shape.num_experts, shape.hidden, shape.width, device=device))
        .mul_(shape.hidden**-0.5)
        .bfloat16(),
        torch.randn(num_rows, 2 * shape.width, device=device).bfloat16(),
        torch.rand(num_rows, device=device),
        torch.tensor([0, *lengths]).cumsum(0).to(device),
    )


def run_case(
    shape: Shape, num_rows: int, routing: str, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Compare the two, then time them turn about."""
    device = torch.device(arguments.device)
    operands = operands_of(shape, num_rows, routing, device)
    function = torch.ops.torch_moe_ep.swiglu_backward_gemm
    fused, apart = (function(*operands, is_fused) for is_fused in FORMS.values())
    for ours, other in zip(fused, apart, strict=True):
        error = common.relative_error(ours, other.float())
        if not error <= CLOSE:
            raise RuntimeError(f"the two forms differ by {error:.2g} of the largest value.")
    del fused, apart
    flops = 2.0 * num_rows * shape.hidden * shape.width
    candidates = [common.dense_gemm(device, torch.bfloat16)]
    candidates += [
        common.Candidate(name, partial(function, *operands, is_fused), flops)
        for name, is_fused in FORMS.items()
    ]
    timings = common.time_turn_about(
        candidates, device, min_seconds=arguments.min_seconds, turns=arguments.turns
    )
    sizes = f"E={shape.num_experts} H={shape.hidden} I={shape.width}"
    return common.speed_rows(timings, f"rows={num_rows} {routing} {sizes}", "TFLOP/s", 1e12)


def main() -> None:
    """Run the shapes and keep the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_common_arguments(parser)
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, 8192, 32768])
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        parser.error("the epilogue is that of GPUs of compute capability 9.0; there is none here.")
    cases = [(MIXTRAL, rows, routing) for rows in arguments.rows for routing in ("even", "1/i")]
    cases.append((FINE_GRAINED, 262144, "even"))
    rows: list[dict[str, Any]] = []
    for shape, num_rows, routing in cases:
        of_case = run_case(shape, num_rows, routing, arguments)
        # Case by case: a run that is cut off keeps what it has measured.
        common.write_results("swiglu_backward", of_case, arguments.output, arguments.commit)
        rows += of_case
    common.finish("swiglu_backward", rows, arguments)


if __name__ == "__main__":
    main()
