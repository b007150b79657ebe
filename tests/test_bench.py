"""bench.py from the command line: generation under each policy, and wrong inputs."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench
import train
from allocator import AdaK, Allocators, Counted, RandomMix, Skip, TopK, TopP
from hub.checkpoint import load
from hub.tokenizer import Tokenizer
from model import generate

ROOT = Path(__file__).parent.parent


def test_generation_prints_the_text_speed_and_mean_k(smoke):
    run = smoke[0]
    done = subprocess.run([sys.executable, ROOT / 'bench.py', '--run', run, '--prompt', 'def f(', '--tokens', '12', '--show'],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model, tokenizer = load(run / 'base'), Tokenizer(run / 'base')
    policy = AdaK(Allocators.load(run / 'allocator.safetensors', model.config))
    tokens = torch.tensor([tokenizer.encode('def f(')])
    text = tokenizer.decode(generate(model, tokens, 12, policy)[0].tolist())
    assert done.stdout.startswith(text)
    assert 'tokens/s' in done.stdout and 'mean k' in done.stdout and '\x1b[48;5;' in done.stdout and 'over the layers' in done.stdout


def test_coloured_text_is_the_text(smoke):
    import re
    model, tokenizer = load(smoke[0] / 'base'), Tokenizer(smoke[0] / 'base')
    ids = tokenizer.encode('def größe(self):\n    return 漢')
    shown = bench.coloured(model, tokenizer, torch.tensor([ids]), RandomMix(2.5))
    assert re.sub('\x1b\\[[0-9;]*m', '', shown).startswith('def größe(self):\n    return 漢\n')


@pytest.mark.parametrize('name, kind, k_max', [('top-k', TopK, 3), ('k=2', TopK, 2), ('mix=1.5', RandomMix, 2), ('top-p=.4', TopP, 8),
                                               ('skip=0.5', Skip, 3)])
def test_policies_by_name(name, kind, k_max):
    from conftest import tiny_config
    policy = bench.make_policy(name, tiny_config(), None, 'cpu')
    assert type(policy) is kind and policy.k_max == k_max


@pytest.mark.parametrize('args, says', [
    ([], '--ckpt'), (['--policy', 'k=99'], 'k=99'), (['--policy', 'k=1.5'], 'k=1.5'), (['--policy', 'best'], 'best'),
    (['--policy', 'ada-k'], '--run'), (['--tokens', '0'], '--tokens'), (['--temperature', '-1'], '--temperature'),
    (['--device', 'abacus'], 'abacus'), (['--prompt', ''], '--prompt'), (['--run', '/no/such', '--policy', 'ada-k'], 'no/such'),
    (['--ckpt', 'gpt-9'], 'gpt-9')])
def test_wrong_flags_are_refused_in_one_line(args, says, smoke, capsys):
    base = [] if not args else ['--ckpt', str(smoke[0] / 'base')]
    with pytest.raises(SystemExit) as exit:
        bench.command_line(['--prompt', 'x', *base, *args])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count('\n') == 1 and says in error


def test_quick_bench_writes_its_tables(tmp_path):
    done = subprocess.run([sys.executable, ROOT / 'bench.py', '--quick', '--out', tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / 'bench.json').read_text())
    rows = results['dispatch']
    assert {(r['dtype'], r['stage'], r['T']) for r in rows} == {
        (dtype, *stage) for dtype in ('float32', 'bfloat16')
        for stage in (('prefill', 64), ('decode', 8), ('decode', 1), ('forward + backward', 32))}
    assert {r['path'] for r in rows} >= {'loop', 'exact', 'static', 'dense pair'}
    assert all(0 < r['low'] <= r['ms'] <= r['high'] for r in rows)
    for r in rows:
        assert r['mean_k'] == pytest.approx(0.75 * r['K'], rel=0.02) or not r['variable'] or r['stage'] == 'decode'
        if r['stage'] == 'prefill':                            # 6*C*F FLOPs a row, rows = sum of k
            assert r['flops'] == pytest.approx(6 * 64 * 32 * 64 * r['mean_k'])
            limits = r['flops'] / results['reached'][r['dtype']], r['bytes'] / results['reached']['copy']
            assert r['limit_ms'] == pytest.approx(1000 * max(limits)) and r['bound'] == ('compute' if limits[0] > limits[1] else 'memory')
    top, ada = results['model']['rows']
    assert ada['prefill_mean_k'] == pytest.approx(1.4, abs=0.05) and top['prefill_mean_k'] == 2
    assert sum(ada['share_of_prefill'].values()) == pytest.approx(1) and ada['share_of_prefill']['allocator'] > 0
    assert '| exact |' in done.stdout and '| ada-k |' in done.stdout
    for name in ('dispatch.png', 'roofline.png', 'model.png'):
        assert (tmp_path / name).read_bytes().startswith(b'\x89PNG')


def test_bench_of_a_run_uses_its_allocators_and_its_text(smoke, tmp_path):
    run = smoke[0]
    bench.command_line(['--run', str(run), '--quick', '--tokens', '8', '--out', str(tmp_path)])
    table = json.loads((tmp_path / 'bench.json').read_text())['model']
    model = load(run / 'base')
    policy = AdaK(Allocators.load(run / 'allocator.safetensors', model.config))
    s = train.run_settings(run)
    _, _, texts = train.base_model(s, run)
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
    with pytest.raises(SystemExit) as exit:
        bench.command_line(['--run', str(run)])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.splitlines()[-1].startswith('bench.py: ') and says in error
