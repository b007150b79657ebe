"""bench.py from the command line: its tables, a run's own text, and wrong inputs."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bench
import train
from allocator import AdaK, Allocators, Counted
from base.frozen import base_model
from conftest import refusal
from hub.checkpoint import load

ROOT = Path(__file__).parent.parent


def test_quick_bench_writes_its_tables(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / 'bench.py', '--quick', '--out', tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / 'bench.json').read_text())
    rows = results['dispatch']
    assert {(r['dtype'], r['stage'], r['T']) for r in rows} == {
        (dtype, *stage) for dtype in ('float32', 'bfloat16')
        for stage in (('prefill', 64), ('decode', 8), ('decode', 1), ('forward + backward', 32))}
    assert {r['path'] for r in rows} >= {'loop', 'exact', 'static', 'dense pair'}
    assert all(0 < r['low'] <= r['ms'] <= r['high'] for r in rows)
    for r in rows:
        assert (
            r['mean_k'] == pytest.approx(0.75 * r['K'], rel=0.02)
            or not r['variable']
            or r['stage'] == 'decode'
        )
        if r['stage'] == 'prefill':                            # 6*C*F FLOPs a row, rows = sum of k
            assert r['flops'] == pytest.approx(6 * 64 * 32 * 64 * r['mean_k'])
            limits = r['flops'] / results['reached'][r['dtype']], r['bytes'] / results['reached']['copy']
            assert r['limit_ms'] == pytest.approx(1000 * max(limits)) and r['bound'] == (
                'compute' if limits[0] > limits[1] else 'memory'
            )
    top, ada = results['model']['rows']
    assert ada['prefill_mean_k'] == pytest.approx(1.4, abs=0.05) and top['prefill_mean_k'] == 2
    assert (
        sum(ada['share_of_prefill'].values()) == pytest.approx(1) and ada['share_of_prefill']['allocator'] > 0
    )
    assert '| exact |' in done.stdout and '| ada-k |' in done.stdout
    for name in ('dispatch.png', 'roofline.png', 'model.png'):
        assert (tmp_path / name).read_bytes().startswith(b'\x89PNG')


def test_bench_of_a_run_uses_its_allocators_and_its_text(smoke, tmp_path):
    run = smoke[0]
    bench.main(['--run', str(run), '--quick', '--out', str(tmp_path)])
    table = json.loads((tmp_path / 'bench.json').read_text())['model']
    model = load(run / 'base')
    policy = AdaK(Allocators.load(run / 'allocator.safetensors', model.config))
    s = train.run_settings(run)
    _, _, texts = base_model(s, run)
    tally = Counted(policy, 2)
    model.hidden(texts[2].windows(64, 2048)[0], tally)
    assert table['rows'][1]['prefill_mean_k'] == pytest.approx(tally.mean())
    assert (table['B'], table['T'], table['K'], table['layers']) == (32, 64, 4, 2)


@pytest.mark.parametrize('damage, says', [
    (lambda run: (run / 'results.json').unlink(), 'results.json'),
    (lambda run: (run / 'results.json').write_text('{"config": {"old": 1}}'), 'another version'),
    (lambda run: (run / 'allocator.safetensors').write_bytes(b'x'), 'allocator.safetensors')])
def test_damaged_runs_are_refused_in_one_line(damage, says, smoke, tmp_path, capsys):
    run = tmp_path / 'run'
    shutil.copytree(smoke[0], run)
    damage(run)
    assert says in refusal(capsys, 'bench.py', bench.main, '--run', run)


@pytest.mark.parametrize(
    'flag, new',
    [
        ('--frontier', 'study.frontier'),
        ('--ablations=x', 'study.ablations'),
        ('--analysis', 'study.analysis'),
        ('--prompt', 'study.sample'),
        ('--tasks', 'study.tasks'),
    ],
)
def test_the_old_spellings_name_the_new_ones(flag, new, capsys):
    line = refusal(capsys, 'bench.py', bench.main, flag, 'x')
    assert flag.split('=')[0] in line and f'python -m {new}' in line
