"""run/standins.py and the weights of moe_dispatch.py:select: by hand, against torch.linalg, in a model."""
import pytest
import torch

import moe_dispatch
import run.standins as standins
from allocator import Skip, TopK
from conftest import random_model, tiny_config
from hub.checkpoint import save
from hub.files import InputError
from model import generate
from moe_dispatch import Weighting, select
from run.evaluate import evaluate
from run.standins import StandIns
from scale.stream import stream
from train import Settings

P = torch.tensor([[0.4, 0.3, 0.2, 0.1]])        # K = 3: g = 4/9, 3/9, 2/9


@pytest.mark.parametrize('k, rho, eta, weights, left', [
    (1, 0.0, 1.0, [4 / 9, 0, 0, 0], [0, 3 / 9, 2 / 9, 0]),      # kept
    (1, 1.0, 1.0, [1, 0, 0, 0], [0, 3 / 9, 2 / 9, 0]),          # published: eq. 3
    (2, 1.0, 1.0, [4 / 7, 3 / 7, 0, 0], [0, 0, 2 / 9, 0]),
    (2, 0.5, 1.0, [4 / 9 * 8 / 7, 3 / 9 * 8 / 7, 0, 0], [0, 0, 2 / 9, 0]),
    (3, 0.3, 0.5, [4 / 9, 3 / 9, 2 / 9, 0], [0, 0, 0, 0]),
    (4, 0.0, 0.5, [4 / 9, 3 / 9, 2 / 9, 0.5 / 9], [0, 0, 0, 0]),
    (4, 1.0, 1.0, [0.4, 0.3, 0.2, 0.1], [0, 0, 0, 0]),
])
def test_weights_by_hand(k, rho, eta, weights, left):
    ids, found, found_left = select(P, torch.tensor([k]), 4, Weighting(3, True, rho, eta))
    assert ids.tolist() == [[0, 1, 2, 3]]
    torch.testing.assert_close(found, torch.tensor([weights], dtype=torch.float))
    torch.testing.assert_close(found_left, torch.tensor([left], dtype=torch.float))


def test_all_k_of_them_weigh_what_they_do_in_the_model_to_the_bit():
    probs = torch.randn(500, 8).softmax(-1)
    for rho in (0.0, 0.7):
        how = Weighting(3, True, rho)
        _, plain, none = select(probs, None, 0, how)
        _, weights, left = select(probs, torch.full((500,), 3), 3, how)
        assert none is None and torch.equal(plain, weights) and not left.any()


@pytest.mark.parametrize('tokens', [1, 3, 200])
@pytest.mark.parametrize('share', [0.0, 0.4, 1.0])
def test_the_sorted_form_is_the_plain_one(tokens, share):
    N, C, r = 6, 16, 4
    maps = torch.randn(N, r, C), torch.randn(N, C, r), torch.randn(N, C)
    x = torch.randn(tokens, C)
    ids = torch.rand(tokens, N).topk(3).indices
    left = torch.rand(tokens, 3) * (torch.rand(tokens, 3) < share)
    right = torch.zeros(tokens, C)
    for t in range(tokens):
        for j in range(3):
            n = ids[t, j]
            right[t] += left[t, j] * (maps[1][n] @ (maps[0][n] @ x[t]) + maps[2][n])
    layer = StandIns(*maps)
    for form in (layer.plain, layer.one_by_one, layer.many, layer):
        torch.testing.assert_close(form(x, ids, left), right, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- the fit

@pytest.fixture
def layer():
    """A MoE layer, and what a fit sees of 3,000 tokens: x, g, ids."""
    moe = random_model(tiny_config()).layers[0].mlp
    x = torch.randn(3000, 32)
    p, ids = moe.router(x).softmax(-1).topk(3)
    return moe, x, p / p.sum(-1, keepdim=True), ids


def weighted(layer, n):
    """Inputs with a column of ones, outputs, both times g, of the tokens that choose expert n, not first."""
    moe, x, g, ids = layer
    token, choice = torch.where(ids[:, 1:] == n)
    weight = g[token, 1 + choice, None].double()
    ones = torch.ones(len(token), 1)
    return weight * torch.cat([x[token], ones], dim=1), weight * standins.output(moe, n, x[token])


def predicted(X, A, B, b):
    return X[:, :-1] @ (B @ A).T.double() + X[:, -1:] * b.double()


def test_a_fit_of_full_rank_is_the_least_squares_one(layer, monkeypatch):
    monkeypatch.setattr(standins, 'RIDGE', 1e-12)
    X, Y = weighted(layer, 2)
    found = predicted(X, *standins.fit_expert(*layer, 2, 32))
    torch.testing.assert_close(found, X @ torch.linalg.lstsq(X, Y).solution, rtol=1e-4, atol=1e-5)


def test_a_fit_of_low_rank_leaves_least_of_all_maps_of_that_rank(layer, monkeypatch):
    monkeypatch.setattr(standins, 'RIDGE', 1e-12)
    X, Y = weighted(layer, 2)
    best = X @ torch.linalg.lstsq(X, Y).solution
    centred = best - X[:, -1:] * (X[:, -1:] * best).sum(0) / X[:, -1:].square().sum()
    errors = [(Y - predicted(X, *standins.fit_expert(*layer, 2, rank))).square().sum() for rank in (2, 8, 32)]
    assert errors[0] > errors[1] > errors[2]
    for rank, error in zip((2, 8), errors):
        dropped = torch.linalg.svdvals(centred)[rank:].square().sum()      # Eckart and Young
        least = (Y - best).square().sum() + dropped
        assert error.item() == pytest.approx(least.item(), rel=1e-3)


def test_rho_is_the_best_number(layer):
    moe, x, g, ids = layer
    found = standins.fit_rho(*layer)
    k = torch.full((len(x),), 2)
    full = moe_dispatch.moe_loop(x, ids, g, k + 1, moe.w_in, moe.w_out)

    def error(rho):
        weights = g * (1 + rho * g[:, 2:] / (1 - g[:, 2:]))
        return (moe_dispatch.moe_loop(x, ids, weights, k, moe.w_in, moe.w_out) - full).square().sum()
    if 0 < found < 1:
        assert error(found) < min(error(found - 0.05), error(found + 0.05))
    assert error(found) <= min(error(0), error(1))


def test_an_expert_that_few_tokens_choose_has_its_mean(layer):
    moe, x, g, ids = layer
    few = torch.where((ids[:, 1:] == 2).any(1))[0][:5]
    A, B, b = standins.fit_expert(moe, x[few], g[few], ids[few], 2, 8)
    X, Y = weighted((moe, x[few], g[few], ids[few]), 2)
    assert not A.any() and not B.any()
    mean = (X[:, -1:] * Y).sum(0) / X[:, -1:].square().sum()
    torch.testing.assert_close(b, mean.float())


# ---------------------------------------------------------------- in a model

@pytest.fixture
def model():
    return random_model(tiny_config())


def cost(model, windows):
    [(nats, _)] = evaluate(model, windows, [Skip(0.6, 3)], expected=True)
    return nats.mean().item()


def test_each_way_costs_less_than_the_one_before(model):
    inputs = torch.randint(50, (64, 32))
    windows = inputs[:16], inputs[:16], None
    costs = []
    for dropped in ('published', 'rho', 'stand-ins'):
        standins.use(model, standins.fit(Settings(dropped=dropped, rank=24), model, inputs))
        costs.append(cost(model, windows))
    assert costs[0] > costs[1] > 1.1 * costs[2] > 0


@torch.no_grad()
@pytest.mark.parametrize('dropped', ['rho', 'stand-ins'])
def test_cached_and_streamed_models_use_the_same(dropped, model, tmp_path):
    inputs = torch.randint(50, (8, 32))
    fitted = standins.fit(Settings(dropped=dropped), model, inputs)
    save(model, tmp_path)
    standins.save(tmp_path, fitted, 'a base')
    policy = Skip(0.6, 3)
    published = model(inputs, policy)
    again = standins.of_run(tmp_path, 'a base')
    streamed = stream(tmp_path)
    for m in (model, streamed):
        standins.use(m, again)
    logits = model(inputs, policy)
    assert (logits - published).abs().max() > 1e-3
    assert torch.equal(logits, streamed(inputs, policy))
    torch.testing.assert_close(model(inputs, TopK(3)), model(inputs))      # nothing dropped, nothing changes
    out = generate(model, inputs[:2, :5], 6, policy)
    for t in range(5, 11):
        assert torch.equal(out[:, t], model(out[:, :t], policy)[:, -1].argmax(-1))
    with pytest.raises(InputError, match='another base'):
        standins.of_run(tmp_path, 'another')


def test_what_cannot_be_is_one_line(model):
    with pytest.raises(InputError, match='--rank 33: .* C = 32'):
        standins.fit(Settings(rank=33), model, torch.randint(50, (8, 32)))


def test_a_budget_counts_stand_ins():
    config = tiny_config(dim=32, expert_dim=16, top_k=4)
    s = Settings(budget=0.75, rank=6)
    k = standins.target_k(s, config)
    of_topk = moe_dispatch.flops(config, 4, 16)['experts']
    assert moe_dispatch.flops(config, k, 16, 0, 4 - k, 6)['experts'] == pytest.approx(0.75 * of_topk)
    assert standins.target_k(Settings(dropped='rho'), config) == 3


@pytest.mark.parametrize('rank, C', [(3, 16), (4, 18)])
def test_sizes_that_grouped_matmuls_cannot_take(rank, C):
    maps = torch.randn(6, rank, C), torch.randn(6, C, rank), torch.randn(6, C)
    layer = StandIns(*maps)
    x = torch.randn(100, C)
    ids = torch.rand(100, 6).topk(3).indices
    left = torch.rand(100, 3)
    torch.testing.assert_close(layer(x, ids, left), layer.plain(x, ids, left))


@pytest.mark.parametrize('tokens', [2, 20])
def test_what_is_left_has_a_gradient_however_few_tokens(tokens):
    """The mixture over k of study/policies.py is differentiated by it."""
    layer = StandIns(torch.randn(6, 4, 16), torch.randn(6, 16, 4), torch.randn(6, 16))
    x = torch.randn(tokens, 16)
    ids = torch.rand(tokens, 6).topk(2).indices
    left = torch.rand(tokens, 2, requires_grad=True)
    layer(x, ids, left).sum().backward()
    [right] = torch.autograd.grad(layer.plain(x, ids, left).sum(), left)
    torch.testing.assert_close(left.grad, right)
