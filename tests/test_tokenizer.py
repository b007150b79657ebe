"""Steps and options of tokenizer.json against the ids of tokenizers 0.23 (see make_pipelines.py)."""
import gzip
import json
from pathlib import Path

import pytest

from hub.tokenizer import Tokenizer

GOLDEN = json.loads(gzip.decompress((Path(__file__).parent / 'golden/pipelines.json.gz').read_bytes()))
CASES = {case['name']: case for case in GOLDEN['cases']}


def tokenizer_of(folder, hf, **others):
    """The Tokenizer of a folder with this tokenizer.json; others: {name of a file, _ for .: its values}."""
    for name, values in {'tokenizer': hf, **others}.items():
        (folder / f'{name}.json').write_text(json.dumps(values))
    return Tokenizer(folder)


def file_of(case):
    return {**case['hf'], 'model': {**GOLDEN['models'][case['model']], **case['hf']['model']}}


def test_there_are_enough_of_them():
    assert len(CASES) >= 30 and len(GOLDEN['texts']) >= 150


@pytest.mark.parametrize('name', CASES)
def test_ids_equal_the_librarys(name, tmp_path):
    tokenizer, case = tokenizer_of(tmp_path, file_of(CASES[name])), CASES[name]
    for text, plain, special in zip(GOLDEN['texts'], case['plain'], case['special']):
        assert tokenizer.encode(text) == plain, text
        assert tokenizer.prompt(text) == special, text
