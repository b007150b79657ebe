"""What marks a text: bos, eos and the ids at which generation stops."""
import math

import pytest
import torch

import study.sample
from hub.files import write_json
from run.evaluate import bits_per_byte
from test_tokenizer import file_of, tokenizer_of

BOS, EOS, END = 380, 381, 382           # <s>, </s>, <|x|> of the golden pipelines


def ours(bos, add):
    return {'tokenizer_config': {'bos_token': bos, 'add_bos_token': add}}


def ends(config, generation=None, token=None):
    return {
        'config': {'eos_token_id': config, 'bos_token_id': BOS},
        'generation_config': {'eos_token_id': generation},
        'tokenizer_config': {'eos_token': token},
    }


@pytest.mark.parametrize('files, front, eos, stops', [
    (ours('<s>', True), [BOS], [], set()),
    (ours({'content': '<s>'}, True), [BOS], [], set()),
    (ours('<s>', False), [], [], set()),
    (ends(EOS), [], [EOS], {EOS}),
    (ends(EOS, generation=[END, EOS]), [], [END], {END, EOS}),
    (ends(EOS, token='<|x|>'), [], [END], {EOS}),
    (ends(None, token='</s>'), [], [EOS], {EOS}),
])
def test_one_place_decides_what_marks_a_text(files, front, eos, stops, tmp_path):
    t = tokenizer_of(tmp_path, file_of('Qwen'), **files)
    assert (t.front, t.eos, t.stops) == (front, eos, stops)


def test_bos_and_eos_are_put_around_a_document_and_count_no_byte(tmp_path):
    t = tokenizer_of(tmp_path, file_of('DeepSeek-V3'), config={'eos_token_id': EOS})
    ids = t.document('größe')
    assert ids == [BOS, *t.encode('größe'), EOS]
    n_bytes = len('größe'.encode())
    assert bits_per_byte(n_bytes * math.log(2) / len(ids), torch.tensor([ids]), t) == pytest.approx(1)


def test_generation_stops_at_every_eos(finished, capsys):
    write_json(finished / 'base/generation_config.json', {'eos_token_id': list(range(320))})
    study.sample.main(['--run', str(finished), '--prompt', 'def', '--policy', 'top-k'])
    assert '--- 0 tokens' in capsys.readouterr().out
