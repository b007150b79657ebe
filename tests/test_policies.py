"""study/policies.py and run/start.py: rules by hand, learning without RL, the start at expert skipping."""

import numpy as np
import pytest
import torch

from allocator import AdaK, Allocators, Skip, TopK, TopP, tail_ratios
from base.text import Text
from conftest import random_model, tiny_config
from run.evaluate import calibrate, evaluate
from run.rules import SkipFamilies, best_family, worth_of_an_expert
from run.start import look, new_allocators
from study.policies import EntropyBands, PerLayer, SoftMixture
from train import Settings


def test_entropy_bands_by_hand():
    uniform, sure, half = (
        torch.full((1, 4), 0.25),
        torch.tensor([[1.0, 0, 0, 0]]),
        torch.tensor([[0.5, 0.5, 0, 0]]),
    )
    assert [EntropyBands(0.5, 4)(0, p, p).item() for p in (uniform, sure, half)] == [
        2,
        1,
        1,
    ]  # exp(H) = 4, 1, 2
    assert [EntropyBands(1.3, 4)(0, p, p).item() for p in (uniform, sure, half)] == [
        4,
        1,
        3,
    ]  # 5.2 is cut to k_max, 2.6 rounds up


def test_per_layer_has_each_layers_mean():
    x = torch.zeros(20000, 1)
    policy = PerLayer([2, 1.25, 4])
    assert (
        policy.k_max == 4
        and policy(0, x, x).unique().tolist() == [2]
        and policy(2, x, x).unique().tolist() == [4]
    )
    k = policy(1, x, x)
    assert set(k.tolist()) == {1, 2} and abs(k.float().mean() - 1.25) < .01


def test_tail_ratios_by_hand():
    torch.testing.assert_close(
        tail_ratios(torch.tensor([[0.4, 0.3, 0.2, 0.1]])), torch.tensor([[0.6 / 0.4, 0.3 / 0.7, 0.1 / 0.9]])
    )


@pytest.mark.parametrize('norm_topk', [True, False])
def test_a_sure_soft_mixture_is_the_static_k_it_is_sure_of(norm_topk):
    model, tokens = random_model(tiny_config(norm_topk=norm_topk)), torch.randint(50, (2, 9))
    allocators = Allocators(model.config, 5, True)
    for k in (1, 3, 5):
        allocators.bias.data.copy_(60.0 * (torch.arange(1, 6) == k))
        mixture = SoftMixture(allocators)
        torch.testing.assert_close(model(tokens, mixture), model(tokens, TopK(k)), rtol=1e-3, atol=1e-3)
        assert mixture.pi.shape == (3, 18, 5) and mixture.pi[..., k - 1].min() > .999


def test_the_gradient_through_a_soft_mixture_is_that_of_finite_differences():
    model, tokens = random_model(tiny_config(n_layers=2)), torch.randint(50, (1, 6))
    allocators = Allocators(model.config, 4, True)
    allocators.bias.data.normal_()
    loss = lambda: model(tokens, SoftMixture(allocators)).double().log_softmax(-1)[0, :, 7].mean()
    gradient = torch.autograd.grad(loss(), allocators.bias)[0]
    for at in ((0, 0), (1, 2)):
        step = torch.zeros_like(allocators.bias)
        step[at] = 1e-2
        values = []
        for sign in (1, -1):
            allocators.bias.data.add_(sign * step)
            values.append(loss().item())
            allocators.bias.data.sub_(sign * step)
        assert abs((values[0] - values[1]) / 2e-2 - gradient[at].item()) < .01 * gradient.abs().max().item()


@pytest.mark.parametrize('budget', [0.9, 0.6])
@pytest.mark.parametrize('start', ['one beta', 'per layer', 'greedy', 'skip'])
def test_allocators_start_as_expert_skipping(start, budget):
    model = random_model(tiny_config(top_k=4))
    s = Settings(budget=budget, seq=16, start=start)
    text = Text(torch.randint(50, (9000,)), np.zeros(9000, int))
    families = SkipFamilies(model, text, 16)
    allocators, price = new_allocators(s, model, text, families)
    family = best_family(families, families.windows, 4 * budget) if start == 'skip' else start
    skip, ada = families.policy(family, 4 * budget), AdaK(allocators)
    seen = [(layer, x, p) for layer, (x, p) in enumerate(look(s, model, text.windows(16, 1600)[0]))]
    k, wanted = (torch.cat([policy(*one) for one in seen]) for policy in (ada, skip))
    assert abs(k.float().mean() - budget * 4) < 0.1 and (k == wanted).float().mean() > 0.999
    assert price == pytest.approx(0.7 * worth_of_an_expert(families, 4 * budget)) and price > 0


def test_calibration_hits_its_mean_k_within_a_percent():
    model = random_model(tiny_config(top_k=4))
    windows = Text(torch.randint(50, (6000,)), np.zeros(6000, int)).windows(32, 4096)
    allocators = Allocators(model.config, 8, True)
    allocators.weight.data.normal_(0, .1)
    for policy_of, low, high in (
        (lambda p: TopP(p, 8), 0, 1),
        (lambda beta: Skip(beta, 4), 4, 0),
        (lambda scale: EntropyBands(scale, 8), 0, 4),
        (lambda price: AdaK(allocators, price), 20, -20),
    ):
        knob = calibrate(model, windows, policy_of, 2.6, low, high)
        assert abs(evaluate(model, windows, policy_of(knob))[1].mean() - 2.6) < .026
