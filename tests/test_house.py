"""The house: who may import whom, no circle, and files short and narrow, from the code."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SIX = 'moe_dispatch', 'model', 'allocator', 'ppo', 'train', 'bench'
# every file may import only files that stand before it: so there is no circle and no arrow upwards
FLOORS = [
    ['moe_dispatch', 'hub.files', 'hub.safetensors', 'hub.regex', 'hub.pipeline', 'hub.bpe'],
    ['model'],
    ['hub.config', 'hub.checkpoint', 'hub.tokenizer'],
    ['allocator', 'hub.plug'],
    ['ppo'],
    ['scale.memory', 'scale.stream', 'scale.shard'],
    ['run.ranks', 'run.console', 'run.state', 'run.evaluate', 'run.report', 'run.timing', 'run.beside',
     'run.speed', 'run.rules', 'run.start'],
    ['base.documents', 'base.text', 'base.pretrain'],
    ['base.frozen'],
    ['train'],
    ['bench'],
    ['scale.plan', 'study.policies', 'study.study', 'study.passage', 'study.classes', 'study.frontier',
     'study.bases', 'study.published', 'study.ablations', 'study.analysis', 'study.sample',
     'study.tasks']]
# what the files that are read aloud may lean on, no more
ALLOWED = {
    'moe_dispatch': set(),
    'model': {'moe_dispatch'},
    'allocator': {'hub.safetensors'},
    'ppo': {'allocator'},
}


def path_of(module):
    return ROOT / f'{module.replace(".", "/")}.py'


def modules():
    """The dotted name of every file of the project but tests and empty __init__.py."""
    rooms = [path.parent for path in ROOT.glob('*/__init__.py')]
    paths = [*ROOT.glob('*.py'), *(path for room in rooms for path in room.rglob('*.py'))]
    names = {'.'.join(path.relative_to(ROOT).with_suffix('').parts): path for path in paths}
    return {name for name, path in names.items() if path.stat().st_size}


def imports(source):
    """The names of all modules that a source imports, anywhere in it: `from a import b` is a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, 'imports are absolute'
            found |= {node.module, *(f'{node.module}.{alias.name}' for alias in node.names)}
    return found


def arrows():
    """[(file, what it imports of the project), ..]."""
    known = modules()
    return [
        (name, other)
        for name in sorted(known)
        for other in sorted(imports(path_of(name).read_text()) & known)
    ]


def upwards(arrows):
    """The arrows that do not point downwards."""
    order = [name for floor in FLOORS for name in floor]
    return [(name, other) for name, other in arrows if order.index(other) >= order.index(name)]


def too_wide(text):
    """[(number, line)] of lines above 110 characters."""
    return [(i, line) for i, line in enumerate(text.splitlines(), 1) if len(line) > 110]


def test_every_file_has_its_floor():
    assert sorted(name for floor in FLOORS for name in floor) == sorted(modules())


def test_imports_point_downwards():
    assert upwards(arrows()) == []
    assert ('train', 'ppo') in arrows() and ('model', 'moe_dispatch') in arrows()


@pytest.mark.parametrize('name', ALLOWED)
def test_the_lower_files_lean_on_little(name):
    assert {other for file, other in arrows() if file == name} <= ALLOWED[name]


def test_files_of_another_floor_do_not_know_each_other_by_circle():
    """What `upwards` must catch: an arrow up, a file that imports itself, an import inside a function."""
    assert (
        upwards([('hub.files', 'train')])
        and upwards([('ppo', 'ppo')])
        and not upwards([('ppo', 'allocator')])
    )
    assert imports('def f():\n    from run import console\n    import ppo, study.tasks') == {
        'run', 'run.console', 'ppo', 'study.tasks'}


def test_the_model_knows_no_file_format_no_tokenizer_no_ranks():
    text = path_of('model').read_text()
    assert not re.search(r'import json|tiktoken|distributed|safetensors', text.split('"""', 2)[2])


def test_files_are_short():
    lines = {name: len(path_of(name).read_text().splitlines()) for name in modules()}
    assert sum(lines[name] for name in SIX) <= 1900
    assert all(lines[name] <= 450 for name in SIX)
    assert not {name: n for name, n in lines.items() if name not in SIX and n > 300}


@pytest.mark.parametrize('folder', ['tests', '.ci'])
def test_other_sources_are_short_too(folder):
    assert not {path.name: n for path in (ROOT / folder).glob('*.py')
                if (n := len(path.read_text().splitlines())) > 300}


def test_lines_are_narrow():
    paths = [path_of(name) for name in modules()] + [
        *(ROOT / 'tests').glob('*.py'),
        *(ROOT / '.ci').glob('*.py'),
    ]
    assert {path.name: wide for path in paths if (wide := too_wide(path.read_text()))} == {}
    assert too_wide('a' * 110 + '\n' + 'ö' * 111) == [(2, 'ö' * 111)]


def test_the_front_door_is_short():
    readme = (ROOT / 'README.md').read_text()
    assert len(readme.splitlines()) <= 200 and len(readme.encode()) <= 14 * 1024
