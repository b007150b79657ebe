"""run/rules.py: expert skipping calibrated in three ways, the best rules that need no training.

    one beta     the same beta in every layer
    per layer    a beta per layer, all layers keep the same share of experts: as published (Lu et al. 2024)
    greedy       a beta per layer; the layer whose experts are worth least gives up the next of them

Each is a family of policies with one knob, mean k. Which is best is measured on training text by the loss
expected under the top-k prediction (run/evaluate.py), without the luck of the text.
"""
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F

from allocator import RandomMix, Skip, TopK, TopP, Watched, tail_ratios
from run.console import Progress
from run.evaluate import by_parts, calibrate, evaluate, rewards
from scale.memory import sequences_of_pass

STEPS = 8               # `greedy` takes steps of about K / STEPS experts
SEARCH_TOKENS = 8192    # its steps are measured on
FAMILIES = 'one beta', 'per layer', 'greedy'


class SkipFamilies:
    """The three families for one model, measured once, on windows of training text."""

    def __init__(self, model, windows):
        self.model = model
        self.K = model.config.top_k
        self.L = len(model.config.moe_layers)
        self.windows = windows

        def ratios(layer, x, probs):
            return tail_ratios(probs.topk(self.K).values)
        # of every layer and token, under the model's own top-k
        self.tails = torch.stack(look(model, windows[0], ratios)).cpu()     # (L,P,K-1)
        n_steps = round(STEPS * (self.K - 1) / self.K)
        self.levels = np.linspace(self.K, 1, n_steps + 1)
        # both measure once for every mean k
        self.steps_down = cache(self.steps_down)
        self.best_family = cache(self.best_family)

    def policy(self, family, mean_k, around=None):
        """A Skip whose mean k is near mean_k, of one of FAMILIES, or of the best of them: 'skip'.

        around: the mean k at which it is the best, and of the other layers while `greedy` measures one; by
        default mean_k.
        """
        around = around or mean_k
        if family == 'skip':
            family = self.best_family(around)
        if family == 'one beta':
            together = self.tails.flatten(0, 1)                             # (L*P,K-1)
            return Skip(self.L * betas_at([together], [mean_k]), self.K)
        shares = [mean_k] * self.L
        if family == 'greedy' and self.K > 1:
            shares = self.greedy_shares(mean_k, around)
        return Skip(betas_at(self.tails, shares), self.K)

    def greedy_shares(self, mean_k, around):
        """The mean k of each layer, on average mean_k.

        All layers start at K; the cheapest next step of any layer is taken until the mean is reached, the
        last one in part.
        """
        steps = self.steps_down(around)
        size = self.levels[0] - self.levels[1]                 # of a step, in experts
        taken = [0] * self.L
        left = self.L * (self.K - mean_k) / size               # steps to take
        while left > 1e-9:
            layer = min(range(self.L), key=lambda layer: steps[layer][taken[layer]])
            taken[layer] += min(1, left)
            left -= 1
        return [self.K - size * n for n in taken]

    def steps_down(self, around):
        """Of every layer [what its steps from K down to 1 cost in nats, the others at `around`; then inf]."""
        policies = [self.policy('per layer', mean_k) for mean_k in (around, *self.levels)]
        apart = max(1, self.windows[0].numel() // SEARCH_TOKENS)
        # cut if they are long: the states of all levels of all layers are in memory
        windows = [part[::apart, :SEARCH_TOKENS] for part in self.windows]
        n, T = windows[0].shape
        few = max(1, sequences_of_pass(T) // self.L)
        progress = Progress('greedy shares')
        done = 0

        def of_part(inputs, targets):
            nonlocal done
            hidden = self.varied(inputs, *policies)
            done += few
            progress(min(done, n), n)
            return -rewards(self.model, hidden, targets.flatten(), expected=True)[1:]
        nats = by_parts(self.model, windows, few, of_part).mean(1)          # (L*levels,)
        steps = nats.view(self.L, -1).diff()
        return F.pad(steps, (0, 1), value=torch.inf).tolist()

    def varied(self, tokens, around, *levels):
        """Last states of tokens (B,T) under top-k, and with each layer at every level, the others `around`.

        In one sweep over the layers: those before the one that is varied are not run again for it.
        -> (1+L*levels,B*T,C)
        """
        model = self.model
        x = model.embed_tokens(tokens)                                      # (B,T,C) with no layer varied yet
        positions = model.positions(tokens.shape[1])
        top_k = x
        others = []
        for layer in model.visit():
            top_k = layer(top_k, positions, None, None)
            others = [layer(other, positions, None, around) for other in others]
            if not layer.dense:
                others += [layer(x, positions, None, level) for level in levels]
            x = layer(x, positions, None, around)
        return model.norm(torch.stack([top_k, *others])).flatten(1, 2)

    def costs(self, policies):
        """[(nats per token that a policy costs, its mean k), ..]"""
        found = evaluate(self.model, self.windows, policies, expected=True)
        return [(nats.mean().item(), tally.mean()) for nats, tally in found]

    def best_family(self, mean_k):
        """The name of the family whose Skip at mean_k costs least."""
        policies = [self.policy(family, mean_k) for family in FAMILIES]
        costs = self.costs(policies)
        best = FAMILIES[costs.index(min(costs))]
        print(f'expert skipping at mean k {mean_k:.2f}: {best}')
        return best

    def worth_of_an_expert(self, mean_k):
        """What one expert more buys around mean_k, in nats per expert and layer."""
        fewer = self.policy('per layer', 0.95 * mean_k)
        more = self.policy('per layer', min(1.05 * mean_k, self.K))
        (dear, few), (cheap, many) = self.costs([fewer, more])
        return (dear - cheap) / (many - few) / self.L

    def rule_at(self, name, mean_k, around=None):
        """The rule of this name, its knob set to mean_k on self.windows by real passes.

        name: random-mix, top-p, or a family as for `policy`, as is around.
        """
        if name == 'random-mix':
            return RandomMix(mean_k)
        if name == 'top-p':
            low = 0
            high = 1
            policy_of = partial(TopP, n_experts=self.model.config.n_experts)
        else:
            low = 1
            high = self.K
            policy_of = partial(self.policy, name, around=around or mean_k)
        return calibrate(self.model, self.windows, policy_of, mean_k, low, high)


@torch.no_grad()
def look(model, inputs, see):
    """[see(layer, x (P,C), probs (P,N)) of each MoE layer], all tokens of inputs (B,T) at once, P = B*T.

    Under the model's own top-k, in one sweep over the layers.
    """
    T = inputs.shape[1]
    positions = model.positions(T)
    states = [model.embed_tokens(part) for part in inputs.to(model.device).split(sequences_of_pass(T))]
    found = []
    for layer in model.visit():
        seen = []
        policy = Watched(TopK(model.config.top_k), lambda *decision: seen.append(decision))
        states = [layer(x, positions, None, policy) for x in states]        # (few,T,C) each
        if seen:                                               # not a dense layer
            _, x, probs, _ = zip(*seen)                        # of all passes
            found.append(see(len(found), torch.cat(x), torch.cat(probs)))
    return found


def betas_at(ratios, mean_k):
    """The beta of each layer with which Skip keeps mean_k[l] experts: ratios (L,P,K-1), mean_k [L] -> [L].

    Skip keeps 1 + the number of ratios above beta, so beta is an order statistic. Example: 4 tokens of K = 2
    with ratios .9 .5 .3 .1 and mean_k 1.5: two of them must lie above beta -> .3.
    """
    betas = []
    for layer, k in zip(ratios, mean_k):
        falling = layer.flatten().sort(descending=True).values              # (P*(K-1),)
        falling = F.pad(falling, (0, 1))                       # beta 0 keeps all K
        above = round(max(k - 1, 0) * len(layer))
        betas.append(falling[above].item())
    return betas
