"""study/frontier.py: every policy at every budget on one frozen base -> RUN/frontier/frontier.json, .png.

    python -m study.frontier out/deep      50 minutes on two cores; a stopped one goes on where it was

Every knob is set on the training documents to the same mean k; every row is of the held-out split.
"""
import math

import numpy as np
import torch

from allocator import RandomMix, TopP
from hub.files import write_json
from model import Transformer
from run.console import one_line_errors
from run.evaluate import clustered_error
from run.report import BLUE, GREEN, ORANGE, markdown, plt, save_figure
from run.rules import FAMILIES, worth_of_an_expert
from study.study import BUDGET, PUBLISHED, open_study, parser, thousandths

BUDGETS = 0.9, 0.75, 0.6, 0.5
SEEDS = 3               # of what is trained
RULES = 'random-mix', 'top-p', *(f'skip, {family}' for family in FAMILIES)
METHODS = *RULES, 'published', 'soft', 'ada-k, dialled', 'ada-k'


# ================================================================ rows

def measure(study, budgets):
    """What frontier.json holds: a row for every method and budget."""
    rows = []
    for b in budgets:
        at = {}                                                # {method: row}
        losses = {}                                            # {method: (n,)}, the mean over seeds
        for method in methods(study, b):
            measurements = []
            for i in range(1 if method in RULES else SEEDS):
                seed = study.s.seed + i
                name = f'{method}-{b}-seed{seed}'
                measurements.append(study.measured(name, lambda: policy_at(study, method, b, seed)))
            at[method] = {
                'method': method,
                'budget': b,
                **study.row(measurements),
            }
            losses[method] = sum(loss for loss, _ in measurements) / len(measurements)
        add_leads(study, at, losses, b)
        rows += at.values()
    return {
        'K': study.K,
        'tokens': len(study.of_topk),
        'documents': len(np.unique(study.windows[2])),
        'seeds': SEEDS,
        'torch': torch.__version__,
        'rows': rows,
    }


def methods(study, b):
    """METHODS but for those that make no sense here."""
    chosen = list(METHODS)
    if b == BUDGET:
        chosen.remove('ada-k, dialled')                        # is trained there
    if type(study.model) is not Transformer:
        chosen.remove('soft')                                  # backpropagation needs all weights at once
    return chosen


def policy_at(study, method, b, seed):
    """The policy of this name, trained if need be, its knob set to mean k = b * K."""
    mean_k = b * study.K
    if method == 'random-mix':
        return RandomMix(mean_k)
    if method == 'top-p':
        N = study.model.config.n_experts
        return study.calibrated(lambda p: TopP(p, N), b, 0, 1)
    if method in RULES:
        family = method.removeprefix('skip, ')
        policy_of = study.families.policy
        return study.calibrated(lambda k: policy_of(family, k, around=mean_k), b, 1, study.K)
    if method == 'published':
        return study.ada_k(method, BUDGET, seed, b, **PUBLISHED)
    trained_at = BUDGET if method == 'ada-k, dialled' else b
    return study.ada_k(method.removesuffix(', dialled'), trained_at, seed, b)


def add_leads(study, at, losses, b):
    """Adds to Ada-K's row its paired differences to the best rule without training and to `soft`.

    Mean k is set on other text, so it differs a little between rows; the difference is corrected to equal
    mean k by what an expert buys the rules there: an Ada-K that ran more is charged for them.
    """
    ada = at['ada-k']
    documents = study.windows[2].flatten()
    worth = worth_of_an_expert(study.families, b * study.K)                 # nats per expert and layer
    free = min(RULES, key=lambda method: at[method]['delta'])
    for name, method in (('best_free', free), ('soft', 'soft')):
        if method not in at:
            continue
        other = at[method]
        difference = ada['delta'] - other['delta']
        more = study.families.L * (ada['mean_k'] - other['mean_k'])         # experts of a token
        lead = losses['ada-k'] - losses[method]
        of_text = clustered_error(lead.numpy(), documents)
        ada[name] = {
            'method': method,
            'difference': difference,
            'at_equal_k': difference + worth * more,
            'se': math.hypot(of_text, ada['seed_se'], other['seed_se']),
        }


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
    for name, other in (('best_free', 'the best rule without training'), ('soft', 'soft')):
        leads = [row[name] for row in ada if name in row]
        cells = [thousandths(lead['at_equal_k'], lead['se']) for lead in leads]
        lines.append([f'*ada-k minus {other}, at equal mean k*', '', *cells])
    mean_k = [f'{row["mean_k"]:.2f}' for row in ada]
    lines.append(['mean k of ada-k', '', *mean_k])
    return markdown(['10⁻³ nats/token, minus top-k', 'seeds', *columns], lines)


def figure(path, columns):
    """Loss minus top-k of every method, with one standard error; a marker for each column."""
    fig, ax = plt.subplots(figsize=(8, 4), layout='constrained')
    looks = zip('os^', (BLUE, ORANGE, GREEN))
    for (marker, color), (title, rows) in zip(looks, columns.items()):
        loss = [1000 * row['delta'] for row in rows.values()]
        error = [1000 * row['delta_se'] for row in rows.values()]
        ax.errorbar(loss, list(rows), xerr=error, fmt=marker, color=color, label=title)
    ax.invert_yaxis()                                          # the first method on top
    ax.axvline(0, color='black')
    ax.grid(axis='x', alpha=0.3)
    ax.set(xlabel='loss minus top-k (10⁻³ nats/token)')
    ax.legend()
    save_figure(fig, path)


def frontier_table(rows):
    return table(by_budget(rows))


def main(argv=None):
    study = open_study(parser(__doc__).parse_args(argv), 'frontier')
    budgets = [b for b in BUDGETS if b * study.K > 1]          # with one expert left all policies are one
    results = measure(study, budgets)
    write_json(study.folder / 'frontier.json', results)
    print(frontier_table(results['rows']))
    figure(study.folder / 'frontier.png', by_budget(results['rows']))
    print(f'wrote {study.folder}')


if __name__ == '__main__':
    one_line_errors('study.frontier', main)
