"""The planner: its numbers against real models, measured steps, and worked examples."""

import dataclasses
import doctest
import importlib
import itertools
import json
import math
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

import torch_moe_ep.plan as package
from benchmarks.result_files import newest_files, read
from tests import plan_cases
from torch_moe_ep.plan import (
    GPUS,
    PRECISIONS,
    Batch,
    Layout,
    Precision,
    find_shape,
    memory_of,
    plan,
    recommend,
    speed_of,
    traffic_of,
)
from torch_moe_ep.plan.__main__ import main
from torch_moe_ep.plan.activations import (
    block_input,
    kept_by_head,
    kept_by_layer,
    kept_rows,
    rows_of,
)
from torch_moe_ep.plan.memory import moments, state_bytes
from torch_moe_ep.plan.shape import from_config
from torch_moe_ep.plan.table import as_json
from torch_moe_ep.plan.weights import num_parameters, weights_of

ROOT = Path(__file__).parent.parent
MIXTRAL = find_shape("mistralai/Mixtral-8x7B-v0.1")
FP32 = Precision("fp32", "fp32", 4, 4, 8, 4, 4)
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "use_cache": False,
}
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**SMALL, intermediate_size=128, num_local_experts=8),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **SMALL, moe_intermediate_size=96, shared_expert_intermediate_size=160, num_experts=8
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SMALL, moe_intermediate_size=96, num_experts=8, head_dim=32, attention_bias=True
    ),
    "olmoe": lambda: OlmoeConfig(
        **SMALL,
        intermediate_size=96,
        num_experts=8,
        attention_bias=True,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
    ),
}


def four_layers() -> Any:
    """The model that benchmarks/step.py and offload.py measure."""
    return dataclasses.replace(MIXTRAL, layers=4)


def kept_by(model: Any, layout: Layout, batch: Batch) -> int:
    """Bytes that a forward leaves for backward, by the formulas."""
    each = kept_by_layer(model, layout, batch)
    if layout.checkpointing != "none":
        each = block_input(model, layout, batch)
    if layout.checkpointing == "rows":
        each += kept_rows(model, layout, batch)
    return kept_by_head(model, layout, batch) + model.layers * each


def results(name: str) -> list[dict[str, Any]]:
    """Rows of the newest result file of that name."""
    rows: list[dict[str, Any]] = read(newest_files()[name])["rows"]
    return rows


def test_worked_examples_in_docstrings_are_right():
    for module in pkgutil.iter_modules(package.__path__):
        if module.name != "__main__":
            found = importlib.import_module(f"{package.__name__}.{module.name}")
            assert doctest.testmod(found).failed == 0


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("mistralai/Mixtral-8x7B-v0.1", 46.7),
        ("mistralai/Mixtral-8x22B-v0.1", 140.6),
        ("Qwen/Qwen1.5-MoE-A2.7B", 14.3),
        ("Qwen/Qwen2-57B-A14B", 57.4),
        ("Qwen/Qwen3-30B-A3B", 30.5),
        ("Qwen/Qwen3-235B-A22B", 235.1),
        ("allenai/OLMoE-1B-7B-0924", 6.9),
    ],
)
def test_known_model_has_the_published_number_of_parameters(name, billions):
    assert round(num_parameters(weights_of(find_shape(name.upper()))) / 1e9, 1) == billions


@pytest.mark.parametrize("family", CONFIGS)
def test_config_file_gives_the_parameters_of_transformers_class(family, tmp_path):
    config = CONFIGS[family]()
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = sum(param.numel() for param in model.parameters())
    for path in (tmp_path, tmp_path / "config.json"):
        assert num_parameters(weights_of(find_shape(str(path)))) == expected


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("family", CONFIGS)
def test_activations_kept_are_those_of_the_real_model(family, checkpointing):
    config = CONFIGS[family]()
    model = plan_cases.lone_model(config, checkpointing)
    ids = torch.randint(config.vocab_size, (2, 128))
    kept = plan_cases.kept_after_forward(model, {"input_ids": ids, "labels": ids})
    layout = Layout(1, 1, 1, 1, PRECISIONS["bf16"], checkpointing, row_alignment=1)
    shape = from_config(config.to_dict(), family)
    assert kept == pytest.approx(kept_by(shape, layout, Batch(128, 2)), rel=0.01)


def test_activations_kept_on_ranks_hold_the_rows_received(ranks):
    fields = {"max_position_embeddings": 512}
    kinds = ["none", "rows", "full"]
    found = ranks(2).run(plan_cases.kept_on_ranks, 2, kinds, fields, 512)
    shape = from_config(MixtralConfig(**{**SMALL, **fields}, intermediate_size=128).to_dict(), "m")
    shape = dataclasses.replace(shape, vocab=128)
    for kind, kept in zip(kinds, zip(*found, strict=True), strict=True):
        layout = Layout(2, 1, 1, 1, PRECISIONS["bf16"], kind, row_alignment=1)
        expected = kept_by(shape, layout, Batch(256, 2))
        assert sum(kept) / 2 == pytest.approx(expected, rel=0.02), kind


def test_states_of_sharded_models_are_exact(ranks):
    """Parameters, gradients and AdamW of the rank that holds most; 129 rows are cut unevenly."""
    grids = [(1, 4), (2, 2), (4, 1), (2, 1), (1, 2)]
    fields = {"vocab_size": 129, "num_local_experts": 8}
    found = ranks(4).run(plan_cases.sharded_states, grids, fields)
    shape = from_config(MixtralConfig(**SMALL, intermediate_size=128).to_dict(), "m")
    shape = dataclasses.replace(shape, vocab=129)
    for grid, (ep, shard) in enumerate(grids):
        layout = Layout(ep, shard, 4 // (ep * shard), 1, FP32)
        most = max(rank[grid] for rank in found)
        assert most == state_bytes(shape, layout), (ep, shard)


def test_peak_of_sharded_steps_is_predicted(ranks):
    """Weights far outweigh activations; gloo copies what it reduce-scatters, NCCL does not."""
    grids = [(2, 1), (1, 1), (1, 2)]
    fields = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3}
    found = ranks(2).run(plan_cases.peaks_of_steps, grids, fields, 16)[0]
    config = MixtralConfig(**{**SMALL, **fields, "vocab_size": 128})
    shape = from_config(config.to_dict(), "m")
    for (ep, shard), peak in zip(grids, found, strict=True):
        layout = Layout(ep, shard, 2 // (ep * shard), 1, PRECISIONS["mixed"], row_alignment=1)
        expected = memory_of(shape, layout, Batch(8, 2)).total
        copy = 4 * 3 * 128 * 512 * 8 // ep if shard > 1 else 0
        assert 0.97 * expected <= peak <= 1.03 * expected + copy, (ep, shard)


def test_memory_is_what_one_h200_reported():
    """benchmarks/offload.py: forward and backward over gradients that are there already."""
    model, batch = four_layers(), Batch(4096, 4)
    measured = {(row["name"], row["unit"]): row["value"] for row in results("offload")}
    cases = {
        "on the GPU": ("none", "none"),
        "on the host, horizon 1": ("none", "activations"),
        "on the GPU, checkpointing": ("full", "none"),
        "on the host, horizon 1, checkpointing": ("full", "activations"),
    }
    for name, (checkpointing, offload) in cases.items():
        layout = Layout(1, 1, 1, 1, PRECISIONS["bf16"], checkpointing, offload)
        found = moments(model, layout, batch)
        top = max(m.activations + m.buffers + _gradients_of_a_layer(m) for m in found)
        assert top / 2**30 == pytest.approx(measured[name, "GiB peak"], rel=0.03), name
        if offload == "none":
            held = kept_by(model, layout, batch)
            assert held / 2**30 == pytest.approx(measured[name, "GiB held"], rel=0.01), name


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("samples", [1, 4])
def test_peak_is_that_of_whole_steps_on_a_gpu(samples, checkpointing):
    """Four layers of 8x7B with AdamW, against torch's own count of bytes."""
    case = f"4 layers H=4096 I=14336 T={4096 * samples} checkpointing={checkpointing}"
    (measured,) = [
        row["value"] for row in results("memory") if row["name"] == "torch" and row["case"] == case
    ]
    layout = Layout(1, 1, 1, 1, PRECISIONS["bf16"], checkpointing)
    expected = memory_of(four_layers(), layout, Batch(4096, samples)).total
    assert expected / 2**30 == pytest.approx(measured, rel=0.01)


def _gradients_of_a_layer(moment: Any) -> int:
    """Those of the experts whose backward ends; the layers behind have theirs already."""
    is_last = moment.moment == "experts of layer 3" and moment.gradients > 0
    return 2 * 3 * 8 * 4096 * 14336 if is_last else 0


TRAINED = re.compile(
    r"(\d+) layers H=4096 I=14336 W=(\d+) batch=(\d+) sequence=4096 a GPU, (bf16|fp32) parameters"
    r"(, activation checkpointing)?$"
)


def trained(name: str) -> list[tuple[Any, Layout, Batch, dict[str, float]]]:
    """The cases of benchmarks/train.py in a result file (P = W), with ours by unit."""
    found: dict[str, dict[str, float]] = {}
    for row in results(name):
        if row["name"] == "torch_moe_ep":
            case = row["case"].partition("scaling, ")[2] or row["case"]
            found.setdefault(case, {})[row["unit"]] = row["value"]
    cases = []
    for case, by_unit in found.items():
        fit = TRAINED.match(case)
        assert fit is not None, case
        model = dataclasses.replace(MIXTRAL, layers=int(fit[1]))
        precision = PRECISIONS["bf16" if fit[4] == "bf16" else "mixed"]
        layout = Layout(int(fit[2]), 1, 1, 1, precision, "full" if fit[5] else "none")
        cases.append((model, layout, Batch(4096, int(fit[3])), by_unit))
    return cases


@pytest.mark.parametrize("name", ["train-4gpu", "train-4gpu-h100", "scaling-4gpu"])
def test_memory_is_what_several_gpus_reported(name):
    cases = trained(name)
    assert cases
    for model, layout, batch, measured in cases:
        total = memory_of(model, layout, batch).total / 2**30
        assert total == pytest.approx(measured["GiB at most"], rel=0.01), (layout, batch)


@pytest.mark.parametrize(
    ("name", "gpu"), [("train-4gpu", "h200-141gb"), ("train-4gpu-h100", "h100-80gb")]
)
def test_speed_range_holds_the_steps_of_whole_models_on_four_gpus(name, gpu):
    ((model, layout, batch, measured),) = trained(name)
    speed = speed_of(model, layout, batch, GPUS[gpu])
    assert speed.low < measured["tokens/s"] < speed.high


def test_speed_range_holds_the_steps_that_one_h200_made():
    model, batch, gpu = four_layers(), Batch(4096, 4), GPUS["h200-141gb"]
    layout = Layout(1, 1, 1, 1, PRECISIONS["bf16"])
    speed = speed_of(model, layout, batch, gpu)
    steps = [row["value"] for row in results("step") if row["name"] == "torch_moe_ep"]
    assert len(steps) == 2
    assert all(speed.low < step < speed.high for step in steps)
    measured = {(row["name"], row["unit"]): row["value"] for row in results("offload")}
    for name, (checkpointing, offload) in {
        "on the GPU": ("none", "none"),
        "on the host, horizon 1": ("none", "activations"),
        "on the GPU, checkpointing": ("full", "none"),
        "on the host, horizon 1, checkpointing": ("full", "activations"),
    }.items():
        layout = Layout(1, 1, 1, 1, PRECISIONS["bf16"], checkpointing, offload)
        work = speed_of(model, layout, batch, gpu).work
        assert batch.tokens / work == pytest.approx(measured[name, "tokens/s"], rel=0.05), name


@pytest.mark.parametrize("name", ["mistralai/mixtral-8x7b-v0.1", "qwen/qwen1.5-moe-a2.7b"])
def test_every_range_is_narrow_and_every_split_adds_up(name):
    model = find_shape(name)
    for gpu, (gpus, nodes), tokens in itertools.product(
        GPUS.values(), [(1, 1), (24, 3)], [256, 8192]
    ):
        for one in plan(model, gpu, gpus, nodes, Batch(tokens, 1), ["mixed"]):
            assert 1 < one.speed.high / one.speed.low <= 1.5
            layout, parts = one.layout, dataclasses.asdict(one.memory)
            assert layout.ep * layout.shard * layout.replicate == gpus
            assert model.experts % layout.ep == 0
            assert one.memory.total == sum(
                value for key, value in parts.items() if key not in ("moment", "host")
            )
            assert min(value for key, value in parts.items() if key != "moment") >= 0


def test_layouts_are_all_that_divide():
    plans = plan(MIXTRAL, GPUS["h100-80gb"], 16, 2, Batch(4096, 1), ["mixed"])
    grids = {(p.layout.ep, p.layout.shard, p.layout.replicate) for p in plans}
    assert grids == {
        (ep, shard, 16 // ep // shard)
        for ep, shard in itertools.product([1, 2, 4, 8], [1, 2, 4, 8, 16])
        if 16 % (ep * shard) == 0
    }
    choices = {(p.layout.checkpointing, p.layout.offload) for p in plans}
    assert len(choices) == 9
    assert len({p.layout for p in plans}) == len(plans)


def test_mixtral_on_two_p4d_needs_bf16_states_or_the_host(capsys):
    """747 GB at 16 bytes a parameter are more than 16 x 40 GB."""
    gpu = GPUS["a100-40gb"]
    plans = plan(MIXTRAL, gpu, 16, 2, Batch(2048, 1), list(PRECISIONS))
    assert num_parameters(weights_of(MIXTRAL)) * 16 > 16 * 40e9
    fitting = {(p.layout.precision.name, p.layout.offload) for p in plans if p.fits}
    assert ("mixed", "none") not in fitting
    assert ("mixed", "activations") not in fitting
    assert {("bf16", "none"), ("mixed", "parameters")} <= fitting
    chosen = recommend(plans)
    assert chosen is not None
    assert (chosen.layout.precision.name, chosen.layout.ep) == ("bf16", 8)
    arguments = ["--gpus", "16", "--nodes", "2", "--gpu", "a100-40gb", "--sequence", "2048"]
    assert main(["--model", MIXTRAL.name, *arguments]) == 0
    printed = capsys.readouterr().out
    refused = "fp32 states on the GPUs, 16 bytes a parameter and 696 GiB in all, do not fit"
    assert refused in " ".join(printed.split())
    assert "bf16 weights, gradients and AdamW" in printed


def test_traffic_of_a_worked_example():
    """Mixtral, P = 8 on each of two nodes, S = 2 across them, T = 4096."""
    layout, batch = Layout(8, 2, 1, 2, PRECISIONS["mixed"]), Batch(4096, 1)
    traffic = traffic_of(MIXTRAL, layout, batch)
    copies = 4096 * 2 * 7 / 8 * 2 * 4096
    assert traffic.rows.nvlink == 4 * 32 * copies
    assert traffic.rows.network == 0
    experts = 32 * 3 * 4096 * 14336  # of an EP rank
    dense, root = 32 * (41943040 + 2 * 4096 + 8 * 4096), 2 * 32000 * 4096 + 4096
    flat = (dense * 8 + root * 6) * 15 / 16
    assert math.isclose(traffic.weights.network, experts * 8 / 2 + flat / 8)
    assert math.isclose(traffic.weights.nvlink, flat * 7 / 8)
    recomputed = dataclasses.replace(layout, checkpointing="full")
    assert traffic_of(MIXTRAL, recomputed, batch).rows.nvlink == 6 * 32 * copies


def test_one_node_sends_nothing_over_the_network():
    for one in plan(MIXTRAL, GPUS["h200-141gb"], 8, 1, Batch(4096, 1), ["bf16"]):
        assert (one.traffic.rows + one.traffic.weights).network == 0


def test_rows_of_experts_over_nodes_cross_once_a_node():
    model = find_shape("Qwen/Qwen3-30B-A3B")
    layout = Layout(16, 1, 1, 2, PRECISIONS["bf16"])
    rows = traffic_of(model, layout, Batch(1024, 1)).rows
    other = 1 - math.comb(64, 8) / math.comb(128, 8)
    assert math.isclose(rows.network, 4 * 48 * 1024 * other * 2 * 2048)
    assert math.isclose(rows.nvlink, 4 * 48 * 1024 * 8 * 7 / 8 * 2 * 2048)


def test_more_of_anything_that_saves_memory_needs_less():
    batch, states = Batch(4096, 8), PRECISIONS["mixed"]
    totals = {
        kind: memory_of(MIXTRAL, Layout(8, 2, 1, 2, states, *kind), batch).total
        for kind in itertools.product(["none", "rows", "full"], ["none", "activations"])
    }
    assert totals["full", "none"] < totals["rows", "none"] < totals["none", "none"]
    assert totals["none", "activations"] < totals["none", "none"]
    by_ep = [memory_of(MIXTRAL, Layout(p, 16 // p, 1, 2, states), batch) for p in (1, 2, 4, 8)]
    gathered = [memory.gathered for memory in by_ep]
    assert gathered == sorted(gathered, reverse=True)


def test_rows_follow_padding():
    batch, states = Batch(100, 1), PRECISIONS["bf16"]
    assert rows_of(MIXTRAL, Layout(1, 1, 1, 1, states, row_alignment=1), batch) == 200
    assert rows_of(MIXTRAL, Layout(1, 1, 1, 1, states), batch) == (200 + 8 * 127) // 128 * 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "nobody/nothing"}, "is no model that is known offline"),
        ({"--gpu": "tpu"}, "gpu must be one of a100-40gb"),
        ({"--nodes": "3"}, "nodes must divide gpus: 3 does not divide 16"),
        ({"--gpus": "0"}, "gpus must be at least 1, got 0"),
        ({"--batch": "-1"}, "batch must be at least 1, got -1"),
        ({"--sequence": "0"}, "sequence must be at least 1, got 0"),
        ({"--network": "0"}, "network must be more than 0 Gbit/s"),
        ({"--nodes": "0"}, "nodes must be at least 1, got 0"),
    ],
)
def test_bad_question_is_refused_with_what_came(change, message, capsys):
    options = {
        "--model": MIXTRAL.name,
        "--gpus": "16",
        "--nodes": "2",
        "--gpu": "h100-80gb",
        "--sequence": "4096",
        **change,
    }
    assert main([word for pair in options.items() for word in pair]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llama"}, "has model_type 'llama'; the planner knows mixtral"),
        ([], "has model_type None"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, "has layers without experts"),
        ({"model_type": "mixtral", "hidden_size": "big"}, "must give hidden_size"),
    ],
)
def test_config_that_cannot_be_planned_is_refused(fields, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"config\.json") as error:
        find_shape(str(tmp_path))
    assert message in str(error.value)


def test_config_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON file"):
        find_shape(str(tmp_path / "config.json"))


def test_model_that_fits_nowhere_says_what_is_missing(capsys):
    arguments = ["--gpus", "1", "--gpu", "a100-40gb", "--sequence", "2048"]
    assert main(["--model", MIXTRAL.name, *arguments]) == 1
    assert "Nothing fits: the leanest needs" in capsys.readouterr().out


def test_fp32_states_are_taken_where_they_fit_though_bf16_is_faster(capsys):
    gpu = GPUS["h100-80gb"]
    plans = plan(MIXTRAL, gpu, 16, 2, Batch(4096, 1), list(PRECISIONS))
    chosen = recommend(plans)
    assert chosen is not None
    assert chosen.layout.precision.name == "mixed"
    peers = [p for p in plans if p.fits and p.layout.precision.name == "mixed"]
    assert chosen.speed.low >= 0.98 * max(p.speed.low for p in peers)
    assert max(p.speed.low for p in plans if p.fits) > chosen.speed.low
    arguments = ["--gpus", "16", "--nodes", "2", "--gpu", gpu.name, "--sequence", "4096"]
    assert main(["--model", MIXTRAL.name, *arguments]) == 0
    assert "others are faster with states that lose small updates" in capsys.readouterr().out


def test_json_holds_every_layout_and_the_one_to_take(capsys):
    arguments = ["--gpus", "8", "--gpu", "h200-141gb", "--sequence", "4096", "--json"]
    assert main(["--model", MIXTRAL.name, *arguments]) == 0
    printed = json.loads(capsys.readouterr().out)
    plans = plan(MIXTRAL, GPUS["h200-141gb"], 8, 1, Batch(4096, 1), list(PRECISIONS))
    assert printed == json.loads(
        json.dumps(as_json(MIXTRAL, GPUS["h200-141gb"], Batch(4096, 1), plans))
    )
    assert len(printed["plans"]) == len(plans)
    assert printed["recommended"] in printed["plans"]
    assert set(printed["gpu"]["sources"]) == set(printed["gpu"]) - {"name", "sources"}


def test_network_of_another_machine_changes_the_speed(capsys):
    arguments = ["--model", MIXTRAL.name, "--gpus", "16", "--nodes", "2", "--gpu", "h100-80gb"]
    low = []
    for network in ("3200", "400"):
        assert main([*arguments, "--sequence", "4096", "--json", "--network", network]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["gpu"]["network"] == float(network) * 1e9 / 8 / 8
        assert printed["gpu"]["sources"]["network"] == f"--network {network}"
        low.append(printed["recommended"]["speed"]["low"])
    assert low[1] < low[0] / 2


def test_readme_shows_what_the_command_prints():
    readme = (ROOT / "README.md").read_text()
    section = readme.split("<!-- plan:begin -->")[1].split("<!-- plan:end -->")[0]
    command, printed = section.split("```console\n")[1].split("\n", 1)
    words = command.removeprefix("$ python ").split()
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert printed.strip().removesuffix("```").strip() == done.stdout.strip()
