"""Several ranks (gloo, on the CPU): the same allocators as one, a part of the weights each, and failures."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import run.evaluate
import run.ranks
import train
from conftest import refusal
from hub.checkpoint import load, save
from hub.safetensors import read_safetensors

HERE = Path(__file__).parent
SMOKE = [
    '--preset',
    'smoke',
    '--ppo-steps',
    '20',
    '--data',
    str(HERE),
]  # our own sources: little text, quickly read


def start(commands, cwd, wait=True, **environment):
    """One process per command, as ranks 0, 1, .. that meet here; waits for [(status, stdout, stderr), ..]."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    found = []
    for rank, command in enumerate(commands):
        meet = dict(
            RANK=rank,
            LOCAL_RANK=rank,
            WORLD_SIZE=len(commands),
            MASTER_ADDR='127.0.0.1',
            MASTER_PORT=port,
            OMP_NUM_THREADS=1,
        )
        found.append(
            subprocess.Popen(
                [sys.executable, *map(str, command)],
                cwd=cwd,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **{name: str(value) for name, value in {**meet, **environment}.items()}},
            )
        )
    return [finish(p) for p in found] if wait else found


def finish(p, timeout=200):
    out, err = p.communicate(timeout=timeout)
    return p.returncode, out, err


def one_line(error, script='train.py'):
    """The one line that a stop may say, behind the progress lines."""
    lines = [line for line in error.splitlines() if line.startswith(script)]
    assert len(lines) == 1 and 'Traceback' not in error, error
    return lines[0]


@pytest.fixture(scope='module')
def base(smoke):
    return smoke[0] / 'base'


def test_two_ranks_train_the_allocators_of_one(base, tmp_path):
    runs = {
        n: start(
            [[HERE.parent / 'train.py', *SMOKE, '--ckpt', base, '--out', tmp_path / f'{n}']] * n, tmp_path
        )
        for n in (1, 2)
    }
    for n, ranks in runs.items():
        assert all(status == 0 for status, _, _ in ranks), ranks
    one, two = (read_safetensors(tmp_path / f'{n}/allocator.safetensors')[0] for n in (1, 2))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5 if name != 'price' else 1e-3)
    assert (one['weight'] - one['weight'].mean()).abs().max() > .1
    one, two = (json.loads((tmp_path / f'{n}/results.json').read_text()) for n in (1, 2))
    assert two['ranks'] == 2 and runs[2][1][1] == ''           # rank 1 says nothing
    for a, b in zip(one['rows'], two['rows']):
        if a['method'] != 'random-mix':  # its draws are the ranks' own
            assert (
                abs(a['loss'] - b['loss']) < 1e-5
                and abs(a['mean_k'] - b['mean_k']) < 1e-3
                and len(a['k_histogram']) == len(b['k_histogram'])
            )


def test_a_rank_ends_at_once_with_its_status_and_all_it_said():
    """Python's shutdown beside gloo's threads is what now and then aborts."""
    ends = (
        'import atexit, run.ranks as r; r.join("cpu"); print("said"); atexit.register(print, "shutdown")\n'
        'r.leave(3); print("not reached")'
    )
    assert start([['-c', ends]] * 2, HERE.parent) == [(3, 'said\n', ''), (3, '', '')]
    assert start([['-c', ends]], HERE.parent) == [
        (0, 'said\nnot reached\nshutdown\n', '')
    ]  # a lone process goes on


SHARD = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import hub.safetensors as files
from run.ranks import leave
from pathlib import Path
from hub.checkpoint import load
from model import generate
from scale.shard import shard
dist.init_process_group('gloo')
read, real = [], files.os.preadv
files.os.preadv = lambda f, places, at: read.append(real(f, places, at)) or read[-1]
for folder in sys.argv[2:]:
    read.clear()
    sharded = shard(folder, torch.float32, 'cpu')
    mine, whole = sum(read), load(folder)
    file = next(iter(sorted(Path(folder).glob('model*.safetensors'))))
    width = next(iter(files.read_header(file)[0].values()))[0].itemsize
    everything = sum(p.numel() for p in whole.parameters())
    kept = sum(getattr(p, '_local_tensor', p).numel() for p in sharded.parameters())
    assert mine == kept * width, (mine, kept)
    assert kept < everything * (0.5 / dist.get_world_size() + 0.5), (kept, everything)
    torch.manual_seed(0)
    tokens = torch.randint(whole.config.n_vocab, (2, 12))
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(sharded(tokens), whole(tokens))
        assert torch.equal(generate(sharded, tokens[:, :3], 4), generate(whole, tokens[:, :3], 4))

        def local():
            return [(i, name) for i, layer in enumerate(sharded.layers)
                    for name, p in layer.named_parameters() if not hasattr(p, 'to_local')]
        assert not local()                 # every layer has been given up behind its visit
        for i, _ in enumerate(sharded.visit()):
            here = local()
            assert {j for j, _ in here} <= {i, i + 1}
            assert (i, 'mlp.w_in') in here or sharded.layers[i].dense
print('equal')
leave()
"""


@pytest.mark.parametrize('n', [2, 3])                          # 8 experts do not divide by 3
def test_a_sharded_model_is_the_loaded_one_and_each_rank_reads_its_part(n, tmp_path):
    folders = [HERE / 'golden' / name for name in ('mixtral-tied-sharded', 'deepseek-2', 'qwen2_moe-1')]
    for status, out, err in start([['-c', SHARD, HERE.parent, *folders]] * n, tmp_path):
        assert status == 0 and out == 'equal\n', err


def test_text_under_ranks_is_the_text_of_one(smoke, tmp_path):
    command = [
        '-m',
        'study.sample',
        '--run',
        smoke[0],
        '--prompt',
        'import',
        '--tokens',
        '12',
        '--temperature',
        '1',
    ]
    (_, alone, _), = start([command], HERE.parent)
    (status, together, err), (_, silent, _) = start([command] * 2, HERE.parent)
    assert status == 0, err
    assert together.splitlines()[:-1] == alone.splitlines()[:-1] and silent == '' and 'mean k' in together


def test_evaluation_of_fewer_windows_than_ranks(monkeypatch):
    """A rank without windows still visits the layers, and its part of the result is empty."""
    from allocator import TopK
    from conftest import random_model, tiny_config
    model, tokens = random_model(tiny_config()), torch.randint(50, (1, 2, 9))
    windows = tokens[0], tokens[0].flip(1), None
    whole, tally = run.evaluate.evaluate(model, windows, TopK(2))
    monkeypatch.setattr(run.evaluate, 'ranks', lambda: (2, 3))         # rank 2 of 3 has none of the 2 windows
    seen = []
    monkeypatch.setattr(
        run.evaluate, 'gathered', lambda part: seen.append(part) or [(whole, tally.counts), part]
    )
    again, counted = run.evaluate.evaluate(model, windows, TopK(2))
    assert len(seen[0][0]) == 0 and torch.equal(again, whole) and torch.equal(counted.counts, tally.counts)


# ---------------------------------------------------------------- what may go wrong

def test_a_batch_that_ranks_cannot_share(base, tmp_path):
    ranks = start(
        [[HERE.parent / 'train.py', *SMOKE, '--ckpt', base, '--ppo-batch', '7', '--out', 'x']] * 2, tmp_path
    )
    assert [status for status, _, _ in ranks] == [2, 2] and '--ppo-batch 7: 2 ranks' in one_line(ranks[0][2])
    assert not (tmp_path / 'x').exists()


def test_ranks_with_different_checkpoints(base, tmp_path):
    other = load(base)
    other.layers[0].mlp.w_out[3] += .01
    save(other, tmp_path / 'other')
    (tmp_path / 'other/tokenizer.json').write_bytes((base / 'tokenizer.json').read_bytes())
    ranks = start(
        [
            [HERE.parent / 'train.py', *SMOKE, '--ckpt', ckpt, '--out', 'x']
            for ckpt in (base, tmp_path / 'other')
        ],
        tmp_path,
    )
    assert [status for status, _, _ in ranks] == [
        2,
        2,
    ] and 'is another one on rank 1 than on rank 0' in one_line(ranks[0][2])


def test_no_rendezvous(base, tmp_path, monkeypatch, capsys):
    for name, value in dict(
        RANK='1', LOCAL_RANK='1', WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT='1'
    ).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(run.ranks, 'RENDEZVOUS', 1)
    line = refusal(capsys, 'train.py', train.main, *SMOKE, '--ckpt', base, '--out', tmp_path)
    assert 'no rendezvous of the ranks at 127.0.0.1:1' in line


def test_no_base_and_no_streaming_under_ranks(base, tmp_path):
    for args, says in (
        (['--out', 'x'], 'several ranks cannot learn one'),
        (['--ckpt', base, '--stream'], '--stream under torchrun'),
    ):
        ranks = start([[HERE.parent / 'train.py', *SMOKE, *args]] * 2, tmp_path)
        assert [status for status, _, _ in ranks] == [2, 2] and says in one_line(ranks[0][2])


def test_a_stop_saves_and_a_killed_rank_is_one_line(base, tmp_path):
    command = [
        HERE.parent / 'train.py',
        *SMOKE,
        '--ckpt',
        base,
        '--ppo-steps',
        '2000',
        '--save-every',
        '5',
        '--out',
        'x',
    ]
    state = tmp_path / 'x/state.safetensors'

    def started(*args):
        ranks = start([[*command, *args]] * 2, tmp_path, wait=False)
        before = state.stat().st_mtime if state.exists() else 0
        while not (state.exists() and state.stat().st_mtime > before) and ranks[0].poll() is None:
            time.sleep(.05)
        return ranks
    ranks = started()
    ranks[1].send_signal(signal.SIGTERM)                       # one of them is enough
    assert [finish(p)[0] for p in ranks] == [130, 130]
    steps = len(json.loads(read_safetensors(state)[1]['state'])['log'])
    ranks = started('--resume')
    ranks[1].kill()
    status, out, err = finish(ranks[0])
    assert status == 2 and 'another rank is gone' in one_line(err) and f'resumed after step {steps}' in out
    assert len(json.loads(read_safetensors(state)[1]['state'])['log']) > steps
