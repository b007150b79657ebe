"""Layer streaming: the same bits as the model in memory, from checkpoints of every kind, and its limits."""
import pytest
import torch

import train
from allocator import AdaK, Allocators, TopK
from base.text import Text
from conftest import ROOT, random_model, tiny_config
from hub.checkpoint import load, save
from hub.files import InputError
from model import generate
from run.rules import SkipFamilies
from run.start import new_allocators
from scale.stream import stream

MODELS = sorted({path.parent for path in (ROOT / 'tests/golden').glob('*/model*.safetensors')})


@pytest.mark.parametrize('folder', MODELS, ids=lambda folder: folder.name)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_streamed_logits_are_those_of_the_loaded_model(folder, dtype):
    plain = load(folder, dtype)
    streamed = stream(folder, dtype)
    tokens = torch.randint(plain.config.n_vocab, (2, 12))
    with torch.no_grad():
        for _ in range(2):                                     # the second pass finds the buffers used
            assert torch.equal(streamed(tokens), plain(tokens))
    assert torch.equal(generate(streamed, tokens[:, :3], 5), generate(plain, tokens[:, :3], 5))


@pytest.fixture
def checkpoint(tmp_path):
    save(random_model(tiny_config(n_layers=5)), tmp_path)
    return tmp_path


def test_passes_share_a_sweep_and_change_nothing(checkpoint, monkeypatch):
    plain = load(checkpoint)
    streamed = stream(checkpoint)
    allocators = Allocators(plain.config, 6, True)
    allocators.weight.data.normal_(0, .3)
    passes = []
    for shape, policy in (((1, 9), None), ((4, 9), AdaK(allocators)), ((2, 5), TopK(1))):
        passes.append((torch.randint(50, shape), policy))
    read = []
    real = streamed.read

    def reading(layer):
        read.append(layer)
        real(layer)
    monkeypatch.setattr(streamed, 'read', reading)
    with torch.no_grad():
        together = streamed.hidden_of(passes)
        for (tokens, policy), hidden in zip(passes, together):
            assert torch.equal(hidden, plain.hidden(tokens, policy))
    assert read == [0, 1, 2, 3, 4]                             # each layer once


def test_memory_of_two_layers(checkpoint, monkeypatch):
    def mapped(*args, **kwargs):
        raise AssertionError('a map of a whole file would count against ulimit -v')
    monkeypatch.setattr(torch, 'from_file', mapped)
    streamed = stream(checkpoint)
    for i, layer in enumerate(streamed.layers):
        buffer = streamed.buffers[i % 2]
        first, end = buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes
        assert all(first <= p.data_ptr() < end for p in layer.parameters())
    with torch.no_grad():
        streamed(torch.randint(50, (1, 4)))


def test_streamed_training_ends_with_the_same_bits(checkpoint, monkeypatch):
    monkeypatch.setattr(train, 'sequences_of_pass', lambda T: 64 // T)      # several passes, in both
    s = train.Settings(ppo_steps=6, seq=16, ppo_batch=6, heldout_tokens=256)
    text = Text(torch.randint(50, (800,)), torch.arange(800).numpy() // 100)
    windows = text.windows(16, 256)
    ends = []
    for model in (load(checkpoint), stream(checkpoint)):
        families = SkipFamilies(model, text.windows(16))
        allocators, price = new_allocators(s, model, text, families)
        log = []
        train.train_ppo(s, model, allocators, price, text, log, windows)
        rows = train.compare(s, model, allocators, families, windows, windows)
        ends.append((allocators.state_dict(), log, rows))
    (plain, *known), (streamed, *found) = ends
    assert all(torch.equal(plain[name], streamed[name]) for name in plain)
    assert len({row['mean_k'] for row in known[0]}) > 1
    assert str(known) == str(found)


def test_no_backward_pass_through_buffers(checkpoint):
    with pytest.raises(AssertionError, match='backward'):
        stream(checkpoint)(torch.randint(50, (1, 4)))


def test_a_file_that_shrinks_while_it_is_streamed(checkpoint):
    streamed = stream(checkpoint)
    with open(checkpoint / 'model.safetensors', 'r+b') as f:
        f.truncate(f.seek(0, 2) // 2)
    with torch.no_grad(), pytest.raises(InputError, match='model.safetensors'):
        streamed(torch.randint(50, (1, 4)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device here')
@pytest.mark.parametrize('pinned', [True, False])
def test_streamed_logits_on_cuda(checkpoint, pinned):
    plain = load(checkpoint, torch.bfloat16, 'cuda')
    streamed = stream(checkpoint, torch.bfloat16, 'cuda', pinned)
    tokens = torch.randint(50, (3, 9), device='cuda')
    with torch.no_grad():
        for _ in range(20):
            assert torch.equal(streamed(tokens), plain(tokens))
