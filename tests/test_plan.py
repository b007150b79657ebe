"""scale/plan.py, scale/memory.py: hand-worked sizes, the bytes that objects take, one line where it fails."""
import math

import pytest
import torch

import scale.memory
import scale.plan
import train
from allocator import Rollout
from conftest import ROOT, refusal, tiny_config
from hub.checkpoint import PUBLISHED, load
from hub.config import from_hf, read_config
from hub.files import InputError
from moe_dispatch import flops
from scale.memory import check_memory, empty_allocators, weight_bytes, weight_counts, working_bytes
from scale.plan import gb, plan, run_flops
from test_published import HUB
from train import Settings

MIXTRAL = 'mixtral-8x7b'


def test_plan_of_mixtral_by_hand():
    s = Settings(ckpt=MIXTRAL, seq=1024, ppo_batch=16, ppo_steps=100, price=1e-3)
    config = read_config(PUBLISHED / MIXTRAL)
    C, F, V, L = 4096, 14336, 32000, 32
    attention = C * 4096 * 2 + C * 1024 * 2
    layer = attention + 8 * C + 8 * 3 * C * F + 2 * C
    rest = 2 * V * C + C
    assert weight_counts(config) == (layer, L * layer, rest)
    assert weight_bytes(config, 2, stream=False, size=1) == 2 * (L * layer + rest)
    assert weight_bytes(config, 2, stream=True, size=1) == 2 * (2 * layer + rest)
    working = working_bytes(s, config, 2)
    # a token of one layer: matmuls of attention, scores over 1,024 tokens, router, two experts
    per_layer = 2 * attention + 4 * 1024 * 4096 + 2 * 8 * C + 2 * 6 * C * F
    token = L * per_layer + 2 * C * V
    update = 3 * 4 * 6 * 2 * (C + 9) * L
    ppo = 100 * 16 * 1024 * (5 * token + update)
    looks = 32 * 131072 * token
    sweeps = 100 + 32
    work = run_flops(s, config)
    assert work == pytest.approx(ppo + looks, rel=1e-9)
    row = plan(s, {'fast': (1e15, math.inf), 'slow to copy': (math.inf, 5e10)})
    assert list(row.values()) == [
        MIXTRAL,
        '93.4 GB',
        gb(2 * layer),
        f'{2 * (C + 9) * L / 1e6 + 2 * L / 1e6:.2f}M',
        gb(working + 2 * (L * layer + rest)),
        gb(working + 2 * (2 * layer + rest)),
        gb(working // 8 + 2 * (L * layer // 8 + 2 * layer + rest)),
        f'{work:.1e}',
        f'{work / 1e15 / 3600:.2g}',
        f'{sweeps * 2 * L * layer / 5e10 / 3600:.2g}',
    ]


def test_bytes_of_a_rollout_are_what_is_taken():
    config = tiny_config()
    s = Settings(group=3, ppo_batch=5, seq=7)
    allocators = empty_allocators(s, config)
    _, k_max, n_in = allocators.weight.shape
    noise = torch.rand(3, 3 * 5 * 7)
    rollout = Rollout(allocators, noise)
    for layer in range(3):
        rollout(layer, torch.rand(3 * 5 * 7, 32), torch.rand(3 * 5 * 7, 8))
    kept = noise.nbytes + sum(t.nbytes for [one_pass] in rollout.drawn for t in one_pass)
    update = 3 * 5 * 7 * (4 * n_in + 40 * k_max)               # of one layer
    hidden = 3 * 4 * 5 * 7 * 32 * 4
    experts = 3 * 5 * 7 * 4 * (3 * (2 * 32 + 3 * 16) + 3 * 32)
    logits = 16 * 4 * 5 * 7 * 50
    assert working_bytes(s, config, 4) == kept + update + hidden + max(experts, logits)


def test_too_little_memory_is_said_before_loading(monkeypatch):
    monkeypatch.setattr(scale.memory, 'free_memory', lambda device: 94e9)
    args = read_config(PUBLISHED / MIXTRAL), 2, 1, int(1e9)
    with pytest.raises(InputError, match='cpu has 94.0 GB free, this run needs 94.4 GB, 1.0 of them beside'):
        check_memory(Settings(), *args)
    check_memory(Settings(stream=True), *args)


@pytest.mark.parametrize('name', HUB)
def test_short_names_have_the_sizes_of_the_published_configs(name):
    ours = read_config(PUBLISHED / name)
    theirs = from_hf(HUB[name])
    assert weight_counts(ours) == weight_counts(theirs)
    assert flops(ours, ours.top_k, 100) == flops(theirs, theirs.top_k, 100)


def test_plan_of_a_folder():
    folder = ROOT / 'tests/golden/deepseek-1'
    n_weights = sum(p.numel() for p in load(folder).parameters())
    assert plan(Settings(ckpt=str(folder)), {})['weights'] == gb(2 * n_weights)


def test_plan_prints_a_table(capsys):
    scale.plan.main(['--ckpt', 'olmoe-1b-7b', '--device', 'cpu', '--paper', '--seq', '512'])
    head, _, line = capsys.readouterr().out.splitlines()
    assert head.endswith('H100 | hours, `--stream`, cpu |')
    assert '| 13.8 GB | 0.839 GB | 2.10M | ' in line
    assert 'give the checkpoint with --ckpt' in refusal(capsys, 'scale.plan', scale.plan.main)


@pytest.mark.parametrize('flags, sequences', [
    (['--stream', '--device', 'cuda', '--seq', '2048'], 6),    # 5 passes of 6 x 2,048 tokens: 61,440
    (['--stream', '--device', 'cuda', '--ppo-batch', '3'], 3),
    (['--stream', '--device', 'cpu'], 16),
])
def test_a_streamed_gpu_gets_as_many_tokens_as_hide_the_transfer(flags, sequences, monkeypatch):
    monkeypatch.setattr(train, 'open_device', lambda s: None)
    assert train.parse(['--ckpt', MIXTRAL, *flags]).ppo_batch == sequences
