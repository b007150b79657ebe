"""scale/plan.py, scale/memory.py: hand-worked sizes, the bytes that objects take, one line where it fails."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import scale.memory
import scale.plan
import train
from allocator import Allocators, Rollout
from conftest import random_model, refusal, tiny_config
from hub.checkpoint import save
from hub.files import InputError
from scale.stream import stream
from test_published import HUB
from train import Settings
from hub.config import read_config
from scale.memory import allocator_sizes, check_memory, state_bytes, weight_bytes
from scale.plan import measured_rates, neighbourhoods, plan

ROOT = Path(__file__).parent.parent
GPU = {'a gpu': (1e15, 5e10, 80e9)}


@pytest.fixture
def hub(tmp_path):
    """A folder with the config of a published model and nothing else."""
    def make(name):
        (tmp_path / 'config.json').write_text(json.dumps({**HUB[name], 'torch_dtype': 'bfloat16'}))
        return tmp_path
    return make


def test_plan_of_mixtral_by_hand(hub):
    s = Settings(ckpt=str(hub('mixtral-8x7b')), seq=1024, ppo_batch=16, ppo_steps=100, lam=1e-3)
    p = plan(s, GPU)
    C, F, V, L = 4096, 14336, 32000, 32
    attention = C * 4096 * 2 + C * 1024 * 2
    layer = attention + 8 * C + 8 * 3 * C * F + 2 * C
    assert p['layer_bytes'] == 2 * layer and p['bytes'] == 2 * (L * layer + 2 * V * C + C)
    assert (
        p['memory']['stream'][0] - p['working_bytes'] == 2 * (2 * layer + 2 * V * C + C)
        and p['memory']['stream'][1] == 2 * L * layer
    )
    assert p['memory']['plain'][0] == p['bytes'] + p['working_bytes']
    # a token of one layer: matmuls of attention, scores over 1,024 tokens, router, two experts
    per_layer = 2 * attention + 4 * 1024 * 4096 + 2 * 8 * C + 2 * 6 * C * F
    token = L * per_layer + 2 * C * V
    update = 3 * 4 * 6 * 4 * (C + 9) * L
    probes = 12 * 65536 * token                                       # Top-K, the start, ten times in between
    assert p['flops']['ppo'] == pytest.approx(100 * 16 * 1024 * (5 * token + update) + probes, rel=1e-9)
    m, = p['machines']
    assert m['compute_bound'] == pytest.approx(2 * layer / 5e10 / (per_layer / 1e15), rel=1e-9)
    seconds = {stage: flop / 1e15 for stage, flop in p['flops'].items()}
    assert m['hours']['plain'] is None and m['hours']['shard'] == pytest.approx(
        sum(seconds.values()) / 8 / 3600
    )
    # visits; 65,536 tokens share one. Two searches of shares, around 0.8 and 0.9, on the way to all of K
    way = {'start': 2 + 3 + L, 'ppo': 112, 'evaluation': 25 + 5 * 2 + 2 * L}
    assert m['hours']['stream'] == pytest.approx(
        sum(max(seconds[stage], n * 2 * L * layer / 5e10) for stage, n in way.items()) / 3600
    )


@pytest.mark.parametrize(
    'changes',
    [
        {},
        dict(n_experts=5, dense_layers=(1,), dense_dim=64),
        dict(tie=True, shared_dim=24, model_type='qwen2_moe'),
    ],
)
def test_bytes_of_weights_and_states_are_what_is_taken(changes, tmp_path):
    config = tiny_config(**changes)
    model = random_model(config)
    count = lambda of: 4 * sum(p.numel() for p in of)
    assert weight_bytes(config, 4, 'plain') == (count(model.parameters()), 0)
    rest = count(model.parameters()) - count(model.layers.parameters())
    largest = max(count(layer.parameters()) for layer in model.layers)
    assert weight_bytes(config, 4, 'stream') == (rest + 2 * largest, count(model.layers.parameters()))
    s = Settings(group=3, ppo_batch=5, seq=7)
    allocators = Allocators(config, *allocator_sizes(s, config)[:1], s.extended)
    assert allocators.mean.shape[1] == allocator_sizes(s, config)[1]
    L = len(config.moe_layers)
    rollout = Rollout(allocators, torch.rand(L, 3 * 5 * 7))
    kept = sum(t.numel() * t.element_size() for t in (rollout.z, rollout.k, rollout.logp, rollout.noise))
    update = L * 3 * 5 * 7 * 20 * allocators.k_max
    assert state_bytes(s, config) == kept + update


def test_streamed_buffers_take_what_the_plan_says(tmp_path):
    config = tiny_config()
    save(random_model(config), tmp_path)
    model = stream(tmp_path)
    rest = sum(
        p.numel() for module in (model.embed_tokens, model.norm, model.lm_head) for p in module.parameters()
    )
    taken = 4 * (sum(b.numel() for b in model.buffers) + rest)
    assert 1 <= taken / weight_bytes(config, 4, 'stream')[0] < 1.1   # weights begin at multiples of 512 bytes


@pytest.mark.parametrize(
    'streamed, free, says',
    [
        (
            False,
            60e9,
            '60.0 GB free, this run needs 94.4 GB (1.0 of them beside the weights); --stream needs 7.3 GB',
        ),
        (False, 7e9, '--stream needs 7.3 GB, and with it a smaller --ppo-batch or --seq needs less'),
        (True, 7e9, 'needs 7.3 GB'),
        (
            True,
            5e9,
            '5.0 GB free, this run needs 7.3 GB (1.0 of them beside the weights); '
            'two layers and the embedding alone are 6.3 GB',
        ),
    ],
)
def test_too_little_memory_is_said_before_loading(streamed, free, says, monkeypatch, hub):
    config = read_config(hub('mixtral-8x7b'))
    monkeypatch.setattr(scale.memory, 'free_memory', lambda device: free)
    with pytest.raises(InputError) as e:
        check_memory(Settings(stream=streamed), config, 2, 1, int(1e9))
    assert says in str(e.value) and 'cpu' in str(e.value)
    monkeypatch.setattr(scale.memory, 'free_memory', lambda device: 1e12)
    assert (
        check_memory(Settings(stream=streamed), config, 2, 1, int(1e9)) is False
    )  # nothing to page-lock on a CPU


def test_free_memory_sees_ulimit():
    script = ('import resource, sys; sys.path.insert(0, sys.argv[1]); import torch\n'
              'from scale.memory import free_memory, numbers\n'
              'before = free_memory(torch.device("cpu"))\n'
              'size = 1024 * numbers("/proc/self/status")["VmSize"]\n'    # 3 GB and more with CUDA in torch
              'for limit in (size + 10 ** 9, size - 10 ** 9):\n'
              '    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))\n'
              '    print(free_memory(torch.device("cpu")))\n'
              'print(before)')
    done = subprocess.run([sys.executable, '-c', script, ROOT], capture_output=True, text=True)
    a_gigabyte, none, before = map(float, done.stdout.split())
    assert before > 1e8 and 0.5e9 < a_gigabyte <= 1e9 and none == 0


@pytest.mark.parametrize(
    'args, says',
    [
        ([], 'give the checkpoint with --ckpt'),
        (['--ckpt', 'nowhere'], 'no such folder'),
        (['--stream'], '--ckpt'),
        (
            ['--ckpt', 'mixtral-8x7b'],
            'get its config with: hf download mistralai/Mixtral-8x7B-v0.1 config.json --local-dir',
        ),
    ],
)
def test_wrong_inputs(args, says, capsys):
    assert says in refusal(capsys, 'scale.plan', scale.plan.main, *args)


def test_the_old_spelling_names_the_new_one(capsys):
    line = refusal(capsys, 'train.py', train.main, '--plan', '--ckpt', 'mixtral-8x7b')
    assert '--plan' in line and 'python -m scale.plan' in line


def test_plan_prints_a_table_from_the_config_alone(hub, capsys, monkeypatch):
    monkeypatch.setattr(scale.plan, 'free_memory', lambda device: 0)           # nothing is measured here then
    scale.plan.main(['--ckpt', str(hub('olmoe-1b-7b')), '--paper', '--seq', '512'])
    text = capsys.readouterr().out
    assert '6.92B weights in bfloat16, 13.8 GB' in text and 'allocators of 2,097,152 weights' in text
    rows = [line for line in text.splitlines() if line.startswith('| H100')]
    assert len(rows) == 1 and 'does not fit' not in rows[0]


def test_measured_rates_are_of_one_layer():
    rate, copy = measured_rates(
        Settings(seq=64), replace(tiny_config(), dense_layers=(0,), dense_dim=8), torch.float32
    )
    assert 1e6 < rate < 1e14 and 1e8 < copy < 1e13


def test_a_streamed_gpu_gets_as_many_tokens_as_hide_the_copy(monkeypatch, tmp_path):
    monkeypatch.setattr(train, 'open_device', lambda name: name)
    batch = lambda *args: train.parse(['--ckpt', str(tmp_path), *args]).ppo_batch
    assert batch('--stream', '--device', 'cuda', '--seq', '2048') == 6  # 5 passes of 6 x 2,048 tokens: 61,440
    assert batch('--stream', '--device', 'cuda', '--seq', '2048', '--ppo-batch', '3') == 3
    assert batch('--stream', '--device', 'cpu') == batch('--device', 'cuda') == 16


def test_searches_on_the_way_of_a_calibration_by_hand():
    assert neighbourhoods(1.5, 2) == {0.8}                     # the first middle of 1..2 is 1.5
    # 2.5, 3.25, 2.875, 3.0625, .. of 4
    assert neighbourhoods(3.0, 4) == {0.6, 0.8, 0.7}
