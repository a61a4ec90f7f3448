"""The pipeline of the Hopper GEMMs on the host, under random schedules.

Producers, consumers, the tile queue and the schedulers are csrc's own code; TMA, mbarriers, wgmma
and clusters are modelled (tests/hopper_model). Each run draws a problem and a schedule in which
warps, loads and stores are late, and holds every product to the step of the tile that it belongs
to, and every store of SwiGLU's gradient to the z that was loaded where it stores from.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
from model_programs import compiled

CONFIGS = [
    "single",
    "wide",
    "large",
    "tall",
    "ping_pong",
    "ping_pong_single",
    "swiglu",
    "swiglu_gradient",
    "weight_gradient",
    "wide_weight_gradient",
    "few_rows",
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("pipeline", tmp_path_factory.mktemp("pipeline"))


def check(program: Path, config: str, seeds: Iterable[int]) -> None:
    """Every part of a tile is stored once, from the right products, and nobody waits for ever."""
    num_parts = 0
    for seed in seeds:
        command = [program, config, str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"{config} {seed}: {done.stdout or done.stderr}"
        num_parts += int(done.stdout)
    assert num_parts > 0


@pytest.mark.parametrize("config", CONFIGS)
def test_every_product_meets_its_step(program: Path, config: str) -> None:
    check(program, config, range(12))


@pytest.mark.full
@pytest.mark.parametrize("config", CONFIGS)
def test_every_product_meets_its_step_often(program: Path, config: str) -> None:
    check(program, config, range(12, 400))
