"""Logits and token ids against the reference libraries' answers in tests/golden (see make_golden.py)."""
import json
import random

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import moe_dispatch
from allocator import TopK
from conftest import GOLDEN, assert_close
from hub.checkpoint import load
from hub.safetensors import read_safetensors
from hub.tokenizer import Tokenizer

MODELS = sorted(path.parent.name for path in GOLDEN.glob('*/golden.safetensors'))
TOKENIZERS = sorted(path.parent.name for path in GOLDEN.glob('*/golden.json'))


@pytest.mark.parametrize('name', MODELS)
def test_logits_equal_transformers(name):
    golden, _ = read_safetensors(GOLDEN / name / 'golden.safetensors')
    logits = load(GOLDEN / name)(golden['tokens'])
    assert_close(logits, golden['logits'])


@pytest.mark.parametrize('name', TOKENIZERS)
def test_token_ids_equal_the_reference(name):
    tokenizer = Tokenizer(GOLDEN / name)
    golden = (GOLDEN / name / 'golden.json').read_text()
    for text, ids in json.loads(golden):
        assert tokenizer.encode(text) == ids, repr(text)


@pytest.mark.parametrize('name', TOKENIZERS)
def test_random_and_long_text_round_trips_and_streams(name):
    tokenizer = Tokenizer(GOLDEN / name)
    rng = random.Random(1)
    rare = ''.join(map(chr, range(1, 0xD7FF, 700)))
    texts = [' ' * 10 ** 5 + 'end', 'x' * 10 ** 5]
    for _ in range(200):
        letters = rng.choices('ab \n.1é漢🙂ø' * 9 + rare, k=30)
        texts.append(''.join(letters))
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text            # by way of `stream`
    assert tokenizer.decode([10 ** 6]) == ''        # ids beyond the tokenizer exist in a padded head


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('k', [1, 4])
def test_flops_of_every_family_equal_torchs_counter(k, name, monkeypatch):
    # the counter knows neither grouped matmuls nor the CPU's fused attention
    monkeypatch.setattr(moe_dispatch, 'path_of', lambda *of_what: moe_dispatch.moe_loop)
    model = load(GOLDEN / name)
    tokens = torch.randint(32, (2, 16))
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        model(tokens, TopK(k))
    flops = moe_dispatch.flops(model.config, k, 16)
    assert counter.get_total_flops() == flops['total'] * tokens.numel()
