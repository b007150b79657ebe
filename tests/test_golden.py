"""Logits and token ids against the reference libraries' answers in tests/golden (see make_golden.py)."""

import json
import random
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import moe_dispatch
from hub.checkpoint import load
from hub.config import from_hf
from hub.files import read_json
from hub.safetensors import read_safetensors
from hub.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / 'golden'
MODELS = sorted(p.name for p in GOLDEN.iterdir() if p.is_dir() and not p.name.startswith('tokenizer'))
TOKENIZERS = sorted(p.name for p in GOLDEN.iterdir() if p.name.startswith('tokenizer'))


@pytest.mark.parametrize('name', MODELS)
def test_logits_equal_transformers(name):
    golden, _ = read_safetensors(GOLDEN / name / 'golden.safetensors')
    logits = load(GOLDEN / name)(golden['tokens'])
    assert (logits - golden['logits']).abs().max() < 1e-5 * max(1, golden['logits'].abs().max())


@pytest.mark.parametrize('name', TOKENIZERS)
def test_token_ids_equal_the_reference(name):
    tokenizer = Tokenizer(GOLDEN / name)
    for text, ids in json.loads((GOLDEN / name / 'golden.json').read_text()):
        assert tokenizer.encode(text) == ids, repr(text)


@pytest.mark.parametrize('name', TOKENIZERS)
def test_random_text_round_trips_and_streams(name):
    import unicodedata
    tokenizer, rng = Tokenizer(GOLDEN / name), random.Random(1)
    for _ in range(200):
        text = ''.join(
            rng.choice('ab \n.1é漢🙂ø▁') if rng.random() < 0.7 else chr(rng.randrange(1, 0xD7FF))
            for _ in range(30)
        )
        ids = tokenizer.encode(text)
        wanted = (
            unicodedata.normalize('NFC', text)
            if name in ('tokenizer-qwen', 'tokenizer-olmoe')
            else text.replace('▁', ' ')
            if tokenizer.drops_space
            else text
        )
        assert tokenizer.decode(ids) == wanted
        pieces = list(tokenizer.stream(ids))
        assert ''.join(pieces) == wanted and '\ufffd' not in ''.join(pieces)
    assert tokenizer.decode([10**6]) == ''  # ids beyond the tokenizer exist in a padded head


def test_special_tokens_are_obeyed_only_when_asked():
    tokenizer = Tokenizer(GOLDEN / 'tokenizer-qwen')
    end = tokenizer.added['<|endoftext|>']
    assert end not in tokenizer.encode('a<|endoftext|>b') and end in tokenizer.encode(
        'a<|endoftext|>b', special=True
    )
    assert tokenizer.added['<think>'] in tokenizer.encode('a<think>b')           # not special: always matched


def test_configs_of_transformers_4_and_5_say_the_same():
    for name in MODELS:
        new = read_json(GOLDEN / name / 'config.json')
        old = {**new, 'rope_theta': (new.get('rope_parameters') or new)['rope_theta'], 'rope_scaling': None}
        old.pop('rope_parameters', None)
        assert from_hf(new) == from_hf(old)


def test_sharded_and_tied_checkpoints_are_among_the_goldens():
    assert len(list((GOLDEN / 'mixtral-tied-sharded').glob('model-*.safetensors'))) > 1
    assert from_hf(read_json(GOLDEN / 'mixtral-tied-sharded/config.json')).tie
    assert from_hf(read_json(GOLDEN / 'deepseek-1/config.json')).dense_layers == (0,)
    assert from_hf(read_json(GOLDEN / 'qwen2_moe-every-second/config.json')).dense_layers == (0,)


@pytest.mark.parametrize('name', MODELS)
def test_flops_of_every_family_equal_torchs_counter(name, monkeypatch):
    monkeypatch.setattr(
        moe_dispatch, 'moe', moe_dispatch.moe_loop
    )  # the counter knows neither grouped matmuls
    model, tokens = load(GOLDEN / name), torch.randint(32, (2, 16))
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):  # nor the CPU's fused attention
        model(tokens)
    assert (
        counter.get_total_flops()
        == moe_dispatch.flops(model.config, model.config.top_k, 16)['total'] * tokens.numel()
    )
