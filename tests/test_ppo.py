"""ppo.py: by hand, against exact enumeration, and at the ends of the price."""
import itertools
import math

import pytest
import torch

import ppo
import train
from allocator import Allocators, Rollout, TopK, mass_labels
from conftest import random_model, tiny_config
from run.evaluate import rewards
from run.start import find_mass


def logp_of(logits, k):
    """log pi(k) of logits (L,P,A), k (L,P) -> (L,P), without gradient."""
    logp = logits.detach().log_softmax(-1)
    return logp.gather(-1, (k - 1)[..., None])[..., 0]


# ---------------------------------------------------------------- by hand

def test_clipped_loss():
    # one layer, three tokens, eps = 0.2
    #   token 0: ratio 1.5, adv  2: min(3.0, 1.2 * 2 = 2.4)    = 2.4    clipped
    #   token 1: ratio 0.5, adv  1: min(0.5, 0.8)              = 0.5
    #   token 2: ratio 0.5, adv -1: min(-0.5, 0.8 * -1 = -0.8) = -0.8   clipped
    # loss = -(2.4 + 0.5 - 0.8) / 3 = -0.7; all three ratios lie outside 0.8..1.2
    ratio = torch.tensor([[1.5, 0.5, 0.5]])
    loss, stats = ppo.clipped_loss(ratio.log(), torch.zeros(1, 3), torch.tensor([2.0, 1.0, -1.0]), 0.2)
    assert loss.item() == pytest.approx(-.7)
    assert stats['clipfrac'] == 1
    kl = ((1.5 - 1 - math.log(1.5)) + 2 * (.5 - 1 - math.log(.5))) / 3
    assert stats['approx_kl'] == pytest.approx(kl)


def test_whole_loss():
    # one decision, three actions with probabilities 1/2, 1/4, 1/4: E[k] = 1.75; k = 2 drawn at its old
    # probability, adv 3
    logits = torch.tensor([[[.5, .25, .25]]]).log()
    old = torch.tensor([[0.25]]).log()
    loss, stats = ppo.ppo_loss(logits, torch.tensor([[2]]), old, torch.tensor([3.0]), 0.1, 0.2, 0.01)
    entropy = .5 * math.log(2) + .5 * math.log(4)
    assert loss.item() == pytest.approx(-3 + .1 * 1.75 - .01 * entropy)
    assert stats['mean_k'] == pytest.approx(1.75)
    assert stats['entropy'] == pytest.approx(entropy)


def test_first_epoch_has_ratio_1_and_clips_nothing():
    logits = torch.randn(2, 9, 4)
    k = torch.randint(1, 5, (2, 9))
    _, stats = ppo.ppo_loss(logits, k, logp_of(logits, k), torch.randn(9), 0, .2)
    assert stats['clipfrac'] == 0 and stats['approx_kl'] == 0


def test_group_advantage():
    assert ppo.group_advantage(torch.tensor([[-1.], [-3.]])).tolist() == [[2.], [-2.]]
    r = torch.tensor([[1.], [2.], [6.]])
    torch.testing.assert_close(ppo.group_advantage(r), torch.tensor([[1 - 4.], [2 - 3.5], [6 - 1.5]]))


def test_reward_to_go():
    one = torch.zeros(2, 3)                                    # a document
    r = torch.tensor([[[1.0, 2.0, 4.0], [0.0, 0.0, 8.0]]])
    assert ppo.reward_to_go(r, 0.5, one).tolist() == [[[3.0, 4.0, 4.0], [2.0, 4.0, 8.0]]]
    assert ppo.reward_to_go(r, 1, one).tolist() == [[[7.0, 6.0, 4.0], [8.0, 8.0, 8.0]]]
    two = torch.tensor([[0, 0, 1], [0, 1, 1]])
    assert ppo.reward_to_go(r, 0.5, two).tolist() == [[[2.0, 2.0, 4.0], [0.0, 4.0, 8.0]]]
    drawn = torch.randn(4, 3, 128)                             # (G,B,T)
    document = torch.randint(3, (3, 128)).cumsum(1)
    assert torch.equal(ppo.reward_to_go(drawn, 0.0, document), drawn)      # the paper's: bit for bit
    ahead = torch.arange(128) - torch.arange(128)[:, None]                 # (T,T): u - t
    weight = torch.where(ahead >= 0, 0.9 ** ahead.clamp_min(0), 0.0)
    weight = weight * (document[:, None] == document[..., None])           # (B,T,T)
    slow = torch.einsum('gbu,btu->gbt', drawn, weight)
    torch.testing.assert_close(ppo.reward_to_go(drawn, 0.9, document), slow)


def test_cost_gradient_is_that_of_the_exact_mean():
    logits = torch.randn(2, 5, 4, requires_grad=True)
    n = torch.arange(1., 5)
    k = ppo.expected_k(logits)
    p = logits.softmax(-1)
    torch.testing.assert_close(k, (p * n).sum(-1))
    got, = torch.autograd.grad(k.sum(), logits)
    torch.testing.assert_close(got, p * (n - k[..., None]))    # softmax's own derivative


# ---------------------------------------------------------------- exact enumeration: two decisions

# of the plan (a, b): b's logits depend on a, which is its state
REWARD = torch.tensor([[-1., -2., .5], [0., 1., -3.], [2., -.5, .3]])
OWN = torch.tensor([0.5, 0.1, -0.4])                           # of the first token alone
PLANS = list(itertools.product(range(3), range(3)))


def toy(seed):
    """Logits of the first decision (3,), and of the second (3,3) by the action of the first."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, generator=g, requires_grad=True), torch.randn(3, 3, generator=g, requires_grad=True)


def plan_prob(theta, plan):
    a, b = plan
    return theta[0].softmax(-1)[a] * theta[1][a].softmax(-1)[b]


def gradient(theta, plan, adv, as_layers):
    """The gradient of the loss of one sampled plan: two layers of a token, or two tokens of a layer."""
    logits = torch.stack([theta[0], theta[1][plan[0]]])                              # (2,A)
    logits = logits[:, None] if as_layers else logits[None]                         # (L,P,A)
    k = torch.tensor(plan).view(logits.shape[:2]) + 1
    loss, _ = ppo.ppo_loss(logits, k, logp_of(logits, k), adv, 0.0, .2)
    return torch.autograd.grad(loss, theta)


def mean_over_pairs(theta, advantages, as_layers):
    """The mean gradient over all pairs of rollouts (G = 2), both of which learn."""
    total = [torch.zeros(3), torch.zeros(3, 3)]
    for pair in itertools.product(PLANS, PLANS):
        p = (plan_prob(theta, pair[0]) * plan_prob(theta, pair[1])).detach()
        for plan, adv in zip(pair, advantages(*pair)):
            for t, g in zip(total, gradient(theta, plan, adv, as_layers)):
                t += p * g / 2
    return total


def exact_gradient(theta):
    value = sum(plan_prob(theta, plan) * REWARD[plan] for plan in PLANS)
    return torch.autograd.grad(-value / 2, theta)              # the loss is a mean over the two decisions


def of_topk(one, other):
    return [ppo.topk_advantage(REWARD[plan].view(1), REWARD[1, 1].view(1)) for plan in (one, other)]


def of_group(one, other):
    return ppo.group_advantage(torch.stack([REWARD[one], REWARD[other]])[:, None])


@pytest.mark.parametrize('advantages', [of_topk, of_group])
def test_mean_gradient_is_exact(advantages):
    theta = toy(1)
    found = mean_over_pairs(theta, advantages, as_layers=True)
    for t, e in zip(found, exact_gradient(theta)):
        torch.testing.assert_close(t, e)


@pytest.mark.parametrize('discount', [0.0, 0.5, 1.0])
def test_mean_gradient_with_credit_over_time_is_exact(discount):
    """Of two tokens: that of E[r_1 + discount r_2] for the first, of E[r_2] for the second."""
    theta = toy(3)

    def advantages(*pair):
        rewards = [torch.stack([OWN[a], REWARD[a, b]]) for a, b in pair]
        credit = ppo.reward_to_go(torch.stack(rewards)[:, None], discount, torch.zeros(1, 2))
        return ppo.group_advantage(credit[:, 0])               # (G,P=2)
    found = mean_over_pairs(theta, advantages, as_layers=False)
    first = theta[0].softmax(-1)
    second = [theta[1][a].softmax(-1) @ REWARD[a] for a in range(3)]                # E[r_2] by the first k
    of_first = sum(first[a] * (OWN[a] + discount * second[a].detach()) for a in range(3))
    of_second = sum(first[a].detach() * second[a] for a in range(3))
    torch.testing.assert_close(found[0], torch.autograd.grad(-of_first / 2, theta[0])[0])
    torch.testing.assert_close(found[1], torch.autograd.grad(-of_second / 2, theta[1])[0])


@pytest.mark.parametrize('price, expected', [(100., 1), (0., 3)])
def test_a_huge_price_leaves_one_expert_and_no_price_the_most_rewarding_k(price, expected):
    logits = torch.zeros(1, 64, 4, requires_grad=True)
    optimizer = torch.optim.Adam([logits], .1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        probs = logits.detach()[0].softmax(-1)
        k = 1 + torch.multinomial(probs, 1, generator=generator).T                  # (1,64)
        adv = torch.tensor([0., 0., 1., .2])[k - 1] - .3                            # k = 3 pays best
        loss, _ = ppo.ppo_loss(logits, k, logp_of(logits, k), adv, price, .2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert ((1 + logits.argmax(-1)) == expected).float().mean() > .9


# ---------------------------------------------------------------- P-Warm

def test_find_mass_brings_the_mean_label_to_the_target():
    probs = (2 * torch.randn(4000, 16)).softmax(-1)
    p = find_mass(probs, 4)
    assert abs(mass_labels(probs, p).float().mean() - 4) < .01


# ---------------------------------------------------------------- rewards

def test_reward_of_a_position_is_the_log_prob_of_the_next_token():
    logits = torch.randn(1, 3, 5)
    targets = torch.tensor([[4, 0, 2]])
    logp = logits[0].log_softmax(-1)
    right = torch.stack([logp[t, targets[0, t]] for t in range(3)])[None]
    torch.testing.assert_close(ppo.next_token_logp(logits, targets), right)


def test_advantage_is_exactly_0_where_the_sampled_plan_is_top_k():
    model = random_model(tiny_config())
    allocators = Allocators(model.config, 3, False)
    allocators.bias.data[:, 2] = 50                            # k = 3 = K, always
    inputs, targets = torch.randint(50, (2, 20)), torch.randint(50, (2, 20))
    sampled = ppo.next_token_logp(model(inputs, Rollout(allocators, torch.rand(3, 40), torch.float)), targets)
    plain = ppo.next_token_logp(model(inputs), targets)
    assert ppo.topk_advantage(sampled, plain).abs().max() == 0


def test_expected_reward_by_enumeration_and_by_drawing():
    logits, topk = torch.randn(3, 2, 5), torch.randn(2, 5)
    p, q = topk.softmax(-1), logits.softmax(-1)
    got = ppo.expected_gain(logits - topk, topk)
    torch.testing.assert_close(got, (p * (q / p).log()).sum(-1))
    assert (ppo.expected_gain(torch.zeros_like(topk), topk) == 0).all()
    assert (got < 0).all()                                     # never better than top-k
    # it is the mean of what the plan gains over top-k in the sampled reward, over the model's own next tokens
    draws = torch.multinomial(p, 200000, replacement=True)                          # (2,draws)
    gained = (q[0] / p).log().gather(1, draws).mean(1)
    torch.testing.assert_close(got[0], gained, atol=.02, rtol=0)


@pytest.mark.parametrize('size', [1e-3, .1, 1, 10])
def test_expected_reward_keeps_its_digits_however_small_the_change(size):
    topk = torch.randn(500, 1000) * 3
    logits = topk + size * torch.randn_like(topk)
    p, q = topk.double().log_softmax(-1), logits.double().log_softmax(-1)
    right = (p.exp() * (q - p)).sum(-1)
    found = ppo.expected_gain(logits - topk, topk).double()
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6 * size)


def test_the_reward_of_a_bf16_model_is_that_of_its_states_in_fp64():
    """The noise of logits spaced 0.06 apart would be a thousandth of a nat; what is sought is smaller."""
    model = random_model(tiny_config(n_vocab=2000)).bfloat16()
    h = torch.randn(1, 500, 32).bfloat16()
    hidden = torch.cat([h, h + (0.01 * torch.randn(2, 500, 32)).bfloat16()])          # (n,P,C)
    found = rewards(model, hidden, torch.zeros(500), True)
    head = model.lm_head.weight.double()
    logp = (hidden.double() @ head.T).log_softmax(-1)
    right = (logp[0].exp() * (logp - logp[0])).sum(-1)
    assert (found[0] == 0).all()
    assert (found - right).mean().abs() < 0.02 * right[1:].mean().abs()


def test_expected_reward_of_a_plan_that_ruins_the_prediction_is_finite():
    topk, logits = torch.zeros(2, 100), torch.zeros(2, 100)
    logits[0, 0], logits[1, 0] = 1e4, torch.nan
    gain = ppo.expected_gain(logits - topk, topk)
    assert -80 < gain[0] < -70 and gain[1].isnan()             # a NaN of the model stays one


@pytest.mark.parametrize('reward', ['expected', 'sampled'])
def test_rollout_rewards_are_those_of_separate_passes(reward):
    model = random_model(tiny_config())
    s = train.Settings(group=2, reward=reward)
    inputs, targets = torch.randint(50, (3, 8)), torch.randint(50, (3, 8))
    got, got_topk = train.rollout_reward(s, model, inputs, targets, TopK(2))
    logits, topk = model(inputs, TopK(2)), model(inputs)
    if reward == 'expected':
        right, right_topk = ppo.expected_gain(logits - topk, topk), torch.zeros(3, 8)
    else:
        right, right_topk = ppo.next_token_logp(logits, targets), ppo.next_token_logp(topk, targets)
    torch.testing.assert_close(got, right.expand(2, -1, -1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got_topk, right_topk, rtol=1e-4, atol=1e-4)
