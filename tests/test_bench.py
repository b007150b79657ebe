"""bench.py: everything timed computes the same, its tables, a run's own text, wrong inputs."""
import pytest
import torch

import bench
import run.speed
import run.timing
from conftest import random_model, refusal, rows_of, tiny_config
from hub.files import read_json
from moe_dispatch import moe


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(run.timing, 'ROUNDS', 2)
    monkeypatch.setitem(bench.SHAPES, 'cpu', {'tiny': (64, 32, 8, 2, 64)})
    monkeypatch.setitem(bench.DTYPES, 'cpu', ['bfloat16'])
    monkeypatch.setitem(bench.WIDTHS, 'cpu', 256)
    monkeypatch.setattr(bench, 'rates', lambda device: {'bfloat16': 1e12, 'copy': 1e10})


@torch.no_grad()
@pytest.mark.parametrize('T, choice, mean_k, hit', [
    (1, 'top-k', 4, 4),
    (40, 'fewer', 3, 8),
])
def test_everything_that_is_timed_computes_the_same(T, choice, mean_k, hit):
    layer = random_model(tiny_config(top_k=4)).layers[0].mlp
    batch = bench.routed(layer, T, choice)
    y = moe(*batch)
    for path in bench.paths_for(batch[0]):
        assert torch.allclose(path(*batch), y, atol=1e-4)
    expert = 3 * 32 * 16
    flops = 2 * expert * T * mean_k
    n_bytes = 4 * expert * hit
    ms = max(flops, n_bytes) / 1e3
    assert bench.limit(*batch, 1e6, 1e6) == pytest.approx(ms)


def test_bench_writes_both_tables(tmp_path, capsys):
    pytest.importorskip('transformers')
    bench.main(['--out', str(tmp_path)])
    printed = capsys.readouterr().out
    assert '| tiny, bfloat16 | batch 1 | **moe_few** |' in printed
    assert printed.count('**') == 2 * 3                        # of every stage one path
    rows = read_json(tmp_path / 'bench.json')['beside']
    assert len(rows) == 3 * 4                                  # stages, and ways to run a model
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
    assert line == f'| tiny | batch 1 | **moe_few** | {times} | 0.75 | 1.50 | 3.00 |'
    assert other.endswith('| 1.00 | 3.00 |')


def test_bench_of_a_run_without_transformers(smoke, tmp_path, monkeypatch, capsys):
    pytest.importorskip('transformers')
    monkeypatch.setattr('transformers.MixtralForCausalLM', None)
    out, _ = smoke
    bench.main(['--run', str(out), '--out', str(tmp_path)])
    assert 'transformers: its rows are left out' in capsys.readouterr().out
    rows = read_json(tmp_path / 'bench.json')['beside']
    assert [row['path'] for row in rows] == 3 * ['ours']
    # on the run's text, with its allocators
    learnt = rows_of(out)['ada-k']
    assert rows[0]['k_share'] == pytest.approx(learnt['mean_k'] / 4, rel=0.01)


def test_a_run_that_is_not_there_is_refused_and_not_made(tmp_path, capsys):
    typo = tmp_path / 'typo'
    assert 'typo/results.json' in refusal(capsys, 'bench.py', bench.main, '--run', typo)
    assert not typo.exists()
