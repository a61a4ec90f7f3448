"""Routing rules, capacity and router losses of one process: values by hand, gradients, refusals."""

import pytest
import torch
from torch import nn

import torch_moe_ep
from torch_moe_ep import MoEConfig
from torch_moe_ep.integrations.transformers import find_experts, find_routers
from torch_moe_ep.routing import choose
from torch_moe_ep.routing.bias import move_biases
from torch_moe_ep.routing.capacity import limit_copies
from torch_moe_ep.routing.losses import load_balancing_loss, z_loss
from torch_moe_ep.routing.router import RoutedRouter, swap_router
from torch_moe_ep.testing import relative_error, tiny_mixtral

HIDDEN, NUM_EXPERTS, TOP_K = 16, 8, 2


def logits_of(tokens: int = 50, num_experts: int = NUM_EXPERTS, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return scale * torch.randn(tokens, num_experts, generator=generator)


def router_of(**config) -> RoutedRouter:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    router = MixtralTopKRouter(
        MixtralConfig(hidden_size=HIDDEN, num_local_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K)
    )
    with torch.no_grad():
        router.weight.normal_(generator=torch.Generator().manual_seed(1))
    return swap_router(router, MoEConfig(**config), NUM_EXPERTS, torch.device("cpu"))


def tokens_of(tokens: int = 40) -> torch.Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))


def test_choose_top_k_is_the_softmax_over_the_chosen():
    logits = logits_of()
    values, ids = logits.topk(3, dim=-1)
    weights, expert_ids = choose.choose_top_k(logits, 3)
    assert torch.equal(expert_ids, ids)
    assert relative_error(weights, values.softmax(dim=-1)) <= 1e-6


def test_choose_sinkhorn_training_balances_and_keeps_the_weights_unnormalised():
    logits = logits_of(400) + torch.linspace(-4, 4, NUM_EXPERTS)
    weights, ids = choose.choose_sinkhorn(logits, 2, is_training=True)
    plain = choose.choose_sinkhorn(logits, 2, is_training=False)[1]
    counts = choose.count_copies(ids, NUM_EXPERTS)
    assert counts.max() < 1.5 * counts.float().mean()
    assert choose.count_copies(plain, NUM_EXPERTS).max() > 2.5 * counts.float().mean()
    assert torch.equal(plain.sort().values, logits.topk(2).indices.sort().values)
    assert torch.equal(weights, logits.softmax(dim=-1).gather(1, ids))
    assert weights.sum(dim=-1).max() < 1.0


def test_choose_sinkhorn_of_one_expert_weighs_by_the_sigmoid():
    logits = logits_of()
    weights, ids = choose.choose_sinkhorn(logits, 1, is_training=False)
    assert torch.equal(weights, logits.gather(1, ids).sigmoid())


def test_choose_balanced_gives_every_expert_the_same():
    weights, ids = choose.choose_balanced(logits_of(40), 2)
    assert choose.count_copies(ids, NUM_EXPERTS).tolist() == [10] * NUM_EXPERTS
    assert (ids[:, 0] != ids[:, 1]).all()
    assert torch.allclose(weights.sum(dim=-1), torch.ones(40))


def test_choose_biased_moves_the_choice_and_not_the_weights():
    logits = logits_of()
    bias = torch.zeros(NUM_EXPERTS)
    assert torch.equal(choose.choose_biased(logits, 2, bias)[1], choose.choose_top_k(logits, 2)[1])
    bias[5] = 2.0
    weights, ids = choose.choose_biased(logits, 2, bias)
    assert (ids[:, 0] == 5).all()
    assert torch.equal(weights, logits.gather(1, ids).softmax(dim=-1))


def test_limit_copies_drops_in_order_and_pads_with_what_it_dropped():
    ids = torch.tensor([[0], [0], [0], [1]])
    weights = torch.tensor([[0.5], [0.25], [0.75], [1.0]])
    limited, places, is_dropped = limit_copies(weights, ids, 2, 1.0)
    assert places.flatten().tolist() == [0, 0, 1, 1]
    assert limited.flatten().tolist() == [0.5, 0.25, 0.0, 1.0]
    assert is_dropped.flatten().tolist() == [False, False, True, False]


@pytest.mark.parametrize("factor", [1.0, 1.25, 8.0])
@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_limit_copies_never_exceeds_the_capacity(tokens, factor):
    weights, ids = choose.choose_top_k(logits_of(tokens) + torch.linspace(0, 6, 8), 2)
    limited, places, is_dropped = limit_copies(weights, ids, NUM_EXPERTS, factor)
    capacity = -int(-factor * tokens * 2 // NUM_EXPERTS)
    assert choose.count_copies(places, NUM_EXPERTS).sum() == tokens * 2
    if tokens:
        assert choose.count_copies(places, NUM_EXPERTS).max() <= capacity
    wanted = choose.count_copies(ids, NUM_EXPERTS)
    assert int(is_dropped.sum()) == int((wanted - capacity).clamp_min(0).sum())
    assert torch.equal(places[~is_dropped], ids[~is_dropped])
    assert torch.equal(limited, weights.masked_fill(is_dropped, 0.0))


def test_limit_copies_prefers_first_choices():
    ids = torch.tensor([[1, 0], [0, 1]])
    _, _, is_dropped = limit_copies(torch.full((2, 2), 0.5), ids, 4, 1.0)
    assert is_dropped.tolist() == [[False, True], [False, True]]


def test_z_loss_and_load_balancing_loss_equal_the_formula():
    logits = logits_of()
    assert relative_error(z_loss(logits), logits.exp().sum(-1).log().square().mean()) <= 1e-6
    ids = logits.topk(2).indices
    share = torch.bincount(ids.flatten(), minlength=8) / ids.numel()
    expected = 8 * (share * logits.softmax(-1).mean(0)).sum()
    assert relative_error(load_balancing_loss(logits, ids, is_global=False), expected) <= 1e-6
    even = load_balancing_loss(torch.zeros(40, 8), choose.choose_balanced(logits, 2)[1][:40],
                               is_global=False)  # fmt: skip
    assert even.item() == pytest.approx(1.0)
    assert z_loss(logits[:0]).item() == 0.0


@pytest.mark.parametrize("routing", ["huggingface", "none", "aux_loss", "sinkhorn", "bias"])
def test_losses_are_added_to_the_gradient_alone(routing):
    config = {"z_loss_coeff": 0.3, "aux_loss_coeff": 0.7, "routing": routing}
    router, plain = router_of(**config), router_of(**{**config, "z_loss_coeff": 0.0})
    plain.moe_config = MoEConfig(routing="none" if routing == "aux_loss" else routing)
    x, upstream = tokens_of(), torch.linspace(-1, 1, 80).view(40, 2)
    _, weights, _ = router(x)
    (weights * upstream).sum().backward()
    logits, plain_weights, ids = plain(x)
    assert torch.equal(weights, plain_weights)
    loss = (plain_weights * upstream).sum() + 0.3 * z_loss(logits)
    if routing == "aux_loss":
        loss = loss + 0.7 * load_balancing_loss(logits, ids, is_global=False)
    loss.backward()
    assert relative_error(router.weight.grad, plain.weight.grad) <= 1e-6


def test_set_aux_loss_scale_multiplies_the_losses_gradient():
    def gradient() -> torch.Tensor:
        router = router_of(z_loss_coeff=1.0)
        (0.0 * router(tokens_of())[1].sum()).backward()
        return router.weight.grad

    whole = gradient()
    try:
        torch_moe_ep.set_aux_loss_scale(0.25)
        assert torch.equal(gradient(), 0.25 * whole)
    finally:
        torch_moe_ep.set_aux_loss_scale(1.0)
    with pytest.raises(ValueError, match="scale must be a finite number"):
        torch_moe_ep.set_aux_loss_scale(float("nan"))


def test_evaluation_adds_and_counts_nothing_and_drops_nothing():
    router = router_of(z_loss_coeff=1.0, capacity_factor=1.0).eval()
    _, weights, ids = router(tokens_of())
    assert torch.allclose(weights.sum(dim=-1), torch.ones(40))
    assert torch.equal(ids.sort().values, router(tokens_of())[0].topk(2).indices.sort().values)
    (0.0 * weights.sum()).backward()
    assert not router.weight.grad.any()
    assert not router.loss_sums.any()


def test_router_dtype_float32_computes_logits_in_fp32_under_bf16():
    plain, wide = router_of(z_loss_coeff=0.1), router_of(router_dtype="float32")
    exact = router_of(router_dtype="float32")(tokens_of().bfloat16().float())[0]
    x = tokens_of().bfloat16()
    for router in (plain, wide):
        router.weight.data = router.weight.data.bfloat16()
    exact = torch.nn.functional.linear(x.float(), wide.weight.float())
    assert plain(x)[0].dtype == torch.bfloat16
    logits, weights, _ = wide(x)
    assert torch.equal(logits, exact) and weights.dtype == torch.float32
    weights[:, 0].sum().backward()
    assert wide.weight.grad.dtype == torch.bfloat16 and wide.weight.grad.any()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(wide(x)[0], exact)
    assert "weight" not in wide.__dict__


def test_move_biases_follows_the_counts_and_starts_anew():
    router = router_of(routing="bias")
    router.copies_per_expert.copy_(torch.tensor([4, 0, 8, 4, 4, 4, 4, 4]))
    move_biases([router])
    assert router.expert_bias_steps.tolist() == [0, 1, -1, 0, 0, 0, 0, 0]
    move_biases([router])
    assert router.expert_bias_steps.tolist() == [0, 1, -1, 0, 0, 0, 0, 0]


def test_bias_survives_casts_and_to_empty():
    router = router_of(routing="bias")
    router.expert_bias_steps += 1001
    router.to(torch.bfloat16).to_empty(device="cpu")
    assert router.expert_bias_steps.tolist() == [1001] * NUM_EXPERTS


def test_find_routers_refuses_what_is_not_linear_alone():
    model = tiny_mixtral()
    experts, _ = find_experts(model)
    routers, misfits = find_routers(model, experts)
    assert list(routers) == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"] and not misfits
    model.model.layers[0].mlp.gate.bias = nn.Parameter(torch.zeros(8))
    routers, misfits = find_routers(model, experts)
    assert list(routers) == ["model.layers.1.mlp.gate"]
    assert misfits == ["model.layers.0.mlp.experts has no router(s) of Mixtral's kind beside it"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("routing", "top2", 'routing must be "huggingface" or "none" or'),
        ("router_dtype", "bf16", 'router_dtype must be None or "float32", got'),
        ("aux_scope", "all", "aux_scope must be"),
        ("z_loss_coeff", -1.0, "z_loss_coeff must be a finite number, at least 0"),
        ("capacity_factor", 0.5, "capacity_factor must be at least 1, or 0"),
    ],
)
def test_config_refuses_by_name(field, value, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**{field: value})
