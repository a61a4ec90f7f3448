"""`python -m torch_moe_ep.info`: what this machine can use, and why not the rest."""

import json
import subprocess
import sys

import pytest
import torch

from torch_moe_ep import info
from torch_moe_ep._build_info import BuildInfo

DEFAULT = BuildInfo("2.11.0", True, "13.0", "/cuda/bin/nvcc", "8.0+PTX;9.0a")
WITHOUT_CUDA = BuildInfo("2.11.0", False, None, None, None)


def obstacles(build: BuildInfo | None, *capabilities: tuple[int, int]) -> dict[str, str | None]:
    return {choice.name: choice.obstacle for choice in info.kernel_choices(build, capabilities)}


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 9), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("8.0+PTX", (7, 5), False),
        ("9.0a", (9, 0), True),
        ("9.0a", (10, 0), False),
        ("8.0+PTX;9.0a", (12, 0), True),
        ("7.5 8.6", (8, 6), True),
        ("", (9, 0), False),
    ],
)
def test_runs_on_follows_machine_code_and_ptx(architectures, capability, runs):
    assert info.runs_on(architectures, capability) is runs


def test_kernels_on_hopper_are_all_usable():
    assert set(obstacles(DEFAULT, (9, 0)).values()) == {None}


def test_kernels_on_ampere_leave_sm90_out():
    found = obstacles(DEFAULT, (8, 0))
    assert found.pop("sm90") == "they need a GPU of compute capability 9.0"
    assert set(found.values()) == {None}


def test_kernels_built_without_90a_say_so_on_hopper():
    build = BuildInfo("2.11.0", True, "13.0", "nvcc", "8.0+PTX")
    assert "without 9.0a" in str(obstacles(build, (9, 0))["sm90"])


def test_kernels_without_gpu_or_without_cuda_or_without_library_name_it():
    assert obstacles(DEFAULT)["torch"] == "torch sees no GPU"
    assert obstacles(WITHOUT_CUDA, (9, 0))["torch"] == "the library was built without CUDA"
    assert obstacles(None, (9, 0))["cpu"] == "there is no library for this torch"
    assert obstacles(WITHOUT_CUDA)["cpu"] is None


def test_text_names_the_build_and_every_choice():
    collected = info.collect()
    text = info.as_text(collected)
    assert f"for torch {torch.__version__}" in text
    for choice in (*collected.kernels, *collected.transports):
        assert choice.name in text
    assert "NOT USABLE" not in text


def test_module_prints_json():
    command = [sys.executable, "-m", "torch_moe_ep.info", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    printed = json.loads(done.stdout)
    assert printed["versions"]["torch"] == torch.__version__
    assert printed["library_obstacle"] is None
    assert [choice["name"] for choice in printed["kernels"]] == ["sm90", "sm80", "torch", "cpu"]


def test_hooks_that_cannot_be_used_are_said_to(monkeypatch):
    assert info.collect().hooks_obstacle is None
    monkeypatch.setattr(info, "why_hooks_unusable", lambda _path: "were built for another Python")
    lines = info.as_text(info.collect()).splitlines()
    assert "hooks          no: were built for another Python" in lines


def test_models_are_listed_with_verdict_and_reason(capsys):
    info.main(["--models"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["mixtral", "MixtralExperts", "yes"] for line in lines)
    assert any("GptOssExperts" in line and "no: expert biases" in line for line in lines)
