"""Loading a Hugging Face folder per rank: the same bits as from_pretrained, at 1 / (P S) of the bytes.

Letters: W ranks, P expert-parallel degree, S shard degree of the experts.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from parallel_cases import TIED, Run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import torch_moe_ep
from torch_moe_ep import apply_expert_parallel, init_device_mesh
from torch_moe_ep.testing import batch_of, tiny_mixtral
from torch_moe_ep.testing.parallel import from_rank0, full_parameters, wrap

SHARD_BYTES = 200_000  # several files for the tiny Mixtral
EXPERT_NUMBERS = 2 * 8 * 3 * 64 * 128  # layers, experts, matrices, H, I


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Makes folders as transformers saves them, once each: (dtype, tied, fused, one file)."""
    made = {}

    def folder_of(dtype=torch.float32, *, tied=False, fused=False, single=False) -> Path:
        key = (dtype, tied, fused, single)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("hub")
            model = tiny_mixtral(seed=7, tie_word_embeddings=tied).to(dtype)
            model.save_pretrained(
                made[key],
                max_shard_size="5GB" if single else SHARD_BYTES,
                save_original_format=not fused,
            )
        return made[key]

    return folder_of


def patched(run: Run, *, seed: int = 1, is_meta: bool = False, dtype=torch.float32):
    """A patched and wrapped model with weights of its own."""
    mesh = init_device_mesh("cpu", run.ep, run.shard)
    with torch.device("meta" if is_meta else "cpu"):
        model = tiny_mixtral(seed=seed, **run.model).to(dtype)
    apply_expert_parallel(model, mesh)
    return wrap(model, run.wrap, mesh, **run.options)


def loaded_on_rank(run: Run, folder: str, is_meta: bool = False, dtype=torch.float32):
    model = patched(run, is_meta=is_meta, dtype=dtype)
    report = torch_moe_ep.load_hf(model, folder)
    return from_rank0(full_parameters(model)), report


def assert_equals_from_pretrained(found, folder, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    expected = dict(model.named_parameters())
    assert set(found) == set(expected)
    for name, param in expected.items():
        assert found[name].dtype == dtype and torch.equal(found[name], param), name


GRIDS = [
    Run("fsdp2", 4, 1),
    Run("fsdp2", 4, 2, 2),
    Run("fsdp2", 4, 2, 1),
    Run("fsdp2", 4, 4),
    Run("fsdp2", 2, 2),
    Run("fsdp2", 1, 1),
    Run("hsdp2", 4, 2),
    Run("fsdp1", 4, 2),
    Run("fsdp1_no_shard", 2, 2),
    Run("fsdp1_hybrid", 4, 2),
    Run("ddp", 2, 2),
    Run("none", 4, 4),
]


@pytest.mark.parametrize("run", GRIDS, ids=str)
def test_load_hf_equals_from_pretrained_bit_for_bit_and_reads_its_part(ranks, folders, run):
    folder = folders()
    results = ranks(run.world).run(loaded_on_rank, run, str(folder))
    assert_equals_from_pretrained(results[0][0], folder)
    shard = run.shard or run.world // run.ep
    for _, report in results:
        assert report.expert_bytes == 4 * EXPERT_NUMBERS // (run.ep * shard)
