"""`python -m torch_moe_ep.report`: what it reads, draws and puts on one page."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy
import pytest
from matplotlib.image import imread

from torch_moe_ep.report import read_run, write_report
from torch_moe_ep.report.__main__ import main
from torch_moe_ep.report.figures import MAX_COLUMNS, _binned, _running_mean

PICTURES = {"loss", "learning_rate", "grad_norm", "tokens_per_second", "expert_load_layers",
            "expert_load", "router_entropy"}  # fmt: skip


def record(step: int, *, layers: int = 2, experts: int = 4) -> dict:
    """A record as the recorder writes it; expert 1 of layer 1 gets everything."""
    even = {"tokens": [6] * experts, "imbalance": 1.0, "entropy": 1.2}
    one = {"tokens": [0, 24, *[0] * (experts - 2)], "imbalance": 4.0, "entropy": 0.1}
    row = {"group": "mesh_ep", "stage": "plan", "calls": 2, "bytes": 10**6, "milliseconds": 3.0}
    names = {f"model.layers.{i}.mlp.experts": one if i == 1 else even for i in range(layers)}
    return {
        "step": step,
        "imbalance": 4.0,
        "layers": names,
        "traffic": [{**row, "timed_calls": 2}],
    }


def write_lines(path: Path, *lines: dict) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run of ten steps that was killed in the middle of a line, resumed at 8, killed again."""
    folder = tmp_path / "<mine>"
    folder.mkdir()
    steps = [
        {"step": s, "loss": 5.0 - s / 10, "lr": 1e-4, "grad_norm": 1.0, "tokens_per_second": 900.0}
        for s in (*range(9), 8, 9)
    ]
    steps[9]["loss"] = 4.15  # step 8 as it was the second time
    other = [{"reference_losses": {"unigram": 6.5}}, {"step": 10, "validation_loss": 4.4}]
    write_lines(folder / "history.jsonl", *steps, *other)
    write_lines(folder / "experts.jsonl", *map(record, range(10)))
    for name in ("history.jsonl", "experts.jsonl"):
        with (folder / name).open("a") as lines:
            lines.write('{"step": 10, "lo')
    return folder


def test_run_that_was_killed_and_resumed_reads_each_step_once(run_folder: Path) -> None:
    run = read_run(run_folder)
    steps, losses = run.curves["loss"]
    assert steps == list(range(10))
    assert losses[8] == 4.15
    assert run.num_steps == 10
    assert run.num_unreadable == 2
    assert run.reference_losses == {"unigram": 6.5}
    assert run.load[0] == [[1.0] * 4, [0.0, 4.0, 0.0, 0.0]]
    totals = {"calls": 20, "bytes": 10**7, "milliseconds": 30.0, "timed_calls": 20}
    assert run.traffic["mesh_ep", "plan"] == totals


class Page(HTMLParser):
    """Counts what is on a page and notes what it would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.images, self.fetched, self.cells = 0, [], []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.images += tag == "img"
        for name, value in attrs:
            if name in ("src", "href") and not value.startswith("data:image/png;base64,iVBOR"):
                self.fetched.append(value)

    def handle_data(self, data: str) -> None:
        self.cells.append(data)


def test_report_draws_every_curve_and_fetches_nothing(run_folder: Path) -> None:
    files = write_report(run_folder)
    assert {path.stem for path in files} == {*PICTURES, "report"}
    for path in files[:-1]:
        pixels = imread(path)
        assert pixels.shape[0] > 250
        assert len(numpy.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 20, path
    text = files[-1].read_text()
    page = Page()
    page.feed(text)
    assert page.images == len(PICTURES)
    assert page.fetched == []
    assert "<script" not in text
    assert "url(" not in text
    assert "Run <mine>" in page.cells
    assert "Run <mine>" not in text  # escaped
    assert "mesh_ep: plan" in page.cells
    assert {"4.00", "0.100", "1.500"} <= set(page.cells)  # busiest, entropy, ms a call
    said = " ".join(page.cells)
    assert "Busiest: expert 1 of layer 1, 4.00 times an even share; idlest 0.00" in said
    assert re.search(r"Dashed: unigram, 6\.5\.", said)


def test_report_of_a_history_alone_draws_what_there_is(tmp_path: Path, capsys) -> None:
    write_lines(tmp_path / "history.jsonl", {"step": 0, "loss": 1.0})
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/report.html and loss.png\n"


def test_report_of_many_experts_shows_the_busiest_of_each_layer(tmp_path: Path) -> None:
    write_lines(tmp_path / "experts.jsonl", *(record(s, layers=3, experts=128) for s in range(3)))
    page = write_report(tmp_path)[-1].read_text()
    assert "The busiest of the 128 experts of each layer." in page


def test_report_without_a_record_says_what_writes_them(tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path)]) == 2
    assert "holds neither history.jsonl nor experts.jsonl" in capsys.readouterr().err
    write_lines(tmp_path / "experts.jsonl", record(0, layers=1), record(1, layers=2))
    assert main([str(tmp_path)]) == 2
    assert "step 0 has other layers than step 1" in capsys.readouterr().err


def test_many_records_are_averaged_into_few_columns() -> None:
    rows = numpy.arange(2 * MAX_COLUMNS + 2, dtype=float)[:, None]
    binned, width = _binned(rows)
    assert width == 3
    assert len(binned) <= MAX_COLUMNS
    assert binned[0] == 1.0
    assert binned[-1] == rows[len(rows) // 3 * 3 :].mean() == 801.0
    smooth = _running_mean(numpy.array([3.0, 5.0, 7.0]), 2)
    assert smooth.tolist() == [3.0, 4.0, 6.0]


def test_loss_that_was_nan_does_not_hide_what_came_after(tmp_path: Path) -> None:
    losses = numpy.array([numpy.nan, 5.0, numpy.inf, 7.0, 9.0])
    assert _running_mean(losses, 2).tolist()[1:] == [5.0, 5.0, 7.0, 8.0]
    lines = [{"step": step, "loss": loss} for step, loss in enumerate(losses.tolist())]
    write_lines(tmp_path / "history.jsonl", *lines)
    page = write_report(tmp_path)[-1].read_text()
    assert "Last value 9, at step 4. 2 values are not finite." in page
