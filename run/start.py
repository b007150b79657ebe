"""run/start.py: the allocators as PPO starts with them.

'skip' (the default) is expert skipping at the budget, exactly: the best of the families of run/rules.py on
the calibration split; 'one beta', 'per layer' and 'greedy' are those families by name; 'p-warm' (published,
eq. 12, 13) imitates a Top-P rule at K by supervised learning; 'always-k' is K for every token with some
exploration; 'random' knows nothing.
"""
import torch

import ppo
from allocator import Allocators, TopK, Watched, mass_labels
from run.console import Progress
from run.rules import best_family, worth_of_an_expert
from scale.memory import allocator_sizes

SHARPNESS = 2.0         # of the start at Skip, logits per unit of its log ratio
X_SCALE = 2.0           # divides the extended inputs' x: the larger, the slower x is learnt from
WARM_LR = 1e-3          # of P-Warm
ALWAYS_K = -2.0         # logits per expert away from K
UNBUDGETED = 0.9        # of K: where a run with a fixed price starts
FIRST_PRICE = 0.7      # of what an expert is worth to a rule: trained allocators get more from those they run


def new_allocators(s, model, text, families):
    """(allocators at the start that s.start names, the price of an expert that PPO starts at, in nats).

    text: the training split, to look at; families: run/rules.py:SkipFamilies of the model.
    """
    c = model.config
    allocators = Allocators(c, allocator_sizes(s, c)[0], s.extended).to(s.device)
    batches = text.batches(s.ppo_batch, s.seq, torch.Generator().manual_seed(s.seed))
    mean_k = c.top_k * (s.budget if s.lam is None else UNBUDGETED)
    if s.extended:
        standardise(allocators, look(s, model, next(batches)[0]))
    if s.start == 'p-warm':
        p_warm(s, model, allocators, batches)
    elif s.start == 'always-k':
        k = torch.arange(1, allocators.k_max + 1)
        allocators.bias.data.copy_(ALWAYS_K * (k - c.top_k).abs())
    elif s.start != 'random':
        family = s.start
        if family == 'skip':
            family = best_family(families, families.windows, mean_k)
            print(f'start: expert skipping, {family}')
        start_at_skip(allocators, families.policy(family, mean_k))
    price = s.lam
    if price is None:
        price = FIRST_PRICE * worth_of_an_expert(families, mean_k)
    return allocators, price


@torch.no_grad()
def look(s, model, inputs):
    """[(x (P,C), probs (P,N)) of each MoE layer] of one pass of inputs (B,T) under the model's own top-k."""
    seen = []
    watched = Watched(TopK(model.config.top_k), lambda layer, x, probs, k: seen.append((x, probs)))
    model.hidden(inputs.to(s.device), watched)
    return seen


def inputs_of(allocators, seen):
    """What the allocators read of a pass that was looked at: z (L,P,n_in)."""
    return torch.stack([allocators.inputs(layer, x, probs) for layer, (x, probs) in enumerate(seen)])


@torch.no_grad()
def standardise(allocators, seen):
    """Mean and standard deviation of the allocators' inputs on a first batch.

    subtle: Adam moves every weight by about the same step, so C unit channels of x would move a logit sqrt(C)
    times as far as one input and drown the few router probabilities in noise; all of x gets variance 1 /
    X_SCALE^2.
    """
    z = inputs_of(allocators, seen)                                         # (L,P,n_in)
    allocators.mean.copy_(z.mean(1))
    allocators.std.copy_(z.std(1) + 1e-3)
    C = seen[0][0].shape[1]
    allocators.std[:, :C] *= X_SCALE * C ** 0.5


@torch.no_grad()
def start_at_skip(allocators, skip):
    """Weights that are this `Skip`, a rule without training.

    Skip is linear in its log ratios r_k: the scores SHARPNESS * sum_{i<k} (r_i - log beta) are largest at the
    least k with r_k <= log beta. More than K experts start as unlikely.
    """
    L, A = allocators.bias.shape
    K, device = allocators.top_k, allocators.bias.device
    beta = torch.tensor(skip.beta, device=device).expand(L)                 # (L,)
    k = torch.arange(1, A + 1, device=device)                               # (A,)
    ratios = slice(allocators.mean.shape[1] - (K - 1), None)           # the inputs that are Skip's log ratios
    passed = (k[:K - 1] < k[:, None]).float() * SHARPNESS                   # (A,K-1): is i < k?
    allocators.weight[:, :, ratios] = passed * allocators.std[:, None, ratios]
    scores = (allocators.mean[:, ratios] - (beta + 1e-6).log()[:, None]) @ passed.T         # (L,A)
    allocators.bias.copy_(scores - SHARPNESS * (k - K).clamp_min(0))


def p_warm(s, model, allocators, batches):
    """The published start, P-Warm (eq. 12, 13): imitate "the fewest experts whose router mass reaches p".

    p is chosen on the first batch so that the mean of these labels is the model's own K.
    """
    first = look(s, model, next(batches)[0])
    p = ppo.find_mass(torch.cat([probs for _, probs in first]), model.config.top_k)
    optimizer = torch.optim.AdamW(allocators.parameters(), WARM_LR, weight_decay=s.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s.warm_steps)
    progress = Progress('warm start', s.warm_steps)
    for step in range(1, s.warm_steps + 1):
        inputs, _ = next(batches)
        seen = look(s, model, inputs)
        z = inputs_of(allocators, seen)                                     # (L,P,n_in)
        labels = torch.stack([mass_labels(probs, p) for _, probs in seen])  # (L,P)
        loss = ppo.warm_loss(allocators.logits(slice(None), z), labels.clamp_max(allocators.k_max))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(step, step * inputs.numel(), loss=loss.item())
