"""study/bases.py: does it hold on a base that the recipe was not tuned on? -> out/bases/bases.json, .png.

    python -m study.bases              three bases, every policy at 0.75 K; a stopped one goes on where it was
    python -m study.bases --only deep prose

    deep     the default, Mixtral in small: top-2 of 8, 16 layers, the sources of Python's standard library
    fine     finer experts: top-4 of 16, 4 layers, the same text
    prose    top-2 of 8, 4 layers, English: the docstrings and comments of these sources

Each base is a preset of train.py, learnt in out/NAME if it is not there; its rows stay in out/NAME/frontier.
"""
from pathlib import Path

from hub.files import write_json
from run.console import OneLineParser, one_line_errors, open_out
from study.frontier import figure, measure, table
from study.study import BUDGET, Study
from train import PRESETS, Settings

BASES = 'deep', 'fine', 'prose'


def columns(results):
    """{name of a base: {method: row}}."""
    return {
        f'{name}, K = {base["K"]}': {row['method']: row for row in base['rows']}
        for name, base in results.items()
    }


def main(argv=None):
    p = OneLineParser(__doc__)
    p.add_argument('--only', nargs='+', choices=BASES, default=BASES, help='some of the bases')
    a = p.parse_args(argv)
    results = {}
    for name in a.only:
        s = Settings(preset=name, **PRESETS[name])
        study = Study(s, open_out(Path('out') / name), 'frontier')
        results[name] = {'budget': BUDGET, **measure(study, [BUDGET])}
    out = open_out('out/bases', 'bases.json', 'bases.png')
    write_json(out / 'bases.json', results)
    print(table(columns(results)))
    figure(out / 'bases.png', columns(results))
    print(f'wrote {out}')


if __name__ == '__main__':
    one_line_errors('study.bases', main)
