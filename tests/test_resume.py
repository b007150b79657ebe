"""train.py --resume: a run that was stopped anywhere ends with the same bits as one that was not."""
import os
import signal
import time
from dataclasses import replace

import pytest
import torch

import train
from allocator import Allocators
from base.text import Text
from conftest import finish, random_model, start, tiny_config
from hub.files import InputError, write_whole
from run.console import one_line_errors
from run.rules import SkipFamilies
from run.start import new_allocators
from run.state import load_state, save_state

@pytest.fixture(scope='module')
def flags(quick):
    return *quick, '--save-every', '2', '--out'


def trained(flags, out, *args):
    train.main([*flags, str(out), *args])
    return (out / 'allocator.safetensors').read_bytes()


@pytest.fixture(scope='module')
def undisturbed(flags, tmp_path_factory):
    """The allocators that a whole run trains."""
    return trained(flags, tmp_path_factory.mktemp('whole'))


def steps(state):
    return len(torch.load(state, weights_only=True)['log'])


def test_killed_at_any_moment_it_ends_the_same(undisturbed, flags, tmp_path):
    out = tmp_path / 'run'
    state = out / 'state.pt'
    done = 0
    for resume in ([], ['--resume']):
        [process] = start(tmp_path, (train.main, [*flags, out, *resume]))
        while process.is_alive() and not (state.exists() and steps(state) > done):
            time.sleep(.01)
        process.kill()
        assert finish([process])[0][0] == -signal.SIGKILL
        assert steps(state) > done                             # whole at every moment
        done = steps(state)
    assert trained(flags, out, '--resume') == undisturbed
    assert not state.exists()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_polite_stop_saves_first(number, undisturbed, flags, tmp_path, monkeypatch, capsys):
    real = train.ppo_step

    def step(s, step, *args):
        if step == 7:
            os.kill(os.getpid(), number)
        return real(s, step, *args)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(train, 'ppo_step', step)
        trained(flags, tmp_path)
    assert exit.value.code == 130
    assert steps(tmp_path / 'state.pt') == 7
    assert trained(flags, tmp_path, '--resume') == undisturbed
    assert 'resumed after step 7' in capsys.readouterr().out


# ---------------------------------------------------------------- what may go wrong

def parts():
    """What a state is saved from and put back into."""
    allocators = Allocators(tiny_config(), 6, True)
    optimizer = torch.optim.AdamW(allocators.parameters(), 0.1)
    allocators.weight.sum().backward()
    optimizer.step()
    return allocators, optimizer, torch.Generator().manual_seed(3)


def of_another_version(path):
    state = torch.load(path, weights_only=True)
    del state['settings']['group']
    write_whole(path, lambda f: torch.save(state, f))


@pytest.mark.parametrize('damage, changes, loss, says', [
    (None, dict(seed=5), 2.0, 'seed 0, this one has 5'),
    (None, dict(discount=0.5), 2.0, 'discount 0.9, this one has 0.5'),
    (None, {}, 2.1, 'another base model or text: base_loss was 2.0'),
    (of_another_version, {}, 2.0, 'state.pt: damaged, or of another version'),
    (lambda path: os.truncate(path, 5000), {}, 2.0, 'state.pt: '),
    (lambda path: path.unlink(), {}, 2.0, 'start without --resume'),
])
def test_a_resume_that_does_not_fit_is_refused(damage, changes, loss, says, tmp_path):
    s = train.Settings()
    path = tmp_path / 'state.pt'
    log = [{'step': 1, 'price': 0.1}]
    save_state(path, s, {'base_loss': 2.0}, *parts(), log)
    assert load_state(path, replace(s, out='elsewhere'), {'base_loss': 2.0}, *parts()) == log
    if damage:
        damage(path)
    with pytest.raises(InputError, match=says):
        load_state(path, replace(s, **changes), {'base_loss': loss}, *parts())


def test_a_loss_of_nan_leaves_the_last_good_state(tmp_path, monkeypatch):
    model = random_model(tiny_config(top_k=4))
    s = train.Settings(ppo_steps=9, save_every=2, seq=16, ppo_batch=4)
    text = Text(torch.randint(50, (1000,)), torch.zeros(1000).numpy())
    real = train.rollout_reward
    log = []

    def reward(*args):
        of_rollouts, of_topk = real(*args)
        return (of_rollouts * float('nan') if len(log) == 5 else of_rollouts), of_topk
    monkeypatch.setattr(train, 'rollout_reward', reward)
    allocators, price = new_allocators(s, model, text, SkipFamilies(model, text.windows(16)))
    state = tmp_path / 'state.pt'
    with pytest.raises(InputError, match='step 6'):
        train.train_ppo(s, model, allocators, price, text, log, text.windows(16, 256), state)
    assert len(log) == 5 and allocators.weight.isfinite().all()
    assert steps(state) == 4
    saved = torch.load(state, weights_only=True)['allocators']
    assert all(t.isfinite().all() for t in saved.values())


def test_a_full_disk_is_one_line_and_the_old_file_stays(tmp_path, monkeypatch, capsys):
    def full(f):
        raise OSError(28, 'No space left on device')

    def main(argv):
        write_whole(tmp_path / 'x', lambda f: f.write(b'new'))
    (tmp_path / 'x').write_text('old')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(SystemExit) as exit:
        one_line_errors('train.py', main)
    assert exit.value.code == 2 and 'No space left' in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ['old']


def test_ctrl_c_in_a_stage_without_a_state_is_one_line(capsys):
    def main(argv):
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as exit:
        one_line_errors('bench.py', main)
    assert exit.value.code == 130
    assert capsys.readouterr().err == 'bench.py: interrupted; files that were complete before still are\n'
