"""run/rules.py: the three families of expert skipping, by hand and on a random model."""
import numpy as np
import pytest
import torch

from allocator import Skip, TopK
from base.text import Text
from conftest import random_model, tiny_config
from run.evaluate import evaluate
from run.rules import FAMILIES, SkipFamilies, best_family, betas_at, tails, worth_of_an_expert


@pytest.fixture(scope='module')
def families():
    torch.manual_seed(0)
    model = random_model(tiny_config(top_k=4))
    text = Text(torch.randint(50, (3000,)), np.zeros(3000, int))
    return SkipFamilies(model, text.windows(16))


def test_betas_by_hand():
    ratios = torch.tensor([
        [0.5, 0.1, 0.9, 0.3],
        [0.2, 0.4, 0.6, 0.8],
    ])
    ratios = ratios[..., None]                                 # (L=2,P=4,K-1=1)
    assert betas_at(ratios, [1.5, 1.25]) == pytest.approx([0.3, 0.6])
    assert betas_at(ratios, [1, 2]) == pytest.approx([0.9, 0.0])
    assert betas_at(ratios, [0.95, 0.5]) == betas_at(ratios, [1, 1])        # fewer than one cannot be
    for mean_k in (1, 1.25, 1.5, 1.75, 2):
        [beta] = betas_at(ratios[:1], [mean_k])
        above = ratios[0] > beta
        assert 1 + above.float().mean() == mean_k


def test_tails_are_skips_ratios(families):
    inputs = families.windows[0][:3]
    found = tails(families.model, inputs)
    assert found.shape == (3, 48, 3)
    assert (found[..., :-1] >= found[..., 1:]).all()
    [(_, tally)] = evaluate(families.model, (inputs, inputs, None), [Skip(0.3, 4)])
    first = 1 + (found[0] > 0.3).sum(-1).float().mean()      # the first layer reads what it reads under top-k
    assert tally.mean_by_layer()[0] == pytest.approx(first.item())


@pytest.mark.parametrize('mean_k, shares', [
    (4, [4, 4]),
    (3.75, [3.5, 4]),           # the first step of layer 0 costs 1, that of layer 1 costs 3
    (3.5, [3.5, 3.5]),          # the second step of layer 0 costs 5
    (3.375, [3.5, 3.25]),       # the second step of layer 1 costs 2, half of it is enough
    (1, [1, 1]),
])
def test_greedy_shares_by_hand(mean_k, shares, families, monkeypatch):
    steps = [
        [1, 5, 6, 7, 8, 9, np.inf],
        [3, 2, 9, 9, 9, 9, np.inf],
    ]
    monkeypatch.setattr(families, 'L', 2)
    monkeypatch.setattr(families, 'steps', {3: steps})
    assert families.greedy_shares(mean_k, 3) == shares


def test_costs_of_the_steps_are_measured_once_around_a_mean_k(families, monkeypatch):
    policies = []
    for k in (4, 3.5, 3, 2.5, 2, 1.5, 1):
        betas = betas_at(families.tails, [3, k, 3])
        policies.append(Skip(betas, 4))
    nats = [cost for cost, _ in families.costs(policies, families.windows)]
    families.policy('greedy', 2.7, around=3)
    monkeypatch.setattr(families, 'costs', None)               # measured already
    families.policy('greedy', 2.8, around=3)
    assert families.steps[3][1] == pytest.approx([*np.diff(nats), np.inf])


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('mean_k', [2.4, 3.2])
def test_a_familys_mean_k_is_near_its_knob(family, mean_k, families):
    [(_, found)] = families.costs([families.policy(family, mean_k)], families.windows)
    assert found == pytest.approx(mean_k, abs=0.15)


def test_the_best_family_costs_least(families):
    policies = [families.policy(family, 3) for family in FAMILIES]
    costs = [nats for nats, _ in families.costs(policies, families.windows)]
    assert best_family(families, 3) == FAMILIES[np.argmin(costs)]
    assert costs[FAMILIES.index('greedy')] < min(costs[:2])


def test_one_expert_leaves_nothing_to_skip():
    model = random_model(tiny_config(top_k=1))
    text = Text(torch.arange(40), np.zeros(40))
    families = SkipFamilies(model, text.windows(8))
    for family in FAMILIES:
        [(nats, mean_k)] = families.costs([families.policy(family, 1)], families.windows)
        assert (nats, mean_k) == (0, 1)


def test_the_expected_loss_is_0_for_top_k_and_a_divergence_for_others(families):
    model = families.model
    windows = [w[:40] for w in families.windows]               # two batches
    (same, tally), (fewer, _) = evaluate(model, windows, [TopK(4), TopK(2)], expected=True)
    assert same.abs().max() == 0 and tally.mean() == 4
    inputs = windows[0]
    p = model(inputs).log_softmax(-1).double()
    q = model(inputs, TopK(2)).log_softmax(-1).double()
    divergence = p.exp() * (p - q)
    divergence = divergence.sum(-1).flatten()
    torch.testing.assert_close(fewer, divergence, rtol=1e-3, atol=1e-5)


def test_an_expert_is_worth_what_a_little_more_of_them_saves(families):
    policies = [families.policy('per layer', 3 * share) for share in (0.95, 1.05)]
    (few, _), (many, _) = families.costs(policies, families.windows)
    assert worth_of_an_expert(families, 3) == pytest.approx((few - many) / 0.3 / 3, rel=0.05)
