"""run/start.py: the allocators as PPO starts with them.

'skip' (the default) is expert skipping at the budget, exactly: the best of the families of run/rules.py on
training text; 'one beta', 'per layer' and 'greedy' are those families by name; 'p-warm' (published,
eq. 12, 13) imitates a Top-P rule at K by supervised learning; 'random' knows nothing.
"""
import torch
import torch.nn.functional as F

from allocator import find_knob, mass_labels
from run.console import Progress
from run.rules import SkipFamilies, look
from run.standins import fit_eta, refit, target_k
from scale.memory import empty_allocators

SHARPNESS = 2.0         # of the start at Skip, logits per unit of its log ratio
X_SCALE = 2.0           # divides the extended inputs' x: the larger, the slower x is learnt from
TOGETHER = 9            # inputs that may move together at unit variance: N + K - 1 of Mixtral
WARM_LR = 1e-3          # of P-Warm
MOST_AT_FIRST = 0.9     # of K: at K a rule drops nothing, and there is no start
FIRST_PRICE = 0.7       # of what an expert is worth to a rule: trained ones get more from those they run


def prepare(s, model, text):
    """(what was fitted on windows of training text, the rules without training, whose knobs are set on them).

    From here on the model runs with what was fitted (run/standins.py), for expert skipping at the budget.
    """
    families = SkipFamilies(model, text.windows(s.heldout_tokens // 4))
    skip = families.policy('per layer', first_k(s, model.config))
    fitted = refit(s, model, text, skip)
    if s.beyond:
        fit_eta(model, fitted, families.windows)
    return fitted, families


def first_k(s, config):
    """The mean k that allocators start at: that of the budget, but a rule must drop something there."""
    return min(target_k(s, config), MOST_AT_FIRST * config.top_k)


def new_allocators(s, model, text, families):
    """(allocators at the start that s.start names, the price of an expert that PPO starts at, in nats).

    text: the training split, to look at; families: run/rules.py:SkipFamilies of the model.
    """
    config = model.config
    allocators = empty_allocators(s, config).to(s.device)
    batches = text.batches(s.ppo_batch, s.seed)
    mean_k = first_k(s, config)
    if s.extended:
        standardise(model, allocators, next(batches)[0])
    if s.start == 'p-warm':
        p_warm(s, model, allocators, batches)
    elif s.start != 'random':
        start_at_skip(allocators, families.policy(s.start, mean_k))
    price = s.price
    if price is None:
        price = FIRST_PRICE * families.worth_of_an_expert(mean_k)
    return allocators, price


def standardise(model, allocators, inputs):
    """Set mean and standard deviation of what new allocators read to those of a first batch (B,T).

    subtle: Adam moves every weight by about the same step, so C unit channels of x would move a logit sqrt(C)
    times as far as one input and drown the few router probabilities in noise; all of x gets variance 1 /
    X_SCALE^2. The log probabilities rise and fall together, so theirs add up: many get less each, and the
    first step moves the policy equally far whatever C, N and K are.
    """
    def measure(layer, x, probs):
        z = allocators.raw(x, probs)                                        # (P,n_in)
        allocators.mean[layer] = z.mean(0)
        allocators.std[layer] = z.std(0) + 1e-3
    look(model, inputs, measure)
    C = model.config.dim
    allocators.std[:, :C] *= X_SCALE * C ** 0.5
    allocators.std[:, C:] *= max(1, (allocators.std.shape[1] - C) / TOGETHER)


@torch.no_grad()
def start_at_skip(allocators, skip):
    """Weights that are this `Skip`, a rule without training with a beta a layer.

    Skip is linear in its log ratios r_k: the scores SHARPNESS * sum_{i<k} (r_i - log beta) are largest at the
    least k with r_k <= log beta. More than K experts start as unlikely.
    """
    K = allocators.top_k
    beta = allocators.bias.new_tensor(skip.beta) + 1e-6                     # (L,)
    k = torch.arange(1, allocators.k_max + 1, device=beta.device)           # (A,)
    passed = SHARPNESS * (k[:K - 1] < k[:, None])                           # (A,K-1): is i < k?
    first = allocators.mean.shape[1] - K + 1                   # from here on z is Skip's log ratios
    allocators.weight[:, :, first:] = passed * allocators.std[:, None, first:]              # (L,A,K-1)
    scores = (allocators.mean[:, first:] - beta.log()[:, None]) @ passed.T  # (L,A)
    allocators.bias.copy_(scores - SHARPNESS * (k - K).clamp_min(0))


# ================================================================ P-Warm (eq. 12, 13)

def p_warm(s, model, allocators, batches):
    """The published start, P-Warm: imitate "the fewest experts whose router mass reaches p".

    p is chosen on the first batch so that the mean of these labels is the model's own K.
    """
    probs = look(model, next(batches)[0], lambda layer, x, probs: probs)    # (P,N) each
    p = find_mass(torch.cat(probs), model.config.top_k)

    @torch.enable_grad()
    def learn(layer, x, probs):
        labels = mass_labels(probs, p).clamp_max(allocators.k_max)          # (P,)
        z = allocators.inputs(layer, x, probs)                              # (P,n_in)
        loss = F.cross_entropy(allocators.logits(layer, z), labels - 1)
        loss.backward()
        return loss.item()
    optimizer = torch.optim.AdamW(allocators.parameters(), WARM_LR, weight_decay=s.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s.warm_steps)
    progress = Progress('warm start')
    for step in range(1, s.warm_steps + 1):
        inputs = next(batches)[0]
        optimizer.zero_grad()
        losses = look(model, inputs, learn)                                 # one a layer
        optimizer.step()
        schedule.step()
        progress(step, s.warm_steps, inputs.numel(), loss=sum(losses) / len(losses))


def find_mass(probs, target):
    """p*: the router mass whose mean label is nearest to `target` experts (eq. 12). probs (P,N) -> 0..1."""
    def mean_label(p):
        return mass_labels(probs, p).float().mean().item()
    return find_knob(mean_label, target, 0, 1, probs.shape[1])
