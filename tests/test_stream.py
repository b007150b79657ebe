"""Layer streaming: the same bits as the model in memory, from checkpoints of every kind, and its limits."""
import os

import pytest
import torch

import scale.stream
from allocator import TopK
from conftest import GOLDEN, needs_cuda, random_ada_k, random_model, tiny_config
from hub.checkpoint import load, save
from hub.files import InputError
from model import generate
from scale.memory import weight_counts
from scale.stream import stream

MODELS = sorted({path.parent for path in GOLDEN.glob('*/model*.safetensors')})


@torch.no_grad()
@pytest.mark.parametrize('folder', MODELS, ids=lambda folder: folder.name)
def test_streamed_logits_are_those_of_the_loaded_model(folder):
    plain = load(folder, torch.bfloat16)
    streamed = stream(folder, torch.bfloat16)
    tokens = torch.randint(plain.config.n_vocab, (2, 12))
    for _ in range(2):                                         # the second pass finds the buffers used
        assert torch.equal(streamed(tokens), plain(tokens))
    assert torch.equal(generate(streamed, tokens[:, :3], 5), generate(plain, tokens[:, :3], 5))


@pytest.fixture
def checkpoint(tmp_path):
    save(random_model(tiny_config(n_layers=5)), tmp_path)
    return tmp_path


@torch.no_grad()
def test_passes_share_a_sweep_and_change_nothing(checkpoint, monkeypatch):
    plain = load(checkpoint)
    streamed = stream(checkpoint)
    passes = [
        (torch.randint(50, (1, 9)), None),
        (torch.randint(50, (4, 9)), random_ada_k(plain.config, 6)),
        (torch.randint(50, (2, 5)), TopK(1)),
    ]
    read = []
    real = streamed.read
    monkeypatch.setattr(streamed, 'read', lambda start: read.append(start) or real(start))
    for hidden, (tokens, policy) in zip(streamed.hidden_of(passes), passes):
        assert torch.equal(hidden, plain.hidden(tokens, policy))
    assert read == [f'model.layers.{i}.' for i in range(5)]    # each layer once
    assert not streamed.pinned                                 # there is no page-locking on a CPU


def test_memory_of_two_layers(checkpoint, monkeypatch):
    monkeypatch.setattr(torch, 'from_file', None)              # a map would count against ulimit -v
    streamed = stream(checkpoint)
    for i, layer in enumerate(streamed.layers):
        memory = streamed.buffers[i % 2].untyped_storage().data_ptr()
        assert {p.untyped_storage().data_ptr() for p in layer.parameters()} == {memory}
    layer, _, _ = weight_counts(streamed.config)
    assert 2 * layer <= streamed.buffers.numel() < 2.2 * layer             # the weights are aligned


def test_no_backward_pass_through_buffers(checkpoint):
    with pytest.raises(AssertionError, match='backward'):
        stream(checkpoint)(torch.randint(50, (1, 4)))


def test_a_file_that_shrinks_while_it_is_streamed(checkpoint):
    streamed = stream(checkpoint)
    os.truncate(checkpoint / 'model.safetensors', 50_000)
    with torch.no_grad(), pytest.raises(InputError, match='model.safetensors'):
        streamed(torch.randint(50, (1, 4)))


@torch.no_grad()
@needs_cuda
def test_streamed_logits_on_cuda(checkpoint, monkeypatch):
    tokens = torch.randint(50, (3, 9), device='cuda')
    logits = load(checkpoint, torch.bfloat16, 'cuda')(tokens)
    for free in (1e12, 0):
        monkeypatch.setattr(scale.stream, 'free_memory', lambda device: free)
        streamed = stream(checkpoint, torch.bfloat16, 'cuda')
        assert streamed.pinned == (free > 0)
        for _ in range(20):
            assert torch.equal(streamed(tokens), logits)
