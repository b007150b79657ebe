"""study/published.py: is it the recipe or its length? The published one at its published number of tokens.

    python -m study.published out/deep      an hour on one core; a stopped one goes on where it was

Published: 10,000 samples of up to 2,048 tokens in batches of 64, one epoch of P-Warm and one of PPO, two PPO
epochs a rollout. Here a batch has as many tokens in sequences of the run's own length. Every row is trained
for 0.75 K, dialled to it on the training documents and reported on held-out ones.
"""
import time

from allocator import AdaK, TopK
from hub.files import checked, read_object, write_json
from run.console import one_line_errors
from run.report import markdown
from study.study import BUDGETS, open_study, parse
from train import PAPER

BATCH, STEPS = 64 * 2048, 156


def recipes(s, quick):
    """[(name, the changes to Settings)]."""
    published = {'paper': True, **PAPER, 'lam': None}
    batch, steps = (4 * s.seq, 8) if quick else (BATCH, STEPS)
    long = {**published, 'ppo_batch': batch // s.seq, 'ppo_steps': steps, 'warm_steps': steps}
    return [('default recipe', {}), ('published recipe, our length', published),
            ('published recipe, published length', long)]


def published(a):
    """Measure what is not there yet, then print the table."""
    study = open_study(a, 'published')
    s, budget, kept = study.s, BUDGETS[1], study.folder / 'published.json'
    rows = read_rows(kept) if kept.exists() else []
    reference, _ = study.measured('top-k', lambda: TopK(study.K))
    for what, changes in recipes(s, a.quick)[len(rows):]:
        start = time.time()
        allocators = study.allocators(what, budget, s.seed, **changes)
        seconds = time.time() - start
        dialled = study.calibrated(lambda price: AdaK(allocators, price=price), budget, 20, -20)
        row = study.row([study.measured(what, dialled)], reference, allocators.weight.numel())
        used = {**vars(s), **changes}
        tokens = used['ppo_steps'] * used['ppo_batch'] * used['group'] * s.seq
        rows.append({'what': what, 'seconds': seconds, 'tokens': tokens, 'steps': used['ppo_steps'], **row})
        write_json(kept, {'rows': rows, 'K': study.K, 'budget': budget})
    print(published_table({'rows': rows}))


def read_rows(path):
    """The rows that are there already, checked: they say what need not be trained again."""
    rows = checked(read_object(path), 'rows', path, list)
    for row in rows:
        checked({'row': row}, 'row', path, dict)
        checked(row, 'what', path, str)
        for name in ('steps', 'tokens', 'seconds', 'delta', 'delta_se', 'mean_k'):
            checked(row, name, path, float)
    return rows


def published_table(results):
    lines = [[r['what'], f'{r["steps"]:,}', f'{r["tokens"] / 1e6:.1f}M', f'{r["seconds"]:,.0f}',
              f'{1000 * r["delta"]:+.1f} ± {1000 * r["delta_se"]:.1f}', f'{r["mean_k"]:.2f}']
             for r in results['rows']]
    return markdown(['recipe', 'PPO steps', 'tokens rolled out', 'seconds', 'minus Top-K (10⁻³ nats/token)',
                     'mean k'], lines)


def main(argv=None):
    published(parse(argv, __doc__))


if __name__ == '__main__':
    one_line_errors('study.published', main)
