"""ppo.py: the training of the allocators as pure functions: tensors in, a loss and its statistics out.

A token passes through L layers with a router, and in each an allocator decides its k: these L decisions, one
after the other, are the trajectory of that token. The reward comes once, after the last layer: how well the
frozen language model then predicts the next token (eq. 6).

PPO asks of every decision whether it did better than expected (the advantage), makes what did better more
probable, and takes no step further than the clip allows, since its samples come from the policy before the
step (eq. 7, 8). Experts have a price, so that a decision for more of them must be worth it (eq. 10, 11).
What an allocator reads does not depend on its own weights, so nothing here runs the language model.

    L layers with a router, P tokens (positions with a reward), G rollouts of the same tokens
    A = k_max actions of a decision: 1..A experts
    logits (L,P,A), k (L,P) int64 in 1..A, logp (L,P) log pi(k|state), adv (L,P) or (P,) in nats
"""
import torch
import torch.nn.functional as F


# ================================================================ reward and advantage (eq. 6, 9)

def next_token_logp(logits, targets):
    """The published reward: log-probability in nats of each target token, fp32.

    logits (..,T,V), targets (..,T) -> (..,T).
    subtle: k at position t changes the prediction of token t+1, so `targets` is the text shifted by one.
    """
    logp = F.log_softmax(logits.float(), dim=-1)                                # (..,T,V)
    return logp.gather(-1, targets[..., None]).squeeze(-1)


def expected_gain(change, logits_topk):
    """The default reward, at most 0: a plan can be as good as top-k here, and never better.

    log p(token) - log p_topk(token) in nats, not of the one token that came but expected under p_topk. That
    is -KL(p_topk || p): how far the plan moves the whole prediction. For a calibrated model its mean is that
    of the difference of `next_token_logp`, without the luck of the text, so its variance is far smaller.
    change (..,V): the plan's logits minus those of top-k; logits_topk broadcasting to it -> (..) fp32,
    exactly 0 where nothing changes.

    subtle: -log E[exp(change - E change)] makes a small number of small numbers. A difference of two log p of
    some nats each would carry their rounding error, a thousandth of a nat in bfloat16: more than what is
    sought.
    """
    p = F.softmax(logits_topk.float(), dim=-1)                                  # (..,V)
    change = change.float()
    change = change - (p * change).sum(-1, keepdim=True)
    growth = change.clamp(max=80).expm1()                                       # e^80 does not overflow
    return -(p * growth).sum(-1).log1p()


def reward_to_go(reward, discount, document):
    """Credit over time: r_t + discount r_{t+1} + discount^2 r_{t+2} + .., up to the end of the document.

    reward (G,B,T); document (B,T), the number of the document that each rewarded token belongs to -> (G,B,T).

    Beyond eq. 6-9, which are discount 0: through attention the k of a token changes what is predicted at
    later tokens too, a quarter to a half of what an expert is worth. With discount 1 the expected gradient is
    that of the whole sequence's reward; below 1 it misses some of it and has less noise, which comes from
    the later tokens' own decisions. Example: (1, 2, 4) with discount .5 -> (1 + 1 + 1, 2 + 2, 4) = (3, 4, 4).
    """
    credit = reward.clone()
    same = document[:, 1:] == document[:, :-1]                                  # (B,T-1)
    carry = discount * same                                                     # (B,T-1)
    for t in reversed(range(carry.shape[1])):
        credit[..., t] += carry[:, t] * credit[..., t + 1]
    return credit


def topk_advantage(reward, reward_topk):
    """The published advantage (eq. 9), gamma = 1: the sampled plan's reward minus that of top-k, (P,) each.

    gamma below 1 would make the shallow layers' experts cheaper, since their price is not discounted.
    """
    return reward - reward_topk


def group_advantage(reward):
    """Reward minus the mean reward of the other rollouts of the same token: (..,G,P) -> (..,G,P), G >= 2.

    A token's own difficulty, by far the largest part of the reward, cancels; the others' mean does not depend
    on this rollout's choices, so the gradient stays unbiased. Example: rewards -1, -3 -> advantages 2, -2.
    """
    G = reward.shape[-2]
    return (reward - reward.mean(-2, keepdim=True)) * G / (G - 1)


# ================================================================ PPO (eq. 7, 8), the price (eq. 10, 11)

def clipped_loss(logp, logp_old, adv, eps):
    """PPO's clipped surrogate (eq. 7, 8), a ratio a decision; mean over layers and tokens -> loss, stats."""
    logratio = logp - logp_old                                                  # (L,P)
    ratio = logratio.exp()
    clipped = ratio.clamp(1 - eps, 1 + eps)
    loss = -torch.min(ratio * adv, clipped * adv).mean()
    approx_kl = (ratio - 1 - logratio).mean()
    clipfrac = ((ratio - 1).abs() > eps).float().mean()
    return loss, {'approx_kl': approx_kl, 'clipfrac': clipfrac}


def expected_k(logits):
    """sum_n n P(n), the exact mean of k under the policy: (..,A) -> (..)."""
    n = torch.arange(1, logits.shape[-1] + 1).to(logits)                        # (A,)
    return F.softmax(logits, dim=-1) @ n


def ppo_loss(logits, k, logp_old, adv, price, eps, entropy_bonus=0.0):
    """The objective: clipped surrogate + price * expected k (eq. 11) - entropy bonus -> loss, stats.

    `price` is in nats per expert and layer: an expert is worth running if it buys at least that. The cost is
    an exact expectation, not sampled (eq. 10), so it adds no variance. Advantages are not divided by their
    standard deviation: that would change the price silently.
    """
    logp_all = F.log_softmax(logits, dim=-1)                                    # (L,P,A)
    logp = logp_all.gather(-1, (k - 1).unsqueeze(-1)).squeeze(-1)               # (L,P)
    surrogate, stats = clipped_loss(logp, logp_old, adv, eps)
    mean_k = expected_k(logits).mean()
    entropy = -(logp_all.exp() * logp_all).sum(-1).mean()
    loss = surrogate + price * mean_k - entropy_bonus * entropy
    stats.update(loss=loss, mean_k=mean_k, entropy=entropy)
    return loss, stats
