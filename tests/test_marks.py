"""What marks a text: bos, eos, special tokens; and tokens against the text that they spell."""
import json
import math
import shutil
import unicodedata

import pytest
import torch

import study.sample
from conftest import refusal
from hub.checkpoint import load
from hub.files import write_json
from hub.tokenizer import Tokenizer
from model import generate
from run.evaluate import bits_per_byte
from study.analysis import token_classes
from test_tokenizer import FOLDER, file_of, tokenizer_of

TOKENIZERS = sorted(FOLDER.glob('tokenizer-*'))
BOS, EOS, END = 380, 381, 382           # <s>, </s>, <|x|> of the golden pipelines


# ---------------------------------------------------------------- what marks a text

def ours(bos, add):
    return {'tokenizer_config': {'bos_token': bos, 'add_bos_token': add}}


def ends(config, generation=None, token=None):
    return {
        'config': {'eos_token_id': config, 'bos_token_id': BOS},
        'generation_config': {'eos_token_id': generation},
        'tokenizer_config': {'eos_token': token},
    }


@pytest.mark.parametrize('files, front, eos, stops', [
    (ours('<s>', True), [BOS], None, set()),
    (ours({'content': '<s>'}, True), [BOS], None, set()),
    (ours('<s>', False), [], None, set()),
    (ends(EOS), [], EOS, {EOS}),
    (ends(EOS, generation=[END, EOS]), [], END, {END, EOS}),
    (ends(EOS, token='<|x|>'), [], END, {EOS}),
    (ends(None, token='</s>'), [], EOS, {EOS}),
    (ends([]), [], None, set()),
])
def test_one_place_decides_what_marks_a_text(files, front, eos, stops, tmp_path):
    t = tokenizer_of(tmp_path, file_of('Qwen'), **files)
    assert t.front == front
    assert t.eos == eos
    assert t.stops == stops
    behind = [] if eos is None else [eos]
    assert t.document('the</s>') == front + t.encode('the</s>') + behind
    assert EOS not in t.encode('the</s>')
    assert t.prompt('a</s>')[-1] == EOS


def test_bos_and_eos_count_no_byte(tmp_path):
    t = tokenizer_of(tmp_path, file_of('DeepSeek-V3'), config={'eos_token_id': EOS})
    ids = torch.tensor([t.document('größe')])
    assert ids[0, 0] == BOS
    assert ids[0, -1] == EOS
    n_bytes = len('größe'.encode())
    assert bits_per_byte(n_bytes * math.log(2), (None, ids), t) == pytest.approx(1)


def test_generation_stops_at_every_eos(smoke, tmp_path, capsys):
    run = tmp_path / 'run'
    shutil.copytree(smoke[0], run)
    flags = ['--run', str(run), '--prompt', 'def', '--policy', 'top-k', '--tokens', '12']
    flags += ['--temperature', '0']
    study.sample.main(flags)
    whole = capsys.readouterr().out
    ids = Tokenizer(run / 'base').prompt('def')
    written = generate(load(run / 'base'), torch.tensor([ids]), 12)[0, len(ids):].tolist()
    write_json(run / 'base/generation_config.json', {'eos_token_id': [1, written[3]]})
    study.sample.main(flags)
    assert '--- 12 tokens' in whole
    assert f'--- {written.index(written[3])} tokens' in capsys.readouterr().out


def test_a_token_beyond_the_embedding_is_one_line(smoke, tmp_path, capsys):
    run = tmp_path / 'run'
    shutil.copytree(smoke[0], run)
    path = run / 'base/tokenizer.json'
    hf = json.loads(path.read_text())
    hf['added_tokens'] += [{**hf['added_tokens'][0], 'content': f'<{i}>'} for i in range(3)]
    path.write_text(json.dumps(hf))
    flags = ['--run', run, '--policy', 'top-k', '--prompt', 'a<2>']
    line = refusal(capsys, 'sample', study.sample.main, *flags)
    assert 'the tokenizer gives id 322, the model has only 320 tokens' in line


# ---------------------------------------------------------------- tokens and their text

@pytest.mark.parametrize('folder', TOKENIZERS, ids=lambda folder: folder.name)
def test_classes_follow_the_text_as_the_tokenizer_sees_it(folder):
    tokenizer = Tokenizer(folder)
    ids = tokenizer.document('x = 1  # e\u0301 größe\nprint("ﬁ")\n')
    classes = token_classes(tokenizer, ids)
    assert len(classes) == len(ids)
    seen = {tokenizer.decode([i]).strip(): name for i, name in zip(ids, classes)}
    assert seen['x'] == 'content word'
    assert seen['1'] == 'number'
    assert seen['#'] == 'operator, punctuation'


@pytest.mark.parametrize('folder', TOKENIZERS, ids=lambda folder: folder.name)
@pytest.mark.parametrize('text', [
    ' ' * 10 ** 6 + 'end',
    ' \n' * 50_000,
    'x' * 100_000,
])
def test_a_million_in_a_row_is_read(folder, text):
    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == unicodedata.normalize('NFC', text)
    assert ids[:100] == tokenizer.encode(text[:4800])[:100]
