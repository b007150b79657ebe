"""study/sample.py: text under a policy, and wrong inputs."""
import re

import pytest
import torch

import study.sample
from conftest import model_and_policy, refusal
from hub.tokenizer import Tokenizer
from model import generate


def test_generation_prints_the_text_speed_and_mean_k(smoke, capsys):
    run = smoke[0]
    tokenizer = Tokenizer(run / 'base')
    flags = '--prompt', 'def f(', '--tokens', '12', '--temperature', '0'
    study.sample.main(['--run', str(run), *flags])
    printed = capsys.readouterr().out
    model, policy = model_and_policy(run)
    tokens = torch.tensor([tokenizer.encode('def f(')])
    written = generate(model, tokens, 12, policy)[0]
    assert printed.startswith(tokenizer.decode(written.tolist()))
    assert re.search('--- 12 tokens .* tokens/s, mean k', printed)


@pytest.mark.parametrize('prompt, tokens', [('', 5), ('x', 0), ('x', 10000)])
def test_too_few_and_too_many_tokens_are_refused(prompt, tokens, smoke, capsys):
    args = '--run', smoke[0], '--prompt', prompt, '--tokens', tokens
    assert 'give 1 or more of both' in refusal(capsys, 'study.sample', study.sample.main, *args)
