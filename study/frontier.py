"""study/frontier.py: every policy at every budget on one frozen base -> RUN/frontier/frontier.json, .png.

    python -m study.frontier out/deep      50 minutes on two cores; a stopped one goes on where it was

What is trained may run one expert more than K (train.py --beyond 1), so that at a budget of 1 it can be better
than top-k. Every knob is set on the training documents to the same mean k; every row is of the held-out split.
"""
import math

import numpy as np
import torch

from allocator import RandomMix, TopP
from hub.files import write_json
from model import Transformer
from run.console import one_line_errors
from run.report import markdown, plt, save_figure
from run.rules import FAMILIES, best_family, worth_of_an_expert
from scale.memory import allocator_sizes
from study.study import BUDGET, PUBLISHED, open_study, parser, thousandths

BUDGETS = 1.0, 0.9, 0.75, 0.6
SEEDS = 1               # of what is trained
RULES = 'random-mix', 'top-p', *(f'skip, {family}' for family in FAMILIES)
METHODS = *RULES, 'published', 'soft', 'ada-k, dialled', 'ada-k'


# ================================================================ rows

def measure(study, budgets, methods=METHODS, seeds=SEEDS):
    """What frontier.json holds: a row for every method and budget."""
    rows = []
    for b in budgets:
        rows += rows_at(study, b, methods, seeds)
    return {
        'K': study.K,
        'tokens': len(study.of_topk),
        'documents': len(np.unique(study.windows[2])),
        'seeds': seeds,
        'torch': torch.__version__,
        'rows': rows,
    }


def rows_at(study, b, methods, seeds):
    """A row of every method that makes sense at a budget of b."""
    methods = list(methods)
    if b == BUDGET and 'ada-k, dialled' in methods:
        methods.remove('ada-k, dialled')                       # is trained there
    if type(study.model) is not Transformer and 'soft' in methods:
        methods.remove('soft')                                 # backpropagation needs all weights at once
    rows = {}
    deltas = {}                                                # {method: (n,)}, losses minus top-k's
    for method in methods:
        measurements = []
        for i in range(1 if method in RULES else seeds):
            seed = study.s.seed + i
            name = f'{method}-{b}-seed{seed}'
            measurements.append(study.measured(name, lambda: policy_at(study, method, b, seed)))
        row, deltas[method] = study.row(measurements)
        rows[method] = {'method': method, 'budget': b, **row}
    c = study.model.config
    mean_k = study.target(b)
    free = f'skip, {best_family(study.families, mean_k)}'      # chosen on training text
    worth = worth_of_an_expert(study.families, mean_k)         # nats per expert and layer
    k_max, n_in = allocator_sizes(study.s, c)
    own = 2 * k_max * n_in / (6 * c.dim * c.expert_dim)        # what an allocator costs, in experts
    ada = rows['ada-k']
    for name, method in ('best_free', free), ('soft', 'soft'):
        if method in rows:
            difference = deltas['ada-k'] - deltas[method]
            other = rows[method]
            more = ada['mean_k'] - other['mean_k']             # experts of a token and layer
            # mean k is set on other text, so it differs a little: an Ada-K that ran more is charged for them
            at_equal_k = difference.mean() + study.families.L * worth * more
            ada[name] = {
                'method': method,
                'difference': difference.mean(),
                'at_equal_k': at_equal_k,
                'at_equal_flops': at_equal_k + study.families.L * worth * own,
                'se': math.hypot(study.error(difference), ada['seed_se'], other['seed_se']),
            }
    return rows.values()


def policy_at(study, method, b, seed):
    """The policy of this name, trained if need be, its knob set to the budget b."""
    mean_k = study.target(b)
    if method == 'random-mix':
        return RandomMix(mean_k)
    if method == 'top-p':
        N = study.model.config.n_experts
        return study.calibrated(lambda p: TopP(p, N), b, 0, 1)
    if method in RULES:
        family = method.removeprefix('skip, ')
        policy_of = study.families.policy
        return study.calibrated(lambda k: policy_of(family, k, around=mean_k), b, 1, study.K)
    trained_at = b if method in ('soft', 'ada-k') else BUDGET
    changes = PUBLISHED if method == 'published' else {}
    return study.ada_k(method.removesuffix(', dialled'), trained_at, seed, b, **changes)


# ================================================================ table and figure, of bases.py too

def by_budget(rows):
    """{name of a budget: {method: row}}."""
    columns = {}
    for row in rows:
        column = columns.setdefault(f'{row["budget"]:g} K', {})
        column[row['method']] = row
    return columns


def table(columns):
    """{title: {method: row}} -> loss minus top-k in thousandths of a nat per token, and Ada-K's leads."""
    lines = []
    for method in METHODS:
        cells = []
        seeds = 0
        for rows in columns.values():
            row = rows.get(method)
            cells.append(thousandths(row['delta'], row['delta_se']) if row else '')
            seeds = row['seeds'] if row else seeds
        if seeds:
            lines.append([method, str(seeds), *cells])
    ada = [rows['ada-k'] for rows in columns.values()]
    for name, other, what in (
        ('best_free', 'the best rule without training', 'at_equal_k'),
        ('best_free', 'the best rule without training', 'at_equal_flops'),
        ('soft', 'soft', 'at_equal_k'),
    ):
        leads = [row.get(name, {}) for row in ada]
        cells = [thousandths(lead[what], lead['se']) if what in lead else '' for lead in leads]
        if any(cells):
            lines.append([f'*ada-k minus {other}, {what.replace("_", " ")}*', '', *cells])
    mean_k = [f'{row["mean_k"]:.2f}' for row in ada]
    lines.append(['mean k of ada-k', '', *mean_k])
    return markdown(['10⁻³ nats/token, minus top-k', 'seeds', *columns], lines)


def figure(path, columns):
    """Loss minus top-k of every method, with one standard error; a marker for each column."""
    fig, ax = plt.subplots(figsize=(8, 4))
    for marker, (title, rows) in zip('os^v', columns.items()):
        loss = [1000 * row['delta'] for row in rows.values()]
        error = [1000 * row['delta_se'] for row in rows.values()]
        ax.errorbar(loss, list(rows), xerr=error, fmt=marker, label=title)
    ax.invert_yaxis()                                          # the first method on top
    ax.axvline(0, color='black')
    ax.set(xlabel='loss minus top-k (10⁻³ nats/token)')
    ax.legend()
    save_figure(fig, path)


def main(argv=None):
    study = open_study(parser(__doc__).parse_args(argv), 'frontier', beyond=1)
    budgets = [b for b in BUDGETS if b * study.K > 1]          # with one expert left all policies are one
    results = measure(study, budgets)
    write_json(study.folder / 'frontier.json', results)
    columns = by_budget(results['rows'])
    print(table(columns))
    figure(study.folder / 'frontier.png', columns)
    print(f'wrote {study.folder}')


if __name__ == '__main__':
    one_line_errors('study.frontier', main)
