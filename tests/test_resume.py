"""train.py --resume: a run that was stopped anywhere ends with the same bits as one that was not."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from conftest import random_model, refusal, tiny_config
from hub.safetensors import read_safetensors, write_safetensors
from base.text import Text
from hub.files import InputError
from run.console import one_line_errors
from run.rules import SkipFamilies
from run.start import new_allocators

TRAIN = Path(__file__).parent.parent / 'train.py'
STEPS = '40'


def start(out, *args):
    return subprocess.Popen(
        [
            sys.executable,
            TRAIN,
            '--preset',
            'smoke',
            '--out',
            out,
            '--ppo-steps',
            STEPS,
            '--save-every',
            '4',
            *args,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope='module')
def undisturbed(smoke, tmp_path_factory):
    """A folder with a base model alone, and the allocators that a whole run trains on it."""
    out = tmp_path_factory.mktemp('whole') / 'run'
    shutil.copytree(smoke[0] / 'base', out / 'base')
    run = start(out)
    assert run.wait(timeout=200) == 0, run.stderr.read()
    return smoke[0] / 'base', (out / 'allocator.safetensors').read_bytes()


def new_folder(base, tmp_path):
    shutil.copytree(base, tmp_path / 'run' / 'base')
    return tmp_path / 'run'


def wait_for(state, run):
    while not state.exists() and run.poll() is None:
        time.sleep(.02)


def test_killed_at_random_moments_it_ends_the_same(undisturbed, tmp_path):
    base, allocators = undisturbed
    out, draw = new_folder(base, tmp_path), random.Random(0)
    state, kills = out / 'state.safetensors', 0
    while True:
        run = start(out, *(['--resume'] if state.exists() else []))
        try:
            run.wait(timeout=draw.uniform(3, 9) if kills < 4 else 200)
            break
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
            kills += 1
            if state.exists():
                read_safetensors(state)                        # whole at every moment
    assert run.returncode == 0, run.stderr.read()
    assert (out / 'allocator.safetensors').read_bytes() == allocators and not state.exists()
    assert not list(out.glob('*.new'))


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_polite_stop_saves_first(number, undisturbed, tmp_path):
    base, allocators = undisturbed
    out = new_folder(base, tmp_path)
    run = start(out)
    wait_for(out / 'state.safetensors', run)
    run.send_signal(number)
    assert run.wait(timeout=60) == 130 and '--resume goes on' in run.stdout.read()
    steps = len(json.loads(read_safetensors(out / 'state.safetensors')[1]['state'])['log'])
    assert 4 <= steps < int(STEPS)
    run = start(out, '--resume')
    assert run.wait(timeout=200) == 0 and f'resumed after step {steps}' in run.stdout.read()
    assert (out / 'allocator.safetensors').read_bytes() == allocators


@pytest.fixture(scope='module')
def stopped(undisturbed, tmp_path_factory):
    """A folder that a stopped run left."""
    out = new_folder(undisturbed[0], tmp_path_factory.mktemp('stopped'))
    run = start(out)
    wait_for(out / 'state.safetensors', run)
    run.terminate()
    run.wait(timeout=60)
    return out


def damaged_base(out):
    tensors, metadata = read_safetensors(out / 'base/model.safetensors')
    tensors = {name: t.clone() for name, t in tensors.items()}
    tensors['lm_head.weight'] *= 3
    write_safetensors(out / 'base/model.safetensors', tensors, metadata)


@pytest.mark.parametrize(
    'prepare, args, says',
    [
        (lambda out: None, ['--seed', '5'], 'seed 0, this one has 5'),
        (lambda out: None, ['--budget', '0.5'], 'budget 0.75'),
        (lambda out: None, ['--discount', '0.5'], 'discount 0.9, this one has 0.5'),
        (damaged_base, [], 'base_loss'),
        (lambda out: (out / 'state.safetensors').unlink(), [], 'no such file'),
        (lambda out: os.truncate(out / 'state.safetensors', 5000), [], 'state.safetensors'),
        (lambda out: None, ['--fresh'], '--fresh'),
    ],
)
def test_a_resume_that_does_not_fit_is_refused(prepare, args, says, stopped, tmp_path, capsys):
    out = tmp_path / 'run'
    shutil.copytree(stopped, out)
    prepare(out)
    flags = '--preset', 'smoke', '--out', out, '--ppo-steps', STEPS, '--save-every', '4', '--resume'
    assert says in refusal(capsys, 'train.py', train.main, *flags, *args)


def test_a_loss_of_nan_leaves_the_last_good_state(tmp_path, monkeypatch):
    model, s = (
        random_model(tiny_config(top_k=4)),
        train.Settings(ppo_steps=9, save_every=2, seq=16, ppo_batch=4, calibration_tokens=256),
    )
    text = Text(torch.randint(50, (3000,)), torch.zeros(3000).numpy())
    real, calls = train.rollout_reward, []

    def reward(*args):
        calls.append(1)
        good = real(*args)
        return good if len(calls) < 6 else (good[0] * float('nan'), good[1])
    monkeypatch.setattr(train, 'rollout_reward', reward)
    allocators, price = new_allocators(s, model, text, SkipFamilies(model, text, 16))
    log = []
    with pytest.raises(InputError, match='step 6'):
        train.train_ppo(s, model, allocators, price, text, log, text.windows(16, 256), tmp_path / 'state')
    assert len(log) == 5 and allocators.weight.isfinite().all()
    tensors, metadata = read_safetensors(tmp_path / 'state')
    assert len(json.loads(metadata['state'])['log']) == 4 and all(
        t.isfinite().all() for t in tensors.values()
    )


def test_a_full_disk_is_one_line_and_the_old_file_stays(tmp_path, monkeypatch, capsys):
    write_safetensors(tmp_path / 'x', {'a': torch.ones(3)})
    monkeypatch.setattr(os, 'fsync', lambda f: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    with pytest.raises(SystemExit) as exit:
        one_line_errors('train.py', lambda argv: write_safetensors(tmp_path / 'x', {'a': torch.zeros(3)}), [])
    assert exit.value.code == 2 and 'No space left' in capsys.readouterr().err
    assert (
        read_safetensors(tmp_path / 'x')[0]['a'].tolist() == [1, 1, 1] and len(list(tmp_path.iterdir())) == 1
    )


def test_ctrl_c_in_a_stage_without_a_state_is_one_line(capsys):
    def main(argv):
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as exit:
        one_line_errors('bench.py', main, [])
    assert (
        exit.value.code == 130
        and capsys.readouterr().err == 'bench.py: interrupted; files that were complete before still are\n'
    )
