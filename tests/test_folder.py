"""A run folder is of one run: two that meet, one that stops over a finished one, a base that is not whole."""
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

import train
from base.frozen import is_there
from conftest import ROOT, refusal
from hub.checkpoint import base_digest
from hub.config import read_config
from hub.files import InputError, read_json, write_json
from run.ranks import join, my_rank, n_ranks
from run.state import open_run, trained_policy


def refused(capsys, out, *flags):
    """The line with which train.py refuses a smoke run into `out`."""
    return refusal(capsys, 'train.py', train.main, '--preset', 'smoke', '--out', out, *flags)


def test_the_second_of_two_runs_is_told_who_works_there(finished, capsys):
    with open_run(finished):
        begun = finished / 'base.77.new'                       # of the first one
        begun.mkdir()
        assert f'process {os.getpid()} works there' in refused(capsys, finished)
        assert begun.exists()


def test_a_stopped_run_leaves_a_finished_one_as_it_was(finished, monkeypatch):
    def contents():
        return {path.name: path.read_bytes() for path in finished.glob('*.*')}
    before = contents()

    def stop(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, 'compare', stop)                # PPO is over, the evaluation begins
    with pytest.raises(KeyboardInterrupt):
        train.main(['--preset', 'smoke', '--out', str(finished), '--budget', '0.5'])
    assert before.items() <= contents().items()


def test_allocators_of_another_run_than_the_results_are_refused(finished):
    path = finished / 'results.json'
    base = finished / 'base'
    of_run = finished, read_config(base), base_digest(base)
    assert trained_policy(*of_run).fitted.keys() == {'rho', 'eta', 'A', 'B', 'b'}
    results = read_json(path)
    results['config']['seed'] = 3
    write_json(path, results)
    with pytest.raises(InputError, match='trained with seed 0, .*results.json has 3'):
        trained_policy(*of_run)


def linked(base):
    base.rename(base.with_name('elsewhere'))
    base.symlink_to('elsewhere')


@pytest.mark.parametrize('harm, flags, says', [
    (lambda base: (base / 'tokenizer.json').unlink(), [], 'is not complete'),
    (linked, ['--fresh'], 'is a link, and no base can be learnt into it'),
])
def test_a_base_that_cannot_be_used_is_told_before_anything_is_learnt(harm, flags, says, finished, capsys):
    harm(finished / 'base')
    assert says in refused(capsys, finished, *flags)


def test_a_linked_base_is_used_and_a_run_may_be_in_a_thread(finished, capsys):
    """Python takes signals in the main thread only."""
    linked(finished / 'base')
    flags = ['--preset', 'smoke', '--out', str(finished), '--ppo-steps', '1']
    with ThreadPoolExecutor() as pool:
        pool.submit(train.main, flags).result()
    assert 'used again' in capsys.readouterr().out


@pytest.mark.parametrize('size', ['', '1'])
def test_one_process_meets_nobody(size, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', size)
    join('cpu')
    assert (my_rank(), n_ranks()) == (0, 1)


# ---------------------------------------------------------------- nothing of the user's is lost

@pytest.mark.parametrize('more', [[], ['--fresh']])
@pytest.mark.parametrize('theirs', ['base/notes.txt', 'base/recipe.json', 'results.json', 'state.pt'])
def test_what_no_run_wrote_is_not_written_over(theirs, more, tmp_path, capsys):
    path = tmp_path / theirs
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"mine": 1}')
    for _ in range(2):
        assert 'choose another --out' in refused(capsys, tmp_path, '--data', ROOT / 'train.py', *more)
    assert path.read_text() == '{"mine": 1}'


def test_only_what_a_killed_run_had_begun_is_swept(tmp_path):
    theirs = ['results.new', 'my.log.csv.12.new', 'base.old.new/y']
    ours = ['results.json.12.new', 'base.345.new/model.safetensors.345.new']
    for name in theirs + ours:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('x')
    with open_run(tmp_path):
        pass
    assert all((tmp_path / name).exists() for name in theirs)
    assert not any((tmp_path / name).exists() for name in ours)


def test_a_base_with_files_of_others_in_it_is_not_replaced(finished):
    base = finished / 'base'
    (base / 'notes.txt').write_text('mine')
    with pytest.raises(InputError, match='no base of this program.*choose another --out'):
        is_there(base, read_json(base / 'recipe.json'), fresh=True)


def test_too_little_text_is_said_before_training(tmp_path, capsys):
    (tmp_path / 'x.txt').write_text('the cat sat on the mat and looked at the dog. ' * 600)
    line = refused(capsys, tmp_path / 'o', '--data', tmp_path / 'x.txt', '--ppo-batch', 4000)
    assert 'train split has' in line
    assert not (tmp_path / 'o/base').exists()
