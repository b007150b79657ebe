"""study/policies.py and run/start.py: learning without RL, the start at expert skipping, policies by name."""
import numpy as np
import pytest
import torch

from allocator import AdaK, Allocators, Skip, TopK, TopP, tail_ratios
from base.pretrain import new_model
from base.text import Text
from conftest import random_model, tiny_config
from hub.files import InputError
from run.evaluate import calibrate, evaluate
from run.rules import SkipFamilies, best_family, look, worth_of_an_expert
from run.start import new_allocators
from study.policies import SoftMixture, rule, train_soft
from train import Settings, ppo_step

N_VOCAB = 50


def some_text(n):
    tokens = torch.randint(N_VOCAB, (n,))
    return Text(tokens, np.zeros(n, int))


def mean_k(model, policy, windows):
    [(_, tally)] = evaluate(model, windows, [policy])
    return tally.mean()


def test_tail_ratios_by_hand():
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    ratios = tail_ratios(p[None])
    by_hand = [
        0.6 / 0.4,
        0.3 / 0.7,
        0.1 / 0.9,
    ]
    assert ratios[0].tolist() == pytest.approx(by_hand)


# ================================================================ without RL

@pytest.mark.parametrize('norm_topk', [True, False])
@pytest.mark.parametrize('k', [1, 3, 5])
def test_a_sure_soft_mixture_is_the_static_k_it_is_sure_of(k, norm_topk):
    config = tiny_config(norm_topk=norm_topk)
    model = random_model(config)
    tokens = torch.randint(N_VOCAB, (2, 9))
    allocators = Allocators(config, 5, True)
    allocators.bias.data[:, k - 1] = 60
    mixture = SoftMixture(allocators)
    soft = model(tokens, mixture)
    static = model(tokens, TopK(k))
    torch.testing.assert_close(soft, static, rtol=1e-3, atol=1e-3)
    pi = torch.stack(mixture.steps)
    assert pi.shape == (3, 18, 5)
    assert pi[..., k - 1].min() > 0.999


def test_the_gradient_through_a_soft_mixture_is_that_of_finite_differences():
    model = random_model(tiny_config(n_layers=2))
    tokens = torch.randint(N_VOCAB, (1, 6))
    allocators = Allocators(model.config, 4, True)
    bias = allocators.bias
    bias.data.normal_()

    def loss(change=0.0):
        bias.data[1, 2] += change
        logits = model(tokens, SoftMixture(allocators))
        logp = logits.double().log_softmax(-1)
        return logp[..., 7].mean()
    [gradient] = torch.autograd.grad(loss(), bias)
    rise = loss(1e-2) - loss(-2e-2)
    miss = rise / 2e-2 - gradient[1, 2]
    assert miss.abs() < 0.01 * gradient.abs().max()


@pytest.mark.parametrize('price, least, most', [
    (10.0, 1, 1.1),
    (1e-6, 2.5, 4),
])
def test_learning_without_rl_follows_the_price_and_moves_only_the_allocators(price, least, most):
    model = random_model(tiny_config())
    before = [p.clone() for p in model.parameters()]
    allocators = Allocators(model.config, 4, True)
    allocators.bias.data[:, 2] = 0.5                           # starts at k = 3
    s = Settings(
        seq=16,
        ppo_batch=4,
        ppo_steps=20,
    )
    train_soft(s, model, allocators, price, some_text(4000), log=[])
    windows = some_text(600).windows(16)
    assert least <= mean_k(model, AdaK(allocators), windows) <= most
    assert all(map(torch.equal, model.parameters(), before))


# ================================================================ start and calibration

@pytest.mark.parametrize('start, budget', [
    ('one beta', 0.9),
    ('per layer', 0.6),
    ('greedy', 0.75),
    ('skip', 0.6),
])
def test_allocators_start_as_expert_skipping(start, budget):
    model = random_model(tiny_config(top_k=4))
    s = Settings(
        budget=budget,
        seq=16,
        start=start,
        dropped='published',
    )
    text = some_text(2400)
    families = SkipFamilies(model, text.windows(16))
    allocators, price = new_allocators(s, model, text, families)
    target = 4 * budget
    family = best_family(families, target) if start == 'skip' else start
    skip = families.policy(family, target)
    ada = AdaK(allocators)
    inputs, _, _ = text.windows(16, 1600)

    def same(*seen):
        return ada(*seen) == skip(*seen)
    found = torch.stack(look(model, inputs, same))
    share = found.float().mean(1)
    assert share.min() > 0.998
    found = mean_k(model, ada, families.windows)
    assert abs(found - target) < 0.1
    worth = worth_of_an_expert(families, target)
    assert worth > 0
    assert price == pytest.approx(0.7 * worth)


ALLOCATORS = Allocators(tiny_config(top_k=4), 8, True)


@pytest.mark.parametrize('policy_of, low, high', [
    (lambda p: TopP(p, 8), 0, 1),
    (lambda beta: Skip(beta, 4), 4, 0),
    (lambda price: AdaK(ALLOCATORS, price), 20, -20),
])
def test_calibration_hits_its_mean_k_within_a_percent(policy_of, low, high):
    model = random_model(tiny_config(top_k=4))
    windows = some_text(6000).windows(32, 4096)
    ALLOCATORS.weight.data.normal_(0, 0.1)
    knob = calibrate(model, windows, policy_of, 2.6, low, high)
    found = mean_k(model, policy_of(knob), windows)
    assert found == pytest.approx(2.6, rel=0.01)


# ================================================================ by name

@pytest.mark.parametrize('name, kind, k_max', [
    ('top-k', TopK, 3),
    ('k=2', TopK, 2),
    ('skip=.5', Skip, 3),
])
def test_policies_by_name(name, kind, k_max):
    policy = rule(name, tiny_config())
    assert type(policy) is kind
    assert policy.k_max == k_max


@pytest.mark.parametrize('name', 'k=0 k=9 k=1.5 skip=-1 skip=x skip=nan best ada-k'.split())
def test_no_policy_of_that_name(name):
    with pytest.raises(InputError, match=f'--policy {name}: '):
        rule(name, tiny_config())


@pytest.mark.parametrize('N', [8, 64, 128])
@pytest.mark.parametrize('K', [2, 8])
def test_the_first_step_keeps_the_start_however_many_experts(N, K):
    config = tiny_config(n_experts=N, top_k=K, dim=64)
    model = new_model(config, 0).requires_grad_(False)
    s = Settings(seq=16)
    text = some_text(8000)
    allocators, price = new_allocators(s, model, text, SkipFamilies(model, text.windows(16, 2048)))
    optimizer = torch.optim.AdamW(allocators.parameters(), s.ppo_lr, weight_decay=0)
    noise = torch.rand(3, s.group * s.ppo_batch * 16)
    batch = next(text.batches(s.ppo_batch, 16, torch.Generator()))
    row = ppo_step(s, 1, model, allocators, optimizer, batch, noise, price, s.entropy * price)
    assert 0 < row['approx_kl'] < 0.05
