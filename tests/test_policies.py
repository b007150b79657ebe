"""study/policies.py and run/start.py: learning without RL, the start at expert skipping, policies by name."""
import pytest
import torch

import run.rules
import run.standins as standins
from allocator import AdaK, Allocators, Rollout, TopK
from base.pretrain import new_model
from conftest import random_model, random_text, tiny_config
from hub.files import InputError
from run.evaluate import evaluate
from run.rules import SkipFamilies, look
from run.start import new_allocators
from study.policies import SoftMixture, rule, soft_step
from study.study import SOFT
from train import Settings, rollout_reward, train_ppo


# ================================================================ without RL

def with_standins(config):
    """A model that runs with fitted stand-ins."""
    model = random_model(config)
    standins.use(model, standins.fit(Settings(), model, torch.randint(50, (8, 32)), TopK(1)))
    return model


@pytest.mark.parametrize('k, norm_topk', [(1, True), (5, False)])
def test_a_sure_soft_mixture_is_the_static_k_it_is_sure_of(k, norm_topk):
    model = with_standins(tiny_config(norm_topk=norm_topk))
    tokens = torch.randint(50, (2, 9))
    allocators = Allocators(model.config, 5, True)
    allocators.bias.data[:, k - 1] = 60
    soft = model(tokens, SoftMixture(allocators))
    static = model(tokens, TopK(k))
    torch.testing.assert_close(soft, static, rtol=1e-3, atol=1e-3)


def test_the_gradient_through_a_soft_mixture_is_that_of_finite_differences():
    model = with_standins(tiny_config(n_layers=2))
    tokens = torch.randint(50, (1, 6))
    allocators = Allocators(model.config, 4, True)
    bias = allocators.bias
    bias.data.normal_()

    def loss(change=0.0):
        bias.data[1, 2] += change
        logits = model(tokens, SoftMixture(allocators))
        return logits.double().log_softmax(-1)[..., 7].mean()
    [gradient] = torch.autograd.grad(loss(), bias)
    slope = (loss(1e-2) - loss(-2e-2)) / 2e-2
    assert (slope - gradient[1, 2]).abs() < 0.01 * gradient.abs().max()


@pytest.mark.parametrize('price, least, most', [
    (10.0, 1, 1.1),
    (1e-6, 2.5, 4),
])
def test_learning_without_rl_follows_the_price(price, least, most):
    model = random_model(tiny_config())
    allocators = Allocators(model.config, 4, True)
    allocators.bias.data[:, 2] = 0.5                           # starts at k = 3
    s = Settings(seq=16, ppo_batch=4, ppo_steps=20, **SOFT)
    train_ppo(s, model, allocators, price, random_text(4000), one_step=soft_step)
    [(_, tally)] = evaluate(model, random_text(600).windows(600), [AdaK(allocators)])
    assert least <= tally.mean() <= most


# ================================================================ the start

@pytest.mark.parametrize('family, budget', [
    ('one beta', 0.9),
    ('per layer', 0.6),
])
def test_allocators_start_as_expert_skipping(family, budget, monkeypatch):
    monkeypatch.setattr(run.rules, 'FAMILIES', [family])
    model = random_model(tiny_config(top_k=4))
    s = Settings(budget=budget, seq=16, dropped='published')
    text = random_text(2400)
    families = SkipFamilies(model, text.windows(2400))
    target = 4 * budget
    allocators, price = new_allocators(s, model, text, families)
    skip = families.policy(family, target)
    ada = AdaK(allocators)

    def same(*seen):
        return ada(*seen) == skip(*seen)
    share = torch.stack(look(model, families.windows[0], same)).float().mean(1)
    assert share.min() > 0.998
    assert price == pytest.approx(0.7 * families.worth_of_an_expert(target))


@pytest.mark.parametrize('N, K', [(8, 2), (64, 2), (64, 8), (128, 2), (128, 8)])
def test_the_first_step_keeps_the_start_however_many_experts(N, K):
    model = new_model(tiny_config(n_experts=N, top_k=K, dim=64)).requires_grad_(False)
    s = Settings(seq=16, start='one beta', ppo_steps=1)
    text = random_text(8000)
    families = SkipFamilies(model, text.windows(2048))
    allocators, price = new_allocators(s, model, text, families)
    log = train_ppo(s, model, allocators, price, text)
    assert 0 < log[0]['approx_kl'] < 0.05


def test_with_experts_beyond_k_the_teacher_runs_them():
    model = random_model(tiny_config())
    s = Settings(beyond=1, group=2)
    inputs = torch.randint(50, (2, 9))
    allocators = Allocators(model.config, 4, True)
    allocators.bias.data[:, 3] = 60                            # K + 1 = 4 experts everywhere

    def reward():
        rollout = Rollout(allocators, torch.rand(3, 2 * 18))
        return rollout_reward(s, model, inputs, inputs, rollout)[1:]
    assert not reward().any()
    allocators.bias.data[:, 2] = 90                            # K of them
    assert reward().mean() < 0


# ================================================================ by name

def test_policies_by_name():
    config = tiny_config()
    assert rule('top-k', config).k_max == 3
    assert rule('k=2', config).k_max == 2
    assert rule('skip=.5', config).beta == 0.5


@pytest.mark.parametrize('name', 'k=0 k=9 k=1.5 skip=-1 skip=x skip=nan best ada-k'.split())
def test_no_policy_of_that_name(name):
    with pytest.raises(InputError, match=f'--policy {name}: '):
        rule(name, tiny_config())
