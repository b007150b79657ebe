"""A run folder is of one run: two that meet, one that stops over a finished one, a base that is not whole."""
import json
import os
import shutil
import threading

import pytest

import train
from allocator import AdaK
from conftest import refusal
from hub.checkpoint import base_digest
from hub.config import read_config
from hub.files import InputError
from run.ranks import join
from run.state import open_run


def refused(capsys, out, *flags):
    """The line with which train.py refuses a smoke run into `out`."""
    return refusal(capsys, 'train.py', train.main, '--preset', 'smoke', '--out', out, *flags)


@pytest.fixture
def finished(smoke, tmp_path):
    """A copy of the finished run, to be harmed."""
    return shutil.copytree(smoke[0], tmp_path / 'run')


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.suffix}


@pytest.mark.parametrize('new', [True, False])
def test_the_second_of_two_runs_is_told_who_works_there(new, smoke, tmp_path, capsys):
    out = tmp_path / 'new' if new else shutil.copytree(smoke[0], tmp_path / 'run')
    with open_run(out):
        begun = out / 'base.77.new'                            # of the first one
        begun.mkdir()
        assert f'process {os.getpid()} works there' in refused(capsys, out, '--budget', '0.5')
        assert begun.exists()
    with open_run(out):
        assert not begun.exists()                              # now it is of a dead one


def test_a_stopped_run_leaves_a_finished_one_as_it_was(finished, monkeypatch):
    before = contents(finished)

    def stop(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, 'compare', stop)                # PPO is over, the evaluation begins
    with pytest.raises(KeyboardInterrupt):
        train.main(['--preset', 'smoke', '--out', str(finished), '--budget', '0.5'])
    after = contents(finished)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize('name, value', [('budget', 0.5), ('seed', 3), ('ppo_steps', 7)])
def test_allocators_of_another_run_than_the_results_are_refused(name, value, finished):
    path = finished / 'results.json'
    results = json.loads(path.read_text())
    base = finished / 'base'
    of_run = finished, read_config(base), base_digest(base), 'cpu'
    AdaK.of_run(*of_run)
    results['config'][name] = value
    path.write_text(json.dumps(results))
    with pytest.raises(InputError, match=f'trained with {name} .*, .*results.json has {value}'):
        AdaK.of_run(*of_run)


def linked(base):
    base.rename(base.with_name('elsewhere'))
    base.symlink_to('elsewhere')


def dangling(base):
    shutil.rmtree(base)
    base.symlink_to('nowhere')


@pytest.mark.parametrize('harm, flags, says', [
    (lambda base: (base / 'tokenizer.json').unlink(), [], 'is not complete, it lacks tokenizer.json'),
    (lambda base: (base / 'model.safetensors').unlink(), [], 'is not complete, it lacks model.safetensors'),
    (linked, ['--fresh'], 'is a link, and no base can be learnt into it'),
    (dangling, [], 'is a link, and no base can be learnt into it'),
])
def test_a_base_that_cannot_be_used_is_told_before_anything_is_learnt(harm, flags, says, finished, capsys):
    harm(finished / 'base')
    assert says in refused(capsys, finished, *flags)


def test_a_linked_base_is_used(finished, capsys):
    linked(finished / 'base')
    train.main(['--preset', 'smoke', '--out', str(finished), '--ppo-steps', '1'])
    assert 'used again' in capsys.readouterr().out


def test_a_run_in_a_thread(finished):
    """Python takes signals in the main thread only."""
    failed = []

    def run():
        try:
            train.main(['--preset', 'smoke', '--out', str(finished), '--ppo-steps', '1'])
        except BaseException as e:
            failed.append(e)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failed


@pytest.mark.parametrize('world', ['', '1'])
def test_one_process_meets_nobody(world, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', world)
    join('cpu')


def test_ranks_that_nobody_started_are_one_line_at_once(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('RANK', '0')
    monkeypatch.delenv('MASTER_ADDR', raising=False)
    with pytest.raises(InputError, match='the ranks do not meet: .*MASTER_ADDR'):
        join('cpu')
