"""study/policies.py: policies that only studies use, and learning without RL.

    PerLayer       RandomMix for every layer apart                          knobs: mean k of each layer
    EntropyBands   the more experts the higher the entropy of the router    knob: scale
    Sampled        k drawn from the allocators as in training, not the most probable
    SoftMixture    every k at once, weighted: the allocators can then be learnt by backpropagation
"""
import math

import torch
import torch.nn.functional as F

import ppo
from allocator import AdaK, RandomMix, Skip, TopK, TopP, sample_k
from hub.files import InputError
from run.console import Progress


class PerLayer:
    """One mean k per layer, blind to content within it: `RandomMix` for every layer apart."""

    def __init__(self, mean_k):
        self.layers = [RandomMix(k) for k in mean_k]
        self.k_max = max(mix.k_max for mix in self.layers)

    def __call__(self, layer, x, probs):
        return self.layers[layer](layer, x, probs)


class EntropyBands:
    """k = scale * exp(H), rounded, in 1..k_max: exp(H) is the effective number of experts, H in nats.

    The bands of H lie between log((k - 1/2) / scale) and log((k + 1/2) / scale).
    Example: the uniform (1/4, 1/4, 1/4, 1/4) has exp(H) = 4; with scale .5 -> 2; a sure (1, 0, 0, 0) -> 1.
    """

    def __init__(self, scale, k_max):
        self.scale, self.k_max = scale, k_max

    def __call__(self, layer, x, probs):
        effective = torch.special.entr(probs).sum(-1).exp()                 # (P,)
        return (self.scale * effective).round().long().clamp(1, self.k_max)


class Sampled(AdaK):
    """k drawn from the allocators as in training, instead of the most probable."""

    @torch.no_grad()
    def __call__(self, layer, x, probs):
        logits = self.allocators.logits(layer, self.allocators.inputs(layer, x, probs))
        return sample_k(F.log_softmax(logits, -1), torch.rand(len(x), device=x.device))


# ---------------------------------------------------------------- without RL

SOFT_LR = 3e-2
DECISIVE = 3e-4         # price of entropy at the end, nats: a mixture must become a choice


class SoftMixture:
    """Every token runs k_max experts, and its output is the mean over k of what k experts would give.

    y = sum_k pi_k y_k with pi from the allocators, so backpropagation through the model reaches them. One
    object per pass; after it `pi` is (L,P,k_max). Costs what k_max experts cost, both ways; for inference
    take `AdaK`.
    """

    def __init__(self, allocators):
        self.allocators, self.k_max, self.steps = allocators, allocators.k_max, []

    def __call__(self, layer, x, probs):
        logits = self.allocators.logits(layer, self.allocators.inputs(layer, x, probs))
        self.steps.append(F.softmax(logits, -1))
        return torch.full((len(x),), self.k_max, device=x.device)

    def select(self, probs, k, k_max, renormalise):
        """ids and weights (P,k_max): expert j gets p_j * sum over k >= j of pi_k / (p_1 + .. + p_k).

        Without `renormalise` of pi_k alone.
        """
        p, ids = probs.topk(k_max, dim=-1)
        share = self.steps[-1] / p.cumsum(-1) if renormalise else self.steps[-1]
        return ids, p * share.flip(-1).cumsum(-1).flip(-1)

    @property
    def pi(self):
        return torch.stack(self.steps)


def train_soft(s, model, allocators, text, steps, price, price_rate):
    """The comparison without RL: the same start, objective and price, learnt through `SoftMixture`; in place.

    s: the run's Settings; price in nats per expert and layer, moved as in train.py:ppo_step.
    """
    c = model.config
    batches = text.batches(s.ppo_batch, s.seq, torch.Generator().manual_seed(s.seed + 1))
    optimizer = torch.optim.AdamW(allocators.parameters(), SOFT_LR)
    L, progress = len(c.moe_layers), Progress('soft mixture', steps)
    n = torch.arange(1.0, allocators.k_max + 1, device=s.device)            # (A,)
    for step in range(1, steps + 1):
        inputs, targets = (z.to(s.device) for z in next(batches))           # (B,T) both
        with torch.no_grad():
            logits_topk = model(inputs)                                     # (B,T,V)
        mixture = SoftMixture(allocators)
        logits = model(inputs, mixture)
        if s.reward == 'expected':
            reward = ppo.expected_gain(logits, logits_topk)                 # (B,T)
        else:
            reward = ppo.next_token_logp(logits, targets)
        pi = mixture.pi                                                     # (L,P,A)
        mean_k, entropy = (pi @ n).mean(), torch.special.entr(pi).sum(-1).mean()
        decisive = DECISIVE * min(1, 2 * step / steps)
        loss = -reward.mean() + L * (price * mean_k + decisive * entropy)
        optimizer.param_groups[0]['lr'] = SOFT_LR * (1 - (step - 1) / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        argmax_k = (1 + pi.argmax(-1)).float().mean().item()
        price *= math.exp(price_rate * (argmax_k - s.budget * c.top_k) / c.top_k)
        progress(step, step * inputs.numel(), loss=loss.item(), argmax_k=argmax_k, price=price)


# ---------------------------------------------------------------- policies by name

POLICIES = 'ada-k, top-k, k=2, mix=1.5, top-p=0.4, skip=0.5'


def make_policy(name, config, run, device):
    """The policy that `--policy` names; `run` has the allocators of 'ada-k'. InputError if it is none."""
    kind, _, knob = name.partition('=')
    N, K = config.n_experts, config.top_k
    if name == 'top-k':
        return TopK(K)
    if name == 'ada-k':
        if not run:
            raise InputError('--policy ada-k: give the trained run with --run FOLDER')
        return AdaK.of_run(run, config, device)
    try:
        value = float(knob)
    except ValueError:
        value = math.nan                                       # in no range
    if kind == 'k' and value in range(1, N + 1):
        return TopK(int(value))
    if kind == 'mix' and 1 <= value <= N:
        return RandomMix(value)
    if kind == 'top-p' and 0 < value <= 1:
        return TopP(value, N)
    if kind == 'skip' and value >= 0:
        return Skip(value, K)
    raise InputError(f'--policy {name}: use ada-k, top-k, k=1..{N}, mix=1..{N}, top-p=0..1, or skip=0..')
