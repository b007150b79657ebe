"""ppo.py: the training of the allocators as pure functions: tensors in, a loss and its statistics out.

The trajectory of one token is its L decisions k_1 .. k_L, one per MoE layer; depth is the time axis. The
reward comes once, after the last layer: the log-probability that the frozen model gives the token (eq. 6).
The state of a decision does not depend on the allocators' weights within an epoch, so nothing here runs the
language model.

    L layers with a router, P tokens (positions with a reward), G rollouts of the same tokens, A = k_max
    actions logits (L,P,A), k (L,P) int64 in 1..A, logp (L,P) log pi(k|state), adv (L,P) or (P,) in nats
"""
import torch
import torch.nn.functional as F

from allocator import mass_labels


# ================================================================ reward and advantage (eq. 6, 9)

def next_token_logp(logits, targets):
    """The reward: log-probability in nats of each target token. logits (B,T,V), targets (B,T) -> (B,T) fp32.

    subtle: k at position t changes the prediction of token t+1, so `targets` is the text shifted by one.
    """
    nats = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction='none')
    return -nats.view(targets.shape)


def expected_gain(logits, logits_topk):
    """The reward without its luck: log p(token) - log p_topk(token) in nats, expected under p_topk itself.

    That is -KL(p_topk || p): what the plan does to the whole prediction, not only to the one token that came.
    For a calibrated model its mean is that of the difference of `next_token_logp`; the variance is far
    smaller. logits (..,V) and logits_topk broadcasting to them -> (..) fp32, exactly 0 where they are equal.

    subtle: -log E[exp(change - E change)] makes a small number of small numbers. A difference of two log p of
    some nats each would carry their rounding, which depends on how tokens are cut into passes.
    """
    p = F.softmax(logits_topk.float(), -1)                                      # (..,V)
    change = logits.float() - logits_topk.float()
    change = change - (p * change).sum(-1, keepdim=True)
    return -(p * change.clamp(max=80).expm1()).sum(-1).log1p()                  # e^80 does not overflow


def reward_to_go(reward, discount):
    """Credit over time: r_t + discount r_{t+1} + discount^2 r_{t+2} + .. within a sequence, (..,T) -> (..,T).

    Beyond eq. 6-9, which are discount 0: through attention the k of a token changes what is predicted at
    later tokens too, a quarter to a half of what an expert is worth. With discount 1 the expected gradient is
    that of the whole sequence's reward; below 1 it gives up some of it for less noise, that of the later
    tokens' own decisions. The price keeps its meaning, nats per expert, where the nats now count at later
    tokens too. Example: (1, 2, 4) with discount .5 -> (1 + 1 + 1, 2 + 2, 4) = (3, 4, 4).
    """
    t = torch.arange(reward.shape[-1], device=reward.device)
    ahead = t[:, None] - t                                              # (T,T): of r_u in the sum of t, u - t
    weight = torch.where(ahead >= 0, float(discount) ** ahead.clamp_min(0), 0.0)
    return reward @ weight.to(reward.dtype)


def topk_advantage(logp, logp_topk, gamma=1.0, n_layers=1):
    """The published advantage (eq. 9): A_l = gamma^(L-l) (log p under the sampled k - log p under top-k).

    logp, logp_topk (P,) -> (L,P), L = n_layers. Exactly 0 for a token whose sampled plan is top-k.
    """
    discount = gamma ** torch.arange(n_layers - 1, -1, -1, device=logp.device)  # (L,) 1 for the last layer
    return discount[:, None] * (logp - logp_topk)


def group_advantage(logp):
    """Reward minus the mean reward of the other rollouts of the same token: (..,G,P) -> (..,G,P), G >= 2.

    A token's own difficulty, by far the largest part of the reward, cancels; the others' mean does not depend
    on this rollout's choices, so the gradient stays unbiased. Example: rewards -1 and -3 -> advantages 2 and
    -2.
    """
    G = logp.shape[-2]
    return (logp - logp.mean(-2, keepdim=True)) * G / (G - 1)


# ================================================================ PPO (eq. 7, 8) and the price of experts
# (eq. 10, 11)

def clipped_loss(logp, logp_old, adv, eps):
    """PPO's clipped surrogate (eq. 7, 8), mean over layers and tokens, a ratio a decision -> loss, stats."""
    logratio = logp - logp_old                                                  # (L,P)
    ratio = logratio.exp()
    loss = -torch.min(ratio * adv, ratio.clamp(1 - eps, 1 + eps) * adv).mean()
    with torch.no_grad():
        stats = {'approx_kl': (ratio - 1 - logratio).mean().item(),
                 'clipfrac': ((ratio - 1).abs() > eps).float().mean().item()}
    return loss, stats


def expected_k(logits):
    """sum_n n P(n), the exact mean of k under the policy: (..,A) -> (..)."""
    n = torch.arange(1, logits.shape[-1] + 1, device=logits.device, dtype=logits.dtype)
    return F.softmax(logits, -1) @ n


def ppo_loss(logits, k, logp_old, adv, price, eps, entropy_bonus=0.0):
    """The objective: clipped surrogate + price * expected k (eq. 11) - entropy bonus. Returns loss, stats.

    `price` is in nats per expert and layer: an expert is worth running if it buys at least that. The cost is
    an exact expectation, not sampled (eq. 10), so it adds no variance. Advantages are not divided by their
    standard deviation: that would change the price silently.
    """
    logp_all = F.log_softmax(logits, -1)                                        # (L,P,A)
    logp = logp_all.gather(-1, (k - 1).unsqueeze(-1)).squeeze(-1)               # (L,P)
    surrogate, stats = clipped_loss(logp, logp_old, adv, eps)
    mean_k = expected_k(logits).mean()
    entropy = -(logp_all.exp() * logp_all).sum(-1).mean()
    loss = surrogate + price * mean_k - entropy_bonus * entropy
    stats.update(loss=loss.item(), mean_k=mean_k.item(), entropy=entropy.item())
    return loss, stats


# ================================================================ P-Warm (eq. 12, 13)

def find_mass(probs, target):
    """p*: the router mass whose mean label is nearest to `target` experts (eq. 12). probs (P,N) -> 0..1."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        above = mass_labels(probs, middle).float().mean() > target
        low, high = (low, middle) if above else (middle, high)
    return low


def warm_loss(logits, labels):
    """Cross-entropy against the pseudo-labels k = 1..A (eq. 13): logits (..,A), labels (..) -> scalar."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten() - 1)
