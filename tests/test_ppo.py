"""ppo.py: by hand, against exact enumeration, and at the ends of the price."""
import itertools
import math

import pytest
import torch

import ppo
import train
from allocator import Allocators, Rollout, TopK
from conftest import random_model, tiny_config


def test_reward_of_a_position_is_the_log_prob_of_the_next_token():
    logits = torch.randn(1, 3, 5)
    targets = torch.tensor([[4, 0, 2]])
    got = ppo.next_token_logp(logits, targets)
    for t in range(3):
        assert math.isclose(
            got[0, t].item(), logits[0, t].log_softmax(-1)[targets[0, t]].item(), rel_tol=1e-5
        )


def test_clipped_loss_by_hand():
    # one layer, three tokens, eps = 0.2
    #   token 0: ratio 1.5, adv  2: min(3.0, 1.2 * 2 = 2.4)    = 2.4    clipped
    #   token 1: ratio 0.5, adv  1: min(0.5, 0.8)              = 0.5
    #   token 2: ratio 0.5, adv -1: min(-0.5, 0.8 * -1 = -0.8) = -0.8   clipped
    # loss = -(2.4 + 0.5 - 0.8) / 3 = -0.7; all three ratios lie outside 0.8..1.2
    loss, stats = ppo.clipped_loss(
        torch.tensor([[1.5, 0.5, 0.5]]).log(), torch.zeros(1, 3), torch.tensor([2.0, 1.0, -1.0]), 0.2
    )
    assert math.isclose(loss.item(), -.7, rel_tol=1e-6)
    assert stats['clipfrac'] == 1
    kl = ((1.5 - 1 - math.log(1.5)) + 2 * (.5 - 1 - math.log(.5))) / 3
    assert math.isclose(stats['approx_kl'], kl, rel_tol=1e-5)


def test_whole_loss_by_hand():
    # one decision, three actions with probabilities 1/2, 1/4, 1/4: E[k] = 1.75; k = 2 drawn at its old
    # probability, adv 3
    logits = torch.tensor([[[.5, .25, .25]]]).log()
    loss, stats = ppo.ppo_loss(
        logits, torch.tensor([[2]]), torch.tensor([[0.25]]).log(), torch.tensor([3.0]), 0.1, 0.2, 0.01
    )
    entropy = .5 * math.log(2) + .5 * math.log(4)
    assert math.isclose(loss.item(), -3 + .1 * 1.75 - .01 * entropy, rel_tol=1e-6)
    assert math.isclose(stats['mean_k'], 1.75, rel_tol=1e-6) and math.isclose(
        stats['entropy'], entropy, rel_tol=1e-6
    )


def test_first_epoch_has_ratio_1_and_clips_nothing():
    logits = torch.randn(2, 9, 4, requires_grad=True)
    k = torch.randint(1, 5, (2, 9))
    old = logits.log_softmax(-1).gather(-1, (k - 1)[..., None])[..., 0].detach()
    _, stats = ppo.ppo_loss(logits, k, old, torch.randn(9), 0, .2)
    assert stats['clipfrac'] == 0 and stats['approx_kl'] == 0


def test_group_advantage_by_hand():
    assert ppo.group_advantage(torch.tensor([[-1.], [-3.]])).tolist() == [[2.], [-2.]]
    r = torch.tensor([[1.], [2.], [6.]])
    torch.testing.assert_close(ppo.group_advantage(r), torch.tensor([[1 - 4.], [2 - 3.5], [6 - 1.5]]))


def test_reward_to_go_by_hand():
    r = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 8.0]])
    assert ppo.reward_to_go(r, 0.5).tolist() == [[3.0, 4.0, 4.0], [2.0, 4.0, 8.0]]
    assert ppo.reward_to_go(r, 1).tolist() == [[7.0, 6.0, 4.0], [8.0, 8.0, 8.0]]
    drawn = torch.randn(4, 3, 128)                             # (G,B,T)
    assert torch.equal(ppo.reward_to_go(drawn, 0.0), drawn)    # the paper's: bit for bit
    slow = drawn.clone()
    for t in range(126, -1, -1):
        slow[..., t] += 0.9 * slow[..., t + 1]
    torch.testing.assert_close(ppo.reward_to_go(drawn, 0.9), slow)


def test_gamma_discounts_shallow_layers():
    got = ppo.topk_advantage(torch.tensor([1.]), torch.tensor([0.]), gamma=.5, n_layers=3)
    assert got.tolist() == [[.25], [.5], [1.]]


# ---------------------------------------------------------------- exact enumeration: 2 layers, 3 actions, one
# token

REWARD = torch.tensor([[-1., -2., .5], [0., 1., -3.], [2., -.5, .3]])               # of the plan (k_1, k_2)
ACTIONS = range(3)


def toy(seed=1):
    """Logits of layer 1 (3,), and of layer 2 (3,3) by the action of layer 1, which is its state."""
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(3, generator=g, requires_grad=True),
        torch.randn(3, 3, generator=g, requires_grad=True),
    ]


def plan_logits(theta, a):
    return torch.stack([theta[0], theta[1][a]]).unsqueeze(1)                        # (L=2,P=1,A=3)


def plan_prob(theta, a, b):
    return theta[0].softmax(-1)[a] * theta[1][a].softmax(-1)[b]


def loss_gradient(theta, plan, adv, price=0.0):
    k = torch.tensor(plan)[:, None] + 1
    logits = plan_logits(theta, plan[0])
    old = logits.detach().log_softmax(-1).gather(-1, (k - 1)[..., None])[..., 0]
    loss, _ = ppo.ppo_loss(logits, k, old, adv, price, .2)
    return torch.autograd.grad(loss, theta)


def exact_gradient(theta):
    value = sum(plan_prob(theta, a, b) * REWARD[a, b] for a, b in itertools.product(ACTIONS, ACTIONS))
    return torch.autograd.grad(-value / 2, theta)                        # / L: the loss is a mean over layers


def test_mean_gradient_is_exact_with_the_top_k_baseline():
    theta = toy()
    total = [torch.zeros(3), torch.zeros(3, 3)]
    for plan in itertools.product(ACTIONS, ACTIONS):
        adv = ppo.topk_advantage(REWARD[plan].view(1), REWARD[1, 1].view(1), n_layers=2)
        for t, g in zip(total, loss_gradient(theta, plan, adv)):
            t += plan_prob(theta, *plan).detach() * g
    for t, e in zip(total, exact_gradient(theta)):
        torch.testing.assert_close(t, e)


def test_mean_gradient_is_exact_with_the_group_baseline():
    theta = toy(2)
    total = [torch.zeros(3), torch.zeros(3, 3)]
    plans = list(itertools.product(ACTIONS, ACTIONS))
    for one, other in itertools.product(plans, plans):                            # G = 2 rollouts, both learn
        adv = ppo.group_advantage(torch.stack([REWARD[one], REWARD[other]])[:, None])
        p = (plan_prob(theta, *one) * plan_prob(theta, *other)).detach()
        for plan, a in ((one, adv[0]), (other, adv[1])):
            for t, g in zip(total, loss_gradient(theta, plan, a)):
                t += p * g / 2
    for t, e in zip(total, exact_gradient(theta)):
        torch.testing.assert_close(t, e)


# two tokens, one layer, 3 actions: the k of the first token changes the state and the reward of the second
OWN = torch.tensor([0.5, 0.1, -0.4])
LATER = torch.tensor([[-1.0, -2.0, 0.5], [0.0, 1.0, -3.0], [2.0, -0.5, 0.3]])


@pytest.mark.parametrize('discount', [0.0, 0.5, 1.0])
def test_mean_gradient_with_credit_over_time_is_exact(discount):
    """Enumerated: that of E[r_1 + discount r_2] for the first token, of E[r_2] for the second."""
    theta = toy(3)
    total = [torch.zeros(3), torch.zeros(3, 3)]
    plans = list(itertools.product(ACTIONS, ACTIONS))
    reward = {
        (a, b): ppo.reward_to_go(torch.stack([OWN[a], LATER[a, b]]), discount) for a, b in plans
    }  # (T=2,)
    for one, other in itertools.product(plans, plans):                          # G = 2 rollouts, both learn
        p = (plan_prob(theta, *one) * plan_prob(theta, *other)).detach()
        adv = ppo.group_advantage(torch.stack([reward[one], reward[other]]))    # (G,P=2)
        for (a, b), of_tokens in ((one, adv[0]), (other, adv[1])):
            logits = torch.stack([theta[0], theta[1][a]])[None]                 # (L=1,P=2,A)
            k = torch.tensor([[a + 1, b + 1]])
            old = logits.detach().log_softmax(-1).gather(-1, (k - 1)[..., None])[..., 0]
            loss, _ = ppo.ppo_loss(logits, k, old, of_tokens, 0.0, 0.2)
            for t, g in zip(total, torch.autograd.grad(loss, theta)):
                t += p * g / 2
    first = sum(theta[0].softmax(-1)[a] * (OWN[a] + discount * (theta[1][a].softmax(-1).detach() @ LATER[a]))
                for a in ACTIONS)
    second = sum(theta[0].softmax(-1)[a].detach() * (theta[1][a].softmax(-1) @ LATER[a]) for a in ACTIONS)
    exact = torch.autograd.grad(-first / 2, theta[0])[0], torch.autograd.grad(-second / 2, theta[1])[0]
    for t, e in zip(total, exact):
        torch.testing.assert_close(t, e)


def test_cost_gradient_is_that_of_the_exact_mean():
    logits = torch.randn(2, 5, 4, requires_grad=True)
    k = ppo.expected_k(logits)
    p = logits.softmax(-1)
    torch.testing.assert_close(k, (p * torch.arange(1., 5)).sum(-1))
    got, = torch.autograd.grad(k.sum(), logits)
    torch.testing.assert_close(got, p * (torch.arange(1., 5) - k[..., None]))       # softmax's own derivative


@pytest.mark.parametrize('price, expected', [(100., 1), (0., 3)])
def test_a_huge_price_leaves_one_expert_and_no_price_the_most_rewarding_k(price, expected):
    logits = torch.zeros(1, 64, 4, requires_grad=True)
    optimizer = torch.optim.Adam([logits], .1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        with torch.no_grad():
            logp = logits.log_softmax(-1)
            k = 1 + torch.multinomial(logp[0].exp(), 1, generator=generator).T      # (1,64)
            adv = torch.tensor([0., 0., 1., .2])[k - 1] - .3                        # k = 3 pays best
            old = logp.gather(-1, (k - 1)[..., None])[..., 0]
        loss, _ = ppo.ppo_loss(logits, k, old, adv, price, .2)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert ((1 + logits.argmax(-1)) == expected).float().mean() > .9


def test_advantage_is_exactly_0_where_the_sampled_plan_is_top_k():
    model = random_model(tiny_config())
    allocators = Allocators(model.config, 3, False)
    allocators.bias.data[:, 2] = 50                            # k = 3 = K, always
    inputs, targets = torch.randint(50, (2, 20)), torch.randint(50, (2, 20))
    sampled = ppo.next_token_logp(model(inputs, Rollout(allocators, torch.rand(3, 40))), targets)
    plain = ppo.next_token_logp(model(inputs), targets)
    assert ppo.topk_advantage(sampled.flatten(), plain.flatten(), n_layers=3).abs().max() == 0


# ---------------------------------------------------------------- P-Warm

def test_find_mass_brings_the_mean_label_to_the_target():
    from allocator import mass_labels
    probs = (2 * torch.randn(4000, 16)).softmax(-1)
    p = ppo.find_mass(probs, 4)
    assert abs(mass_labels(probs, p).float().mean() - 4) < .01


def test_warm_loss_is_the_cross_entropy_of_the_label():
    logits = torch.tensor([[[.5, .25, .25]]]).log()
    assert math.isclose(ppo.warm_loss(logits, torch.tensor([[3]])).item(), math.log(4), rel_tol=1e-6)


# ---------------------------------------------------------------- rewards

def test_expected_reward_by_enumeration_and_by_drawing():
    logits, topk = torch.randn(3, 2, 5), torch.randn(2, 5)
    p, q = topk.softmax(-1), logits.softmax(-1)
    got = ppo.expected_gain(logits, topk)
    by_hand = [
        [sum(p[t, v] * (q[g, t, v] / p[t, v]).log() for v in range(5)) for t in range(2)] for g in range(3)
    ]
    torch.testing.assert_close(got, torch.tensor(by_hand))
    assert (ppo.expected_gain(topk, topk) == 0).all()
    # it is the mean of what the plan gains over top-k in the sampled reward, over the model's own next tokens
    draws = torch.multinomial(p, 200000, replacement=True)                          # (2,draws)
    gained = (q[0] / p).log().gather(1, draws).mean(1)
    torch.testing.assert_close(got[0], gained, atol=.02, rtol=0)


@pytest.mark.parametrize('size', [1e-3, .1, 1, 10])
def test_expected_reward_keeps_its_digits_however_small_the_change(size):
    topk = torch.randn(500, 1000) * 3
    logits = topk + size * torch.randn_like(topk)
    p, q = topk.double().log_softmax(-1), logits.double().log_softmax(-1)
    torch.testing.assert_close(
        ppo.expected_gain(logits, topk).double(), (p.exp() * (q - p)).sum(-1), rtol=1e-5, atol=1e-6 * size
    )


def test_expected_reward_of_a_plan_that_ruins_the_prediction_is_finite():
    topk, logits = torch.zeros(2, 100), torch.zeros(2, 100)
    logits[0, 0], logits[1, 0] = 1e4, torch.nan
    gain = ppo.expected_gain(logits, topk)
    assert -80 < gain[0] < -70 and gain[1].isnan()             # a NaN of the model stays one


@pytest.mark.parametrize('reward', ['expected', 'sampled'])
def test_rollout_rewards_are_those_of_separate_passes(reward):
    model = random_model(tiny_config())
    s = train.Settings(group=2, reward=reward)
    inputs, targets = torch.randint(50, (3, 8)), torch.randint(50, (3, 8))
    got, got_topk = train.rollout_reward(s, model, inputs, targets, TopK(2))
    logits, topk = model(inputs, TopK(2)), model(inputs)
    measure = lambda logits: (
        ppo.expected_gain(logits, topk) if reward == 'expected' else ppo.next_token_logp(logits, targets)
    )
    torch.testing.assert_close(got, measure(logits).flatten().expand(2, -1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got_topk, measure(topk).flatten(), rtol=1e-4, atol=1e-4)
