"""The benchmarks' own machinery: routings, timing, result files, README's table."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist

from benchmarks import (
    common,
    killed_rank,
    layer,
    performance_page,
    result_files,
    results,
    train,
    transport,
)
from benchmarks.routing import ROUTINGS, copies_per_expert, expert_ids
from torch_moe_ep.testing import RankPool


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(256, 8, 2), (512, 128, 8), (64, 4, 1)])
def test_routing_has_exact_loads_and_distinct_experts_per_token(
    routing: str, tokens: int, experts: int, top_k: int
) -> None:
    """The ids have the loads promised and no token meets an expert twice."""
    counts = copies_per_expert(routing, tokens, experts, top_k)
    ids = expert_ids(routing, tokens, experts, top_k)
    assert ids.shape == (tokens, top_k)
    assert torch.bincount(ids.flatten(), minlength=experts).tolist() == counts
    in_order = ids.sort(dim=1).values
    assert bool((in_order[:, 1:] != in_order[:, :-1]).all())
    assert routing != "empty" or counts[0] == 0


def test_timing_alternates_candidates_and_covers_min_seconds() -> None:
    """Every candidate runs in every turn, in order."""
    calls: list[str] = []
    candidates = [
        common.Candidate(name, lambda name=name: calls.append(name), 1.0)  # type: ignore[misc]
        for name in (common.DENSE, "other")
    ]
    timings = common.time_turn_about(candidates, torch.device("cpu"), min_seconds=0.0, turns=3)
    warm_up, rest = calls[:4], calls[4:]
    assert warm_up == [common.DENSE] * 2 + ["other"] * 2
    assert rest == [common.DENSE, "other"] * 3
    rows = common.speed_rows(timings, "case", "1/s", 1.0)
    assert rows[0]["ratio_to_dense"] == 1.0


def test_a_candidate_leads_in_before_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """For as long as asked, here two runs of half a second; they are not counted."""

    def half_seconds(run: Callable[[], object], num_runs: int, _device: torch.device) -> float:
        for _ in range(num_runs):
            run()
        return num_runs / 2

    monkeypatch.setattr(common, "_seconds", half_seconds)
    calls: list[str] = []
    candidates = [
        common.Candidate(name, lambda name=name: calls.append(name), 1.0)  # type: ignore[misc]
        for name in ("a", "b")
    ]
    timings = common.time_turn_about(
        candidates, torch.device("cpu"), min_seconds=0.0, turns=2, lead_in=1.0
    )
    assert calls[4:] == ["a", "a", "a", "b", "b", "b"] * 2
    assert [timing.runs for timing in timings] == [2, 2]


def test_result_file_has_the_fixed_fields_and_merges(tmp_path: Path) -> None:
    """A second run from the same commit replaces equal rows and keeps the others."""
    path = tmp_path / "results.json"
    row = {"name": "a", "case": "c", "value": 1.0, "unit": "s"}
    common.write_results("layer", [row, {**row, "case": "d"}], path)
    common.write_results("layer", [{**row, "value": 2.0}], path)
    result = result_files.read(path)
    assert {(r["case"], r["value"]) for r in result["rows"]} == {("c", 2.0), ("d", 1.0)}
    path.write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match="is no result file: date, commit"):
        result_files.read(path)


def test_every_result_file_of_the_repository_is_readable() -> None:
    """All of benchmarks/results has the format of the reader."""
    for path in sorted(common.RESULTS_DIR.glob("*.json")):
        assert results.format_table(result_files.read(path)["rows"])


def test_readme_table_equals_newest_results() -> None:
    """`python -m benchmarks.results --readme` would change nothing."""
    assert results.readme_with_tables() == results.README.read_text()


def test_performance_page_equals_newest_results() -> None:
    """The same command would not change docs/performance.md either."""
    assert performance_page.page_with_tables() == performance_page.PAGE.read_text()


def test_narrow_experts_floor_is_bytes_when_weights_outweigh_the_flops() -> None:
    """One token an expert: the weights' bytes decide; many tokens: the FLOPs."""
    few, many = layer.Case(128, num_experts=128), layer.Case(32768, num_experts=8)
    flops_per_byte = 160.0
    assert few.flops / few.least_bytes < flops_per_byte < many.flops / many.least_bytes
    weights = 3 * 8 * 4096 * 14336
    assert many.least_bytes == 2 * (3 * weights + 4 * 32768 * 4096)


def test_ratios_from_elsewhere_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """They stand only where sonicmoe cannot be timed, under a name that says so."""
    monkeypatch.setattr(layer, "_has_sonicmoe", lambda: False)
    rows = layer.sonic_rows(layer.Case(16384))
    assert [row["name"] for row in rows] == ["sonicmoe, not measured here"]
    assert rows[0]["ratio_min"] <= rows[0]["ratio_to_dense"] <= rows[0]["ratio_max"]
    assert layer.sonic_rows(layer.Case(1024)) == []
    monkeypatch.setattr(layer, "_has_sonicmoe", lambda: True)
    assert layer.sonic_rows(layer.Case(16384)) == []


def test_transport_reports_bytes_of_every_exchange(ranks):
    case = transport.Case(64, 16, 2, 8, runs=1, device_type="cpu", has_own_gpu=False)
    rows = ranks(2).run(transport.measure, case)[0]
    torchs = ranks(2).run(transport.measure, case, transport.vdev_exchanges_of)[0]
    assert [row["value"] for row in torchs] == ["did not run: needs CUDA"]
    sent = {row["name"]: row["value"] for row in rows if row["unit"] == "bytes sent"}
    # Half of the 128 copies stay; gathered tokens leave whole, and their sums in fp32.
    assert sent.pop("torch_moe_ep all-gather dispatcher, there and back") == 64 * 16 * 4 * 2
    assert set(sent.values()) == {64 * 16 * 4} and len(sent) == 3
    assert {row["case"] for row in rows} == {f"P=2 T=64 H=16 K=2 E=8 ({transport.NOT_A_SPEED})"}


def ends_its_process(case: transport.Case, device: torch.device) -> NoReturn:
    """As NVSHMEM does."""
    os.write(2, f"the library does not like {device}".encode())
    os._exit(255)


def test_transport_says_why_a_library_ended_its_process(monkeypatch):
    monkeypatch.setattr(transport, "vdev_exchanges_of", ends_its_process)
    case = transport.Case(64, 16, 2, 8, runs=1, device_type="cpu", has_own_gpu=False)
    (row,) = transport.vdev_rows(case, 2)
    assert row["value"] == "did not run: the library does not like cpu"
    assert row["name"] == transport.VDEV and row["case"] == f"P=2 {case}"


def test_killed_rank_is_named_by_every_other():
    found = {row["unit"]: row["value"] for row in killed_rank.measure(3, "cpu", "collective", 3)}
    assert found["of 2 others raised"] == found["of 2 others named it"] == 2


def runs_on_ranks(min_seconds: float) -> int:
    """Rank 1 is ten times slower at what both do; how often each did it."""
    nap = 0.001 if dist.get_rank() == 0 else 0.01
    timings = common.time_turn_about(
        [common.Candidate("nap", lambda: time.sleep(nap), 1.0)],
        torch.device("cpu"),
        min_seconds=min_seconds,
        turns=2,
        group=dist.group.WORLD,
    )
    return timings[0].runs


def test_ranks_that_time_together_run_equally_often() -> None:
    """Else their collectives would not match."""
    with RankPool(2) as pool:
        first, second = pool.run(runs_on_ranks, 0.02)
    assert first == second


def test_slowest_rank_counts_in_each_turn() -> None:
    candidate = common.Candidate("a", list, 1.0)
    ranks = [[common.Timing(candidate, rates, 6)] for rates in ((3.0, 1.0), (2.0, 4.0))]
    (slowest,) = common.slowest(ranks)
    assert slowest.rates == (2.0, 1.0)


@pytest.mark.parametrize("layers", [1, 3])
def test_train_counts_parameters_as_transformers_does(layers: int) -> None:
    """All but the norms, which the formula rounds up to 8 H a layer."""
    case = train.Case(layers, hidden=256, width=512, sequence=256, batch=1, ranks=2)
    with torch.device("meta"):
        model = train.MixtralForCausalLM(case.config)
    counted = sum(parameter.numel() for parameter in model.parameters())
    router_and_norms = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if "gate.weight" in name or "norm" in name
    )
    formula_rest = case.layers * 8 * case.hidden
    assert counted - router_and_norms == case.num_parameters() - formula_rest
    assert router_and_norms <= formula_rest + 2 * case.layers * case.hidden + case.hidden


def test_train_keeps_fp32_parameters_and_activations_where_they_fit() -> None:
    whole = train.Case(32, hidden=4096, width=14336, sequence=4096, batch=1, ranks=2)
    assert train.fitted(replace(whole, ranks=8), 141e9).parameters == "float32"
    four = train.fitted(replace(whole, ranks=4), 141e9)
    assert (four.parameters, four.layers) == ("bfloat16", 32)
    two = train.fitted(replace(whole, ranks=2), 80e9)
    assert two.layers < 32 and two.checkpointing
    with pytest.raises(ValueError, match=r"not one layer of .* fits"):
        train.fitted(whole, 1e9)


def test_exposed_communication_is_what_computation_does_not_cover() -> None:
    assert train.covered([(0, 4), (2, 6), (8, 9)]) == 7
    assert train.covered([]) == 0
    assert train.is_communication("ncclDevKernel_SendRecv(...)")
    assert not train.is_communication("void (anonymous namespace)::pack_rows<uint4>(...)")


def test_kernels_that_count_as_communication_are_kernels_by_their_names() -> None:
    """A kernel over peers was named otherwise, and taken for computation."""
    csrc = Path(__file__).parent.parent / "csrc"
    sources = "".join(path.read_text() for path in csrc.rglob("*.cu"))
    kernels = set(
        re.findall(r"__global__ void(?: __launch_bounds__\([^()]*\))?\s+(\w+)\(", sources)
    )
    assert {"pack_rows", "sum_rows"} <= kernels
    own = [name for name in train.COMMUNICATION if name != "nccl"]
    assert [name for name in own if name not in kernels] == []
    called = "void torch_moe_ep::(anonymous namespace)::{}<uint4>(torch_moe_ep::Rows, long)"
    assert [name for name in own if not train.is_communication(called.format(name))] == []


def test_multi_gpu_script_says_what_is_missing() -> None:
    """Without a GPU it ends before anything runs."""
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["benchmarks/multi_gpu.sh", "unused", "commit"],
        cwd=results.README.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "multi_gpu.sh needs a GPU, and torch sees none.\n"
