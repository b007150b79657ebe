"""Steps and options of tokenizer.json against the ids of tokenizers 0.23 (see make_pipelines.py)."""
import gzip
import json
import sys
from pathlib import Path

import pytest

from hub.files import InputError
from hub.tokenizer import Tokenizer

FOLDER = Path(__file__).parent / 'golden'
GOLDEN = json.loads(gzip.decompress((FOLDER / 'pipelines.json.gz').read_bytes()))
CASES = {case['name']: case for case in GOLDEN['cases']}


def tokenizer_of(folder, hf, **others):
    """The Tokenizer of a folder with this tokenizer.json; others: {name of a file, _ for .: its values}."""
    for name, values in {'tokenizer': hf, **others}.items():
        (folder / f'{name}.json').write_text(json.dumps(values))
    return Tokenizer(folder)


def file_of(name, **changes):
    case = CASES[name]
    return {**case['hf'], 'model': GOLDEN['models'][case['model']], **changes}


def refused(monkeypatch, folder, hf):
    """The line with which a file is refused where the package tokenizers is not installed."""
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    with pytest.raises(InputError) as error:
        tokenizer_of(folder, hf)
    line = str(error.value)
    assert line.startswith(str(folder / 'tokenizer.json'))
    assert '\n' not in line
    return line


@pytest.mark.parametrize('name', CASES)
def test_ids_equal_the_librarys(name, tmp_path, monkeypatch):
    case = CASES[name]
    if case['foreign']:
        pytest.importorskip('tokenizers')
    else:
        monkeypatch.setitem(sys.modules, 'tokenizers', None)
    tokenizer = tokenizer_of(tmp_path, file_of(name))
    for text, plain, special in zip(GOLDEN['texts'], case['plain'], case['special']):
        assert tokenizer.encode(text) == plain, text
        assert tokenizer.prompt(text) == special, text


@pytest.mark.parametrize('name', [name for name, case in CASES.items() if case['foreign']])
def test_what_is_not_modelled_is_one_line(name, tmp_path, monkeypatch):
    line = refused(monkeypatch, tmp_path, file_of(name))
    assert CASES[name]['foreign'] in line
    assert line.endswith('pip install tokenizers')


@pytest.mark.parametrize('key, step', [
    ('normalizer', {'type': 'NFC', 'form': 2}),
    ('pre_tokenizer', True),
    ('decoder', {'type': 'WordPiece'}),
    ('added_tokens', [{'content': '<s>', 'special': 1}]),
])
def test_damaged_and_unknown_options_are_refused(key, step, tmp_path, monkeypatch):
    refused(monkeypatch, tmp_path, file_of('Qwen', **{key: step}))


def test_a_character_without_a_token_is_refused(tmp_path):
    hf = file_of('OLMoE', added_tokens=[])
    pieces = [piece for piece in hf['model']['vocab'] if piece != 'Z']
    hf['model'] = {**hf['model'], 'vocab': {piece: i for i, piece in enumerate(pieces)}}
    tokenizer = tokenizer_of(tmp_path, hf)
    with pytest.raises(InputError, match='no token for a character of'):
        tokenizer.encode('aZ')
