"""train.py --resume: a run that was stopped anywhere ends with the same bits as one that was not."""
import os
import signal
import time
from dataclasses import replace

import pytest
import torch

import train
from allocator import Allocators
from conftest import finish, start, tiny_config
from hub.files import InputError, read_json, write_whole
from run.console import one_line_errors
from run.state import in_state, load_state, save_state


@pytest.fixture(scope='module')
def flags(quick):
    return *quick, '--save-every', '2', '--out'


def trained(flags, out, *args):
    """The allocators and the rows of a run."""
    train.main([*flags, str(out), *args])
    return (out / 'allocator.safetensors').read_bytes(), read_json(out / 'results.json')['rows']


@pytest.fixture(scope='module')
def undisturbed(flags, tmp_path_factory):
    return trained(flags, tmp_path_factory.mktemp('whole'))


def steps(state):
    return len(torch.load(state, weights_only=True)['log'])


def test_killed_at_any_moment_it_ends_the_same(undisturbed, flags, tmp_path):
    out = tmp_path / 'run'
    state = out / 'state.pt'
    [process] = start(tmp_path, (train.main, [*flags, out]))
    while process.is_alive() and not state.exists():
        time.sleep(.01)
    process.kill()
    assert finish([process])[0][0] == -signal.SIGKILL
    assert steps(state)                                        # the state is whole
    assert trained(flags, out, '--resume') == undisturbed
    assert not state.exists()


def test_a_polite_stop_saves_first(undisturbed, flags, tmp_path, monkeypatch, capsys):
    real = train.next_price
    resume = []
    for stop_at, number in (3, signal.SIGTERM), (7, signal.SIGINT):
        def within_a_step(s, first, log, config):
            if len(log) + 1 == stop_at:
                os.kill(os.getpid(), number)
            return real(s, first, log, config)
        monkeypatch.setattr(train, 'next_price', within_a_step)
        with pytest.raises(SystemExit) as exit:
            one_line_errors('train.py', train.main, [*flags, str(tmp_path), *resume])
        assert exit.value.code == 130
        assert steps(tmp_path / 'state.pt') == stop_at
        resume = ['--resume']
    monkeypatch.undo()
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


@pytest.mark.parametrize('changes, base, says', [
    ({'seed': 5}, 'a', 'seed 0, this one has 5'),
    ({}, 'another', 'base a, this one has another'),
])
def test_a_resume_that_does_not_fit_is_refused(changes, base, says, tmp_path):
    s = train.Settings()
    path = tmp_path / 'state.pt'
    with pytest.raises(InputError, match='state.pt: No such file'):
        load_state(path, {'base': 'a'}, *parts())
    log = [{'step': 1, 'price': 0.1}]
    save_state(path, {**in_state(s), 'base': 'a'}, *parts(), log)
    same = replace(s, out='elsewhere')
    assert load_state(path, {**in_state(same), 'base': 'a'}, *parts()) == log
    with pytest.raises(InputError, match=says):
        load_state(path, {**in_state(replace(s, **changes)), 'base': base}, *parts())


@pytest.mark.parametrize('error, status, says', [
    (OSError(28, 'No space left on device'), 2, 'No space left'),
    (KeyboardInterrupt(), 130, 'bench.py: interrupted'),
])
def test_a_full_disk_and_ctrl_c_are_one_line_and_the_old_file_stays(
        error, status, says, tmp_path, monkeypatch, capsys):
    def stopped(*args):
        raise error

    def main(argv):
        write_whole(tmp_path / 'x', lambda f: f.write(b'new'))
    (tmp_path / 'x').write_text('old')
    monkeypatch.setattr(os, 'replace', stopped)
    with pytest.raises(SystemExit) as exit:
        one_line_errors('bench.py', main)
    assert exit.value.code == status
    [line] = capsys.readouterr().err.splitlines()
    assert says in line
    assert [path.read_text() for path in tmp_path.iterdir()] == ['old']
