"""The fp32 GEMMs on the CPU (csrc/expert_mlp/panels.h): past a panel, past a depth block."""

import os
import subprocess
import sys

import pytest
import torch
from operator_cases import Case
from test_expert_mlp import inputs_of, run

from torch_moe_ep import ops, reference
from torch_moe_ep.testing import relative_error

# Depth blocks end at 768 steps; panels are 8 or 6 rows high and 48 or 16 columns wide.
LARGE = (
    Case("deep_hidden", tokens=40, hidden=1000, width=48),
    Case("deep_width", tokens=40, hidden=48, width=801),
    Case("many_rows", tokens=1600, top_k=1, num_experts=2, hidden=33, width=31),
    Case("one_row", tokens=1, top_k=1, num_experts=1, hidden=800, width=64),
    Case("aligned", tokens=64, hidden=64, width=128),
)
capability = torch.backends.cpu.get_cpu_capability()
has_panels = pytest.mark.skipif(
    capability not in ("AVX2", "AVX512"), reason=f"BLAS does the GEMMs under {capability}"
)


@pytest.mark.parametrize("options", [{}, {"slots_per_pass": 900}, {"recompute_gate_up": True}])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_products_equal_reference(case, options):
    actual = run(ops.expert_mlp, case, inputs_of(case, torch.float32), **options)
    expected = run(reference.expert_mlp, case, inputs_of(case, torch.float32))
    for got, wanted in zip(actual, expected, strict=True):
        assert relative_error(got, wanted) <= 1e-5


def digests() -> str:
    """A line for each case: checksums of the bits of output and gradients."""
    lines = []
    for case in LARGE:
        results = run(ops.expert_mlp, case, inputs_of(case, torch.float32))
        sums = [str(int(r.detach().contiguous().view(torch.int32).long().sum())) for r in results]
        lines.append(" ".join([str(case), *sums]))
    return "\n".join(lines)


def worst_error() -> float:
    """The largest relative error of output and gradients over all cases."""
    worst = 0.0
    for case in LARGE:
        actual = run(ops.expert_mlp, case, inputs_of(case, torch.float32))
        expected = run(reference.expert_mlp, case, inputs_of(case, torch.float32))
        pairs = zip(actual, expected, strict=True)
        worst = max(worst, *(relative_error(got, wanted) for got, wanted in pairs))
    return worst


def printed_under(function: str, instructions: str, threads: int = 1) -> str:
    """What a function above returns in a process that may use no more than these instructions."""
    environment = {"ATEN_CPU_CAPABILITY": instructions, "OMP_NUM_THREADS": str(threads)}
    code = f"import test_panel_gemm; print(test_panel_gemm.{function}())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=os.path.dirname(__file__),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@has_panels
def test_number_of_threads_changes_no_bit():
    name = capability.lower()
    assert printed_under("digests", name, 1) == printed_under("digests", name, 3)


@pytest.mark.parametrize("instructions", ["avx2", "default"])
def test_other_instruction_sets_equal_reference(instructions):
    assert float(printed_under("worst_error", instructions)) <= 1e-5


@has_panels
def test_rows_keep_their_bits_beside_other_rows():
    """A row's result hangs on the row and the weights alone, however many rows an expert gets."""
    case = LARGE[0]
    rows, row_weights, gate_up, down = (t.detach() for t in inputs_of(case, torch.float32))
    gate_up, down = gate_up[:1], down[:1]
    ids = torch.zeros(len(rows), 1, dtype=torch.int64)
    whole = ops.expert_mlp(rows, row_weights, ops.plan(ids, 1), gate_up, down)
    for count in (1, 7, 29):
        plan = ops.plan(ids[:count], 1)
        part = ops.expert_mlp(rows[:count], row_weights[:count], plan, gate_up, down)
        assert torch.equal(part, whole[:count])
