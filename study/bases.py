"""study/bases.py: does it hold on a base that the recipe was not tuned on? -> out/bases/bases.json, .png.

    python -m study.bases              four bases, every policy at 0.75; a stopped one goes on where it was
    python -m study.bases --only deep prose

    deep     the default, Mixtral in small: top-2 of 8, 6 layers, the sources of Python's standard library
    fine     finer experts: top-4 of 16, 4 layers, the same text
    prose    top-2 of 8, 4 layers, English: the docstrings and comments of these sources
    many     many small experts, OLMoE in small: top-8 of 64, 4 layers, the text of deep

Four times each: the weight of an expert that does not run goes to the others (published), or is lost and
theirs are kept, or stand-ins take its place (run/standins.py); and at the full budget with one expert beyond
K.

Each base is a preset of train.py, learnt in out/NAME if it is not there; its rows stay in out/NAME/bases-WAY.
"""
from pathlib import Path

from hub.files import read_json, write_json
from run.console import OneLineParser, one_line_errors, open_out
from study.frontier import RULES, measure, show
from study.study import Study
from train import PRESETS, Settings

BASES = 'deep', 'prose', 'fine', 'many'
# {name: changes to the Settings}
WAYS = {
    'published': {'dropped': 'published'},
    'kept': {'dropped': 'kept'},
    'stand-ins': {},
    'beyond': {'beyond': 1, 'budget': 1.0},
}


def columns(results):
    """{name of a base: {method: row}}, with stand-ins."""
    found = {}
    for name, ways in results.items():
        [rows] = ways['stand-ins']['columns'].values()
        found[f'{name}, K = {ways["stand-ins"]["K"]}'] = rows
    return found


def main(argv):
    p = OneLineParser(__doc__)
    p.add_argument('--only', nargs='+', choices=BASES, default=BASES, help='some of the bases')
    a = p.parse_args(argv)
    out = open_out('out/bases', 'bases.json', 'bases.png')
    results = {}
    for name in a.only:
        results[name] = {}
        for way, changes in WAYS.items():
            folder = Path(f'out/{name}/bases-{way}')
            done = folder / 'bases.json'
            if not done.exists():
                s = Settings(preset=name, **PRESETS[name], **changes)
                study = Study(s, folder)
                learnt = ['soft', 'ada-k'] if way == 'stand-ins' else ['ada-k']
                write_json(done, measure(study, [s.budget], [*RULES, *learnt]))
            results[name][way] = read_json(done)
        write_json(out / 'bases.json', results)
    show(columns(results), out / 'bases.png')


if __name__ == '__main__':
    one_line_errors('study.bases', main)
