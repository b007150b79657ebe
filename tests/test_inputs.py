"""Texts, folders and streams as people have them: read right, or refused in one line."""
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from base.documents import read_documents, split_documents, text_digest
from base.text import Text, tokenize
from conftest import refusal
from hub.files import InputError
from run.console import one_line_errors
from run.evaluate import clustered_error
from run.state import open_run

ROOT = Path(__file__).parent.parent
WORDS = 'the cat sat on the mat and looked at the dog. '


def refused(capsys, out, *flags):
    """The line with which train.py refuses a smoke run into `out`."""
    return refusal(capsys, 'train.py', train.main, '--preset', 'smoke', '--out', out, *flags)


# ---------------------------------------------------------------- nothing of the user's is lost

@pytest.mark.parametrize('more', [[], ['--fresh']])
@pytest.mark.parametrize('theirs', [
    'base/notes.txt', 'base/model.safetensors', 'base/recipe.json', 'results.json', 'log.csv', 'training.png',
    'allocator.safetensors', 'state.pt',
])
def test_what_no_run_wrote_is_not_written_over(theirs, more, tmp_path, capsys):
    path = tmp_path / theirs
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"mine": 1}')
    for _ in range(2):
        assert 'choose another --out' in refused(capsys, tmp_path, '--data', ROOT / 'train.py', *more)
    assert path.read_text() == '{"mine": 1}'


def test_only_what_a_killed_run_had_begun_is_swept(tmp_path):
    theirs = ['plan.new', 'results.new', 'base.new/x', 'log.csv.new', 'my.log.csv.12.new', 'base.old.new/y']
    ours = ['results.json.12.new', 'base.345.new/model.safetensors.345.new', 'training.png.7.new']
    for name in theirs + ours:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('x')
    with open_run(tmp_path):
        pass
    assert all((tmp_path / name).exists() for name in theirs)
    assert not any((tmp_path / name).exists() for name in ours)


def test_a_base_with_files_of_others_in_it_is_not_replaced(smoke, tmp_path, capsys):
    base = tmp_path / 'run/base'
    shutil.copytree(smoke[0], tmp_path / 'run')
    (base / 'notes.txt').write_text('mine')
    assert 'notes.txt' in refused(capsys, tmp_path / 'run', '--fresh')
    assert (base / 'notes.txt').read_text() == 'mine'
    assert (base / 'model.safetensors').exists()


# ---------------------------------------------------------------- how much text there is

@pytest.mark.parametrize('chats, flags', [
    (60, ['--seq', 2048]),
    (60, ['--ppo-batch', 4000]),
    (25, ['--seq', 512]),
])
def test_too_little_text_is_said_before_training(chats, flags, tmp_path, capsys):
    data = tmp_path / 'chats.jsonl'
    row = json.dumps({'messages': [{'role': 'user', 'content': WORDS * 8}]})
    data.write_text(f'{row}\n' * chats)
    line = refused(capsys, tmp_path / 'o', '--data', data, *flags)
    assert 'sequence' in line
    assert not (tmp_path / 'o/base').exists()


class Letters:
    """A tokenizer of one byte a token."""
    front = []

    def document(self, text):
        return list(text.encode())


@pytest.mark.parametrize('texts, B, line', [
    (['x' * 109], 10, '109 tokens, 10 sequences of 10 need 110'),
    (['x' * 10], 0, '10 tokens, 1 sequences of 10 need 11'),
    ([], 0, '0 tokens, 1 sequences of 10 need 11'),
])
def test_too_little_text_says_both_numbers(texts, B, line):
    with pytest.raises(InputError, match=f'held-out split has {line}'):
        tokenize(texts, Letters(), 10, 'held-out', B)


def test_enough_text_gives_full_batches_at_whatever_offset():
    text = tokenize(['x' * 60, 'y' * 50], Letters(), 10, 'train', 10)
    assert text.document.tolist() == [0] * 60 + [1] * 50
    batches = text.batches(10, 10, torch.Generator())
    assert all(len(next(batches)[0]) == 10 for _ in range(50))


@pytest.mark.parametrize('size', [1000, 130_000, 500_000, 3_000_000])
def test_one_file_gives_text_to_every_split(size, tmp_path):
    path = tmp_path / 'one.txt'
    path.write_text((WORDS * size)[:size])
    parts = split_documents(read_documents(path, 10))
    train_size, *others = [sum(map(len, part)) for part in parts]
    assert train_size + sum(others) == size
    assert train_size > 0.7 * size
    assert min(others) > 0.04 * size
    assert all(len(part) >= 2 for part in parts)


def test_one_document_has_an_error_of_its_parts():
    delta = np.random.default_rng(0).normal(size=4096)
    parts = np.arange(4096) // 256                             # 16 equal ones
    error = clustered_error(delta, np.zeros(4096))
    assert error == pytest.approx(clustered_error(delta, parts))
    assert 0.3 < 64 * error < 3


@pytest.mark.parametrize('T, limit, n', [(128, 8192, 64), (8193, 8192, 1), (9000, 100, 1)])
def test_there_is_at_least_one_window(T, limit, n):
    text = Text(torch.arange(30_000), np.zeros(30_000))
    inputs, targets, _ = text.windows(T, limit)
    assert inputs.shape == (n, T)
    assert torch.equal(inputs + 1, targets)


# ---------------------------------------------------------------- files

def texts_of(path, raw):
    """The documents of a file of these bytes."""
    path.write_bytes(raw)
    return list(read_documents(path, 100).values())


@pytest.mark.parametrize('name, text, wanted', [
    # rows end at line feeds only
    ('x.jsonl', '{"text": "a\u2028b\u2029c\x85d"}\n\n{"text": "e"}\r\n', ['a\u2028b\u2029c\x85d', 'e']),
    ('x.jsonl', '\ufeff{"text": "größe"}', ['größe']),
    ('x.txt', '\ufeffgröße\r\n\x0bb\rc', ['größe\n\x0bb\nc']),
    ('x.JSONL', '{"text": "a"}', ['a']),
    ('x.jsonl', '{"text": "a", "id": %s, "less": -%s}' % ('9' * 5000, '1' * 5000), ['a']),
    ('x.Txt', 'a', ['a']),
    # halves of characters
    ('x.jsonl', r'{"text": "\ud83d"}', ['\ufffd']),
    ('x.jsonl', r'{"text": "\ude42\ud83d\ud83d\ude42"}', ['\ufffd\ufffd🙂']),
    # chats
    ('x.jsonl', '{"messages": []}\n{"text": "more"}', ['', 'more']),
    ('x.jsonl', '{"messages": [{"role": "user", "content": "hi"}, {"role": "tool", "content": "3"}]}',
     ['user: hi\n\ntool: 3']),
    ('x.jsonl', '{"messages": [{"role": "a", "content": null, "tool_calls": []}, '
     '{"role": "a", "tool_calls": []}, {"role": "b", "content": "c"}]}', ['b: c']),
])
def test_files_are_read_as_they_are_meant(name, text, wanted, tmp_path):
    assert texts_of(tmp_path / name, text.encode()) == wanted


@pytest.mark.parametrize('row', [
    '{',
    '[]',
    '["a"]',
    '"a"',
    '3',
    'null',
    '{"txt": "a"}',
    '{"text": null}',
    '{"text": 3}',
    '{"text": ["a"]}',
    '{"messages": "hi"}',
    '{"messages": ["hi"]}',
    '{"messages": {"role": "user"}}',
    '{"messages": [{"role": "user"}]}',
    '{"messages": [{"role": null, "content": "hi"}]}',
    '{"messages": [{"role": "user", "content": 3}]}',
    '{"messages": [{"role": "user", "content": {"text": "hi"}}]}',
    '{"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}',
])
def test_other_rows_are_refused_with_their_line(row, tmp_path, capsys):
    (tmp_path / 'x.jsonl').write_text('{"text": "a"}\n' + row)
    line = refused(capsys, tmp_path / 'o', '--data', tmp_path / 'x.jsonl')
    assert 'x.jsonl:2: ' in line


@pytest.mark.parametrize('raw', ['größe'.encode('utf-16'), 'größe'.encode('latin-1'), b'a\xef\xbf\xbd'])
def test_bytes_that_are_no_utf8_are_said(raw, tmp_path, capsys):
    [text] = texts_of(tmp_path / 'x.txt', raw)
    assert '\ufffd' in text
    [line] = capsys.readouterr().err.splitlines()
    assert 'U+FFFD' in line


@pytest.mark.parametrize('name', ['x.jsonl.gz', 'x.parquet', 'x.json', 'x.md', 'x.csv', 'x', 'x.txt.zst'])
def test_other_kinds_of_files_are_refused_by_name(name, tmp_path, capsys):
    with pytest.raises(InputError, match=name):
        texts_of(tmp_path / name, b'some text')
    (tmp_path / 'y.txt').write_text('some text')
    assert list(read_documents(tmp_path, 100)) == ['y.txt']
    assert name in capsys.readouterr().err


@pytest.fixture
def folder(tmp_path):
    """A folder with a/x.txt, and one beside it with y.txt."""
    for path in ('data/a/x.txt', 'other/y.txt'):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text('some text')
    return tmp_path / 'data'


@pytest.mark.parametrize('link, target, names', [
    ('b', 'other', ['a/x.txt', 'b/y.txt']),
    ('y.txt', 'other/y.txt', ['a/x.txt', 'y.txt']),
    ('a/up', 'data', ['a/x.txt']),
    ('a/self', 'data/a', ['a/x.txt']),
    ('again', 'data/a', ['a/x.txt']),
])
def test_links_are_followed_and_folders_read_once(link, target, names, folder, capsys):
    (folder / link).symlink_to(folder.parent / target)
    assert list(read_documents(folder, 100)) == names
    assert not capsys.readouterr().err


@pytest.mark.parametrize('name, why', [
    ('._x.txt', 'copies of macOS or Jupyter'),
    ('__MACOSX/x.txt', 'copies of macOS or Jupyter'),
    ('a/.ipynb_checkpoints/x.py', 'copies of macOS or Jupyter'),
    ('x.parquet', 'files of other kinds'),
])
def test_one_line_says_what_is_left_out(name, why, folder, capsys):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text('another text')
    (folder / 'gone.txt').symlink_to('nowhere')
    assert list(read_documents(folder, 100)) == ['a/x.txt']
    [line] = capsys.readouterr().err.splitlines()
    assert f'1 {why}, such as {folder}' in line
    assert '1 names without a regular file' in line


def test_folders_that_cannot_be_listed_are_said(folder, monkeypatch, capsys):
    listed = Path.iterdir

    def iterdir(path):
        if path.name == 'secret':
            raise PermissionError
        return listed(path)
    monkeypatch.setattr(Path, 'iterdir', iterdir)
    (folder / 'secret').mkdir()
    assert list(read_documents(folder, 100)) == ['a/x.txt']
    assert capsys.readouterr().err == (
        f'text: left out: 1 folders that cannot be listed, such as {folder}/secret\n')
    with pytest.raises(InputError, match='no .txt.* file there.*cannot be listed'):
        read_documents(folder / 'secret', 100)


def test_no_more_is_read_than_is_used(tmp_path):
    (tmp_path / 'x.jsonl').write_text('{"text": "a"}\n' * 3 + '{')
    assert len(read_documents(tmp_path, 3)) == 3


def test_a_token_takes_8_bytes():
    text = tokenize(['x' * 60], Letters(), 10, 'train')
    assert text.tokens.element_size() + text.document.itemsize == 8
    inputs, targets, _ = text.windows(10)
    assert inputs.dtype == targets.dtype == torch.int64


def test_names_that_are_no_utf8(tmp_path):
    for i in range(30):
        name = os.fsdecode(b'\xff%d.txt' % i)
        (tmp_path / name).write_text(f'text {i}')
    documents = read_documents(tmp_path, 100)
    assert len(documents) == 30
    assert len(text_digest(documents)) == 64
    assert sum(map(len, split_documents(documents))) == 30


# ---------------------------------------------------------------- the streams and the environment

@pytest.mark.parametrize('encoding, printed', [('ascii', '\\xb1 \\u6f22\n'), ('latin-1', '± \\u6f22\n')])
def test_what_a_console_cannot_spell_is_escaped(encoding, printed, monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, 'stdout', console)
    one_line_errors('x', lambda argv: print('± 漢'))
    console.flush()
    assert console.buffer.getvalue().decode(encoding) == printed


@pytest.mark.parametrize('backend', ['module://matplotlib_inline.backend_inline', 'TkAgg', 'nonsense'])
def test_figures_need_no_backend_of_the_environment(backend):
    done = subprocess.run(
        [sys.executable, '-c', 'import run.report'],
        cwd=ROOT,
        env={**os.environ, 'MPLBACKEND': backend},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
