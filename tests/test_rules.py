"""run/rules.py and run/evaluate.py: expert skipping, by hand and on a random model; calibration."""
import numpy as np
import pytest
import torch

import ppo
from allocator import Skip, TopK
from conftest import random_model, random_text, tiny_config
from run.evaluate import calibrate, evaluate
from run.rules import FAMILIES, SkipFamilies, betas_at


@pytest.fixture(scope='module')
def families():
    torch.manual_seed(0)
    model = random_model(tiny_config(top_k=4))
    return SkipFamilies(model, random_text(3000).windows(3000))


def test_betas_by_hand():
    ratios = torch.tensor([
        [0.5, 0.1, 0.9, 0.3],
        [0.2, 0.4, 0.6, 0.8],
    ])
    ratios = ratios[..., None]                                 # (L=2,P=4,K-1=1)
    assert betas_at(ratios, [1.5, 1.25]) == pytest.approx([0.3, 0.6])
    assert betas_at(ratios, [0.95, 2]) == pytest.approx([0.9, 0.0])        # fewer than one cannot be


@pytest.mark.parametrize('mean_k, shares', [
    (3.75, [3.5, 4]),           # the first step of layer 0 costs 1, that of layer 1 costs 3
    (3.375, [3.5, 3.25]),       # the second step of layer 1 costs 2, half of it is enough
    (1, [1, 1]),
])
def test_greedy_shares_by_hand(mean_k, shares, families, monkeypatch):
    steps = [
        [1, 5, 6, 7, 8, 9, np.inf],
        [3, 2, 9, 9, 9, 9, np.inf],
    ]
    monkeypatch.setattr(families, 'L', 2)
    monkeypatch.setattr(families, 'steps_down', {3: steps}.get)
    assert families.greedy_shares(mean_k, 3) == shares


def test_one_sweep_over_the_layers_costs_what_whole_passes_do(families):
    shares = [[3, mean_k, 3] for mean_k in families.levels]
    policies = [Skip(betas_at(families.tails, share), 4) for share in shares]
    nats, _ = zip(*families.costs(policies))
    assert families.steps_down(3)[1] == pytest.approx([*np.diff(nats), np.inf], abs=1e-6)


def test_families_have_their_mean_k_and_the_best_costs_least(families):
    policies = [families.policy(family, 3) for family in FAMILIES]
    nats, mean_k = zip(*families.costs(policies))
    assert mean_k == pytest.approx([3, 3, 3], abs=0.15)
    assert families.best_family(3) == FAMILIES[np.argmin(nats)]
    assert nats[2] < min(nats[:2])                             # greedy


def test_one_expert_leaves_nothing_to_skip():
    model = random_model(tiny_config(top_k=1))
    families = SkipFamilies(model, random_text(40, 8).windows(40))
    policies = [families.policy(family, 1) for family in FAMILIES]
    assert families.costs(policies) == [(0, 1)] * 3


def test_the_expected_loss_is_0_for_top_k_and_a_divergence_for_others(families):
    model = families.model
    windows = [w[:40] for w in families.windows]               # two batches
    (same, _), (fewer, _) = evaluate(model, windows, [TopK(4), TopK(2)], expected=True)
    assert same.abs().max() == 0
    topk = model(windows[0])
    gain = ppo.expected_gain(model(windows[0], TopK(2)) - topk, topk)
    torch.testing.assert_close(fewer, -gain.flatten().double(), rtol=1e-3, atol=1e-5)


def test_an_expert_is_worth_what_a_little_more_of_them_saves(families):
    policies = [families.policy('per layer', 3 * share) for share in (0.95, 1.05)]
    (few, _), (many, _) = families.costs(policies)
    assert families.worth_of_an_expert(3) == pytest.approx((few - many) / 0.3 / 3, rel=0.05)


def test_calibration_hits_its_mean_k_within_a_percent(families):
    skip = calibrate(families.model, families.windows, lambda beta: Skip(beta, 4), 2.6, 4, 0)
    [(_, mean_k)] = families.costs([skip])
    assert mean_k == pytest.approx(2.6, rel=0.01)
