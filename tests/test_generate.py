"""Evaluation and generation with experts spread over ranks that have different things to say."""

import pytest
import torch
import torch.distributed as dist
from parallel_cases import Run, backward, build, reference_of

from torch_moe_ep import apply_expert_parallel, init_device_mesh
from torch_moe_ep.testing import assert_close, batch_of, relative_error, tiny_mixtral
from torch_moe_ep.testing.parallel import from_rank0, full_gradients, wrap

PROMPTS = ([5, 17, 99, 3], [7, 7], [1, 2, 3, 4, 5, 6, 7], [60])
MODEL = {"use_cache": True}


def generation_options(rank: int) -> dict:
    """Greedy; every rank wants another number of tokens."""
    return {"do_sample": False, "max_new_tokens": 3 + 4 * rank, "pad_token_id": 0}


def generated_on_rank(run: Run, eos: int | None) -> list[int]:
    model = build(run).eval()
    rank = dist.get_rank()
    prompt = torch.tensor([PROMPTS[rank]])
    with torch.no_grad():
        ids = model.generate(prompt, eos_token_id=eos, **generation_options(rank))
    return ids[0].tolist()


@pytest.mark.parametrize("run", [Run("fsdp2", 2, 2, model=MODEL), Run("fsdp2", 4, 2, model=MODEL),
                                 Run("none", 2, 2, model=MODEL)], ids=str)  # fmt: skip
def test_generate_equals_one_process_with_ranks_of_different_length(ranks, run):
    model = tiny_mixtral(**MODEL).eval()
    expected = []
    for rank in range(run.world):
        prompt = torch.tensor([PROMPTS[rank]])
        ids = model.generate(prompt, eos_token_id=None, **generation_options(rank))
        expected.append(ids[0].tolist())
    assert ranks(run.world).run(generated_on_rank, run, None) == expected


def test_generate_ends_when_one_rank_meets_its_end_token(ranks):
    """Rank 0's first token is made the end token; rank 1 goes on alone."""
    run = Run("fsdp2", 2, 2, model=MODEL)
    free = ranks(2).run(generated_on_rank, run, None)
    eos = free[0][len(PROMPTS[0])]
    ended = ranks(2).run(generated_on_rank, run, eos)
    assert ended[0] == [*PROMPTS[0], eos]
    new = free[1][len(PROMPTS[1]) :]
    wanted = new[: new.index(eos) + 1] if eos in new else new
    assert ended[1] == [*PROMPTS[1], *wanted]


def evaluated_on_rank(run: Run) -> list[float]:
    """Logit errors of an evaluation in which ranks have different numbers of tokens."""
    mesh = init_device_mesh("cpu", run.ep)
    model = wrap(apply_expert_parallel(tiny_mixtral(), mesh), run.wrap, mesh).eval()
    plain = tiny_mixtral().eval()
    errors = []
    with torch.no_grad():
        for step in range(3):
            batch = batch_of(dist.get_rank(), tokens=4 + 6 * dist.get_rank(), step=step)
            errors.append(relative_error(model(**batch).logits, plain(**batch).logits))
    return errors


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1", "ddp", "none"])
def test_evaluation_with_uneven_batches_equals_one_process(ranks, kind):
    errors = ranks(2).run(evaluated_on_rank, Run(kind, 2, 2))
    assert max(max(own) for own in errors) <= 1e-5


def gradients_after_evaluation(run: Run):
    """Gradients of a run whose first forward is an evaluation in inference mode."""
    model = build(run)
    with torch.inference_mode():
        model(**batch_of(dist.get_rank(), step=1))
    backward(run, model)
    return from_rank0(full_gradients(model))


@pytest.mark.parametrize("kind", ["ddp", "none"])
def test_training_after_a_first_forward_in_inference_mode_equals_one_process(ranks, kind):
    run = Run(kind, 2, 2)
    actual = ranks(2).run(gradients_after_evaluation, run)[0]
    assert_close(actual, reference_of(run)[1], 1e-5, f"gradients of {run}")


def padded_generation(run: Run):
    """A padded batch, two prompts of different length on each rank."""
    model = build(run).eval()
    ids = torch.tensor([[0, 0, 5, 9], [3, 4, 5, 6 + dist.get_rank()]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    plain = tiny_mixtral(**run.model).eval()
    options = {"attention_mask": mask, **generation_options(0)}
    with torch.no_grad():
        return model.generate(ids, **options).tolist(), plain.generate(ids, **options).tolist()


def test_generate_from_padded_batch_equals_one_process(ranks):
    for actual, expected in ranks(2).run(padded_generation, Run("fsdp2", 2, 2, model=MODEL)):
        assert actual == expected
