"""The benchmarks' own machinery: routings, timing, result files, README's table."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import common, layer, results, transport
from benchmarks.routing import ROUTINGS, copies_per_expert, expert_ids


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


def test_result_file_has_the_fixed_fields_and_merges(tmp_path: Path) -> None:
    """A second run from the same commit replaces equal rows and keeps the others."""
    path = tmp_path / "results.json"
    row = {"name": "a", "case": "c", "value": 1.0, "unit": "s"}
    common.write_results("layer", [row, {**row, "case": "d"}], path)
    common.write_results("layer", [{**row, "value": 2.0}], path)
    result = results.read(path)
    assert {(r["case"], r["value"]) for r in result["rows"]} == {("c", 2.0), ("d", 1.0)}
    path.write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match="is no result file: date, commit"):
        results.read(path)


def test_every_result_file_of_the_repository_is_readable() -> None:
    """All of benchmarks/results has the format of the reader."""
    for path in sorted(common.RESULTS_DIR.glob("*.json")):
        assert results.format_table(results.read(path)["rows"])


def test_readme_table_equals_newest_results() -> None:
    """`python -m benchmarks.results --readme` would change nothing."""
    assert results.readme_with_tables() == results.README.read_text()


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
    sent = {row["name"]: row["value"] for row in rows if row["unit"] == "bytes sent"}
    # Half of the 128 copies stay; gathered tokens leave whole, and their sums in fp32.
    assert sent.pop("torch_moe_ep all-gather dispatcher, there and back") == 64 * 16 * 4 * 2
    assert set(sent.values()) == {64 * 16 * 4} and len(sent) == 3
    assert {row["case"] for row in rows} == {f"P=2 T=64 H=16 K=2 E=8 ({transport.NOT_A_SPEED})"}
