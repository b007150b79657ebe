"""Texts, folders and streams as people have them: read right, or refused in one line."""
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from base.documents import digest_of, read_documents, split_documents
from base.text import Text, tokenize
from conftest import refusal
from hub.files import InputError
from hub.tokenizer import Tokenizer
from run.evaluate import clustered_error

ROOT, TOKENIZERS = Path(__file__).parent.parent, Path(__file__).parent / 'golden'
WORDS = 'the cat sat on the mat and looked at the dog. '


# ---------------------------------------------------------------- 1 nothing of the user's is lost

@pytest.mark.parametrize('theirs', [
    ['base/notes.txt'], ['base/model.safetensors'], ['base/recipe.json'], ['results.json'], ['log.csv'],
    ['training.png'], ['allocator.safetensors'], ['state.safetensors'], ['log.csv', 'layers.png']])
def test_what_no_run_wrote_is_not_written_over(theirs, tmp_path, capsys):
    for name in theirs:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"mine": 1}')
    for more in ([], ['--fresh']):
        line = refusal(capsys, 'train.py', train.main, '--preset', 'smoke', '--out', tmp_path,
                       '--data', ROOT / 'train.py', *more)
        assert 'choose another --out' in line
    assert all((tmp_path / name).read_text() == '{"mine": 1}' for name in theirs)


def test_only_what_a_killed_run_had_begun_is_swept(tmp_path):
    from run.state import open_run
    theirs = ['plan.new', 'results.new', 'base.new/x', 'log.csv.new', 'my.log.csv.12.new', 'base.old.new/y']
    ours = ['results.json.12.new', 'base.345.new/model.safetensors.345.new', 'layers.png.7.new']
    for name in theirs + ours:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('x')
    open_run(tmp_path)
    assert all((tmp_path / name).exists() for name in theirs)
    assert not any((tmp_path / name).exists() for name in ours)


def test_a_base_with_files_of_others_in_it_is_not_replaced(smoke, tmp_path, capsys):
    shutil.copytree(smoke[0], tmp_path / 'run')
    (tmp_path / 'run/base/notes.txt').write_text('mine')
    line = refusal(capsys, 'train.py', train.main, '--preset', 'smoke', '--out', tmp_path / 'run', '--fresh')
    assert 'notes.txt' in line and (tmp_path / 'run/base/notes.txt').read_text() == 'mine'
    assert (tmp_path / 'run/base/model.safetensors').exists()


# ---------------------------------------------------------------- 2 to 5 how much text there is

@pytest.mark.parametrize('chats, flags', [
    (60, ['--seq', 2048]), (60, ['--ppo-batch', 4000]), (25, ['--seq', 512])])
def test_too_little_text_is_said_before_training(chats, flags, tmp_path, capsys):
    rows = (json.dumps({'messages': [{'role': 'user', 'content': WORDS * 8}]}) for _ in range(chats))
    (tmp_path / 'chats.jsonl').write_text('\n'.join(rows))
    start = time.time()
    line = refusal(capsys, 'train.py', train.main, '--preset', 'smoke', '--out', tmp_path / 'o',
                   '--data', tmp_path / 'chats.jsonl', *flags)
    assert 'sequence' in line and time.time() - start < 60


def test_too_little_text_says_both_numbers():
    class Letters:
        def document(self, text):
            return list(text.encode())
    with pytest.raises(InputError, match='train split has 9 sequences of 10 tokens, a batch needs 10'):
        tokenize(['x' * 109], Letters(), 10, 'train', 10)
    text = tokenize(['x' * 110], Letters(), 10, 'train', 10)
    batches = text.batches(10, 10, torch.Generator().manual_seed(0))
    assert all(len(next(batches)[0]) == 10 for _ in range(50))             # at whatever offset


@pytest.mark.parametrize('size', [1000, 130_000, 500_000, 3_000_000])
def test_one_file_gives_text_to_every_split(size, tmp_path):
    (tmp_path / 'one.txt').write_text((WORDS * (size // len(WORDS) + 1))[:size])
    parts = split_documents(read_documents(tmp_path / 'one.txt', 10))
    shares = [sum(map(len, part)) / size for part in parts]
    assert sum(shares) == pytest.approx(1) and shares[0] > 0.7 and min(shares[1:]) > 0.04
    assert all(len(part) >= 2 for part in parts)


def test_one_document_has_an_error_of_its_parts():
    delta = np.random.default_rng(0).normal(size=4096)
    error = clustered_error(delta, np.zeros(4096, int))
    assert error == clustered_error(delta, np.arange(4096) // 256)         # 16 equal parts
    assert 0.3 < error * math.sqrt(4096) < 3


@pytest.mark.parametrize('T, limit', [(128, 65536), (8193, 8192), (9000, 100)])
def test_there_is_at_least_one_window(T, limit):
    text = Text(torch.arange(30_000), np.zeros(30_000, int))
    inputs, targets, _ = text.windows(T, limit)
    assert 1 <= len(inputs) <= max(1, limit // T) and torch.equal(inputs + 1, targets)


# ---------------------------------------------------------------- 6 to 9 files

def documents_of(folder, raw, name='x.jsonl'):
    (folder / name).write_bytes(raw)
    return list(read_documents(folder / name, 100).values())


@pytest.mark.parametrize('text', ['a\u2028b', 'a\u2029b', 'a\x85b', 'a\x0bb\x0cc\x1cd\x1ed', 'tab\tin'])
def test_rows_of_jsonl_end_at_line_feeds_only(text, tmp_path):
    raw = f'{json.dumps({"text": text}, ensure_ascii=False)}\n\n{json.dumps({"text": "second"})}\r\n'
    assert documents_of(tmp_path, raw.encode()) == [text, 'second']


@pytest.mark.parametrize('mark, code', [(b'\xef\xbb\xbf', 'utf-8'), (b'\xff\xfe', 'utf-16-le'),
                                        (b'\xfe\xff', 'utf-16-be')])
@pytest.mark.parametrize('name', ['x.jsonl', 'x.txt'])
def test_byte_order_marks_are_no_text(mark, code, name, tmp_path):
    row = '{"text": "größe"}' if name == 'x.jsonl' else 'größe'
    assert documents_of(tmp_path, mark + row.encode(code), name) == ['größe']


@pytest.mark.parametrize('messages, text', [
    ([{'role': 'user', 'content': [{'type': 'text', 'text': 'hi '}, {'type': 'text', 'text': 'you'}]}],
     'user: hi you'),
    ([{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': None, 'tool_calls': [{}]},
      {'role': 'assistant', 'tool_calls': [{}]}, {'role': 'tool', 'content': '3'}], 'user: hi\n\ntool: 3'),
    ([{'role': 'user', 'content': []}], 'user: '), ([], '')])
def test_chats_are_joined(messages, text, tmp_path):
    rows = [{'messages': messages}, {'text': 'more'}]
    assert documents_of(tmp_path, '\n'.join(map(json.dumps, rows)).encode()) == [text, 'more']


@pytest.mark.parametrize('row', [
    {'messages': [{'role': 'user', 'content': [{'type': 'image_url', 'image_url': 'x'}]}]},
    {'messages': [{'role': 'user', 'content': {'text': 'hi'}}]},
    {'messages': [{'role': 'user', 'content': 3}]},
    {'messages': [{'role': None, 'content': 'hi'}]}, {'messages': [{'role': 'user'}]}, {'messages': 'hi'},
    {'messages': [{'role': 'user', 'content': ['hi']}]}, {'messages': {'role': 'user'}}, {'text': None},
    {'text': ['a']}, {'prompt': 'a'}, ['a'], 'a', 3, None,
    {'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': None}]}]}])
def test_other_rows_are_refused_with_their_line(row, tmp_path):
    with pytest.raises(InputError, match=r'x\.jsonl:2: '):
        documents_of(tmp_path, f'{{"text": "a"}}\n{json.dumps(row)}\n'.encode())


@pytest.mark.parametrize('name', ['x.jsonl.gz', 'x.parquet', 'x.json', 'x.md', 'x.csv', 'x', 'x.txt.zst'])
def test_other_kinds_of_files_are_refused_by_name(name, tmp_path, capsys):
    with pytest.raises(InputError, match=name):
        documents_of(tmp_path, b'some text', name)
    (tmp_path / 'y.txt').write_text('some text')
    assert list(read_documents(tmp_path, 100)) == ['y.txt'] and name in capsys.readouterr().err


@pytest.mark.parametrize('name', ['x.JSONL', 'x.Jsonl'])
def test_a_suffix_counts_whatever_its_case(name, tmp_path):
    assert documents_of(tmp_path, b'{"text": "a"}', name) == ['a']
    (tmp_path / 'B.TXT').write_text('b')
    assert len(read_documents(tmp_path, 100)) == 2


@pytest.mark.parametrize('text', [r'\ud83d', r'a\udc00b', r'\ude42\ud83d'])
def test_halves_of_characters_become_the_replacement_character(text, tmp_path):
    [found] = documents_of(tmp_path, f'{{"text": "{text}"}}'.encode())
    assert '\ufffd' in found and found.encode()
    assert documents_of(tmp_path, rb'{"text": "\ud83d\ude42"}') == ['🙂']
    tokenizer = Tokenizer(TOKENIZERS / 'tokenizer-qwen')
    assert tokenizer.encode('a\ud83db') == tokenizer.encode('a\ufffdb')


def test_names_that_are_no_utf8(tmp_path):
    for i in range(30):
        with open(os.fsencode(tmp_path) + b'/\xff%d.txt' % i, 'w') as f:
            f.write(f'text {i}')
    documents = read_documents(tmp_path, 100)
    assert len(documents) == 30 and len(digest_of(documents)) == 64
    assert sum(map(len, split_documents(documents))) == 30


# ---------------------------------------------------------------- 20, 21 the streams and the environment

SCRIPT = 'import sys; sys.path.insert(0, {root!r}); from run.console import one_line_errors; {act}'


@pytest.mark.parametrize('env, how', [
    ({'LC_ALL': 'C', 'PYTHONIOENCODING': 'ascii'}, ''), ({'PYTHONIOENCODING': 'latin-1:strict'}, ''),
    ({}, ' | head -c 1 > /dev/null'), ({}, ' >&-'), ({}, ' > /dev/full')])
def test_printing_never_raises(env, how, tmp_path):
    act = ('one_line_errors("x", lambda argv: ([print("± 漢 " * 2000, flush=True) for _ in range(99)], '
           f'open({str(tmp_path / "done")!r}, "w").close()))')
    command = f'{sys.executable} -c {json.dumps(SCRIPT.format(root=str(ROOT), act=act))}{how}'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, errors='replace',
                          env={**os.environ, **env}, executable='/bin/bash', timeout=60)
    assert 'Traceback' not in done.stderr and 'Exception' not in done.stderr and (tmp_path / 'done').exists()


@pytest.mark.parametrize('backend', ['module://matplotlib_inline.backend_inline', 'TkAgg', 'nonsense'])
def test_figures_do_not_care_for_the_backend(backend):
    done = subprocess.run([sys.executable, '-c', 'import run.report, run.speed, study.bases'], cwd=ROOT,
                          env={**os.environ, 'MPLBACKEND': backend}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
