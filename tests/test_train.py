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
from conftest import python_train, random_model, refusal
from hub.checkpoint import hub_tensors, load
from hub.config import from_hf
from hub.files import write_json
from hub.safetensors import write_safetensors
from base.frozen import base_model
from run.rules import SkipFamilies
from run.start import new_allocators

GOLDEN = Path(__file__).parent / 'golden'

def test_smoke_writes_what_it_promises(smoke):
    out, printed = smoke
    assert {p.name for p in out.iterdir()} == {
        'base',
        'allocator.safetensors',
        'log.csv',
        'results.json',
        'training.png',
        'layers.png',
    }
    assert (out / 'training.png').read_bytes()[:4] == (out / 'layers.png').read_bytes()[:4] == b'\x89PNG'
    results = json.loads((out / 'results.json').read_text())
    assert set(results) >= {'run', 'seed', 'config', 'seconds', 'rows'}
    rows = {row['method']: row for row in results['rows']}
    assert list(rows) == ['top-k', 'ada-k', 'random-mix', 'top-p', 'skip']
    assert rows['top-k']['delta'] == rows['top-k']['delta_se'] == 0 and rows['top-k']['mean_k'] == 4
    for name, row in rows.items():
        assert f'| {name} | {row["loss"]:.4f} |' in printed
        assert (
            row['expert_flops'] == pytest.approx(row['mean_k'] / 4)
            and abs(sum(row['k_histogram']) - 1) < 1e-6
        )
        assert row['mean_k'] == pytest.approx(np.mean(row['mean_k_by_layer']))
        assert row['mean_k'] == pytest.approx(np.dot(row['k_histogram'], range(len(row['k_histogram']))))
        assert row['delta'] == pytest.approx(row['loss'] - rows['top-k']['loss'], abs=1e-9)
    for name in ('random-mix', 'top-p', 'skip'):
        assert abs(rows[name]['mean_k'] - rows['ada-k']['mean_k']) < 0.15
    log = list(csv.DictReader((out / 'log.csv').open()))
    assert len(log) == 12 and all(np.isfinite(float(row['loss'])) for row in log)


def test_second_run_reuses_the_base_and_gives_the_same_results(smoke):
    out, _ = smoke
    before = (out / 'base/model.safetensors').read_bytes(), json.loads((out / 'results.json').read_text())
    done = python_train('--preset', 'smoke', '--out', out)
    assert done.returncode == 0 and 'used again' in done.stdout
    after = (out / 'base/model.safetensors').read_bytes(), json.loads((out / 'results.json').read_text())
    assert before[0] == after[0] and before[1]['rows'] == after[1]['rows']


def test_the_base_is_bit_identical_after_training(smoke):
    out, _ = smoke
    s = train.parse(['--preset', 'smoke'])
    model, tokenizer, (text, calibration, _) = base_model(s, out)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    allocators, price = new_allocators(s, model, text, SkipFamilies(model, calibration, s.seq))
    start = allocators.weight.detach().clone()
    train.train_ppo(s, model, allocators, price, text, [])
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not torch.equal(start, allocators.weight)


def test_the_published_recipe_runs_on_a_finished_base(smoke, tmp_path):
    out, _ = smoke
    train.main(['--preset', 'smoke', '--paper', '--ckpt', str(out / 'base'), '--out', str(tmp_path)])
    results = json.loads((tmp_path / 'results.json').read_text())
    assert results['allocator_params'] == 2 * 32 * 8 and results['config']['lam'] == 3e-3  # L*C*N
    assert not (tmp_path / 'base').exists()


def test_interrupt_during_ppo_saves_the_allocators(smoke, tmp_path, monkeypatch, capsys):
    calls, real = [], train.ppo.ppo_loss

    def interrupted(*args):
        calls.append(1)
        if len(calls) > 7:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(train.ppo, 'ppo_loss', interrupted)
    with pytest.raises(SystemExit) as exit:
        train.main(['--preset', 'smoke', '--ckpt', str(smoke[0] / 'base'), '--out', str(tmp_path)])
    assert exit.value.code == 130 and 'interrupted after 2 of 12' in capsys.readouterr().out
    assert (
        Allocators.load(tmp_path / 'allocator.safetensors', load(smoke[0] / 'base').config).weight.abs().sum()
        > 0
    )


# ---------------------------------------------------------------- wrong inputs

@pytest.mark.parametrize(
    'args, says',
    [
        (['--preset', 'huge'], 'huge'),
        (['--budget', 'x'], '--budget'),
        (['--budget', '0'], '--budget 0.0'),
        (['--budget', '1.5'], 'at most 1'),
        (['--budget', '0.1'], 'at least 0.25'),
        (['--budget', 'nan'], '--budget'),
        (['--lam', '-1'], '--lam'),
        (['--discount', '1.1'], '--discount 1.1'),
        (['--discount', 'nan'], '0..1'),
        (['--lam', 'inf'], '--lam'),
        (['--budget', '.7', '--lam', '1'], 'not both'),
        (['--seed', '1.5'], '--seed'),
        (['--seed', '-1'], '--seed'),
        (['--device', 'abacus'], '--device abacus'),
        (['--nonsense'], '--nonsense'),
        (['--data', '/no/such/file'], '/no/such/file'),
        (['--ckpt', '/no/such'], '/no/such'),
    ],
)
def test_wrong_flags_are_refused_in_one_line(args, says, capsys, tmp_path):
    assert says in refusal(
        capsys, 'train.py', train.main, '--preset', 'smoke', '--out', tmp_path / 'run', *args
    )


def test_wrong_text_is_refused_and_nothing_is_harmed(capsys, tmp_path):
    empty = tmp_path / 'empty'
    empty.mkdir()
    assert 'no text' in refusal(
        capsys, 'train.py', train.main, '--preset', 'smoke', '--out', tmp_path / 'a', '--data', empty
    )
    (empty / 'x.txt').write_text('  \n')
    assert 'no text' in refusal(
        capsys,
        'train.py',
        train.main,
        '--preset',
        'smoke',
        '--out',
        tmp_path / 'a',
        '--data',
        empty / 'x.txt',
    )
    (empty / 'x.txt').write_text('too short for anything')
    assert 'too short' in refusal(
        capsys,
        'train.py',
        train.main,
        '--preset',
        'smoke',
        '--out',
        tmp_path / 'a',
        '--data',
        empty / 'x.txt',
    )


def test_unwritable_out_is_refused(capsys, tmp_path):
    (tmp_path / 'file').write_text('here first')
    assert 'cannot write' in refusal(
        capsys, 'train.py', train.main, '--preset', 'smoke', '--out', tmp_path / 'file' / 'run'
    )
    assert (tmp_path / 'file').read_text() == 'here first'


def test_a_base_of_other_settings_is_not_overwritten(smoke, capsys, tmp_path):
    digest = lambda: hashlib.sha256((smoke[0] / 'base/model.safetensors').read_bytes()).digest()
    before = digest()
    (tmp_path / 'x.txt').write_text('other text. ' * 20000)
    assert 'another text' in refusal(
        capsys, 'train.py', train.main, '--preset', 'smoke', '--out', smoke[0], '--data', tmp_path / 'x.txt'
    )
    assert digest() == before


# ---------------------------------------------------------------- the pipeline on loaded checkpoints

def checkpoint(folder, hf, tokenizer, dtype):
    """A random model of a hub config with one of the golden tokenizers, written as the hub has it."""
    torch.manual_seed(0)
    shutil.copytree(GOLDEN / tokenizer, folder)
    config = from_hf(hf)
    model = random_model(config).to(dtype)
    write_safetensors(folder / 'model.safetensors', hub_tensors(model))
    write_json(folder / 'config.json', {**hf, 'torch_dtype': str(dtype).removeprefix('torch.')})


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
)
CHECKPOINTS = {
    'deepseek': (
        dict(
            SIZES,
            model_type='deepseek',
            moe_intermediate_size=16,
            intermediate_size=48,
            n_routed_experts=8,
            num_experts_per_tok=4,
            n_shared_experts=2,
            first_k_dense_replace=1,
        ),
        'tokenizer-deepseek',
        torch.float32,
    ),
    'qwen2_moe in bf16': (
        dict(
            SIZES,
            model_type='qwen2_moe',
            moe_intermediate_size=16,
            intermediate_size=48,
            num_experts=8,
            num_experts_per_tok=4,
            shared_expert_intermediate_size=16,
        ),
        'tokenizer-qwen',
        torch.bfloat16,
    ),
}


@pytest.mark.parametrize('name', CHECKPOINTS)
def test_the_whole_pipeline_on_a_loaded_checkpoint(name, tmp_path):
    hf, tokenizer, dtype = CHECKPOINTS[name]
    checkpoint(tmp_path / 'model', hf, tokenizer, dtype)
    rows = [{'text': f'line {i} of a text: {"and on " * 30}'} for i in range(150)] + [
        {
            'messages': [
                {'role': 'user', 'content': 'is it so? ' * 20},
                {'role': 'assistant', 'content': 'it is. ' * 20},
            ]
        }
    ] * 50
    (tmp_path / 'data.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    train.main(
        [
            '--preset',
            'smoke',
            '--ckpt',
            str(tmp_path / 'model'),
            '--data',
            str(tmp_path / 'data.jsonl'),
            '--out',
            str(tmp_path / 'out'),
        ]
    )
    results = json.loads((tmp_path / 'out/results.json').read_text())
    rows = {row['method']: row for row in results['rows']}
    L = len(from_hf(hf).moe_layers)
    assert all(len(row['mean_k_by_layer']) == L and np.isfinite(row['loss']) for row in rows.values())
    assert rows['top-k']['mean_k'] == 4 and rows['ada-k']['mean_k'] < 3.4
    assert Allocators.load(tmp_path / 'out/allocator.safetensors', from_hf(hf)).weight.shape == (
        L,
        8,
        32 + 8 + 3,
    )
