"""run/compare.py: the table of a run: Ada-K beside the rules without training, at the same mean k."""
import torch

from allocator import AdaK, RandomMix, TopK, TopP
from run.console import Progress
from run.evaluate import calibrate, clustered_error, evaluate, flops_shares
from run.rules import best_family
from run.standins import rank_of, target_k


def compare(s, model, allocators, families, dial, windows):
    """The rows of results.json: top-k, Ada-K, and the rules without training at Ada-K's mean k on `dial`."""
    c = model.config
    ada = AdaK(allocators)
    [(_, tally)] = evaluate(model, dial, [ada])
    mean_k = tally.mean()
    p = calibrate(model, dial, lambda p: TopP(p, c.n_experts), mean_k, 0, 1)
    around = mean_k if s.price is not None else target_k(s, c)             # known from the start
    family = best_family(families, around)

    def skip(k):
        return families.policy(family, k, around)
    knob = calibrate(model, dial, skip, mean_k, 1, c.top_k)
    policies = {
        'top-k': TopK(c.top_k),
        'ada-k': ada,
        'random-mix': RandomMix(mean_k),
        'top-p': TopP(p, c.n_experts),
        'skip': skip(knob),
    }
    rows = []
    progress = Progress('evaluation', len(policies))
    for method, policy in policies.items():
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
            'mean_k': tally.mean(),
            'mean_k_by_layer': tally.mean_by_layer().tolist(),
            'k_histogram': (tally.counts.sum(0) / tally.counts.sum()).tolist(),
            **flops_shares(c, tally, s.seq, rank_of(s, c), params),
        })
        progress(len(rows), len(rows) * len(loss), loss=rows[-1]['loss'])
    return rows
