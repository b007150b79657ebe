"""Several ranks (gloo, on the CPU): the same allocators as one, a part of the weights each, and failures."""
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import base.frozen
import hub.safetensors
import run.ranks
import train
from allocator import TopK
from conftest import ROOT, finish, refusal, start
from hub.checkpoint import load
from hub.safetensors import read_safetensors
from run.evaluate import evaluate
from scale.shard import shard
from study import sample
from test_resume import steps


def test_two_ranks_and_a_streamed_model_train_the_same_allocators(quick, tmp_path):
    two = train.main, [*quick, '--out', tmp_path / 'two']
    streamed = train.main, [*quick, '--stream', '--out', tmp_path / 'streamed']
    processes = start(tmp_path, two, two) + start(tmp_path, streamed)
    train.main([*quick, '--out', str(tmp_path / 'one')])
    ends = finish(processes)
    assert [status for status, _, _ in ends] == [0, 0, 0], ends
    assert ends[1][1] == ''                                    # rank 1 says nothing
    files = [tmp_path / out / 'allocator.safetensors' for out in ('one', 'two', 'streamed')]
    one, two, streamed = (read_safetensors(file)[0] for file in files)
    for name in one:
        assert torch.equal(streamed[name], one[name])
        if name not in ('A', 'B', 'b'):                        # of tokens that may be dropped or not
            tolerance = 1e-3 if name == 'price' else 1e-5
            torch.testing.assert_close(two[name], one[name], rtol=0, atol=tolerance)
    assert one['weight'].std() > .01


def check_shards(folders):
    """What a rank does: sharded models are those loaded whole, and each rank reads and keeps its part."""
    run.ranks.join('cpu')
    read = []
    raw_bytes = hub.safetensors.raw_bytes

    def counted(t):
        read.append(t.nbytes)
        return raw_bytes(t)
    hub.safetensors.raw_bytes = counted                        # of what a file is read into
    for folder in map(Path, folders):
        read.clear()
        sharded = shard(folder, torch.float32, 'cpu')
        mine = sum(read)
        whole = load(folder)
        tokens = torch.arange(32).view(2, 16)                  # a rank has none of the two sequences
        with torch.no_grad():
            logits = whole(tokens)
            assert torch.equal(sharded(tokens), logits)
        [(loss, _)] = evaluate(sharded, (tokens, tokens, None), [TopK(whole.config.top_k)])
        right = cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction='none')
        torch.testing.assert_close(loss.float(), right)
        # the layers have been freed again
        kept = sum(getattr(p, '_local_tensor', p).numel() for p in sharded.parameters())
        everything = sum(p.numel() for p in whole.parameters())
        assert mine == 2 * kept < 2 * 0.7 * everything         # bytes of bf16
    print('equal')
    try:
        run.ranks.leave(3)
    finally:
        print('not reached')


def test_a_sharded_model_is_the_loaded_one_and_each_rank_reads_its_part(tmp_path):
    """And a rank ends at once: Python's shutdown beside gloo's threads is what now and then aborts."""
    names = 'mixtral-tied-sharded', 'deepseek-2', 'qwen2_moe-1'
    rank = check_shards, [ROOT / 'tests/golden' / name for name in names]
    ends = finish(start(tmp_path, rank, rank, rank))           # 8 experts do not divide by 3
    assert [(status, out) for status, out, _ in ends] == [(3, 'equal\n'), (3, ''), (3, '')], ends


def test_text_under_ranks_is_the_text_of_one(smoke, tmp_path, capsys):
    args = '--run', str(smoke[0]), '--prompt', 'import', '--tokens', '12'
    sample.main(args)
    alone = capsys.readouterr().out.splitlines()
    both = [(sample.main, args)] * 2
    (status, together, err), (_, silent, _) = finish(start(tmp_path, *both))
    assert status == 0, err
    assert together.splitlines()[:-1] == alone[:-1]
    assert silent == '' and 'mean k' in together


# ---------------------------------------------------------------- what may go wrong

def test_what_several_ranks_cannot_do_is_one_line(quick, tmp_path, monkeypatch, capsys):
    def refused(*args):
        return refusal(capsys, 'train.py', train.main, *quick, '--out', tmp_path, *args)
    for module in base.frozen, run.ranks:
        monkeypatch.setattr(module, 'n_ranks', lambda: 2)
    assert '--ppo-batch 7: 2 ranks' in refused('--ppo-batch', '7')
    assert 'several ranks cannot learn one' in refused('--ckpt', '')


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
    [line] = [line for line in err.splitlines() if line.startswith('train.py')]
    assert status == 2 and 'another rank is gone' in line and 'Traceback' not in err
    assert f'resumed after step {done}' in out
