"""allocator.py: who decides how many experts a token runs.

Every policy is a small class with `k_max` and `__call__(layer, x, probs) -> k`, the seam of model.py:
    layer 0..L-1, x (P,C) what the router reads, probs (P,N) its fp32 softmax -> k (P,) int64 in 1..k_max

    TopK         the same k for every token                                     knob: k
    RandomMix    k drawn between two neighbouring integers, blind to content    knob: mean k
    TopP         the least k whose router mass reaches p (Huang et al. 2024)    knob: p
    Skip         drop the tail that is light beside what is kept (Lu et al. 2024, for any top-k)    knob: beta
    AdaK         the trained allocators of the paper (eq. 4, 5)                 knob: price

A knob is calibrated on one split of the text to a wanted mean k (`find_knob`) and reported on another.
"""
import json
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import moe_dispatch
from hub.files import InputError, reading
from hub.safetensors import read_safetensors, write_safetensors


class Policy:
    """What policies share; each brings k_max, the most experts it may choose, and `__call__`, the choice.

    fitted: what was fitted for it, for the model that follows it to run with (run/standins.py:use).
    """
    fitted = {}

    def select(self, probs, k, how):
        """ids, weights and left (P,width) of the experts (moe_dispatch.py:select)."""
        return moe_dispatch.select(probs, k, self.k_max, how)


# ================================================================ rules without training

class TopK(Policy):
    """The same k for every token and layer."""

    def __init__(self, k):
        self.k_max = k

    def __call__(self, layer, x, probs):
        return torch.full((len(x),), self.k_max, device=x.device)


class RandomMix(Policy):
    """floor(mean_k) or one more, drawn so that the mean is mean_k: what a blind saving of that size costs.

    Draws from torch's default generator of the device: torch.manual_seed repeats it.
    """

    def __init__(self, mean_k):
        self.mean_k = mean_k
        self.k_max = math.ceil(mean_k)

    def __call__(self, layer, x, probs):
        high = torch.rand(len(x), device=x.device) < self.mean_k % 1        # (P,) bool
        return int(self.mean_k) + high.long()


class TopP(Policy):
    """The least k with p_1 + .. + p_k >= p, p_i the router's probabilities in falling order.

    Example: (.5, .3, .15, .05) with p = .8 -> 2, with p = .81 -> 3, with p = 1 -> 4.
    """

    def __init__(self, p, n_experts):
        self.p = p
        self.k_max = n_experts

    def __call__(self, layer, x, probs):
        """k (P,) by the probabilities (P,N) of the tokens alone."""
        return mass_labels(probs, self.p)


def mass_labels(probs, p):
    """The least number of experts whose router mass reaches p (eq. 12): probs (P,N) -> (P,) int64 in 1..N."""
    in_order = probs.sort(dim=-1, descending=True).values
    before = in_order.cumsum(-1)[:, :-1]                                    # (P,N-1) mass of the first 1..N-1
    return 1 + (before < p).sum(-1)


class Skip(Policy):
    """Of the model's own K experts keep the least k whose tail weighs at most beta times what is kept.

    k is the least with p_{k+1} + .. + p_K <= beta * (p_1 + .. + p_k); beta is one number, or [L] of them, one
    a layer. For K = 2 this is the published rule: drop the second expert if w_2 <= beta w_1.
    Example: (.4, .3, .2, .1) of K = 4 with beta = .5 -> 2, since .3 <= .5 * .7.
    """

    def __init__(self, beta, top_k):
        self.beta = beta
        self.k_max = top_k

    def __call__(self, layer, x, probs):
        """k (P,) by the probabilities (P,N) of the tokens and the layer's beta."""
        beta = self.beta[layer] if isinstance(self.beta, list) else self.beta
        p = probs.topk(self.k_max, dim=-1).values                           # (P,K)
        return 1 + (tail_ratios(p) > beta).sum(-1)


def tail_ratios(p):
    """(p_{k+1} + .. + p_K) / (p_1 + .. + p_k) for k = 1..K-1: p (P,K) in falling order -> (P,K-1)."""
    kept = p.cumsum(-1)
    tail = kept[:, -1:] - kept[:, :-1]
    return tail / kept[:, :-1]


# ================================================================ the trained allocators

class Allocators(nn.Module):
    """One linear map per MoE layer from what the router sees to a distribution over k (eq. 4): W z + b.

    As published (`extended=False`) z = x and k = 1..N: W is (N,C), without bias. Extended, the default of
    train.py, z is x, the logarithms of the router's sorted probabilities, and those of Skip's ratios, all
    standardised by the `mean` and `std` of a first batch: a map that is linear in x would have to learn again
    what the router knows.

    weight (L,k_max,n_in), bias (L,k_max), mean and std (L,n_in), all fp32; `price` shifts the logits by
    -price * k at inference (`AdaK`), a dial between fewer and more experts.
    """

    def __init__(self, config, k_max, extended):
        super().__init__()
        L = len(config.moe_layers)
        n_in = config.dim
        if extended:
            n_in += config.n_experts + config.top_k - 1
        self.k_max = k_max
        self.extended = extended
        self.top_k = config.top_k
        self.fitted = {}                                       # to them (run/standins.py)
        self.weight = nn.Parameter(torch.zeros(L, k_max, n_in))
        self.bias = nn.Parameter(torch.zeros(L, k_max), requires_grad=extended)
        self.register_buffer('mean', torch.zeros(L, n_in))
        self.register_buffer('std', torch.ones(L, n_in))
        self.register_buffer('price', torch.zeros(()))

    def raw(self, x, probs):
        """What the map reads, not yet standardised, fp32: x (P,C), probs (P,N) -> (P,n_in), a constant."""
        z = x.detach().float()
        if not self.extended:
            return z
        p = probs.detach().sort(dim=-1, descending=True).values             # (P,N)
        ratios = tail_ratios(p[:, :self.top_k])                             # (P,K-1)
        logs = torch.cat([p, ratios], dim=-1).clamp_min(1e-9).log()
        return torch.cat([z, logs], dim=-1)

    def inputs(self, layer, x, probs):
        """z (P,n_in) fp32 of one layer, a constant: no gradient flows into the base model."""
        return (self.raw(x, probs) - self.mean[layer]) / self.std[layer]

    def logits(self, layer, z):
        """Of one layer: z (P,n_in) -> (P,k_max) fp32."""
        return z.float() @ self.weight[layer].T + self.bias[layer]

    def at_price(self, price):
        """The policy that takes the most probable k at this price of an expert."""
        return AdaK(self, price)

    def n_params(self):
        """Trained weights, the number that the paper reports."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def save(self, path, base, **run):
        """Write a safetensors file of the allocators and of what is fitted for them.

        base: the digest of their base model (hub/checkpoint.py); run: what else to remember of the run that
        trained them.
        """
        facts = {
            'k_max': self.k_max,
            'extended': self.extended,
            'base': base,
            'run': run,
        }
        write_safetensors(path, {**self.state_dict(), **self.fitted}, {'allocators': json.dumps(facts)})

    @classmethod
    def load(cls, path, config, base):
        """The allocators in a file; InputError if it is damaged, or was trained for another base model."""
        with reading(path):
            tensors, metadata = read_safetensors(path)
            facts = json.loads(metadata['allocators'])
            if facts['base'] != base:
                raise InputError(f'{path}: trained for another base model than this one')
            allocators = cls(config, facts['k_max'], facts['extended'])
            allocators.run = facts['run']                      # of the run that trained them
            for name, t in tensors.items():
                if not t.isfinite().all():
                    raise InputError(f'{path}: {name} holds NaN or infinity')
            own = {name: tensors.pop(name) for name in allocators.state_dict()}
            allocators.load_state_dict(own)
            allocators.fitted = tensors
        return allocators


class AdaK(Policy):
    """k by trained allocators: the most probable k. `Rollout` draws from the distribution (eq. 5).

    One linear map a layer: standardising and the price are made part of its weights once, at the start.
    """

    @torch.no_grad()
    def __init__(self, allocators, price=None):
        a = allocators
        self.allocators = a
        self.k_max = a.k_max
        self.fitted = a.fitted
        self.price = a.price if price is None else price
        k = torch.arange(1, a.k_max + 1, device=a.weight.device)
        weight = a.weight / a.std[:, None]                                  # (L,k_max,n_in)
        of_mean = torch.einsum('lkn,ln->lk', weight, a.mean)                # (L,k_max)
        bias = a.bias - k * self.price - of_mean                            # (L,k_max)
        self.maps = list(zip(weight, bias))

    def __call__(self, layer, x, probs):
        weight, bias = (t.to(x.device) for t in self.maps[layer])
        self.maps[layer] = weight, bias                        # each stays where its layer is
        logits = F.linear(self.allocators.raw(x, probs), weight, bias)      # (P,k_max)
        return 1 + logits.argmax(-1)


def sample_k(logp, noise):
    """k (P,) drawn from logp (P,A) by noise (P,) in [0,1): the least k whose cumulative exceeds it."""
    cumulative = logp.exp().cumsum(-1)[:, :-1]                         # (P,A-1); A takes what rounding leaves
    return 1 + (cumulative <= noise[:, None]).sum(-1)


class Rollout(Policy):
    """Samples k from the allocators and keeps what PPO needs: of P tokens, in one forward pass or several.

    noise (L,P), uniform in [0,1), decides: its owner knows which token gets which number, however the tokens
    are cut into passes. `drawn` holds of each layer [(z, k, logp), ..], one of every pass: z (tokens,n_in) in
    the model's dtype, k (tokens,), and the log-probability of each k when it was drawn.
    """

    def __init__(self, allocators, noise):
        self.allocators = allocators
        self.noise = list(noise)                               # of each layer, what is left of it
        self.k_max = allocators.k_max
        self.drawn = [[] for _ in noise]

    def __call__(self, layer, x, probs):
        z = self.allocators.inputs(layer, x, probs).to(x.dtype)             # (tokens,n_in)
        logp = F.log_softmax(self.allocators.logits(layer, z), dim=-1)      # (tokens,k_max)
        noise, self.noise[layer] = self.noise[layer].tensor_split([len(x)])
        k = sample_k(logp, noise)                                           # (tokens,)
        self.drawn[layer].append((z, k, logp.gather(1, k[:, None] - 1).squeeze(1)))
        return k


# ================================================================ looking on, and calibrating

class Watched(Policy):
    """A policy with an onlooker: look(layer, x, probs, k) is called with every decision."""

    def __init__(self, policy, look):
        self.policy = policy
        self.look = look
        self.k_max = policy.k_max

    def __call__(self, layer, x, probs):
        k = self.policy(layer, x, probs)
        self.look(layer, x, probs, k)
        return k


class Counted(Watched):
    """A policy with a tally: `counts` (L,k_max+1) how often each k was chosen in each layer of the model."""

    def __init__(self, policy, model):
        super().__init__(policy, self.count)
        L = len(model.config.moe_layers)
        self.counts = torch.zeros(L, policy.k_max + 1, dtype=torch.long, device=model.device)

    def count(self, layer, x, probs, k):
        self.counts[layer].scatter_add_(0, k, torch.ones_like(k))

    def mean_by_layer(self):
        """(L,)"""
        counts = self.counts.cpu()
        return counts @ torch.arange(self.k_max + 1) / counts.sum(1)

    def mean(self):
        return self.mean_by_layer().mean().item()

    def mean_left(self, top_k):
        """How many of its top_k experts a token does not run, on average."""
        counts = self.counts.cpu().sum(0)                                   # (k_max+1,)
        left = (top_k - torch.arange(self.k_max + 1)).clamp_min(0)
        return (counts @ left / counts.sum()).item()


def find_knob(mean_k, target, low, high, most):
    """The knob in low..high at which mean_k(knob), rising from 1 to `most`, comes nearest to target.

    Within 0.2% or after 20 tries, by false position: a straight line through the nearest knobs on both sides,
    where an end that stays counts half (Illinois). `low` may be the larger number: AdaK runs more experts the
    smaller its price is. A target out of reach gives an end.
    """
    too_few = 1 - target
    too_many = most - target
    if too_few >= 0:
        return low
    if too_many <= 0:
        return high
    misses = {}                                                # of all knobs that were tried
    for _ in range(20):
        knob = low + (high - low) * too_few / (too_few - too_many)
        miss = mean_k(knob) - target
        misses[knob] = abs(miss)
        if abs(miss) < 2e-3 * target:
            break
        if miss > 0:
            high, too_many = knob, miss
            too_few /= 2
        else:
            low, too_few = knob, miss
            too_many /= 2
    return min(misses, key=misses.get)
