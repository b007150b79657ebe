"""study/exercise.py: every exercise is open without a solution and closed with ours; LESSON.md is true."""
import contextlib
import functools
import importlib
import io
import operator
import re
import sys
import types

import pytest
import torch

import ppo
import train
from allocator import Allocators, Rollout, TopP, find_knob
from conftest import ROOT, random_model, refusal, tiny_config
from study import exercise
from study.exercise import EXERCISES, blanked


# ---------------------------------------------------------------- tests that only exercises need

def test_ppo_step_goes_down_the_gradient_of_ppo_loss():
    """Two epochs of plain gradient descent, against the loss of all layers at once."""
    model = random_model(tiny_config())
    s = train.Settings(seq=8, group=2, ppo_lr=0.5, epochs=2)
    inputs, targets = torch.randint(50, (2, 2, 8))
    document = torch.zeros(2, 8)
    noise = torch.rand(3, 2 * 16)
    ours, theirs = [Allocators(model.config, 4, True) for _ in range(2)]
    our_sgd, their_sgd = [torch.optim.SGD(a.parameters(), 0.5) for a in (ours, theirs)]
    rollout = Rollout(ours, noise)
    reward = train.rollout_reward(s, model, inputs, targets, rollout)[1:]
    credit = ppo.reward_to_go(reward, s.discount, document)
    adv = ppo.group_advantage(credit.flatten(1)).flatten()
    z, k, logp = map(torch.stack, zip(*[one_pass for [one_pass] in rollout.drawn]))         # (L,G*P,..) each
    for _ in range(2):
        logits = torch.stack(list(map(ours.logits, range(3), z)))           # (L,G*P,A)
        loss, stats = ppo.ppo_loss(logits, k, logp, adv, 0.1, train.CLIP, 0.02)
        our_sgd.zero_grad()
        loss.backward()
        our_sgd.step()
    row = train.ppo_step(s, 1, model, theirs, their_sgd, (inputs, targets, document), noise, 0.1, 0.02)
    torch.testing.assert_close(theirs.state_dict(), ours.state_dict())
    assert row['loss'] == pytest.approx(loss.item(), rel=1e-4)
    assert row['mean_k'] == pytest.approx(stats['mean_k'].item(), rel=1e-4)


def test_your_rule_can_be_set_to_a_mean_k():
    probs = torch.randn(2000, 8).softmax(-1)
    x = torch.randn(2000, 16)

    def mean_k(p):
        k = TopP(p, 8)(0, x, probs)
        assert k.shape == (2000,)
        assert k.dtype == torch.long
        assert 1 <= k.min() <= k.max() <= 8
        return k.float().mean().item()
    assert mean_k(0.1) <= mean_k(0.5) <= mean_k(0.9)
    knob = find_knob(mean_k, 2.5, 0, 1, 8)
    assert mean_k(knob) == pytest.approx(2.5, abs=0.1)


# ---------------------------------------------------------------- open without a solution, closed with ours

@functools.cache
def blank(name):
    """(the function of an exercise, the code that it has in the copy)"""
    this = EXERCISES[name]
    file = this['file']
    source = blanked((ROOT / file).read_text(), this)
    ours = importlib.import_module(file[:-3])
    theirs = types.ModuleType(file[:-3])
    exec(compile(source, file, 'exec'), theirs.__dict__)
    function = operator.attrgetter(this['function'])
    return function(ours), function(theirs).__code__


WANTED = {(name, test) for name, e in EXERCISES.items() for test in e['tests']}


class Blanking:
    """A plugin of pytest: runs every test without each function that it is to check, then as it is."""

    def __init__(self):
        self.open = set()                                      # (exercise, test) that could not be passed

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item):
        for name, test in WANTED:
            if test == item.nodeid.split('[')[0]:
                function, code = blank(name)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(function, '__code__', code)
                    with pytest.raises(NotImplementedError, match='your turn: '):
                        item.runtest()
                self.open.add((name, test))


def test_every_test_fails_without_its_function_and_passes_with_it():
    tests = sorted({str(ROOT / test) for _, test in WANTED})
    blanking = Blanking()
    printed = io.StringIO()
    modules = dict(sys.modules)
    with contextlib.redirect_stdout(printed):
        status = pytest.main(['-q', '--rootdir', str(ROOT), '-p', 'no:cacheprovider', *tests], [blanking])
    sys.modules.update(modules)                                # the inner run has a conftest of its own
    assert status == 0, printed.getvalue()
    assert blanking.open == WANTED


def test_a_copy_from_the_first_look_to_the_solution(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exercise, 'COPIES', tmp_path)
    exercise.main(['Skip'])
    file = tmp_path / 'Skip/allocator.py'
    assert f'open {file} ' in capsys.readouterr().out
    source = (ROOT / 'allocator.py').read_text()
    assert file.read_text() == blanked(source, EXERCISES['Skip'])
    # solved with >= in place of >
    wrong = source.replace('(tail_ratios(p) > beta)', '(tail_ratios(p) >= beta)')
    file.write_text(wrong)
    with pytest.raises(SystemExit):
        exercise.main(['Skip', '--check'])
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) < 12
    assert printed.startswith('Skip: not yet\ntests/test_allocator.py:')
    assert 'index 1 diff: 3 != 2' in printed
    # never written over
    assert 'Skip is there already' in refusal(capsys, 'study.exercise', exercise.main, 'Skip')
    assert file.read_text() == wrong
    file.write_text(source)
    exercise.main(['Skip', '--check'])
    assert re.match(r'Skip: \d+ passed', capsys.readouterr().out)


def test_the_list_and_wrong_names(capsys, tmp_path, monkeypatch):
    exercise.main([])
    printed = capsys.readouterr().out
    line = refusal(capsys, 'study.exercise', exercise.main, 'clip')
    assert all(name in printed and name in line for name in EXERCISES)
    monkeypatch.setattr(exercise, 'COPIES', tmp_path)
    line = refusal(capsys, 'study.exercise', exercise.main, 'Skip', '--check')
    assert 'No such file' in line and str(tmp_path / 'Skip') in line


# ---------------------------------------------------------------- LESSON.md

def test_the_answers_of_the_lesson_are_what_its_commands_print(capsys):
    lesson = (ROOT / 'LESSON.md').read_text()
    pairs = re.findall(r"python -c '\n(.*?)\n'.*?<details>.*?`(.*?)`: ", lesson, re.DOTALL)
    assert len(pairs) == 5
    for source, answer in pairs:
        exec(source, {})
        assert capsys.readouterr().out == f'{answer}\n'
