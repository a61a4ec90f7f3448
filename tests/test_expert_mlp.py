"""The operator expert_mlp: grouped SwiGLU over the slots of every local expert."""

import pytest
import torch
from operator_cases import CASES, Case, occupied_rows, strided
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from torch_moe_ep import ops, reference
from torch_moe_ep.testing import relative_error


def inputs_of(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """rows [R, H], row_weights [R], gate_up, down: leaves that need gradients."""
    generator = torch.Generator().manual_seed(13)
    x = torch.randn(case.tokens, case.hidden, generator=generator).to(dtype)
    rows, row_weights = ops.dispatch(x, case.weights(), case.plan())
    tensors = (rows, row_weights, *case.expert_weights(dtype))
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def run(function, case, inputs, **options):
    """Output and the four gradients, rows past the last segment cut off."""
    plan = case.plan()
    rows, row_weights, gate_up, down = inputs
    y = function(rows, row_weights, plan, gate_up, down, **options)
    used = occupied_rows(plan)
    generator = torch.Generator().manual_seed(17)
    upstream = torch.randn(y.shape, generator=generator).to(y.dtype)
    y.backward(upstream)
    return [y[:used], rows.grad[:used], row_weights.grad[:used], gate_up.grad, down.grad]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_expert_mlp_value_and_gradients_equal_reference(case):
    actual = run(ops.expert_mlp, case, inputs_of(case, torch.float32))
    expected = run(reference.expert_mlp, case, inputs_of(case, torch.float32))
    for got, wanted in zip(actual, expected, strict=True):
        assert relative_error(got, wanted) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_expert_mlp_half_error_is_within_twice_torchs(case, dtype):
    """Against fp32 on the same values; torch's own is the loop of linear layers in `dtype`."""
    half = inputs_of(case, dtype)
    wide = [tensor.detach().float().requires_grad_() for tensor in half]
    torchs = [tensor.detach().clone().requires_grad_() for tensor in half]
    actual = run(ops.expert_mlp, case, half)
    exact = run(reference.expert_mlp, case, wide)
    loop = run(linear_loop, case, torchs)
    floor = torch.finfo(dtype).eps
    for got, own, wanted in zip(actual, loop, exact, strict=True):
        bound = 2 * max(relative_error(own.float(), wanted), floor)
        assert relative_error(got.float(), wanted) <= bound


def linear_loop(rows, row_weights, plan, gate_up, down):
    """Torch in the rows' dtype, expert by expert."""
    parts = []
    for expert in range(gate_up.shape[0]):
        start, stop = plan.expert_offsets[expert].item(), plan.expert_offsets[expert + 1].item()
        gate, up = torch.nn.functional.linear(rows[start:stop], gate_up[expert]).chunk(2, dim=-1)
        hidden = torch.nn.functional.silu(gate) * up
        part = torch.nn.functional.linear(hidden, down[expert])
        parts.append(part * row_weights[start:stop, None].to(part.dtype))
    tail = rows[plan.expert_offsets[-1].item() :] * 0
    return torch.cat([*parts, tail])


@pytest.mark.parametrize("options", [
    {"recompute_gate_up": True},
    {"slots_per_pass": 3},
    {"slots_per_pass": 1},
    {"slots_per_pass": 1000},
    {"slots_per_pass": 5, "recompute_gate_up": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("case", CASES, ids=str)
def test_expert_mlp_passes_and_recompute_change_no_result(case, options):
    plain = run(ops.expert_mlp, case, inputs_of(case, torch.float32))
    other = run(ops.expert_mlp, case, inputs_of(case, torch.float32), **options)
    for got, wanted in zip(other, plain, strict=True):
        assert relative_error(got, wanted) <= 2e-6


@pytest.mark.parametrize("recompute_gate_up", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_expert_mlp_that_keeps_x_instead_of_rows_changes_no_bit(case, recompute_gate_up):
    x = torch.randn(case.tokens, case.hidden, generator=torch.Generator().manual_seed(13))
    options = {"recompute_gate_up": recompute_gate_up}
    plain = run(ops.expert_mlp, case, inputs_of(case, torch.float32), **options)
    other = run(ops.expert_mlp, case, inputs_of(case, torch.float32), x=x, **options)
    for got, wanted in zip(other, plain, strict=True):
        assert torch.equal(got, wanted)


def test_expert_mlp_x_of_another_dtype_is_refused():
    case = CASES[0]
    x = torch.randn(case.tokens, case.hidden, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="x must have rows' dtype Float, got BFloat16"):
        run(ops.expert_mlp, case, inputs_of(case, torch.float32), x=x)


def test_expert_mlp_x_with_a_plan_of_several_ranks_is_refused():
    case = CASES[0]
    inputs = inputs_of(case, torch.float32)
    x, plan = torch.randn(case.tokens, case.hidden), case.plan()._replace(group_name="ep")
    with pytest.raises(ValueError, match="x goes with a plan of one rank, got one of group 'ep'"):
        ops.expert_mlp(inputs[0], inputs[1], plan, *inputs[2:], x=x)


def test_expert_mlp_weight_grad_scale_touches_weight_gradients_only():
    case = CASES[0]
    plain = run(ops.expert_mlp, case, inputs_of(case, torch.float32))
    scaled = run(ops.expert_mlp, case, inputs_of(case, torch.float32), weight_grad_scale=0.25)
    for got, wanted in zip(scaled[:3], plain[:3], strict=True):
        assert torch.equal(got, wanted)
    for got, wanted in zip(scaled[3:], plain[3:], strict=True):
        assert torch.equal(got, 0.25 * wanted)


class WeightGradientsAsked(TorchDispatchMode):
    """Whether each backward was asked for the weights' gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.torch_moe_ep.expert_mlp_backward.default:
            self.found.append(args[-1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("keeps", ["rows", "x"])
@pytest.mark.parametrize(
    ("options", "keeps_rows"),
    [({}, False), ({"recompute_gate_up": True}, True), ({"slots_per_pass": 3}, True)],
    ids=str,
)
def test_expert_mlp_frozen_weights_cost_no_gradient_and_keep_no_rows(options, keeps_rows, keeps):
    """Nobody reads rows where z is there. LoRA of attention alone freezes experts."""
    case = CASES[0]
    trained = inputs_of(case, torch.float32)
    expected = run(ops.expert_mlp, case, trained, **options)
    frozen = [tensor.detach().clone() for tensor in trained]
    for tensor in frozen[:2]:
        tensor.requires_grad_()
    generator = torch.Generator().manual_seed(13)
    x = torch.randn(case.tokens, case.hidden, generator=generator)
    source = frozen[0] if keeps == "rows" else x
    saved = set()

    def pack(tensor):
        saved.add(tensor.data_ptr())
        return tensor

    with WeightGradientsAsked() as asked, saved_tensors_hooks(pack, lambda tensor: tensor):
        found = run(ops.expert_mlp, case, frozen, x=x if keeps == "x" else None, **options)
    for got, wanted in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(got, wanted)
    assert found[3:] == [None, None] and asked.found == [False]
    assert (source.data_ptr() in saved) == keeps_rows


def test_expert_mlp_one_frozen_weight_leaves_the_other_its_gradient():
    case = CASES[0]
    expected = run(ops.expert_mlp, case, inputs_of(case, torch.float32))
    half = inputs_of(case, torch.float32)
    half[2].requires_grad_(False)
    found = run(ops.expert_mlp, case, half)
    assert found[3] is None and torch.equal(found[4], expected[4])


def test_expert_mlp_expert_without_rows_has_zero_gradient():
    case = Case("all_to_one_expert", top_k=1, routing="one_expert")
    *_, grad_gate_up, grad_down = run(ops.expert_mlp, case, inputs_of(case, torch.float32))
    assert not grad_gate_up[:-1].any() and not grad_down[:-1].any()
    assert grad_gate_up[-1].any() and grad_down[-1].any()


def test_expert_mlp_float64_is_refused_by_name():
    case = CASES[0]
    inputs = [tensor.detach().double() for tensor in inputs_of(case, torch.float32)]
    with pytest.raises((RuntimeError, ValueError), match="rows"):
        ops.expert_mlp(inputs[0], inputs[1].float(), case.plan(), inputs[2], inputs[3])


def test_expert_mlp_takes_non_contiguous_tensors():
    case = CASES[0]
    inputs = inputs_of(case, torch.float32)
    expected = run(ops.expert_mlp, case, inputs_of(case, torch.float32))
    odd = [strided(tensor.detach()).requires_grad_() for tensor in inputs]
    for got, wanted in zip(run(ops.expert_mlp, case, odd), expected, strict=True):
        assert relative_error(got, wanted) <= 1e-6


def test_expert_mlp_nan_in_one_row_stays_in_that_row():
    case = CASES[0]
    rows, row_weights, gate_up, down = (t.detach() for t in inputs_of(case, torch.float32))
    rows[3, 2] = float("nan")
    y = ops.expert_mlp(rows, row_weights, case.plan(), gate_up, down)
    assert y[3].isnan().all()
    assert not y[[*range(3), *range(4, len(y))]].isnan().any()


@pytest.mark.parametrize("case", [c for c in CASES if c.row_alignment == 1], ids=str)
def test_expert_mlp_opcheck(case):
    rows, row_weights, gate_up, down = inputs_of(case, torch.float32)
    offsets = case.plan().expert_offsets
    arguments = (rows, row_weights, offsets, offsets.clone(), gate_up, down, 0.5, 0, False)
    torch.library.opcheck(torch.ops.torch_moe_ep.expert_mlp.default, arguments)


@pytest.mark.parametrize(
    ("place", "tensor", "message"),
    [
        (0, torch.zeros(14, 15), "rows|gate_up"),
        (0, torch.zeros(14), "rows"),
        (1, torch.zeros(13), "row_weights"),
        (1, torch.zeros(14, dtype=torch.bfloat16), "row_weights"),
        (2, torch.zeros(4, 16, 15), "gate_up"),
        (2, torch.zeros(3, 16, 16), "gate_up"),
        (2, torch.zeros(4, 16, 16, dtype=torch.bfloat16), "gate_up"),
        (3, torch.zeros(4, 16, 9), "down"),
        (3, torch.zeros(4, 15, 8), "down"),
    ],
    ids=str,
)
def test_expert_mlp_wrong_input_is_refused_by_name(place, tensor, message):
    case = CASES[0]
    given = [t.detach() for t in inputs_of(case, torch.float32)]
    given[place] = tensor
    with pytest.raises((RuntimeError, ValueError), match=message):
        ops.expert_mlp(given[0], given[1], case.plan(), given[2], given[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_expert_mlp_main_grads_hold_the_fp32_sum_of_all_calls(case, dtype):
    """Twice into the same tensors: what they held plus both gradients, and no .grad."""
    plain, adding = inputs_of(case, dtype), inputs_of(case, dtype)
    once = run(ops.expert_mlp, case, plain)
    main_grads = tuple(torch.full_like(w, 0.25, dtype=torch.float32) for w in adding[2:])
    for _ in range(2):
        adding[0].grad = adding[1].grad = None
        other = run(ops.expert_mlp, case, adding, main_grads=main_grads)
    for got, wanted in zip(other[:3], once[:3], strict=True):
        assert torch.equal(got, wanted)
    for main_grad, wanted in zip(main_grads, once[3:], strict=True):
        assert torch.equal(main_grad, 0.25 + wanted.float() + wanted.float())
    assert other[3:] == [None, None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda grad: grad.bfloat16(), "main_grad of gate_up must be float32 .* torch.bfloat16"),
        (lambda grad: grad[:1], "main_grad of gate_up must be float32"),
        (lambda grad: grad.requires_grad_(), "must not require a gradient"),
        (lambda grad: grad.transpose(1, 2).contiguous().transpose(1, 2), "must be contiguous"),
    ],
    ids=["dtype", "shape", "gradient", "strides"],
)
def test_expert_mlp_main_grad_that_does_not_fit_is_refused(change, message):
    case = CASES[0]
    inputs = inputs_of(case, torch.float32)
    gate_up, down = (torch.zeros_like(w, dtype=torch.float32).detach() for w in inputs[2:])
    with pytest.raises(ValueError, match=message):
        run(ops.expert_mlp, case, inputs, main_grads=(change(gate_up), down))


def test_expert_mlp_main_grads_of_frozen_weights_are_refused():
    case = CASES[0]
    inputs = inputs_of(case, torch.float32)
    inputs[3].requires_grad_(False)
    main_grads = tuple(torch.zeros_like(w).detach() for w in inputs[2:])
    with pytest.raises(ValueError, match="down has a main_grad but requires no gradient"):
        run(ops.expert_mlp, case, inputs, main_grads=main_grads)


@pytest.mark.parametrize("place", range(4), ids=["rows", "row_weights", "gate_up", "down"])
def test_expert_mlp_meta_tensor_among_real_ones_is_refused(place):
    """torch takes the fake kernel then, whose output nobody writes."""
    inputs = inputs_of(CASES[0], torch.float32)
    inputs[place] = inputs[place].to("meta")
    rows, row_weights, gate_up, down = inputs
    with pytest.raises(ValueError, match=r"is on (meta|cpu), but rows is on (cpu|meta)"):
        ops.expert_mlp(rows, row_weights, CASES[0].plan(), gate_up, down)
