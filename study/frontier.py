"""study/frontier.py: every policy at every budget on one frozen base -> RUN/frontier/frontier.json, .png, the
table.

    python -m study.frontier out/deep             50 minutes on two cores; a stopped one goes on where it was
    python -m study.frontier --ckpt olmoe-1b-7b   on real weights

Every knob is set on the training documents to the same mean k; every row is of the held-out split.
"""
import functools
import math
import time
from pathlib import Path

import numpy as np
import torch

from allocator import AdaK, Allocators, RandomMix, TopK, TopP, bisect
from hub.files import checked, read_object, write_json
from model import Transformer
from run.console import one_line_errors
from run.evaluate import clustered_error, evaluate
from run.report import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, markdown, plt, save_figure
from run.rules import FAMILIES, worth_of_an_expert
from study.policies import EntropyBands, PerLayer
from study.study import BUDGETS, open_study, parse
from train import PAPER

# method: colour, marker, line
LOOKS = {
    'static k': ('black', 'x', ':'), 'random mix': (GREY, 'v', '--'), 'per-layer static k': (GREY, 's', ':'),
    'Top-P': (ORANGE, 's', '-'), 'entropy bands': (PINK, 'D', '--'),
    'skipping, one beta': (GREEN, 'v', ':'), 'skipping, per layer (published)': (GREEN, '^', '--'),
    'skipping, greedy': (GREEN, '<', '-'),
    'P-Warm only': (SKY, '<', ':'), 'published recipe, dialled': (SKY, '>', '--'),
    'learnt without RL': (RED, 'P', '-'), 'Ada-K, dialled': (BLUE, 'o', ':'), 'Ada-K': (BLUE, 'o', '-'),
    'oracle (hindsight)': ('black', '*', '-.')}
TRAINING_FREE = list(LOOKS)[:8]
SKIPPING = dict(zip(TRAINING_FREE[5:], FAMILIES))


# ================================================================ rows that need more than a knob

def greedy_layers(study, tokens=8192):
    """{total: mean k of each layer} for totals from L*K down: the layer that loses least gives up one."""
    windows = study.calibration.windows(study.s.seq, tokens)
    k = [study.K] * study.L
    path = {sum(k): k}
    while sum(k) > max(study.L, int(min(BUDGETS) * study.K * study.L)):
        lower = [[n - (i == layer) for i, n in enumerate(k)] for layer in range(study.L) if k[layer] > 1]
        k = min(lower, key=lambda plan: evaluate(study.model, windows, PerLayer(plan))[0].mean().item())
        path[sum(k)] = k
    return path


def between(path, total):
    """The plan of a fractional total: the two neighbours of `greedy_layers`, mixed."""
    low = max(min(path), math.floor(total))
    high = min(low + 1, max(path))
    return [a + (b - a) * (total - low) for a, b in zip(path[low], path[high])]


def oracle(losses, price):
    """Hindsight, after Duo-LLM: of every static k the one with the least loss + price * k, the label known.

    losses (A,n) -> loss (n,), k (n,).
    """
    k = torch.arange(1, len(losses) + 1)
    best = (losses + price * k[:, None]).argmin(0)
    return losses.gather(0, best[None])[0], k[best]


# ================================================================ all rows

def frontier(a):
    """Measure what is not there yet, then print the table and draw the figure."""
    study = open_study(a, 'frontier')
    adopt(study, a.run)
    budgets = [b for b in BUDGETS if b * study.K > 1]          # with one expert left all policies are one
    results = measure(study, budgets[1::2] if a.quick else budgets, 1 if a.quick else 3)
    print(frontier_table(results['rows']))
    frontier_figure(study.folder / 'frontier.png', results['rows'])
    print(f'{results["seconds"]:.0f} s in all; wrote frontier.json and frontier.png in {study.folder}')


def measure(study, budgets, n_seeds, methods=tuple(LOOKS)):
    """What frontier.json holds: static k, and `methods` at every budget; written again after every row."""
    s, K, start = study.s, study.K, time.time()
    k_max, seeds = min(2 * K, study.model.config.n_experts), range(s.seed, s.seed + n_seeds)
    kept = study.folder / 'frontier.json'
    spent = seconds_of(kept) if kept.exists() else 0.0
    static = {k: study.measured(f'static-{k}', lambda k=k: TopK(k)) for k in range(1, k_max + 1)}
    topk, rows, paired = static[K][0], [], []
    greedy = functools.cache(lambda: greedy_layers(study))
    results = {'rows': rows, 'K': K, 'tokens': len(topk), 'seeds': len(seeds),
               'documents': len(np.unique(study.windows[2])), 'threads': torch.get_num_threads(),
               'torch': torch.__version__}

    def add(method, budget, measurements, params=0):
        rows.append({'method': method, 'budget': budget, **study.row(measurements, topk, params)})
        paired.append(torch.stack([loss for loss, _ in measurements]))      # (seeds,n)
        results['seconds'] = spent + time.time() - start
        write_json(kept, results)

    def add_trained(method, budget, seeds, make):
        """A row of allocators make(seed), their price dial set on the training documents."""
        measurements = []
        for seed in seeds:
            allocators = make(seed)
            policy = study.calibrated(lambda price: AdaK(allocators, price=price), budget, 20, -20)
            measurements.append(study.measured(f'{method}-{budget}-seed{seed}', policy))
        add(method, budget, measurements, allocators.weight.numel())

    for k, measurement in static.items():
        add('static k', k / K, [measurement])
    for b in budgets:
        for method, file, policy in rules(study, b, k_max, greedy):
            if method in methods:
                add(method, b, [study.measured(f'{file}-{b}', policy)])
        for method, n, make in trained(study, b):
            if method in methods:
                add_trained(method, b, seeds[:n], make)
        add_lead(study, rows, paired, b)
        if 'oracle (hindsight)' in methods:
            losses = torch.stack([loss for loss, _ in static.values()])     # (A,n)
            price = bisect(lambda price: oracle(losses, price)[1].double().mean().item(), b * K, 5, 0, 30)
            loss, k = oracle(losses, price)
            add('oracle (hindsight)', b, [(loss, torch.bincount(k, minlength=k_max + 1)[None])])
    return results


def seconds_of(kept):
    """What the rows that are there already took; of frontier.json nothing else is read again."""
    return checked(read_object(kept), 'seconds', kept, float, least=0)


def adopt(study, run):
    """The run's own allocators are one of those wanted, if the default recipe trained them for a budget."""
    s, mine = study.s, study.folder / f'ada-k-{study.s.budget}-seed{study.s.seed}.safetensors'
    theirs = Path(run) / 'allocator.safetensors'
    if run and s.lam is None and not s.paper and theirs.exists() and not mine.exists():
        Allocators.load(theirs, study.model.config).save(mine)


def rules(study, b, k_max, greedy):
    """[(method, file name, a function that makes the policy)] of the rules without training at budget b."""
    K, L, N = study.K, study.L, study.model.config.n_experts
    return [('random mix', 'random-mix', lambda: RandomMix(b * K)),
            ('per-layer static k', 'per-layer', lambda: PerLayer(between(greedy(), b * K * L))),
            ('Top-P', 'top-p', study.calibrated(lambda p: TopP(p, N), b, 0, 1)),
            ('entropy bands', 'bands', study.calibrated(lambda scale: EntropyBands(scale, k_max), b, 0, 4)),
            *((method, method, skipping(study, family, b)) for method, family in SKIPPING.items())]


def skipping(study, family, b):
    """A function that makes the Skip of this family at budget b."""
    return study.calibrated(lambda mean_k: study.families.policy(family, mean_k), b, 1, study.K)


def trained(study, b):
    """[(method, seeds, a function seed -> allocators)] at budget b; dialled ones are trained at 0.75 K."""
    at, published = BUDGETS[1], {'paper': True, **PAPER, 'lam': None}
    rows = [('P-Warm only', 1, lambda seed: study.allocators('p-warm', at, seed, **published)),
            ('published recipe, dialled', 1, lambda seed: study.allocators('paper', at, seed, **published)),
            ('learnt without RL', 3, lambda seed: study.allocators('no-rl', b, seed)),
            ('Ada-K, dialled', 3, lambda seed: study.allocators('ada-k', at, seed)),
            ('Ada-K', 3, lambda seed: study.allocators('ada-k', b, seed))]
    resident = type(study.model) is Transformer                # a backward pass needs all weights at once
    return [row for row in rows if resident or row[0] != 'learnt without RL']


def add_lead(study, rows, paired, budget):
    """Adds to the Ada-K row of a budget its paired differences: to the best free row, and to no RL.

    Mean k is set on other text, so it differs a little between rows; the difference is corrected to equal
    mean k by what an expert buys the rules there (run/rules.py): an Ada-K that ran more is charged for them.
    """
    here = {r['method']: i for i, r in enumerate(rows) if abs(r['budget'] - budget) < 1e-9}
    free = min((here[method] for method in TRAINING_FREE if method in here), key=lambda i: rows[i]['delta'])
    worth = worth_of_an_expert(study.families, budget * study.K) * study.L      # nats per unit of mean k
    ada = here['Ada-K']
    rows[ada]['worth'] = worth
    for name, other in (('best_free', free), ('no_rl', here.get('learnt without RL'))):
        if other is None:
            continue
        difference = (paired[ada].mean(0) - paired[other].mean(0)).numpy()
        seeds = math.hypot(*(rows[i]['seed_std'] / rows[i]['seeds'] ** 0.5 for i in (ada, other)))
        more = rows[ada]['mean_k'] - rows[other]['mean_k']
        rows[ada][name] = {
            'method': rows[other]['method'], 'difference': difference.mean(),
            'at_equal_k': difference.mean() + worth * more,
            'se': math.hypot(clustered_error(difference, study.windows[2].flatten()), seeds)}


# ================================================================ table and figure

def frontier_table(rows):
    """Loss minus Top-K in thousandths of a nat per token at every budget; under it Ada-K's lead, paired."""
    ada = {r['budget']: r for r in rows if r['method'] == 'Ada-K'}
    budgets = sorted(ada, reverse=True)

    def show(r):
        text = f'{1000 * r["delta"]:+.1f} ± {1000 * r["delta_se"]:.1f}'
        return text + (f' (k {r["mean_k"]:.2f})' if r['method'] == 'Ada-K' else '')
    lines = []
    for method in dict.fromkeys(r['method'] for r in rows):
        mine = {r['budget']: r for r in rows if r['method'] == method}
        seeds = max(r['seeds'] for r in mine.values())
        lines.append([method, str(seeds), *(show(mine[b]) if b in mine else '' for b in budgets)])
    for name, title in (('best_free', 'the best row without training'), ('no_rl', 'learnt without RL')):
        if name in ada[budgets[0]]:
            leads = (ada[b][name] for b in budgets)
            lines.append([f'*Ada-K minus {title}, at equal mean k*', '',
                          *(f'*{1000 * r["at_equal_k"]:+.1f} ± {1000 * r["se"]:.1f}*' for r in leads)])
    return markdown(['10⁻³ nats/token, minus Top-K', 'seeds', *(f'{b:g} K' for b in budgets)], lines)


def frontier_figure(path, rows):
    """Left: loss minus Top-K against the share of expert FLOPs. Right: minus the best free rule, close up."""
    fig, (a, b) = plt.subplots(1, 2, figsize=(11, 4.8), layout='constrained')
    budgets = {r['budget'] for r in rows if r['method'] == 'Ada-K'}
    free = {budget: min(r['delta'] for r in rows if r['method'] in TRAINING_FREE and r['budget'] == budget)
            for budget in budgets}
    near = *SKIPPING, 'learnt without RL', 'Ada-K, dialled', 'Ada-K'
    for method, (color, marker, line) in LOOKS.items():
        mine = [r for r in rows if r['method'] == method and r['expert_flops'] < 1]
        mine.sort(key=lambda r: r['expert_flops'])
        look = dict(color=color, marker=marker, linestyle=line, markersize=5)
        x, error = [r['expert_flops'] for r in mine], [r['delta_se'] for r in mine]
        if mine and method != 'oracle (hindsight)':
            a.errorbar(x, [r['delta'] for r in mine], error, label=method, **look)
        if mine and method in near:
            b.errorbar(x, [r['delta'] - free[r['budget']] for r in mine], error, **look)
    worst = max(r['delta'] for r in rows if r['budget'] in budgets and r['method'] in TRAINING_FREE[1:])
    a.set(xlabel='share of expert FLOPs', ylabel='loss minus Top-K (nats/token)', xlim=(0.45, 1),
          ylim=(-0.002, 1.1 * worst), title='every policy (lower is better)')
    a.axhline(0, color='black', linewidth=0.8)
    b.set(xlabel='share of expert FLOPs', ylabel='loss minus the best free rule (nats/token)',
          title='close up (bars: error against Top-K)')
    fig.legend(loc='outside lower center', ncols=5, fontsize=8)
    save_figure(fig, path)


def main(argv=None):
    frontier(parse(argv, __doc__))


if __name__ == '__main__':
    one_line_errors('study.frontier', main)
