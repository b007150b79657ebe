"""study/recipes.py: which part of the recipe does what -> RUN/recipes/ablations.json or published.json.

    python -m study.recipes out/deep               one change at a time, few PPO steps: half an hour
    python -m study.recipes out/deep --published   is it the recipe or its length? 90 minutes, one core

Published: 10,000 samples of up to 2,048 tokens in batches of 64, one epoch of P-Warm and one of PPO, two PPO
epochs a rollout. Here a batch has as many tokens in sequences of the run's own length. Each recipe is trained
for 0.75 K and its price set to it. A stopped study goes on where it was.
"""
from dataclasses import replace

from hub.files import write_json
from run.console import one_line_errors
from run.report import markdown
from study.study import BUDGET, PUBLISHED, Study, open_study, parser, thousandths

FEW = 60                                # PPO steps of an ablation
BATCH = 64 * 2048                       # tokens, as published
STEPS = 156
FITTED = {'dropped', 'rank', 'beyond'}  # settings that change what is fitted before PPO: a study of its own


def ablations(s):
    """{what is changed: the changes to Settings}."""
    many = {                                                   # the baseline is top-k
        'group': 1,
        'ppo_batch': s.group * s.ppo_batch,                    # as many rollouts, of more texts
    }
    cases = [
        {},
        {'start': 'random'},
        {'start': 'p-warm'},
        *[{'discount': discount} for discount in (0.0, 0.5, 0.8, 0.95, 1.0)],
        {'epochs': 1},
        {'epochs': 2},
        {'reward': 'sampled'},
        many,
        {'reward': 'sampled', **many},
        {'dropped': 'published'},
        {'dropped': 'kept'},
        *[{'rank': rank} for rank in (1, 4, 8, 32)],
        {'beyond': 1},
        {                                                      # the allocators read x only
            'extended': False,
            'start': 'p-warm',
            'ppo_lr': 1e-3,
        },
    ]
    named = {}
    for changes in cases:
        what = ', '.join(f'{setting} {value}' for setting, value in changes.items())
        named[what or 'default'] = {'ppo_steps': FEW, **changes}
    return named


def published(s):
    """{recipe, short or at full length: the changes to Settings}."""
    return {
        'the default': {},
        'published, as long': PUBLISHED,
        'published, as long, its step in logits': {**PUBLISHED, 'ppo_lr': 32 * PUBLISHED['ppo_lr']},
        'published, whole': {
            **PUBLISHED,
            'ppo_batch': BATCH // s.seq,
            'ppo_steps': STEPS,
            'warm_steps': STEPS,
        },
    }


def recipe_table(rows):
    """Loss minus top-k of every row of a results file."""
    lines = [
        [what, thousandths(row), f'{row["mean_k"]:.2f}']
        for what, row in rows.items()
    ]
    return markdown(['recipe', 'minus top-k (10⁻³ nats/token)', 'mean k'], lines)


def main(argv):
    p = parser(__doc__)
    p.add_argument('--published', action='store_true', help='the published recipe, short and at full length')
    a = p.parse_args(argv)
    study = open_study(a, 'recipes')
    recipes = published if a.published else ablations
    rows = {}
    for what, changes in recipes(study.s).items():
        of = study
        if changes.keys() & FITTED:
            of = Study(replace(study.s, **changes), study.folder.with_name(f'recipes-{what}'))
        measurement = of.measured(what, lambda: of.ada_k(what, BUDGET, budget=BUDGET, **changes))
        rows[what] = of.row(*measurement)
        write_json(study.folder / f'{recipes.__name__}.json', rows)
    print(recipe_table(rows))
    print(f'wrote {study.folder}')


if __name__ == '__main__':
    one_line_errors('study.recipes', main)
