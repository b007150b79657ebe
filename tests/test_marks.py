"""What marks a text: bos, eos, special tokens; and tokens against the text that they spell."""
import json
import math
import shutil
import unicodedata
from pathlib import Path

import pytest
import torch

import study.sample
from conftest import refusal
from hub.checkpoint import load
from hub.files import write_json
from hub.tokenizer import Tokenizer
from model import generate
from run.evaluate import bits_per_byte
from study.classes import prose_classes, python_classes, token_classes
from test_tokenizer import GOLDEN, tokenizer_of

TOKENIZERS = Path(__file__).parent / 'golden'


# ---------------------------------------------------------------- 12, 13 what marks a text

PLAIN = {**GOLDEN['cases'][0]['hf'], 'pre_tokenizer': None, 'normalizer': None,
         'model': GOLDEN['models']['unk']}
BOS, EOS, END = 260, 261, 262
ADDED = [{'id': i, 'content': c, 'special': True, 'single_word': False, 'lstrip': False, 'rstrip': False,
          'normalized': False} for i, c in ((BOS, '<s>'), (EOS, '</s>'), (END, '<|end|>'))]
ADDS_BOS = {'type': 'TemplateProcessing', 'pair': [],
            'special_tokens': {'<s>': {'id': '<s>', 'ids': [BOS], 'tokens': []}},
            'single': [{'SpecialToken': {'id': '<s>', 'type_id': 0}},
                       {'Sequence': {'id': 'A', 'type_id': 0}}]}


@pytest.mark.parametrize('post, files, front, eos, stops', [
    (None, dict(config={'bos_token_id': BOS, 'eos_token_id': EOS}), [], EOS, {EOS}),
    (ADDS_BOS, dict(config={'bos_token_id': None}), [BOS], None, set()),
    (None, dict(tokenizer_config={'bos_token': '<s>', 'add_bos_token': True}), [BOS], None, set()),
    (None, dict(tokenizer_config={'bos_token': {'content': '<s>'}, 'add_bos_token': True}), [BOS], None,
     set()),
    (None, dict(tokenizer_config={'bos_token': '<s>', 'add_bos_token': False}), [], None, set()),
    (None, dict(config={'eos_token_id': EOS}, generation_config={'eos_token_id': [END, EOS]}), [], END,
     {END, EOS}),
    (None, dict(config={'eos_token_id': [EOS, END]}), [], EOS, {EOS, END}),
    (None, dict(config={'eos_token_id': EOS}, tokenizer_config={'eos_token': '<|end|>'}), [], END, {EOS}),
    (None, dict(tokenizer_config={'eos_token': '</s>'}), [], EOS, {EOS}),
    (None, dict(config={'eos_token_id': []}, generation_config={'eos_token_id': None}), [], None, set())])
def test_one_place_decides_what_marks_a_text(post, files, front, eos, stops, tmp_path):
    t = tokenizer_of(tmp_path, {**PLAIN, 'added_tokens': ADDED, 'post_processor': post}, **files)
    assert (t.front, t.eos, t.stops) == (front, eos, stops)
    behind = [] if eos is None else [eos]
    assert t.document('▁the') == front + t.encode('▁the') + behind
    assert t.prompt('a</s>')[-1] == EOS
    assert EOS not in t.encode('a</s>') and EOS not in t.document('a</s>')[:-1]


def test_bos_and_eos_count_no_byte(tmp_path):
    t = tokenizer_of(tmp_path, {**PLAIN, 'added_tokens': ADDED, 'post_processor': ADDS_BOS},
                     config={'eos_token_id': EOS})
    ids = torch.tensor([t.document('▁the')])
    n_bytes = len('▁the'.encode())
    assert bits_per_byte(n_bytes * math.log(2), (None, ids), t) == pytest.approx(1)


def test_generation_stops_at_every_eos(smoke, tmp_path, capsys):
    shutil.copytree(smoke[0], tmp_path / 'run')
    flags = ['--run', str(tmp_path / 'run'), '--prompt', 'def', '--policy', 'top-k', '--tokens', '12']
    study.sample.main(flags)
    whole = capsys.readouterr().out
    tokenizer = Tokenizer(tmp_path / 'run/base')
    ids = tokenizer.prompt('def')
    written = generate(load(tmp_path / 'run/base'), torch.tensor([ids]), 12, None)[0, len(ids):].tolist()
    write_json(tmp_path / 'run/base/generation_config.json', {'eos_token_id': [1, written[3]]})
    study.sample.main(flags)
    n = written.index(written[3])
    assert f'--- {n} tokens' in capsys.readouterr().out and '--- 12 tokens' in whole


def test_a_token_beyond_the_embedding_is_one_line(smoke, tmp_path, capsys):
    shutil.copytree(smoke[0], tmp_path / 'run')
    path = tmp_path / 'run/base/tokenizer.json'
    hf = json.loads(path.read_text())
    more = [{**hf['added_tokens'][0], 'id': 320 + i, 'content': f'<{i}>'} for i in range(3)]
    path.write_text(json.dumps({**hf, 'added_tokens': hf['added_tokens'] + more}))
    line = refusal(capsys, 'sample', study.sample.main, '--run', tmp_path / 'run', '--policy', 'top-k',
                   '--prompt', 'a<2>')
    assert 'the tokenizer gives id 322, the model has only 320 tokens' in line
    line = refusal(capsys, 'sample', study.sample.main, '--run', tmp_path / 'run', '--policy', 'top-k',
                   '--prompt', 'def ' * 2000, '--tokens', '5')
    assert 'reads at most 2048' in line


# ---------------------------------------------------------------- 15, 22 tokens and their text

@pytest.mark.parametrize('name', sorted(p.name for p in TOKENIZERS.glob('tokenizer-*')))
def test_classes_follow_the_text_as_the_tokenizer_sees_it(name):
    source = 'x = 1  # e\u0301 größe\nprint("ﬁ")\n'
    tokenizer = Tokenizer(TOKENIZERS / name)
    ids = tokenizer.document(source)
    for classes_of in (python_classes, prose_classes):
        assert len(token_classes(tokenizer, ids, classes_of)) == len(ids)
    texts = (tokenizer.decode([i]).strip() for i in ids)
    seen = dict(zip(texts, token_classes(tokenizer, ids, python_classes)))
    assert seen['x'] == 'identifier' and seen['1'] == 'number' and seen['#'] == 'comment, docstring'


@pytest.mark.parametrize('name', sorted(p.name for p in TOKENIZERS.glob('tokenizer-*')))
@pytest.mark.parametrize('text', [
    ' ' * 10 ** 6, ' ' * 10 ** 6 + 'end', '\t \n' * 50_000, 'x' * 200_000, '\n' * 100_000])
def test_a_million_in_a_row_is_read(name, text):
    tokenizer = Tokenizer(TOKENIZERS / name)
    ids, few = tokenizer.encode(text), tokenizer.encode(text[:4800])
    spelt = ''.join(tokenizer.stream(ids))
    assert spelt == unicodedata.normalize('NFC', text) and ids[:100] == few[:100]
