"""run/rules.py: expert skipping calibrated in three ways, the best rules that need no training.

    one beta     the same beta in every layer
    per layer    a beta per layer, all layers keep the same share of experts: as published (Lu et al. 2024)
    greedy       a beta per layer; the layer whose experts buy the least gives up the next share of them

Each is a family of policies with one knob, mean k. Which is best is measured on the calibration split by the
divergence from the Top-K prediction (ppo.py:expected_gain): the expected loss, without the luck of the text.
"""
import numpy as np
import torch

from allocator import Skip, TopK, Watched, bisect, tail_ratios
from run.evaluate import divergences

LEVELS = 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25   # of K: what the search of shares tries in every layer
SEARCH_TOKENS = 8192
FAMILIES = 'one beta', 'per layer', 'greedy'


class SkipFamilies:
    """The three families for one model: tails looked up and shares searched once, on the calibration split.

    calibration: a Text; seq: T. `policy(family, mean_k)` makes a Skip whose mean k is near mean_k.
    """

    def __init__(self, model, calibration, seq):
        self.model, self.K, self.L = model, model.config.top_k, len(model.config.moe_layers)
        self.windows = calibration.windows(seq, SEARCH_TOKENS)
        self.tails = tails(model, self.windows[0])                          # (L,P,K-1)
        self.curves = {}                                   # of `greedy`, by the mean k it was searched around

    def policy(self, family, mean_k):
        if family == 'one beta' or self.K == 1:                # K = 1 leaves nothing to skip
            together = self.tails.flatten(0, 1)[None]                       # (1,L*P,K-1)
            return Skip(betas_at(together, [mean_k])[0], self.K)
        shares = [mean_k] * self.L
        if family == 'greedy':
            shares = self.greedy_shares(mean_k)
        return Skip(betas_at(self.tails, shares), self.K)

    def greedy_shares(self, mean_k):
        """The mean k of each layer, on average mean_k: where a greedy search in ever smaller steps ends.

        There the next bit of an expert costs every layer the same: k_l(cost) is read off each layer's curve,
        and one cost is found for all.
        """
        around = neighbourhood(mean_k, self.K) * self.K        # one search serves all of it
        if around not in self.curves:
            self.curves[around] = [marginal_costs(points) for points in self.costs(around)]

        def shares(cost):
            return [float(np.interp(cost, costs, k)) for costs, k in self.curves[around]]
        low = min(costs[0] for costs, _ in self.curves[around])
        high = max(costs[-1] for costs, _ in self.curves[around])
        return shares(bisect(lambda cost: np.mean(shares(cost)), mean_k, high, low, 40))

    def costs(self, around):
        """[[(mean k, divergence), ..] of each layer at LEVELS of K], the other layers at the equal share."""
        costs, levels = [], sorted({max(1.0, level * self.K) for level in LEVELS}, reverse=True)
        for layer in range(self.L):
            policies = []
            for k in levels:
                shares = [around] * self.L
                shares[layer] = k
                policies.append(Skip(betas_at(self.tails, shares), self.K))
            found = divergences(self.model, self.windows, policies)
            costs.append([(k, nats.mean().item()) for k, (nats, _) in zip(levels, found)])
        return costs


def neighbourhood(mean_k, K):
    """The tenth of K around which `greedy_shares` searches for mean_k."""
    return round(mean_k / K, 1)


@torch.no_grad()
def tails(model, inputs):
    """Skip's ratios of every layer and token under the model's own top-k: inputs (B,T) -> (L,B*T,K-1)."""
    seen, K = [], model.config.top_k

    def look(layer, x, probs, k):
        seen.append(tail_ratios(probs.topk(K, dim=-1).values))
    model.hidden(inputs.to(model.device), Watched(TopK(K), look))
    return torch.stack(seen)


def betas_at(ratios, mean_k):
    """The beta of each layer with which Skip keeps mean_k[l] experts: ratios (L,P,K-1), mean_k [L] -> [L].

    Skip keeps 1 + the number of ratios above beta, so beta is an order statistic. Example: 4 tokens of K = 2
    with ratios .9 .5 .3 .1 and mean_k 1.5: two of them must lie above beta -> .3.
    """
    P, betas = ratios.shape[1], []
    for layer, k in zip(ratios, mean_k):
        falling = layer.flatten().sort(descending=True).values              # (P*(K-1),)
        above = round((k - 1) * P)
        betas.append(falling[above].item() if above < len(falling) else 0.0)
    return betas


def marginal_costs(points):
    """(costs, k) of one layer: what the next bit of an expert costs, in nats per expert, where k are left.

    points: [(mean k, divergence), ..], k falling. Costs stand at the middles of the steps, 0 at the first k,
    and are made to rise as k falls, as a search that takes the cheapest step first would meet them. Example:
    (2, 0), (1.5, .1), (1, .4) -> costs 0, .2, .6, .8 at k 2, 1.75, 1.25, 1.
    """
    k, nats = np.array(points).T
    costs = np.diff(nats) / -np.diff(k)
    costs = np.concatenate([[0], costs, [1.5 * costs[-1] - 0.5 * costs[-2]]])
    return np.maximum.accumulate(costs), np.concatenate([k[:1], (k[1:] + k[:-1]) / 2, k[-1:]])


def best_family(families, windows, mean_k):
    """The name of the family whose Skip at mean_k diverges least from Top-K on `windows`."""
    found = divergences(families.model, windows, [families.policy(family, mean_k) for family in FAMILIES])
    return min(zip(found, FAMILIES), key=lambda pair: pair[0][0].mean().item())[1]


def worth_of_an_expert(families, mean_k):
    """What one expert more buys around mean_k, in nats per expert and layer."""
    policies = [families.policy('per layer', min(share * mean_k, families.K)) for share in (0.95, 1.05)]
    few, many = divergences(families.model, families.windows, policies)
    saved = few[0].mean().item() - many[0].mean().item()
    return saved / (many[1].mean() - few[1].mean()) / families.L
