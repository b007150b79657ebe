"""run/standins.py: by hand, against torch.linalg, in a model."""
import pytest
import torch
import torch.nn.functional as F

import moe_dispatch
import run.standins as standins
from allocator import Skip, TopK
from conftest import random_model, tiny_config
from hub.checkpoint import save
from hub.files import InputError
from model import generate
from moe_dispatch import run_expert
from run.evaluate import evaluate
from run.rules import look
from run.standins import StandIns
from scale.stream import stream
from train import Settings


@pytest.mark.parametrize('tokens, r', [
    (1, 4),
    (200, 4),
    (200, 3),                   # a size that grouped matmuls cannot take
])
def test_every_form_is_the_sum_over_the_choices(tokens, r):
    layer = StandIns(torch.randn(6, r, 16), torch.randn(6, 16, r), torch.randn(6, 16))
    x = torch.randn(tokens, 16)
    ids = torch.rand(tokens, 6).topk(3).indices
    left = torch.randn(tokens, 3).clamp_min(0)                 # about half of the choices run
    right = torch.zeros_like(x)
    for t in range(tokens):
        for n, weight in zip(ids[t], left[t]):
            right[t] += weight * (layer.B[n] @ (layer.A[n] @ x[t]) + layer.b[n])
    share = torch.zeros(tokens, 6).scatter(1, ids, left)
    forms = layer.plain(x, share), layer.one_by_one(x, ids, left), layer(x, ids, left)
    for y in forms:                                            # the last is the sorted form, where it can
        torch.testing.assert_close(y, right, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- the fit

@pytest.fixture
def layer():
    """A MoE layer, and what a fit sees of 3,000 tokens: x, the weights of all but the first choice, ids."""
    moe = random_model(tiny_config()).layers[0].mlp
    x = torch.randn(3000, 32)
    p, ids = moe.router(x).softmax(-1).topk(3)
    return moe, x, F.pad(p[:, 1:], (1, 0)), ids


@pytest.mark.parametrize('rank', [2, 8, 32])
def test_a_fit_leaves_least_of_all_maps_of_its_rank(rank, layer, monkeypatch):
    monkeypatch.setattr(standins, 'RIDGE', 1e-12)
    moe, x, left, ids = layer
    token, choice = torch.where(ids[:, 1:] == 2)               # the tokens that drop expert 2
    ones = left[token, 1 + choice, None].double()              # all is times the weight
    X = ones * x[token]
    Y = ones * run_expert(x[token], moe.w_in[2], moe.w_out[2])
    both = torch.cat([X, ones], dim=1)
    best = both @ torch.linalg.lstsq(both, Y).solution
    centred = best - ones @ torch.linalg.lstsq(ones, best).solution
    dropped = torch.linalg.svdvals(centred)[rank:]             # Eckart and Young
    least = (Y - best).square().sum() + dropped.square().sum()
    A, B, b = standins.fit_expert(*layer, 2, rank)
    found = X @ (B @ A).T.double() + ones * b
    assert (Y - found).square().sum().item() == pytest.approx(least.item(), rel=1e-5)


def test_an_expert_that_few_tokens_drop_has_its_mean(layer):
    moe, x, left, ids = layer
    one = torch.where(ids[:, 2] == 5)[0][:1]
    A, B, b = standins.fit_expert(moe, x[one], left[one], ids[one], 5, 8)
    assert not A.any()
    assert not B.any()
    torch.testing.assert_close(b[None], run_expert(x[one], moe.w_in[5], moe.w_out[5]))


# ---------------------------------------------------------------- in a model

@pytest.fixture
def model():
    return random_model(tiny_config())


@pytest.mark.parametrize('lowest, found', [(0.2, 0.2), (-1, 0), (3, 1)])
def test_eta_is_where_the_loss_of_the_text_is_lowest(lowest, found, model, monkeypatch):
    def evaluated(model, windows, policies):
        [policy] = policies
        assert policy.k_max == 4
        eta = model.layers[2].mlp.weighting.eta
        return [(torch.tensor([(eta - lowest) ** 2]), None)]
    monkeypatch.setattr(standins, 'evaluate', evaluated)
    fitted = standins.fit(Settings(dropped='published'), model, None, None)
    standins.fit_eta(model, fitted, None)
    torch.testing.assert_close(fitted['eta'], torch.tensor(float(found)))


def test_each_way_costs_less_than_the_one_before(model):
    inputs = torch.randint(50, (64, 32))
    windows = inputs[:16], inputs[:16], None
    skip = Skip(0.6, 3)
    costs = []
    for dropped in ('published', 'kept', 'stand-ins'):
        standins.use(model, standins.fit(Settings(dropped=dropped, rank=16), model, inputs, skip))
        [(nats, _)] = evaluate(model, windows, [skip], expected=True)
        costs.append(nats.mean())
    assert costs[0] > costs[1] > 1.1 * costs[2] > 0


def test_stand_ins_are_fitted_where_the_policy_drops_experts(model):
    inputs = torch.randint(50, (64, 32))
    skip = Skip(0.6, 3)
    fitted = standins.fit(Settings(rank=8), model, inputs, skip)

    def compare(layer, x, probs):
        moe = model.layers[model.config.moe_layers[layer]].mlp
        ids, _, left = skip.select(probs, skip(layer, x, probs), moe.weighting)
        maps = standins.fit_expert(moe, x, left, ids, 3, 8)
        torch.testing.assert_close(maps, tuple(fitted[name][layer, 3] for name in 'ABb'))
    look(model, inputs, compare)


@torch.no_grad()
@pytest.mark.parametrize('dropped', ['kept', 'stand-ins'])
def test_cached_and_streamed_models_use_the_same(dropped, model, tmp_path):
    inputs = torch.randint(50, (8, 32))
    save(model, tmp_path)
    policy = Skip(0.6, 3)
    fitted = standins.fit(Settings(dropped=dropped), model, inputs, policy)
    streamed = stream(tmp_path)
    for m in (model, streamed):
        standins.use(m, fitted)
    assert torch.equal(model(inputs, policy), streamed(inputs, policy))
    assert torch.equal(model(inputs, TopK(3)), model(inputs))  # nothing dropped, nothing changes
    out = generate(model, inputs[:2, :5], 6, policy)
    for t in range(5, 11):
        assert torch.equal(out[:, t], model(out[:, :t], policy)[:, -1].argmax(-1))


def test_a_rank_above_the_width_is_refused(model):
    with pytest.raises(InputError, match='--rank 33: '):
        standins.fit(Settings(rank=33), model, torch.randint(50, (8, 32)), TopK(3))


def test_a_budget_counts_stand_ins():
    config = tiny_config(top_k=4)
    k = standins.target_k(Settings(budget=0.75, rank=6), config)
    of_topk = moe_dispatch.flops(config, 4, 16)['experts']
    assert moe_dispatch.flops(config, k, 16, 0, 4 - k, 6)['experts'] == pytest.approx(0.75 * of_topk)
    assert standins.target_k(Settings(dropped='kept'), config) == 3
