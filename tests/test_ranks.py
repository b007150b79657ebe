"""Several ranks (gloo, on the CPU): the same allocators as one, a part of the weights each, and failures."""
import json
import subprocess
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

import base.frozen
import run.evaluate
import run.ranks
import train
from allocator import TopK
from conftest import ROOT, finish, meeting, random_model, refusal, start, tiny_config
from hub.checkpoint import load, save
from hub.files import InputError
from hub.safetensors import read_safetensors
from run.evaluate import evaluate
from study import sample
from test_resume import steps

def one_line(error):
    """The one line that a stop may say, behind the progress lines."""
    lines = [line for line in error.splitlines() if line.startswith('train.py')]
    assert len(lines) == 1 and 'Traceback' not in error, error
    return lines[0]


def test_two_ranks_train_the_allocators_of_one(quick, tmp_path):
    two = train.main, [*quick, '--out', tmp_path / 'two']
    ends = finish(start(tmp_path, two, two))
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert ends[1][1] == ''                                    # rank 1 says nothing
    train.main([*quick, '--out', str(tmp_path / 'one')])
    one, two = (read_safetensors(tmp_path / out / 'allocator.safetensors')[0] for out in ('one', 'two'))
    for name in one:
        tolerance = 1e-3 if name == 'price' else 1e-5
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=tolerance)
    assert one['weight'].std() > .01
    one, two = (json.loads((tmp_path / out / 'results.json').read_text()) for out in ('one', 'two'))
    assert two['ranks'] == 2
    for a, b in zip(one['rows'], two['rows']):
        if a['method'] != 'random-mix':                        # its draws are the ranks' own
            assert a['loss'] == pytest.approx(b['loss'], abs=1e-5)
            assert a['mean_k'] == pytest.approx(b['mean_k'], abs=1e-3)


SHARD = """
import atexit, sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import hub.safetensors as files
from pathlib import Path
from hub.checkpoint import load
from model import generate
from run.ranks import join, leave
from scale.shard import shard
join('cpu')
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
        assert not local()                 # every layer has been freed behind its visit
        for i, _ in enumerate(sharded.visit()):
            here = local()
            assert {j for j, _ in here} <= {i, i + 1}
            assert (i, 'mlp.w_in') in here or sharded.layers[i].dense
print('equal')
atexit.register(print, 'shutdown')
leave(3)
print('not reached')
"""


def test_a_sharded_model_is_the_loaded_one_and_each_rank_reads_its_part():
    """And a rank ends at once: Python's shutdown beside gloo's threads is what now and then aborts."""
    names = 'mixtral-tied-sharded', 'deepseek-2', 'qwen2_moe-1'
    folders = [ROOT / 'tests/golden' / name for name in names]
    command = [sys.executable, '-c', SHARD, ROOT, *folders]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for environment in meeting(3)                          # 8 experts do not divide by 3
    ]
    printed = [p.communicate(timeout=200)[0] for p in processes]
    assert printed == ['equal\n', '', '']
    assert [p.returncode for p in processes] == [3, 3, 3]


def test_text_under_ranks_is_the_text_of_one(smoke, tmp_path, capsys):
    args = '--run', str(smoke[0]), '--prompt', 'import', '--tokens', '12'
    sample.main(args)
    alone = capsys.readouterr().out.splitlines()
    both = [(sample.main, args)] * 2
    (status, together, err), (_, silent, _) = finish(start(tmp_path, *both))
    assert status == 0, err
    assert together.splitlines()[:-1] == alone[:-1]
    assert silent == '' and 'mean k' in together


def test_evaluation_of_fewer_windows_than_ranks(monkeypatch):
    """A rank without windows still sweeps over the layers, and its part of the result is empty."""
    model = random_model(tiny_config())
    tokens = torch.randint(50, (2, 9))
    windows = tokens, tokens, None
    [(whole, tally)] = evaluate(model, windows, [TopK(2)])
    seen = []

    def gathered(part):
        seen.append(part)
        other = whole[None] if len(seen) == 1 else tally.counts
        return [other, part]
    monkeypatch.setattr(run.evaluate, 'ranks', lambda: (2, 3))         # rank 2 of 3 has none of the 2 windows
    monkeypatch.setattr(run.evaluate, 'gathered', gathered)
    [(again, counted)] = evaluate(model, windows, [TopK(2)])
    assert seen[0].shape == (1, 0)
    assert torch.equal(again, whole) and torch.equal(counted.counts, tally.counts)


# ---------------------------------------------------------------- what may go wrong

def test_a_batch_that_ranks_cannot_share(monkeypatch):
    monkeypatch.setattr(run.ranks, 'ranks', lambda: (0, 2))
    run.ranks.check_ranks(SimpleNamespace(ppo_batch=8))
    with pytest.raises(InputError, match='--ppo-batch 7: 2 ranks'):
        run.ranks.check_ranks(SimpleNamespace(ppo_batch=7))


def test_no_rendezvous(quick, tmp_path, monkeypatch, capsys):
    for name, value in meeting(2)[1].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(run.ranks, 'PATIENCE', timedelta(seconds=1))
    line = refusal(capsys, 'train.py', train.main, *quick, '--out', tmp_path)
    assert 'the ranks do not meet: ' in line
    monkeypatch.setenv('WORLD_SIZE', '')                       # is one process
    run.ranks.join('cpu')
    assert run.ranks.ranks() == (0, 1)


def test_no_base_and_no_streaming_under_ranks(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(base.frozen, 'ranks', lambda: (0, 2))
    for args, says in (
        (['--ckpt', ''], 'several ranks cannot learn one'),
        (['--stream'], '--stream under torchrun'),
    ):
        assert says in refusal(capsys, 'train.py', train.main, *quick, '--out', tmp_path, *args)


def test_ranks_with_different_checkpoints(quick, smoke, tmp_path):
    ckpt = smoke[0] / 'base'
    other = load(ckpt)
    other.layers[0].mlp.w_out[3] += .01
    save(other, tmp_path)
    (tmp_path / 'tokenizer.json').write_bytes((ckpt / 'tokenizer.json').read_bytes())
    args = *quick, '--out', tmp_path / 'x', '--ckpt'
    ends = finish(start(tmp_path, (train.main, [*args, ckpt]), (train.main, [*args, tmp_path])))
    assert [status for status, _, _ in ends] == [2, 2]
    assert 'is not the same on all ranks' in one_line(ends[0][2])


def test_a_stop_saves_and_a_killed_rank_is_one_line(quick, tmp_path):
    args = *quick, '--ppo-steps', '2000', '--save-every', '5', '--out', tmp_path
    state = tmp_path / 'state.pt'

    def started(done, *resume):
        """Two ranks that have saved a state after more than `done` steps."""
        processes = start(tmp_path, *[(train.main, [*args, *resume])] * 2)
        while processes[0].is_alive() and not (state.exists() and steps(state) > done):
            time.sleep(.05)
        return processes
    processes = started(0)
    processes[1].terminate()                                   # one of them is enough
    assert [status for status, _, _ in finish(processes)] == [130, 130]
    done = steps(state)
    processes = started(done, '--resume')
    processes[1].kill()
    (status, out, err), _ = finish(processes)
    assert status == 2 and 'another rank is gone' in one_line(err)
    assert f'resumed after step {done}' in out
