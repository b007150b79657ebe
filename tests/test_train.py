"""train.py from the command line: the smoke preset start to end, and every wrong input by its one line."""
import csv
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from allocator import Allocators
from base.frozen import base_model
from conftest import random_model, refusal
from hub.checkpoint import base_digest, hub_tensors
from hub.config import from_hf, read_config
from hub.files import write_json
from hub.safetensors import write_safetensors
from run.rules import SkipFamilies
from run.start import new_allocators

GOLDEN = Path(__file__).parent / 'golden'
WRITTEN = {'base', 'allocator.safetensors', 'standins.safetensors', 'log.csv', 'results.json', 'training.png',
           '.ada-k'}


def test_smoke_writes_what_it_promises(smoke):
    out, printed = smoke
    assert {p.name for p in out.iterdir()} == WRITTEN
    assert (out / 'training.png').read_bytes()[:4] == b'\x89PNG'
    results = json.loads((out / 'results.json').read_text())
    assert set(results) >= {'run', 'seed', 'config', 'seconds', 'rows'}
    rows = {row['method']: row for row in results['rows']}
    assert list(rows) == ['top-k', 'ada-k', 'random-mix', 'top-p', 'skip']
    assert rows['top-k']['delta'] == rows['top-k']['delta_se'] == 0
    assert rows['top-k']['mean_k'] == 4
    for name, row in rows.items():
        assert f'| {name} | {row["loss"]:.4f} |' in printed
        left = sum(share * max(0, 4 - k) for k, share in enumerate(row['k_histogram']))
        standin = 4 * 4 * 32 / (6 * 32 * 16)                   # of rank 4, in FLOPs of an expert
        assert row['expert_flops'] == pytest.approx((row['mean_k'] + standin * left) / 4)
        assert sum(row['k_histogram']) == pytest.approx(1)
        assert row['mean_k'] == pytest.approx(np.mean(row['mean_k_by_layer']))
        assert row['mean_k'] == pytest.approx(np.dot(row['k_histogram'], range(len(row['k_histogram']))))
        assert row['delta'] == pytest.approx(row['loss'] - rows['top-k']['loss'], abs=1e-9)
    for name in ('random-mix', 'top-p', 'skip'):
        assert abs(rows[name]['mean_k'] - rows['ada-k']['mean_k']) < 0.15
    log = list(csv.DictReader((out / 'log.csv').open()))
    assert len(log) == 12
    assert all(np.isfinite(float(row['loss'])) for row in log)


def test_second_run_reuses_the_base_and_gives_the_same_results(smoke, tmp_path, capsys):
    out = tmp_path / 'run'
    shutil.copytree(smoke[0], out)
    before = (out / 'base/model.safetensors').read_bytes(), json.loads((out / 'results.json').read_text())
    train.main(['--preset', 'smoke', '--out', str(out)])
    assert 'used again' in capsys.readouterr().out
    after = (out / 'base/model.safetensors').read_bytes(), json.loads((out / 'results.json').read_text())
    assert before[0] == after[0] and before[1]['rows'] == after[1]['rows']


def test_the_base_is_bit_identical_after_training(quick):
    s = train.parse(quick)
    model, _, (text, calibration, _) = base_model(s, None)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    allocators, price = new_allocators(s, model, text, SkipFamilies(model, calibration.windows(s.seq)))
    start = allocators.weight.detach().clone()
    train.train_ppo(s, model, allocators, price, text, [])
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not torch.equal(start, allocators.weight)


def test_the_published_recipe_runs_on_a_finished_base(quick, tmp_path):
    train.main([*quick, '--paper', '--out', str(tmp_path)])
    results = json.loads((tmp_path / 'results.json').read_text())
    assert results['allocator_params'] == 2 * 32 * 8 and results['config']['price'] == 3e-3         # L*C*N
    assert not (tmp_path / 'base').exists()


# ---------------------------------------------------------------- wrong inputs

@pytest.mark.parametrize('args, says', [
    (['--preset', 'huge'], 'huge'),
    (['--budget', 'x'], '--budget'),
    (['--budget', '0'], '--budget 0.0'),
    (['--budget', '1.5'], 'at most 1'),
    (['--budget', '0.1'], 'at least 0.25'),
    (['--budget', 'nan'], '--budget'),
    (['--price', '-1'], '--price'),
    (['--price', 'inf'], '--price'),
    (['--budget', '.7', '--price', '1'], 'not allowed with'),
    (['--seed', '1.5'], '--seed'),
    (['--seed', '-1'], '--seed'),
    (['--seq', '0'], '1 or more'),
    (['--ppo-steps', '-3'], '1 or more'),
    (['--device', 'abacus'], '--device abacus'),
    (['--nonsense'], '--nonsense'),
    (['--stream'], '--ckpt'),
    (['--fresh', '--resume'], '--fresh learns a base'),
    (['--data', '/no/such/file'], '/no/such/file'),
    (['--ckpt', '/no/such'], '/no/such'),
])
def test_wrong_flags_are_refused_in_one_line(args, says, capsys, tmp_path):
    flags = '--preset', 'smoke', '--out', tmp_path / 'run'
    assert says in refusal(capsys, 'train.py', train.main, *flags, *args)


@pytest.mark.parametrize('text, says', [
    (None, 'no .txt'),
    ('  \n', 'sequences of'),
    ('short', 'sequences of'),
])
def test_wrong_text_is_refused(text, says, capsys, tmp_path):
    data = tmp_path / 'data'
    data.mkdir()
    if text is not None:
        (data / 'x.txt').write_text(text)
    flags = '--preset', 'smoke', '--out', tmp_path / 'a', '--data', data
    assert says in refusal(capsys, 'train.py', train.main, *flags)


def test_unwritable_out_is_refused(capsys, tmp_path):
    (tmp_path / 'file').write_text('here first')
    flags = '--preset', 'smoke', '--out', tmp_path / 'file' / 'run'
    assert 'cannot write' in refusal(capsys, 'train.py', train.main, *flags)
    assert (tmp_path / 'file').read_text() == 'here first'


def test_a_base_of_other_settings_is_not_overwritten(smoke, capsys, tmp_path):
    def digest():
        return hashlib.sha256((smoke[0] / 'base/model.safetensors').read_bytes()).digest()
    before = digest()
    (tmp_path / 'x.txt').write_text('other text. ' * 20000)
    flags = '--preset', 'smoke', '--out', smoke[0], '--data', tmp_path / 'x.txt'
    assert 'another text' in refusal(capsys, 'train.py', train.main, *flags)
    assert digest() == before


# ---------------------------------------------------------------- the pipeline on loaded checkpoints

SIZES = dict(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=512,
    rms_norm_eps=1e-6,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=451,
    moe_intermediate_size=16,
    intermediate_size=48,
    num_experts_per_tok=4,
)
DEEPSEEK = dict(SIZES, model_type='deepseek', n_routed_experts=8, n_shared_experts=2, first_k_dense_replace=1)
QWEN = dict(SIZES, model_type='qwen2_moe', num_experts=8, shared_expert_intermediate_size=16)


@pytest.mark.parametrize('hf, tokenizer, dtype', [
    (DEEPSEEK, 'tokenizer-deepseek', torch.float32),
    (QWEN, 'tokenizer-qwen', torch.bfloat16),
])
def test_the_whole_pipeline_on_a_loaded_checkpoint(hf, tokenizer, dtype, tmp_path):
    folder = tmp_path / 'model'
    shutil.copytree(GOLDEN / tokenizer, folder)
    model = random_model(from_hf(hf)).to(dtype)
    write_safetensors(folder / 'model.safetensors', hub_tensors(model))
    write_json(folder / 'config.json', {**hf, 'torch_dtype': str(dtype).removeprefix('torch.')})
    chat = [{'role': 'user', 'content': 'is it so? ' * 20}, {'role': 'assistant', 'content': 'it is. ' * 20}]
    rows = [{'text': f'line {i} of a text: {"and on " * 30}'} for i in range(150)] + [{'messages': chat}] * 50
    (tmp_path / 'data.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    out = tmp_path / 'out'
    flags = ['--ckpt', folder, '--data', tmp_path / 'data.jsonl', '--out', out]
    train.main(['--preset', 'smoke', *map(str, flags)])
    rows = {row['method']: row for row in json.loads((out / 'results.json').read_text())['rows']}
    config = read_config(folder)
    L = len(config.moe_layers)
    assert all(len(row['mean_k_by_layer']) == L and np.isfinite(row['loss']) for row in rows.values())
    assert rows['top-k']['mean_k'] == 4 and rows['ada-k']['mean_k'] < 3.4
    allocators = Allocators.load(out / 'allocator.safetensors', config, base_digest(folder))
    assert allocators.weight.shape == (L, 4, 32 + 8 + 3)
