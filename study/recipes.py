"""study/recipes.py: which part of the recipe does what -> RUN/recipes/ablations.json or published.json.

    python -m study.recipes out/fine               one change at a time, few PPO steps: ten minutes
    python -m study.recipes out/deep --published   is it the recipe or its length? An hour on one core

Published: 10,000 samples of up to 2,048 tokens in batches of 64, one epoch of P-Warm and one of PPO, two PPO
epochs a rollout. Here a batch has as many tokens in sequences of the run's own length. Each recipe is trained
for 0.75 K and its price set to it. A stopped study goes on where it was.
"""
from dataclasses import replace

from hub.files import write_json
from run.console import one_line_errors
from run.report import markdown
from run.rules import FAMILIES
from study.study import BUDGET, PUBLISHED, open_study, parser, thousandths

FEW = 60                                # PPO steps of an ablation
BATCH = 64 * 2048                       # tokens, as published
STEPS = 156


def ablations(s):
    """{what is changed: the changes to Settings}."""
    many = dict(group=1, ppo_batch=s.group * s.ppo_batch)      # as many rollouts, of more texts
    cases = {'default': {}}
    for start in ('random', 'p-warm', *FAMILIES):
        cases[f'start: {start}'] = {'start': start}
    for discount in (0.0, 0.5, 0.8, 0.95, 1.0):
        cases[f'discount {discount:g}'] = {'discount': discount}
    cases |= {
        "reward: the text's own token": {'reward': 'sampled'},
        'baseline: top-k': many,
        "baseline: top-k, reward: the text's own token": {'reward': 'sampled', **many},
        'allocator reads x only, start: p-warm': dict(extended=False, start='p-warm', ppo_lr=1e-3),
        '1 PPO epoch': {'epochs': 1},
        '2 PPO epochs': {'epochs': 2},
    }
    return {what: {'ppo_steps': FEW, **changes} for what, changes in cases.items()}


def lengths(s):
    """{recipe and its rollouts' tokens: the changes to Settings}."""
    long = {
        **PUBLISHED,
        'ppo_batch': BATCH // s.seq,
        'ppo_steps': STEPS,
        'warm_steps': STEPS,
    }
    named = {}
    for changes in ({}, PUBLISHED, long):
        what = 'published' if changes else 'default'
        used = replace(s, **changes)
        tokens = used.ppo_steps * used.ppo_batch * used.group * s.seq
        named[f'{what}, {tokens:,} tokens'] = changes
    return named


def recipe_table(results):
    """Loss minus top-k of every row of a results file."""
    lines = []
    for row in results['rows']:
        loss = thousandths(row['delta'], row['delta_se'])
        lines.append([row['what'], loss, f'{row["mean_k"]:.2f}'])
    return markdown(['recipe', 'minus top-k (10⁻³ nats/token)', 'mean k'], lines)


def main(argv=None):
    p = parser(__doc__)
    p.add_argument('--published', action='store_true', help='the published recipe, short and at full length')
    a = p.parse_args(argv)
    study = open_study(a, 'recipes')
    s = study.s
    kind = 'published' if a.published else 'ablations'
    recipes = lengths(s) if a.published else ablations(s)
    rows = []
    for what, changes in recipes.items():
        measurement = study.measured(what, lambda: study.ada_k(what, BUDGET, s.seed, **changes))
        row, _ = study.row([measurement])
        rows.append({'what': what, **row})
        write_json(study.folder / f'{kind}.json', {'rows': rows})
    print(recipe_table({'rows': rows}))
    print(f'wrote {study.folder}')


if __name__ == '__main__':
    one_line_errors('study.recipes', main)
