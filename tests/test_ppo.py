"""ppo.py: by hand, and against exact enumeration."""
import itertools
import math

import pytest
import torch

import ppo
import train
from allocator import TopK, Watched, mass_labels
from conftest import random_model, tiny_config
from run.evaluate import rewards
from run.start import find_mass


def logp_of(logits, k):
    """log pi(k) of logits (L,P,A), k (L,P) -> (L,P), without gradient."""
    logp = logits.detach().log_softmax(-1)
    return logp.gather(-1, (k - 1)[..., None])[..., 0]


def gain_in_fp64(logits, topk):
    """What a plan with these logits is expected to gain over top-k with those, of every position."""
    p = topk.double().log_softmax(-1)
    q = logits.double().log_softmax(-1)
    return (p.exp() * (q - p)).sum(-1)


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
    assert stats['clipfrac'] == 0
    assert stats['approx_kl'] == 0


def test_group_advantage():
    # minus the mean of the others: 1 - 4, 2 - 3.5, 6 - 1.5
    reward = torch.tensor([[1.0], [2.0], [6.0]])
    assert ppo.group_advantage(reward).tolist() == [[-3.0], [-1.5], [4.5]]


def test_reward_to_go():
    reward = torch.tensor([[[1.0, 2.0, 4.0], [0.0, 4.0, 8.0]]])
    document = torch.tensor([[0, 0, 0], [0, 1, 1]])
    assert ppo.reward_to_go(reward, 0.5, document).tolist() == [[[3.0, 4.0, 4.0], [0.0, 8.0, 8.0]]]
    assert torch.equal(ppo.reward_to_go(reward, 0.0, document), reward)    # the paper's


def test_cost_gradient_is_that_of_the_exact_mean():
    logits = torch.randn(2, 5, 4, requires_grad=True)
    n = torch.arange(1., 5)
    k = ppo.expected_k(logits)
    p = logits.softmax(-1)
    torch.testing.assert_close(k, (p * n).sum(-1))
    got, = torch.autograd.grad(k.sum(), logits)
    torch.testing.assert_close(got, p * (n - k[..., None]))    # softmax's own derivative


# ---------------------------------------------------------------- exact enumeration: two tokens, three k each

FIRST_REWARD = torch.tensor([0.5, 0.1, -0.4])                  # by the k of the first token
NEXT_REWARD = torch.tensor([[-1., -2., .5], [0., 1., -3.], [2., -.5, .3]])          # by those of both


def of_topk(reward):
    return ppo.topk_advantage(reward, torch.tensor([0.1, 1.0]))


@pytest.mark.parametrize('discount', [0.0, 0.5, 1.0])
@pytest.mark.parametrize('advantage', [of_topk, ppo.group_advantage])
def test_mean_gradient_is_exact(advantage, discount):
    """Of two tokens: that of E[r_1 + discount r_2] for the first, of E[r_2] for the second."""
    first = torch.randn(3, requires_grad=True)                 # logits
    second = torch.randn(3, 3, requires_grad=True)             # by the k of the first, which is its state
    plans = list(itertools.product(range(3), range(3)))
    mean = 0                                                   # over all pairs of rollouts, G = 2
    for pair in itertools.product(plans, plans):
        k = 1 + torch.tensor(pair)                                                  # (G,P)
        logits = torch.stack([torch.stack([first, second[a]]) for a, _ in pair])    # (G,P,A)
        reward = torch.tensor([[FIRST_REWARD[a], NEXT_REWARD[a, b]] for a, b in pair])
        credit = ppo.reward_to_go(reward[:, None], discount, torch.zeros(1, 2))
        logp = logp_of(logits, k)
        loss, _ = ppo.ppo_loss(logits, k, logp, advantage(credit[:, 0]), 0.0, 0.2)
        mean = mean + logp.sum().exp() * loss
    p = first.softmax(-1)
    expected_next = (second.softmax(-1) * NEXT_REWARD).sum(-1)                      # by the first k
    of_first = p @ (FIRST_REWARD + discount * expected_next.detach())
    of_second = p.detach() @ expected_next
    found = torch.autograd.grad(mean, [first, second])
    right = torch.autograd.grad(-(of_first + of_second) / 2, [first, second])
    torch.testing.assert_close(found, right)


# ---------------------------------------------------------------- P-Warm

def test_find_mass_brings_the_mean_label_to_the_target():
    probs = (2 * torch.randn(4000, 16)).softmax(-1)
    labels = mass_labels(probs, find_mass(probs, 4))
    assert abs(labels.float().mean() - 4) < .01


# ---------------------------------------------------------------- rewards

def test_reward_of_a_position_is_the_log_prob_of_the_next_token():
    logits = torch.randn(1, 3, 5)
    logp = logits[0].log_softmax(-1)
    right = torch.stack([logp[0, 4], logp[1, 0], logp[2, 2]])
    torch.testing.assert_close(ppo.next_token_logp(logits, torch.tensor([[4, 0, 2]])), right[None])


def test_expected_reward_by_enumeration_and_by_drawing():
    logits, topk = torch.randn(2, 5)
    p, q = topk.softmax(-1), logits.softmax(-1)
    gain = ppo.expected_gain(logits - topk, topk)
    torch.testing.assert_close(gain, (p * (q / p).log()).sum())
    assert ppo.expected_gain(torch.zeros(5), topk) == 0
    # it is the mean of what the plan gains over top-k in the sampled reward, over the model's own next tokens
    tokens = torch.multinomial(p, 200000, replacement=True)
    gained = (q / p).log()[tokens].mean()
    torch.testing.assert_close(gain, gained, atol=.02, rtol=0)


@pytest.mark.parametrize('size', [1e-3, 10])
def test_expected_reward_keeps_its_digits_however_small_the_change(size):
    topk = torch.randn(500, 1000) * 3
    change = torch.randn(500, 1000) * size
    right = gain_in_fp64(topk.double() + change, topk)
    found = ppo.expected_gain(change, topk).double()
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6 * size)


def test_the_reward_of_a_bf16_model_is_that_of_its_states_in_fp64():
    """The noise of logits spaced 0.06 apart would be a thousandth of a nat; what is sought is smaller."""
    model = random_model(tiny_config(n_vocab=2000)).bfloat16()
    h = torch.randn(500, 32).bfloat16()
    hidden = torch.stack([h, h + 0.01 * torch.randn_like(h)])                       # (n,P,C)
    same, found = rewards(model, hidden, torch.zeros(500), True)
    topk, logits = hidden.double() @ model.lm_head.weight.double().T
    right = gain_in_fp64(logits, topk)
    assert (same == 0).all()
    assert (found - right).mean().abs() < 0.02 * right.mean().abs()


def test_expected_reward_of_a_plan_that_ruins_the_prediction_is_finite():
    change = torch.zeros(2, 100)
    change[:, 0] = torch.tensor([1e4, torch.nan])
    ruined, unknown = ppo.expected_gain(change, torch.zeros(100))
    assert -80 < ruined < -70
    assert unknown.isnan()                                     # a NaN of the model stays one


@pytest.mark.parametrize('reward', ['expected', 'sampled'])
def test_rollout_rewards_are_those_of_separate_passes(reward):
    model = random_model(tiny_config())
    s = train.Settings(group=2, reward=reward)
    inputs, targets = torch.randint(50, (2, 3, 8))
    policy = Watched(TopK(2), lambda *decision: None)
    policy.k_max = 3                                           # may run K, does not
    found = train.rollout_reward(s, model, inputs, targets, policy)
    logits, topk = model(inputs, TopK(2)), model(inputs)
    if reward == 'expected':
        right = ppo.expected_gain(logits - topk, topk)
        right_topk = torch.zeros(3, 8)
    else:
        right = ppo.next_token_logp(logits, targets)
        right_topk = ppo.next_token_logp(topk, targets)
    torch.testing.assert_close(found, torch.stack([right_topk, right, right]), rtol=1e-4, atol=1e-4)
