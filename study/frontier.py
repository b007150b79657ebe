"""study/frontier.py: every policy at every budget on one frozen base -> RUN/frontier/frontier.json, .png.

    python -m study.frontier out/deep      50 minutes on two cores; a stopped one goes on where it was

What is trained may run one expert more than K (train.py --beyond 1), so that at a budget of 1 it can be
better than top-k. Every knob is set on the training documents to the same mean k; every row is of the
held-out split.
"""
import torch

from hub.files import write_json
from model import Transformer
from run.console import one_line_errors
from run.report import markdown, plt, save_figure
from run.rules import FAMILIES
from scale.memory import empty_allocators
from study.study import BUDGET, PUBLISHED, SOFT, open_study, parser, thousandths

BUDGETS = 1.0, 0.9, 0.75, 0.6
RULES = 'random-mix', 'top-p', *(f'skip, {family}' for family in FAMILIES)
METHODS = *RULES, 'published', 'soft', 'ada-k, dialled', 'ada-k'


# ================================================================ rows

def measure(study, budgets, methods=METHODS):
    """What frontier.json holds: a column for every budget, with a row for every method."""
    return {
        'K': study.families.K,
        'tokens': len(study.of_topk),
        'documents': len(study.windows[2].unique()),
        'torch': torch.__version__,
        'columns': {f'{b:g} K': rows_at(study, b, methods) for b in budgets},
    }


def rows_at(study, b, methods):
    """{method: row} of all that make sense at a budget of b."""
    rows = {}
    deltas = {}                                                # {method: (n,)}, losses minus top-k's
    for method in methods:
        if method == 'soft' and type(study.model) is not Transformer:
            continue                                           # backpropagation needs all weights at once
        if method == 'ada-k, dialled' and b == BUDGET:
            continue                                           # is trained there
        name = f'{method}-{b}-seed{study.s.seed}'
        deltas[method], counts = study.measured(name, lambda: policy_at(study, method, b))
        rows[method] = study.row(deltas[method], counts)
    c = study.model.config
    mean_k = study.target(b)
    free = f'skip, {study.families.best_family(mean_k)}'      # chosen on training text
    # nats of an expert more in every layer
    worth = study.families.L * study.families.worth_of_an_expert(mean_k)
    allocator = empty_allocators(study.s, c).weight[0]
    own = 2 * allocator.numel() / (6 * c.dim * c.expert_dim)   # what an allocator costs, in experts
    ada = rows['ada-k']
    for name, method in ('best_free', free), ('soft', 'soft'):
        if method in rows:
            difference = deltas['ada-k'] - deltas[method]
            more = ada['mean_k'] - rows[method]['mean_k']      # experts of a token and layer
            # mean k is set on other text, so it differs a little: an Ada-K that ran more is charged for them
            at_equal_k = difference.mean() + worth * more
            ada[name] = {
                'method': method,
                'difference': difference.mean(),
                'at_equal_k': at_equal_k,
                'at_equal_flops': at_equal_k + worth * own,
                'se': study.error(difference),
            }
    return rows


def policy_at(study, method, b):
    """The policy of this name, trained if need be, its knob set to the budget b."""
    if method in RULES:
        return study.families.rule_at(method.removeprefix('skip, '), study.target(b))
    trained_at = b if method in ('soft', 'ada-k') else BUDGET
    changes = {'published': PUBLISHED, 'soft': SOFT}.get(method, {})
    return study.ada_k(method.removesuffix(', dialled'), b, budget=trained_at, **changes)


# ================================================================ table and figure, of bases.py too

def table(columns):
    """{title: {method: row}} -> loss minus top-k in thousandths of a nat per token, and Ada-K's leads."""
    lines = []
    for method in METHODS:
        cells = [thousandths(rows.get(method, {})) for rows in columns.values()]
        if any(cells):
            lines.append([method, *cells])
    ada = [rows['ada-k'] for rows in columns.values()]
    for name, other, what in (
        ('best_free', 'the best rule without training', 'at_equal_k'),
        ('best_free', 'the best rule without training', 'at_equal_flops'),
        ('soft', 'soft', 'at_equal_k'),
    ):
        cells = [thousandths(row.get(name, {}), what, 'se') for row in ada]
        if any(cells):
            lines.append([f'*ada-k minus {other}, {what.replace("_", " ")}*', *cells])
    mean_k = [f'{row["mean_k"]:.2f}' for row in ada]
    lines.append(['mean k of ada-k', *mean_k])
    return markdown(['10⁻³ nats/token, minus top-k', *columns], lines)


def show(columns, path):
    """Print the table; draw loss minus top-k with one standard error, a marker for each column.

    The figure is the last of a study's files.
    """
    print(table(columns))
    fig, ax = plt.subplots(figsize=(8, 4))
    for marker, (title, rows) in zip('os^v', columns.items()):
        loss = [1000 * row['delta'] for row in rows.values()]
        error = [1000 * row['delta_se'] for row in rows.values()]
        ax.errorbar(loss, list(rows), xerr=error, fmt=marker, label=title)
    ax.invert_yaxis()                                          # the first method on top
    ax.axvline(0, color='black')
    ax.set(xlabel='loss minus top-k (10⁻³ nats/token)')
    ax.legend(loc='lower right')
    save_figure(fig, path)
    print(f'wrote {path.parent}')


def main(argv):
    study = open_study(parser(__doc__).parse_args(argv), 'frontier', beyond=1)
    results = measure(study, BUDGETS)
    write_json(study.folder / 'frontier.json', results)
    show(results['columns'], study.folder / 'frontier.png')


if __name__ == '__main__':
    one_line_errors('study.frontier', main)
