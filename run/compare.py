"""run/compare.py: the table of a run: Ada-K beside the rules without training, at the same mean k."""
import torch

from allocator import AdaK, TopK
from run.console import Progress
from run.evaluate import clustered_error, evaluate, flops_shares
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
        policies[name] = families.rule_at(name, mean_k, around=target or mean_k)
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
            'delta_se': clustered_error(delta, windows[2].flatten()),
            'mean_k_by_layer': tally.mean_by_layer().tolist(),
            **flops_shares(model.config, tally, s.seq, rank_in(model), params),
        })
        progress(len(rows), len(policies), len(loss), loss=rows[-1]['loss'])
    return rows
