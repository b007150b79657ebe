"""scale/plan.py, scale/memory.py: hand-worked sizes, the bytes that objects take, one line where it fails."""
import json
import math
import sys

import pytest
import torch

import scale.memory
import scale.plan
import train
from allocator import Allocators, Rollout
from conftest import random_model, refusal, tiny_config
from hub.checkpoint import save
from hub.config import PUBLISHED, from_hf, read_config
from hub.files import InputError
from scale.memory import allocator_sizes, check_memory, weight_bytes, working_bytes
from scale.plan import plan
from scale.stream import stream
from test_published import HUB
from train import Settings

MIXTRAL = 'mixtral-8x7b'


@pytest.fixture
def hub(tmp_path):
    """A folder with the config of a published model and nothing else."""
    def make(name):
        config = {**HUB[name], 'torch_dtype': 'bfloat16'}
        (tmp_path / 'config.json').write_text(json.dumps(config))
        return tmp_path
    return make


def test_plan_of_mixtral_by_hand(hub):
    s = Settings(ckpt=str(hub(MIXTRAL)), seq=1024, ppo_batch=16, ppo_steps=100, price=1e-3)
    p = plan(s, {'fast': (1e15, math.inf), 'slow to copy': (math.inf, 5e10)})
    C, F, V, L = 4096, 14336, 32000, 32
    attention = C * 4096 * 2 + C * 1024 * 2
    layer = attention + 8 * C + 8 * 3 * C * F + 2 * C
    rest = 2 * V * C + C
    assert p['layer_bytes'] == 2 * layer
    assert p['bytes'] == 2 * (L * layer + rest)
    working = working_bytes(s, read_config(s.ckpt), 2)
    assert p['memory']['plain'] == working + p['bytes']
    assert p['memory']['stream'] == working + 2 * (2 * layer + rest)
    # a token of one layer: matmuls of attention, scores over 1,024 tokens, router, two experts
    per_layer = 2 * attention + 4 * 1024 * 4096 + 2 * 8 * C + 2 * 6 * C * F
    token = L * per_layer + 2 * C * V
    update = 3 * 4 * 6 * 2 * (C + 9) * L
    ppo = 100 * 16 * 1024 * (5 * token + update)
    looks = (8 * L * 8192 + 25 * 131072) * token
    sweeps = 100 + L + 25
    assert p['flops'] == pytest.approx(ppo + looks, rel=1e-9)
    assert p['hours']['fast'] == pytest.approx((ppo + looks) / 1e15 / 3600)
    assert p['hours']['slow to copy'] == pytest.approx(sweeps * 2 * L * layer / 5e10 / 3600)


@pytest.mark.parametrize('changes', [
    {},
    dict(n_experts=5, dense_layers=(1,), dense_dim=64),
    dict(tie=True, shared_dim=24, model_type='qwen2_moe'),
])
def test_bytes_of_weights_are_what_is_taken(changes, tmp_path):
    config = tiny_config(**changes)
    model = random_model(config)

    def count(module):
        return 4 * sum(p.numel() for p in module.parameters())
    rest = count(model) - count(model.layers)
    assert weight_bytes(config, 4, 'plain') == count(model)
    assert weight_bytes(config, 4, 'stream') == rest + 2 * max(map(count, model.layers))
    if config.model_type == 'mixtral' and not config.dense_layers:
        save(model, tmp_path)
        taken = rest + stream(tmp_path).buffers.nbytes
        assert 1 <= taken / weight_bytes(config, 4, 'stream') < 1.1        # the weights are aligned


def test_bytes_of_a_rollout_are_what_is_taken():
    config = tiny_config()
    s = Settings(group=3, ppo_batch=5, seq=7)
    k_max, n_in = allocator_sizes(s, config)
    allocators = Allocators(config, k_max, s.extended)
    assert allocators.mean.shape[1] == n_in
    rollout = Rollout(allocators, torch.rand(3, 3 * 5 * 7), torch.float)
    kept = sum(t.numel() * t.element_size() for t in (rollout.z, rollout.k, rollout.logp, rollout.noise))
    update = 3 * 5 * 7 * (4 * n_in + 40 * k_max)               # of one layer
    hidden = 3 * 4 * 5 * 7 * 32 * 4
    experts = 3 * 5 * 7 * 4 * (3 * (2 * 32 + 3 * 16) + 3 * 32)
    logits = 16 * 4 * 5 * 7 * 50
    assert working_bytes(s, config, 4) == kept + update + hidden + max(experts, logits)


def test_too_little_memory_is_said_before_loading(monkeypatch, hub):
    config = read_config(hub(MIXTRAL))
    free = 94e9
    monkeypatch.setattr(scale.memory, 'free_memory', lambda device: free)
    with pytest.raises(InputError) as e:
        check_memory(Settings(), config, 2, 1, int(1e9))
    assert 'cpu has 94.0 GB free, this run needs 94.4 GB, 1.0 of them beside the weights' in str(e.value)
    pinned = check_memory(Settings(stream=True), config, 2, 1, int(1e9))
    assert not pinned                                          # there is no page-locking on a CPU
    free = 7e9
    with pytest.raises(InputError, match='needs 7.3 GB'):
        check_memory(Settings(stream=True), config, 2, 1, int(1e9))


@pytest.mark.parametrize('args, says', [
    ([], 'give the checkpoint with --ckpt'),
    (['--ckpt', 'nowhere'], 'no such folder'),
    (['--stream'], '--ckpt'),
])
def test_wrong_inputs(args, says, capsys):
    assert says in refusal(capsys, 'scale.plan', scale.plan.main, *args)


@pytest.mark.parametrize('name', HUB)
def test_short_names_are_planned_with_nothing_at_hand(name, hub, monkeypatch, tmp_path):
    assert PUBLISHED[name] == from_hf(HUB[name])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    numbers = plan(Settings(ckpt=name), {})
    assert numbers == {**plan(Settings(ckpt=str(hub(name))), {}), 'ckpt': name}


def test_a_config_that_is_there_is_read_instead(hub, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    here = tmp_path / 'checkpoints' / MIXTRAL
    here.mkdir(parents=True)
    (hub('olmoe-1b-7b') / 'config.json').rename(here / 'config.json')
    assert round(plan(Settings(ckpt=MIXTRAL), {})['bytes'], -8) == 13_800_000_000


def test_plan_prints_a_table_from_the_config_alone(hub, capsys, monkeypatch):
    monkeypatch.setattr(scale.plan, 'rates', lambda device: {'bfloat16': 2e12})
    scale.plan.main(['--ckpt', str(hub('olmoe-1b-7b')), '--paper', '--seq', '512'])
    head, _, line = capsys.readouterr().out.splitlines()
    assert head.endswith('H100 | hours, `--stream`, cpu |')
    assert '| 13.8 GB | 0.839 GB | 2.10M | ' in line


def test_a_streamed_gpu_gets_as_many_tokens_as_hide_the_transfer(monkeypatch, tmp_path):
    monkeypatch.setattr(train, 'open_device', lambda name: name)

    def batch(*args):
        return train.parse(['--ckpt', str(tmp_path), *args]).ppo_batch
    on_gpu = '--stream', '--device', 'cuda', '--seq', '2048'
    assert batch(*on_gpu) == 6                                 # 5 passes of 6 x 2,048 tokens: 61,440
    assert batch(*on_gpu, '--ppo-batch', '3') == 3
    assert batch('--stream', '--device', 'cpu') == batch('--device', 'cuda') == 16
