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
    for part in ('--- 12 tokens', 'tokens/s', 'mean k', '\x1b[48;5;', 'from black to white'):
        assert part in printed


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


@pytest.mark.parametrize('args, says', [
    ([], '--ckpt'),
    (['--policy', 'k=99'], 'k=99'),
    (['--policy', 'ada-k'], '--run'),
    (['--tokens', '0'], '--tokens'),
    (['--tokens', '10000'], 'at most'),
    (['--device', 'abacus'], 'abacus'),
    (['--prompt', ''], '--prompt'),
    (['--run', '/no/such', '--policy', 'ada-k'], 'no/such'),
    (['--ckpt', 'gpt-9'], 'gpt-9'),
])
def test_wrong_flags_are_refused_in_one_line(args, says, smoke, capsys):
    base = ['--ckpt', smoke[0] / 'base'] if args else []
    args = '--prompt', 'x', *base, *args
    assert says in refusal(capsys, 'study.sample', study.sample.main, *args)
