"""study/exercise.py: write the functions of the method yourself, one at a time.

    python -m study.exercise                          the exercises, in reading order
    python -m study.exercise clipped_loss             a copy of the project without the body of this function
    python -m study.exercise clipped_loss --check     its tests on your copy: passed, or what differs

The copy lies in out/exercise/NAME/ and is made from the code as it is; the three commands do the same there.
What there is to write, with equations, hints and tests, is in exercises.toml beside this file.
"""
import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from hub.files import InputError
from run.console import OneLineParser, one_line_errors

# the project's folder, also from within a copy
ROOT = Path(re.sub('(/out/exercise/[^/]+)?/study/exercise.py$', '', __file__))
COPIES = ROOT / 'out/exercise'
EXERCISES = tomllib.loads(Path(__file__).with_name('exercises.toml').read_text('utf-8'))


def blanked(source, exercise):
    """The source of a file, with the hint in place of what is to be written."""
    function = ast.parse(source)
    for name in exercise['function'].split('.'):
        function = next(node for node in function.body if getattr(node, 'name', '') == name)
    body = function.body[1:]                                   # behind the docstring
    kind = getattr(ast, exercise.get('from', 'stmt'))
    start = next(statement for statement in body if isinstance(statement, kind))
    lines = source.splitlines(keepends=True)
    your_turn = f'{" " * start.col_offset}raise NotImplementedError("your turn: {exercise["hint"]}")\n'
    lines[start.lineno - 1:function.end_lineno] = [your_turn]
    return ''.join(lines)


def make(exercise, folder):
    """Copy the project's own files to `folder`, one function blanked, and say how to go on."""
    if folder.exists():
        raise InputError(f'{folder} is there already and stays as it is: go on there, or move it away')
    folder.mkdir(parents=True)
    for path in ROOT.glob('[!.]*'):
        if path.is_file():
            shutil.copy(path, folder)
        elif any(path.glob('*.py')):                           # not what was trained or downloaded
            shutil.copytree(
                path,
                folder / path.name,
                ignore=shutil.ignore_patterns('__pycache__'))
    file = folder / exercise['file']
    file.write_text(blanked(file.read_text(), exercise))
    print(f'{folder.name}, about {exercise["minutes"]} minutes: {exercise["equation"]}\n'
          f'open {file} and write what "your turn" asks for\n'
          f'then python -m study.exercise {folder.name} --check')


def check(exercise, folder):
    """Run the tests of an exercise in its copy; exit with status 1 unless they pass."""
    pytest = [sys.executable, *'-m pytest -x -q --tb=short --color=no'.split(), *exercise['tests']]
    done = subprocess.run(pytest, cwd=folder, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.splitlines()
    if done.returncode:
        # where it failed in the project's files, and what pytest says of it
        told = [line for line in lines if re.match(r'\w[\w/]*\.py:\d+: |E +\S|ERROR', line)]
        print(f'{folder.name}: not yet', *told[:10], sep='\n')
        sys.exit(1)
    print(f'{folder.name}: {lines[-1]}. Now compare yours with {exercise["file"]}:{exercise["function"]}')


def main(argv):
    p = OneLineParser(__doc__)
    p.add_argument('name', nargs='?', choices=EXERCISES, help='an exercise (without it: the list)')
    p.add_argument('--check', action='store_true', help='run its tests on your copy')
    a = p.parse_args(argv)
    if a.name:
        act = check if a.check else make
        act(EXERCISES[a.name], COPIES / a.name)
        return
    for name, exercise in EXERCISES.items():
        print(
            f'{name}, {exercise["minutes"]} minutes, {exercise["file"]}:{exercise["function"]}',
            f'  {exercise["equation"]}',
            *exercise['tests'],
            '',
            sep='\n',
        )


if __name__ == '__main__':
    one_line_errors('study.exercise', main)
