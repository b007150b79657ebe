"""run/rules.py: the three families of expert skipping, by hand and on a random model."""
import numpy as np
import pytest
import torch

from allocator import Skip, TopK
from base.text import Text
from conftest import random_model, tiny_config
from run.evaluate import divergences, evaluate
from run.rules import FAMILIES, SkipFamilies, best_family, betas_at, marginal_costs, tails, worth_of_an_expert


@pytest.fixture(scope='module')
def families():
    torch.manual_seed(0)
    model = random_model(tiny_config(top_k=4))
    return SkipFamilies(model, Text(torch.randint(50, (9000,)), np.zeros(9000, int)), 16)


def test_betas_by_hand():
    ratios = torch.tensor([[[0.5], [0.1], [0.9], [0.3]], [[0.2], [0.4], [0.6], [0.8]]])     # (L=2,P=4,K-1=1)
    assert betas_at(ratios, [1.5, 1.25]) == pytest.approx([0.3, 0.6])
    assert betas_at(ratios, [1, 2]) == pytest.approx([0.9, 0.0])
    for mean_k in (1, 1.25, 1.5, 1.75, 2):
        assert 1 + (ratios[0] > betas_at(ratios[:1], [mean_k])[0]).float().mean() == mean_k


def test_betas_of_a_layer_are_taken_one_a_layer():
    probs = torch.tensor([[0.6, 0.4], [0.9, 0.1]])
    skip = Skip([0.5, 0.7], 2)
    assert skip(0, None, probs).tolist() == [2, 1] and skip(1, None, probs).tolist() == [1, 1]


def test_tails_are_skips_ratios(families):
    inputs = families.windows[0][:3]
    found = tails(families.model, inputs)
    assert found.shape == (3, 48, 3) and (found[..., :-1] >= found[..., 1:]).all()
    _, tally = evaluate(families.model, (inputs, inputs, None), Skip(0.3, 4))
    first = 1 + (found[0] > 0.3).sum(-1).float().mean()  # the first layer reads what it reads under Top-K
    assert tally.mean_by_layer()[0] == pytest.approx(first.item())


def test_marginal_costs_by_hand():
    costs, k = marginal_costs([(2, 0.0), (1.5, 0.1), (1, 0.4)])
    assert costs == pytest.approx([0, 0.2, 0.6, 0.8]) and k == pytest.approx([2, 1.75, 1.25, 1])
    costs, _ = marginal_costs([(2, 0.0), (1.5, 0.3), (1, 0.4)])
    assert costs == pytest.approx([0, 0.6, 0.6, 0.6])          # a cheap step behind a dear one waits for it


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('mean_k', [2.4, 3.2])
def test_a_familys_mean_k_is_near_its_knob(family, mean_k, families):
    _, tally = evaluate(families.model, families.windows, families.policy(family, mean_k))
    assert tally.mean() == pytest.approx(mean_k, abs=0.15)


def test_shares_are_equal_per_layer_and_cheapest_greedily(families):
    _, tally = evaluate(families.model, families.windows, families.policy('per layer', 3))
    assert tally.mean_by_layer()[0] == pytest.approx(3, abs=0.02)
    shares = families.greedy_shares(3)
    assert np.mean(shares) == pytest.approx(3, abs=0.01) and all(2 <= k <= 4 for k in shares)
    costs = [marginal_costs(points) for points in families.costs(3.2)]       # 0.8 K: tenths of K are searched
    at = [np.interp(k, of_k[::-1], of_cost[::-1]) for k, (of_cost, of_k) in zip(shares, costs)]
    assert np.ptp(at) < 0.01 * np.mean(at)  # the next bit of an expert costs every layer the same


def test_the_best_family_diverges_least(families):
    found = divergences(families.model, families.windows, [families.policy(family, 3) for family in FAMILIES])
    nats = {family: nats.mean() for family, (nats, _) in zip(FAMILIES, found)}
    assert best_family(families, families.windows, 3) == min(nats, key=nats.get)


def test_divergence_is_0_for_top_k_and_the_expected_loss_for_others(families):
    model, windows = families.model, tuple(w[:20] for w in families.windows)
    (same, tally), (fewer, _) = divergences(model, windows, [TopK(4), TopK(2)], batch=7)
    assert same.abs().max() == 0 and tally.mean() == 4
    p, q = model(windows[0]).log_softmax(-1).double(), model(windows[0], TopK(2)).log_softmax(-1).double()
    torch.testing.assert_close(fewer, (p.exp() * (p - q)).sum(-1).flatten(), rtol=1e-3, atol=1e-5)


def test_an_expert_is_worth_what_a_little_more_of_them_saves(families):
    (few, _), (many, _) = divergences(families.model, families.windows,
                                      [families.policy('per layer', 3 * share) for share in (0.95, 1.05)])
    saved = (few.mean() - many.mean()).item()
    assert worth_of_an_expert(families, 3) == pytest.approx(saved / 0.3 / 3, rel=0.05)
