"""accelerate's own loop over FSDP2 and FSDP1, DDP under Trainer, and `save_pretrained`."""

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate_cases import fresh_accelerate, make_trainer, settle_device, training_arguments
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from torch_moe_ep import apply_expert_parallel, init_device_mesh
from torch_moe_ep.testing import assert_close, relative_error, tiny_mixtral
from torch_moe_ep.testing.parallel import full_parameters, wrap

TOLERANCE = 1e-5
MAX_NORM = 0.5


def accelerator(version: int) -> Accelerator:
    fresh_accelerate()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["MixtralDecoderLayer"],
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
        sync_module_states=False,
        use_orig_params=True if version == 1 else None,
    )
    found = Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=2)
    settle_device()
    return found


def run_loop(
    version: int, ep: int | None, folder: str = "", resume: str = ""
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Four steps of two micro-batches, clipped; norms and full parameters. Saves after two."""
    from accelerate_cases import rows

    acc = accelerator(version)
    model = tiny_mixtral()
    if ep is not None:
        apply_expert_parallel(model, init_device_mesh("cpu", ep))
    if version == 1:  # as accelerate's documents say: the model first
        model = acc.prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loader = DataLoader(rows(16), batch_size=1)  # type: ignore[arg-type]
    prepared = (optimizer, loader) if version == 1 else (model, optimizer, loader)
    *rest, optimizer, loader = acc.prepare(*prepared)
    model = rest[0] if rest else model
    if resume:
        acc.load_state(resume)
    norms = []
    for index, batch in enumerate(loader):
        if resume and index < 4:
            continue
        with acc.accumulate(model):
            acc.backward(model(**batch).loss)
            if acc.sync_gradients:
                norms.append(float(acc.clip_grad_norm_(model.parameters(), MAX_NORM)))
            optimizer.step()
            optimizer.zero_grad()
        if index == 3 and folder:
            acc.save_state(folder)
    return norms, full_parameters(model)


def check_loop(version: int, folder: str) -> None:
    norms, weights = run_loop(version, None)
    assert min(norms) > MAX_NORM and len(norms) == 4
    for ep, options in ((2, {"folder": folder}), (1, {"resume": folder})):
        found, params = run_loop(version, ep, **options)
        for mine, theirs in zip(found[::-1], norms[::-1], strict=False):
            assert abs(mine - theirs) < TOLERANCE * theirs
        assert_close(params, weights, TOLERANCE, f"parameters at P = {ep}")


@pytest.mark.parametrize("version", [2, 1])
def test_accelerate_equals_itself_on_the_unpatched_model(ranks, tmp_path, version):
    """Accumulation, clipping, `save_state`, and `load_state` at another P."""
    ranks(2).run(check_loop, version, str(tmp_path), timeout_s=120)


def train_under_ddp(folder: str, ep: int | None) -> tuple[list[float], dict[str, torch.Tensor]]:
    arguments = training_arguments(folder, 2, fsdp=None, fsdp_config=None, save_strategy="no")
    from accelerate.state import DistributedType, PartialState

    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    model: nn.Module = tiny_mixtral()
    if ep is not None:
        apply_expert_parallel(model, init_device_mesh("cpu", ep))
    trainer = make_trainer(model, arguments)
    trainer.train()
    trainer.save_model(f"{folder}/model-{ep}")
    if ep is not None:
        with pytest.raises(ValueError, match="without FSDP Trainer saves one rank's experts"):
            trainer._save_checkpoint(trainer.model, None)
    dist.barrier()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    figures = [float(entry[key]) for entry in entries for key in ("loss", "grad_norm")]
    return figures, full_parameters(model)


def check_ddp(folder: str) -> None:
    figures, weights = train_under_ddp(folder, None)
    found, params = train_under_ddp(folder, 2)
    assert relative_error(torch.tensor(found), torch.tensor(figures)) < TOLERANCE
    assert_close(params, weights, TOLERANCE)
    saved = [load_file(f"{folder}/model-{ep}/model.safetensors") for ep in (2, None)]
    assert_close(saved[0], saved[1], TOLERANCE)


def test_trainer_under_ddp_equals_itself_on_the_unpatched_model(ranks, tmp_path):
    ranks(2).run(check_ddp, str(tmp_path), timeout_s=120)


def check_save(folder: str, kind: str) -> str:
    mesh = init_device_mesh("cpu", 2)
    model = apply_expert_parallel(tiny_mixtral(), mesh)
    wrap(model, kind, mesh)
    model.save_pretrained(folder, max_shard_size="1GB")
    dist.barrier()
    with pytest.raises(ValueError, match="this rank's shard of") as caught:
        model.save_pretrained(folder, state_dict=model.state_dict())
    return str(caught.value)


@pytest.mark.parametrize("kind", ["fsdp2", "none"])
def test_save_pretrained_writes_whole_models_or_refuses(ranks, tmp_path, kind):
    ranks(2).run(check_save, str(tmp_path / "patched"), kind)
    tiny_mixtral().save_pretrained(tmp_path / "plain")
    found, wanted = (
        load_file(tmp_path / name / "model.safetensors") for name in ("patched", "plain")
    )
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
