"""train.py from the command line: the smoke preset start to end, and every wrong input by its one line."""
import csv
import shutil

import numpy as np
import pytest
import torch

import train
from allocator import Allocators
from conftest import GOLDEN, ROOT, random_model, random_text, refusal, rows_of, tiny_config
from hub.checkpoint import base_digest, hub_tensors
from hub.config import from_hf
from hub.files import InputError, read_json, write_json
from hub.safetensors import write_safetensors
from run.rules import SkipFamilies
from run.start import new_allocators


def test_smoke_writes_what_it_promises(smoke):
    out, printed = smoke
    assert sorted(path.name for path in out.iterdir()) == [
        '.ada-k',
        'allocator.safetensors',
        'base',
        'log.csv',
        'results.json',
        'training.png',
    ]
    rows = rows_of(out)
    assert list(rows) == ['top-k', 'ada-k', 'random-mix', 'top-p', 'skip']
    topk = rows['top-k']
    assert topk['delta'] == topk['delta_se'] == 0
    assert topk['mean_k'] == 4
    for name, row in rows.items():
        assert f'| {name} | {row["loss"]:.4f} |' in printed
        assert row['delta'] == pytest.approx(row['loss'] - topk['loss'], abs=1e-9)
        assert abs(row['mean_k'] - rows['ada-k']['mean_k']) < 0.15 or name == 'top-k'
        assert row['mean_k'] == pytest.approx(np.mean(row['mean_k_by_layer']))
        if name != 'top-p':                                    # may run more than K
            left = 4 - row['mean_k']
            standin = 4 * 1 * 32 / (6 * 32 * 16)               # of rank 1, in FLOPs of an expert
            assert row['expert_flops'] == pytest.approx((row['mean_k'] + standin * left) / 4)
    losses = [float(row['loss']) for row in csv.DictReader((out / 'log.csv').open())]
    assert np.isfinite(losses).tolist() == [True] * 12


def test_the_published_recipe_runs_on_a_finished_base(quick, tmp_path):
    train.main([*quick, '--paper', '--out', str(tmp_path)])
    results = read_json(tmp_path / 'results.json')
    assert results['allocator_params'] == 2 * 32 * 8                        # L*C*N
    assert results['config']['price'] == 3e-3
    assert not (tmp_path / 'base').exists()


def test_a_loss_of_nan_leaves_the_last_good_state_and_no_step_changes_the_base(tmp_path, monkeypatch):
    model = random_model(tiny_config(top_k=4))
    before = [p.clone() for p in model.parameters()]
    s = train.Settings(ppo_steps=9, save_every=2, seq=16, ppo_batch=4)
    text = random_text(1000)
    allocators, price = new_allocators(s, model, text, SkipFamilies(model, text.windows(1000)))
    real = train.rollout_reward
    calls = []                                                 # one a step

    def reward(*args):
        calls.append(args)
        return real(*args) * (float('nan') if len(calls) == 6 else 1)
    monkeypatch.setattr(train, 'rollout_reward', reward)
    path = tmp_path / 'state.pt'
    with pytest.raises(InputError, match='step 6'):
        train.train_ppo(s, model, allocators, price, text, path)
    state = torch.load(path, weights_only=True)
    assert len(state['log']) == 4
    assert all(t.isfinite().all() for t in state['allocators'].values())
    assert all(map(torch.equal, model.parameters(), before))


# ---------------------------------------------------------------- wrong inputs

@pytest.mark.parametrize('args, says', [
    (['--nonsense'], '--nonsense'),
    (['--budget', '1.5'], 'at most 1'),
    (['--budget', '0.1'], 'at least 0.25'),
    (['--budget', 'nan'], '--budget'),
    (['--price', '-1'], '--price'),
    (['--budget', '.7', '--price', '1'], 'not allowed with'),
    (['--seed', '-1'], '--seed'),
    (['--seq', '0'], '1 or more'),
    (['--device', 'abacus'], '--device abacus'),
    (['--resume'], 'state.pt: No such file'),
    (['--data', '/no/such/file'], '/no/such/file'),
    (['--ckpt', '/no/such'], '/no/such'),
    (['--out', '/dev/null/run'], "Not a directory: '/dev/null/run'"),
])
def test_wrong_flags_are_refused_in_one_line(args, says, capsys, tmp_path):
    flags = '--preset', 'smoke', '--out', tmp_path / 'run'
    assert says in refusal(capsys, 'train.py', train.main, *flags, *args)


# ---------------------------------------------------------------- the pipeline on a loaded checkpoint

def test_the_whole_pipeline_on_a_loaded_checkpoint(tmp_path):
    """Two MoE layers behind a dense one, in bf16."""
    folder = shutil.copytree(GOLDEN / 'tokenizer-deepseek', tmp_path / 'model')
    config = read_json(GOLDEN / 'deepseek-1/config.json')
    config.update(vocab_size=512, max_position_embeddings=256)
    model = random_model(from_hf(config)).bfloat16()
    write_safetensors(folder / 'model.safetensors', hub_tensors(model))
    write_json(folder / 'config.json', config)
    out = tmp_path / 'out'
    data = ROOT / 'train.py'
    train.main(['--preset', 'smoke', '--ckpt', str(folder), '--data', str(data), '--out', str(out)])
    rows = rows_of(out)
    assert all(len(row['mean_k_by_layer']) == 2 and np.isfinite(row['loss']) for row in rows.values())
    assert rows['top-k']['mean_k'] == 3
    assert rows['ada-k']['mean_k'] < 2.6
    allocators = Allocators.load(out / 'allocator.safetensors', model.config, base_digest(folder))
    assert allocators.weight.shape == (2, 3, 32 + 6 + 2)
