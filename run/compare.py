"""run/compare.py: the table of a run: Ada-K beside the rules without training, at the same mean k."""
import torch

from allocator import AdaK, TopK
from moe_dispatch import flops
from run.console import Progress
from run.evaluate import clustered_error, evaluate
from run.standins import rank_in, refit

RULES = 'random-mix', 'top-p', 'skip'


def compare(s, model, text, allocators, families, windows, target):
    """The rows of results.json: top-k, Ada-K, and the rules without training at Ada-K's mean k.

    That mean k is of families.windows, the losses are of `windows`, each rule's with stand-ins of its own,
    fitted on `text`; those in the model are Ada-K's. target: the mean k of the budget, if any.
    """
    policies = {'top-k': TopK(families.K), 'ada-k': AdaK(allocators)}
    [(_, tally)] = evaluate(model, families.windows, [policies['ada-k']])
    mean_k = tally.mean()
    for name in RULES:
        policies[name] = families.rule_at(name, mean_k, target)
    rows = []
    progress = Progress('evaluation')
    for method, policy in policies.items():
        if method in RULES:
            refit(s, model, text, policy)
        torch.manual_seed(s.seed)                              # for RandomMix
        [(loss, tally)] = evaluate(model, windows, [policy])
        if method == 'top-k':
            of_topk = loss
        delta = (loss - of_topk).numpy()
        params = allocators.weight.numel() if method == 'ada-k' else 0
        rows.append({
            'method': method,
            'loss': loss.mean().item(),
            'delta': delta.mean(),
            'delta_se': clustered_error(delta, windows[2]),
            'mean_k_by_layer': tally.mean_by_layer().tolist(),
            **flops_shares(model, tally, s.seq, params),
        })
        progress(len(rows), len(policies), len(loss), loss=loss.mean())
    return rows


def flops_shares(model, tally, T, allocator_params=0):
    """FLOPs of the model as shares of those of its own top-k, and the mean k that they are of.

    tally: a Counted.
    """
    c = model.config
    ours = flops(c, tally.mean(), T, allocator_params, tally.mean_left(c.top_k), rank_in(model))
    topk = flops(c, c.top_k, T)
    return {
        'mean_k': tally.mean(),
        'expert_flops': ours['experts'] / topk['experts'],
        'total_flops': ours['total'] / topk['total'],
    }
