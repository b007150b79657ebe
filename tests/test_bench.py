"""bench.py: everything timed computes the same, its tables, a run's own text, wrong inputs."""
import shutil

import pytest
import torch

import bench
import run.speed
from allocator import Skip
from conftest import random_model, refusal, tiny_config
from hub.files import read_json
from moe_dispatch import moe


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(run.speed, 'ROUNDS', 2)
    monkeypatch.setitem(bench.SHAPES, 'cpu', {'tiny': (64, 32, 8, 2, 64)})
    monkeypatch.setitem(bench.DTYPES, 'cpu', ['bfloat16'])
    monkeypatch.setitem(bench.WIDTHS, 'cpu', 256)


@torch.no_grad()
@pytest.mark.parametrize('T', [1, 8, 40])
@pytest.mark.parametrize('choice, mean_k', [('top-k', 4), ('fewer', 3)])
def test_everything_that_is_timed_computes_the_same(T, choice, mean_k):
    model = random_model(tiny_config(top_k=4))
    layer = model.layers[0].mlp
    batch = bench.routed(layer, T, choice)
    cases = bench.dispatch_cases(*batch)
    y = moe(*batch)
    for case in cases.values():
        assert torch.allclose(case(), y, atol=1e-4)
    assert ('moe_few' in cases) == (T <= 8)
    expert = 3 * 32 * 16
    hit = mean_k if T == 1 else 8
    flops = 2 * expert * T * mean_k
    n_bytes = 4 * expert * hit
    ms = max(flops, n_bytes) / 1e3
    assert bench.limit(*batch, 1e6, 1e6) == pytest.approx(ms)


def test_bench_writes_both_tables(tmp_path, capsys):
    bench.main(['--out', str(tmp_path)])
    printed, progress = capsys.readouterr()
    assert '| tiny, bfloat16 | batch 1 | **moe_few** |' in printed
    assert 'timing tiny, bfloat16, batch 8' in progress
    assert printed.count('**') == 2 * 3                        # of every stage one path
    rows = read_json(tmp_path / 'bench.json')['beside']
    assert rows[0]['k_share'] == pytest.approx(0.7, abs=0.03)


def test_the_table_says_what_was_measured():
    row = {
        'name': 'tiny',
        'stage': 'batch 1',
        'path': 'moe_few',
        'k_share': 0.75,
        'default': 'moe_few',
        'limit_ms': {'top-k': 1, 'fewer': 0.5},
        'top-k': {'ms': 4, 'low': 3, 'high': 5},
        'fewer': {'ms': 2, 'low': 1, 'high': 3},
    }
    theirs = {**row, 'path': 'transformers eager', 'top-k': {'ms': 6, 'low': 5, 'high': 7}}
    _, _, line, other = run.speed.speed_table([row, theirs]).splitlines()
    times = '4.00 (3.00-5.00), 25% | 2.00 (1.00-3.00), 25% | 0.50'
    assert line == f'| tiny | batch 1 | **moe_few** | {times} | 0.75 | 1.50, 3.00 |'
    assert other.endswith('| 1.00, 3.00 |')


def test_whole_models_with_and_without_transformers(monkeypatch, capsys):
    pytest.importorskip('transformers')
    model = random_model(tiny_config(top_k=2))
    tokens = torch.randint(50, (2, 80))
    case = 'tiny', model, tokens, Skip(0.6, 2)
    rows = run.speed.whole_rows(*case)
    assert len(rows) == 3 * 4
    monkeypatch.setattr('transformers.MixtralForCausalLM', None)
    rows = run.speed.whole_rows(*case)
    assert [r['path'] for r in rows] == 3 * ['ours', 'ours, stand-ins']
    printed = capsys.readouterr().out
    assert 'transformers: its rows are left out, tiny (' in printed


@pytest.fixture
def out(smoke, monkeypatch):
    """The smoke run's folder; neither the machine nor transformers is timed."""
    monkeypatch.setattr(bench, 'rates', lambda device: {})
    pytest.importorskip('transformers')
    monkeypatch.setattr('transformers.MixtralForCausalLM', None)
    return smoke[0]


def test_bench_of_a_run_uses_its_allocators_and_its_text(out, tmp_path):
    flags = ['--run', str(out), '--out', str(tmp_path)]
    bench.main(flags)
    row = read_json(tmp_path / 'bench.json')['beside'][0]
    results = read_json(out / 'results.json')
    K = results['config']['top_k']
    [learnt] = [r for r in results['rows'] if r['method'] == 'ada-k']
    assert row['k_share'] == pytest.approx(learnt['mean_k'] / K, rel=0.01)


@pytest.mark.parametrize('name', ['results.json', 'allocator.safetensors'])
def test_a_run_that_is_damaged_is_refused_in_one_line(name, out, tmp_path, capsys):
    folder = tmp_path / 'run'
    shutil.copytree(out, folder)
    (folder / name).write_bytes(b'x')
    typo = tmp_path / 'typo'
    assert name in refusal(capsys, 'bench.py', bench.main, '--run', folder)
    refusal(capsys, 'bench.py', bench.main, '--run', typo)
    assert not typo.exists()
