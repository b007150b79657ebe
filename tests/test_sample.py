"""study/sample.py: text under each policy, coloured text, and wrong inputs."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import study.sample
from allocator import AdaK, Allocators, RandomMix, Skip, TopK, TopP
from conftest import refusal
from hub.checkpoint import load
from hub.tokenizer import Tokenizer
from model import generate
from study.passage import coloured
from study.policies import make_policy

ROOT = Path(__file__).parent.parent


def test_generation_prints_the_text_speed_and_mean_k(smoke):
    run = smoke[0]
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'study.sample',
            '--run',
            run,
            '--prompt',
            'def f(',
            '--tokens',
            '12',
            '--show',
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    model, tokenizer = load(run / 'base'), Tokenizer(run / 'base')
    policy = AdaK(Allocators.load(run / 'allocator.safetensors', model.config))
    tokens = torch.tensor([tokenizer.encode('def f(')])
    text = tokenizer.decode(generate(model, tokens, 12, policy)[0].tolist())
    assert done.stdout.startswith(text)
    assert (
        'tokens/s' in done.stdout
        and 'mean k' in done.stdout
        and '\x1b[48;5;' in done.stdout
        and 'over the layers' in done.stdout
    )


def test_coloured_text_is_the_text(smoke):
    import re
    model, tokenizer = load(smoke[0] / 'base'), Tokenizer(smoke[0] / 'base')
    ids = tokenizer.encode('def größe(self):\n    return 漢')
    shown = coloured(model, tokenizer, torch.tensor([ids]), RandomMix(2.5))
    assert re.sub('\x1b\\[[0-9;]*m', '', shown).startswith('def größe(self):\n    return 漢\n')


@pytest.mark.parametrize(
    'name, kind, k_max',
    [
        ('top-k', TopK, 3),
        ('k=2', TopK, 2),
        ('mix=1.5', RandomMix, 2),
        ('top-p=.4', TopP, 8),
        ('skip=0.5', Skip, 3),
    ],
)
def test_policies_by_name(name, kind, k_max):
    from conftest import tiny_config
    policy = make_policy(name, tiny_config(), None, 'cpu')
    assert type(policy) is kind and policy.k_max == k_max


@pytest.mark.parametrize(
    'args, says',
    [
        ([], '--ckpt'),
        (['--policy', 'k=99'], 'k=99'),
        (['--policy', 'k=1.5'], 'k=1.5'),
        (['--policy', 'best'], 'best'),
        (['--policy', 'ada-k'], '--run'),
        (['--tokens', '0'], '--tokens'),
        (['--temperature', '-1'], '--temperature'),
        (['--device', 'abacus'], 'abacus'),
        (['--prompt', ''], '--prompt'),
        (['--run', '/no/such', '--policy', 'ada-k'], 'no/such'),
        (['--ckpt', 'gpt-9'], 'gpt-9'),
    ],
)
def test_wrong_flags_are_refused_in_one_line(args, says, smoke, capsys):
    base = [] if not args else ['--ckpt', smoke[0] / 'base']
    assert says in refusal(capsys, 'study.sample', study.sample.main, '--prompt', 'x', *base, *args)
