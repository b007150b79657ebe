"""Steps and options of tokenizer.json against the ids of tokenizers 0.23 (see make_pipelines.py)."""
import gzip
import json
import sys

import pytest

from conftest import ROOT
from hub.files import InputError
from hub.tokenizer import Tokenizer

GOLDEN = json.loads(gzip.decompress((ROOT / 'tests/golden/pipelines.json.gz').read_bytes()))
CASES = {case['name']: case for case in GOLDEN['cases']}


def tokenizer_of(folder, hf, **others):
    """The Tokenizer of a folder with this tokenizer.json; others: {name of a file, _ for .: its values}."""
    for name, values in {'tokenizer': hf, **others}.items():
        (folder / f'{name}.json').write_text(json.dumps(values))
    return Tokenizer(folder)


def file_of(name, **changes):
    case = CASES[name]
    return {**case['hf'], 'model': GOLDEN['models'][case['model']], **changes}


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
        assert tokenizer.prompt(text) == special[:len(special) - (name == 'bos and eos')], text


@pytest.mark.parametrize('hf, says', [
    *[(file_of(name), case['foreign']) for name, case in CASES.items() if case['foreign']],
    (file_of('Qwen', normalizer={'type': 'NFC', 'form': 2}), 'form'),
])
def test_what_is_not_modelled_is_one_line(hf, says, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    with pytest.raises(InputError) as error:
        tokenizer_of(tmp_path, hf)
    line = str(error.value)
    assert line.startswith(str(tmp_path / 'tokenizer.json'))
    assert '\n' not in line
    assert says in line
    assert line.endswith('pip install tokenizers')
