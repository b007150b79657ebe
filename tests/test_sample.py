"""study/sample.py: text under a policy, coloured text, and wrong inputs."""
import re

import pytest
import torch

import run.standins as standins
import study.sample
from allocator import AdaK, RandomMix
from conftest import refusal
from hub.checkpoint import base_digest, load
from hub.tokenizer import Tokenizer
from model import generate
from study.sample import coloured


@pytest.fixture(scope='module')
def base(smoke):
    """(model, tokenizer) of the smoke run."""
    folder = smoke[0] / 'base'
    return load(folder), Tokenizer(folder)


def test_generation_prints_the_text_speed_and_mean_k(smoke, base, capsys):
    run = smoke[0]
    model, tokenizer = base
    flags = '--prompt', 'def f(', '--tokens', '12', '--show', '--temperature', '0'
    study.sample.main(['--run', str(run), *flags])
    printed = capsys.readouterr().out
    digest = base_digest(run / 'base')
    policy = AdaK.of_run(run, model.config, digest, 'cpu')
    standins.use(model, standins.of_run(run, digest))
    tokens = torch.tensor([tokenizer.encode('def f(')])
    written = generate(model, tokens, 12, policy)[0]
    assert printed.startswith(tokenizer.decode(written.tolist()))
    assert re.search('--- 12 tokens .* tokens/s, mean k .*\n\x1b.48;5;', printed)


def test_coloured_text_is_the_text_and_lighter_where_more_experts_ran(base):
    text = 'def größe(self):\n    return 漢'
    model, tokenizer = base
    tokens = torch.tensor([tokenizer.encode(text)])
    shown = coloured(model, tokenizer, tokens, RandomMix(2.5))
    bare = re.sub('\x1b\\[[0-9;]*m', '', shown)
    assert bare.startswith(f'{text}\n')
    greys = re.findall('48;5;(\\d+)', shown)
    assert min(greys) == '232'
    assert max(greys) == '255'


@pytest.mark.parametrize('prompt, tokens', [('', 5), ('x', 0), ('x', 10000)])
def test_too_few_and_too_many_tokens_are_refused(prompt, tokens, smoke, capsys):
    args = '--run', smoke[0], '--prompt', prompt, '--tokens', tokens
    assert 'give 1 or more of both' in refusal(capsys, 'study.sample', study.sample.main, *args)
