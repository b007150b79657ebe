"""Texts, folders and streams as people have them: read right, or refused in one line."""
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from base.documents import read_documents
from base.text import tokenize
from conftest import ROOT
from hub.files import InputError
from run.console import one_line_errors
from train import Settings


# ---------------------------------------------------------------- how much text there is

class Letters:
    """A tokenizer of one byte a token."""
    front = []

    def document(self, text):
        return list(text.encode())


def test_too_little_text_says_both_numbers():
    with pytest.raises(InputError, match='held-out split has 110 tokens, 10 sequences of 10 need 111'):
        tokenize(['x' * 110], Letters(), 10, 'held-out', 10)
    with pytest.raises(InputError, match='0 tokens, 1 sequences of 10 need 11'):
        tokenize([], Letters(), 10, 'held-out')


def test_enough_text_gives_full_batches_at_whatever_offset():
    text = tokenize(['x' * 60, 'y' * 51], Letters(), 10, 'train', 10)
    assert text.document.tolist() == [0] * 60 + [1] * 51
    assert text.tokens.element_size() + text.document.itemsize == 8
    batches = text.batches(10, seed=0)
    assert all(len(next(batches)[0]) == 10 for _ in range(50))


# ---------------------------------------------------------------- files

def texts_of(path, raw):
    """The documents of a file of these bytes."""
    path.write_bytes(raw)
    return list(read_documents(Settings(data=path)).values())


@pytest.mark.parametrize('name, text, wanted', [
    # rows end at line feeds only
    ('x.jsonl', '{"text": "a\u2028b\u2029c\x85d"}\n\n{"text": "e"}\r\n', ['a\u2028b\u2029c\x85d', 'e']),
    ('x.JSONL', '\ufeff{"text": "größe"}', ['größe']),
    ('x.txt', '\ufeffgröße\r\n\x0bb\rc', ['größe\n\x0bb\nc']),
    ('x.jsonl', '{"text": "a", "id": %s}' % ('9' * 5000), ['a']),
    # halves of characters
    ('x.jsonl', r'{"text": "\ude42\ud83d\ud83d\ude42"}', ['\ufffd\ufffd🙂']),
    # chats
    ('x.jsonl', '{"messages": [{"role": "user", "content": "hi"}, {"role": "tool", "content": "3"}]}',
     ['user: hi\n\ntool: 3']),
    ('x.jsonl', '{"messages": [{"role": "a", "content": null, "tool_calls": []}, '
     '{"role": "a", "tool_calls": []}, {"role": "b", "content": "c"}]}', ['b: c']),
])
def test_files_are_read_as_they_are_meant(name, text, wanted, tmp_path):
    assert texts_of(tmp_path / name, text.encode()) == wanted


@pytest.mark.parametrize('row', [
    '{',
    '["a"]',
    'null',
    '{"txt": "a"}',
    '{"text": 3}',
    '{"messages": "hi"}',
    '{"messages": [{"role": "user"}]}',
])
def test_other_rows_are_refused_with_their_line(row, tmp_path):
    text = '{"text": "a"}\n' + row
    with pytest.raises(InputError, match='x.jsonl:2: '):
        texts_of(tmp_path / 'x.jsonl', text.encode())


def test_bytes_that_are_no_utf8_are_said(tmp_path, capsys):
    assert texts_of(tmp_path / 'x.txt', 'größe'.encode('latin-1')) == ['gr\ufffd\ufffde']
    assert 'U+FFFD' in capsys.readouterr().err


def test_other_kinds_of_files_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match='no .txt.* file there.*files of other kinds.* such as .*x.jsonl.gz'):
        texts_of(tmp_path / 'x.jsonl.gz', b'some text')


def write_texts(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('some text')


@pytest.mark.parametrize('link, target, names', [
    ('b', 'other', ['a/x.txt', 'b/y.txt']),
    ('y.txt', 'other/y.txt', ['a/x.txt', 'y.txt']),
    ('a/up', 'data', ['a/x.txt']),
    ('again', 'data/a', ['a/x.txt']),
])
def test_links_are_followed_and_folders_read_once(link, target, names, tmp_path):
    write_texts(tmp_path, 'data/a/x.txt', 'other/y.txt')
    (tmp_path / 'data' / link).symlink_to(tmp_path / target)
    assert list(read_documents(Settings(data=tmp_path / 'data'))) == names


def test_one_line_says_what_is_left_out(tmp_path, monkeypatch, capsys):
    write_texts(tmp_path, 'a/x.txt', '._x.txt', 'a/.ipynb_checkpoints/x.py', 'secret/x.txt', 'x.parquet')
    (tmp_path / 'gone.txt').symlink_to('nowhere')
    listed = Path.iterdir

    def iterdir(path):
        if path.name == 'secret':
            raise PermissionError
        return listed(path)
    monkeypatch.setattr(Path, 'iterdir', iterdir)
    assert list(read_documents(Settings(data=tmp_path))) == ['a/x.txt']
    assert capsys.readouterr().err == (
        f'text: left out: 2 copies of macOS or Jupyter, such as {tmp_path}/._x.txt; '
        f'2 files of other kinds, or links that lead nowhere or back, such as {tmp_path}/gone.txt; '
        f'1 folders that cannot be listed, such as {tmp_path}/secret\n')


def test_no_more_is_read_than_is_used(tmp_path):
    (tmp_path / 'x.jsonl').write_text('{"text": "a"}\n' * 3 + '{')
    assert len(read_documents(Settings(data=tmp_path, documents=3))) == 3


# ---------------------------------------------------------------- the streams and the environment

def test_what_a_console_cannot_spell_is_escaped(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), 'latin-1')
    monkeypatch.setattr(sys, 'stdout', console)
    one_line_errors('x', lambda argv: print('± 漢'))
    console.flush()
    assert console.buffer.getvalue() == b'\xb1 \\u6f22\n'


def test_figures_need_no_backend_of_the_environment():
    environment = {**os.environ, 'MPLBACKEND': 'nonsense'}
    subprocess.run([sys.executable, '-c', 'import run.report'], cwd=ROOT, env=environment, check=True)
