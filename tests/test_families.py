"""Every family of transformers whose experts have Mixtral's shape, against its unpatched self."""

import copy

import pytest
import torch
import torch.distributed as dist
import transformers
from family_cases import FAMILIES, REFUSED, Family
from torch import nn

from torch_moe_ep import apply_expert_parallel, average_gradients, init_device_mesh
from torch_moe_ep.integrations.families import find_experts_classes
from torch_moe_ep.layer import ExpertParallelExperts
from torch_moe_ep.testing import relative_error
from torch_moe_ep.testing.parallel import full_gradients, wrap

TOLERANCE = 1e-5
INSTALLED = [family for family in FAMILIES if family.is_installed]
PROVEN = [family for family in INSTALLED if family.is_proven]
OTHERS = [family for family in INSTALLED if not family.is_proven]
ROWS_ARE_FOR = "5.17.0"


def loss_of(model: nn.Module, family: Family, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first output on one rank's batch, and a loss that every element of it moves."""
    output = model(**family.batch(rank))[0]
    generator = torch.Generator().manual_seed(7)
    return output, (output * torch.randn(output.shape, generator=generator)).sum()


def errors_on_rank(family: Family, kind: str, has_gradients: bool) -> dict[str, float]:
    """Relative errors of this rank's output and, `has_gradients`, of every full gradient.

    Also checks that nothing but routed experts became expert-parallel.
    """
    world = dist.get_world_size()
    model = family.build()
    reference = copy.deepcopy(model)
    for rank in range(world):
        output, loss = loss_of(reference, family, rank)
        (loss / world).backward()
        if rank == dist.get_rank():
            expected = output.detach()
    names = {name for name, module in model.named_modules() if hasattr(module, "gate_up_proj")}
    mesh = init_device_mesh("cpu", world)
    apply_expert_parallel(model, mesh)
    swapped = {n for n, m in model.named_modules() if isinstance(m, ExpertParallelExperts)}
    assert swapped == names and not any("shared" in name for name in swapped)
    model = wrap(model, kind, mesh)
    output, loss = loss_of(model, family, dist.get_rank())
    errors = {"output": relative_error(output.detach(), expected)}
    if not has_gradients:
        return errors
    loss.backward()
    if kind == "none":
        average_gradients(model)
    for param in model.parameters():
        if param.grad is None:  # frozen, or not used by this batch
            param.grad = torch.zeros_like(param)
    wanted = {
        name: torch.zeros_like(param) if param.grad is None else param.grad
        for name, param in reference.named_parameters()
    }
    found = full_gradients(model)
    assert set(found) == set(wanted)
    return errors | {name: relative_error(found[name], wanted[name]) for name in wanted}


def errors_of_all(
    families: list[Family], kind: str, has_gradients: bool, tolerance: float = TOLERANCE
) -> dict[str, float]:
    """The errors beyond the tolerance, of several families in one launch."""
    return {
        f"{family} {name}": error
        for family in families
        for name, error in errors_on_rank(family, kind, has_gradients).items()
        if not error <= tolerance
    }


def test_every_class_that_fits_has_a_row():
    """A new transformers may bring more, which then want rows."""
    fits = {(known.model_type, known.name) for known in find_experts_classes() if not known.misfit}
    rows = {
        (family.module, type(module).__name__)
        for family in INSTALLED
        for module in family.build().modules()
        if "gate_up_proj" in module._parameters
    }
    if transformers.__version__ != ROWS_ARE_FOR:
        pytest.skip(f"rows are for transformers {ROWS_ARE_FOR}; without one: {fits - rows}")
    assert fits == rows
    assert len(rows) == 45


def test_classes_of_another_shape_are_listed_with_the_reason():
    reasons = {known.name: known.misfit or "" for known in find_experts_classes()}
    assert "expert biases" in reasons["GptOssExperts"]
    assert "no has_gate" in reasons["Llama4TextExperts"]
    assert "instead of fused gate_up_proj" in reasons["DbrxExperts"]
    assert "not SiLU" in reasons["Gemma4TextExperts"]
    assert "gates in its own way" in reasons["DeepseekV4Experts"]
    assert "would wait for each other" in reasons["Ernie4_5_VLMoeMoeExperts"]


def test_values_and_gradients_of_proven_families(ranks):
    for far in ranks(2).run(errors_of_all, PROVEN, "fsdp2", True):
        assert far == {}


def test_values_of_the_other_families(ranks):
    families = [family for family in OTHERS if not family.is_slow]
    for far in ranks(2).run(errors_of_all, families, "none", False, timeout_s=180):
        assert far == {}


def refusals_on_rank() -> dict[str, str]:
    mesh = init_device_mesh("cpu", 2)
    messages = {}
    for words, family in REFUSED.items():
        if not family.is_installed:
            continue
        with pytest.raises(ValueError) as caught:
            apply_expert_parallel(family.build(), mesh)
        messages[words] = str(caught.value)
    return messages


def test_models_of_another_shape_are_refused_by_name(ranks):
    for messages in ranks(2).run(refusals_on_rank):
        for words, message in messages.items():
            assert words in message


@pytest.mark.full
@pytest.mark.parametrize("family", OTHERS, ids=str)
def test_gradients_of_the_other_families(ranks, family):
    """Some of their attentions round more than ours (decays of linear attention): 5e-5."""
    for far in ranks(2).run(errors_of_all, [family], "none", True, 5e-5, timeout_s=180):
        assert far == {}
