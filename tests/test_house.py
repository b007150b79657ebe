"""The house: who may import whom, no circle, and how much code there is, from the code itself."""
import io
import re
import tokenize

import pytest

from conftest import ROOT

ROOMS = [ROOT, *(path.parent for path in ROOT.glob('*/__init__.py'))]
FILES = [path for room in ROOMS for path in room.glob('*.py') if path.stat().st_size]
MODULES = {'.'.join(path.relative_to(ROOT).with_suffix('').parts): path for path in FILES}
TESTS = {*(ROOT / 'tests').glob('test_*.py')}
HELPERS = {*(ROOT / 'tests').glob('*.py'), *(ROOT / '.ci').glob('*.py')} - TESTS
SIX = 'moe_dispatch', 'model', 'allocator', 'ppo', 'train', 'bench'
# every file may import only files that stand before it: so there is no circle and no arrow upwards
ORDER = [
    'run.experts_cpu', 'moe_dispatch', 'hub.files', 'hub.safetensors',
    'model',
    'hub.config', 'hub.checkpoint', 'hub.tokenizer',
    'allocator',
    'ppo',
    'scale.memory', 'scale.graph', 'scale.stream', 'scale.shard',
    'run.ranks', 'run.console', 'run.state', 'run.evaluate', 'run.report', 'run.timing',
    'run.rules', 'run.standins', 'run.compare',
    'run.start',
    'hub.plug', 'run.speed',
    'base.documents', 'base.text', 'base.pretrain',
    'base.frozen',
    'train',
    'bench',
    'scale.plan', 'study.policies', 'study.study', 'study.frontier', 'study.bases', 'study.recipes',
    'study.analysis', 'study.sample', 'study.exercise', 'study.tasks', 'study.explore',
]
# what the files that are read aloud may lean on, no more
ALLOWED = {
    'moe_dispatch': {'run.experts_cpu'},
    'model': {'moe_dispatch'},
    'allocator': {'moe_dispatch', 'hub.files', 'hub.safetensors'},
    'ppo': set(),
}


def imports(path):
    """The names of all modules that a file imports, anywhere in it: `from a import b` is a and a.b."""
    found = set()
    for package, name in re.findall(r'^ *(?:from (\S+) )?import ([\w.]*)', path.read_text(), re.MULTILINE):
        found |= {package, name, f'{package}.{name}'}
    return found


ARROWS = {(name, other) for name, path in MODULES.items() for other in imports(path) & MODULES.keys()}


def test_imports_point_downwards():
    assert sorted(ORDER) == sorted(MODULES)
    upwards = [(name, other) for name, other in ARROWS if ORDER.index(other) >= ORDER.index(name)]
    assert upwards == []
    assert {('train', 'ppo'), ('model', 'moe_dispatch')} < ARROWS


@pytest.mark.parametrize('name', ALLOWED)
def test_the_lower_files_lean_on_little(name):
    assert {other for file, other in ARROWS if file == name} <= ALLOWED[name]


# ---------------------------------------------------------------- how much code there is

NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
           tokenize.ENCODING, tokenize.ENDMARKER}
BEHIND_A_STATEMENT = tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING


def size(text):
    """(Python tokens, lines of code): without comments, docstrings and line ends."""
    n = 0
    lines = set()
    starts_statement = True
    inside = 0                                                 # f-strings, one token each as in Python 3.11
    for t in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[t.type]
        inside += name == 'FSTRING_START'
        if inside > 1 or inside and name != 'FSTRING_START':
            inside -= name == 'FSTRING_END'
            continue
        docstring = t.type == tokenize.STRING and starts_statement
        if t.type not in (tokenize.NL, tokenize.COMMENT):
            starts_statement = t.type in BEHIND_A_STATEMENT
        if t.type not in NO_CODE and not docstring:
            n += 1
            lines.add(t.start[0])
    return n, len(lines)


def total(paths):
    sizes = [size(path.read_text()) for path in paths]
    return [sum(numbers) for numbers in zip(*sizes)]


def test_size_by_hand():
    text = '"""Doc."""\nx = 1  # one\n\n\ndef f(a):\n    """Doc."""\n    return (a +\n            x)\n'
    assert size(text) == (15, 4)


def test_there_is_little_code_and_it_is_not_dense():
    tokens, lines = total(FILES)
    assert tokens <= 38_200
    assert tokens / lines <= 9.5
    assert total(MODULES[name] for name in SIX)[0] <= 10_000


def test_there_is_little_code_in_the_tests_too():
    assert total(TESTS)[0] <= 32_000
    assert total(HELPERS)[0] <= 5_500


def test_lines_are_narrow():
    for path in (*FILES, *TESTS, *HELPERS):
        assert max(map(len, path.read_text().splitlines())) <= 110, path


def test_the_front_door_is_short():
    readme = (ROOT / 'README.md').read_text()
    assert len(readme.splitlines()) <= 120
    assert len(readme.split()) <= 1300
