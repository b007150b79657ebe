"""Layer streaming: the same bits as the model in memory, from checkpoints of every kind, and its limits."""

from pathlib import Path

import pytest
import torch

import train
from allocator import AdaK, Allocators, TopK
from conftest import random_model, tiny_config
from hub.checkpoint import load, save
from hub.files import InputError
from model import generate
from scale.stream import stream
from base.text import Text
from run.rules import SkipFamilies
from run.start import new_allocators

GOLDEN = Path(__file__).parent / 'golden'
MODELS = sorted(
    p.parent.name
    for p in GOLDEN.glob('*/model*.safetensors')
    if 'index' not in p.name and '00002' not in p.name
)


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_streamed_logits_are_those_of_the_loaded_model(name, dtype):
    plain, streamed = load(GOLDEN / name, dtype), stream(GOLDEN / name, dtype)
    tokens = torch.randint(plain.config.n_vocab, (2, 12))
    with torch.no_grad():
        for _ in range(2):                                     # the second pass finds the buffers used
            assert torch.equal(streamed(tokens), plain(tokens))
    assert torch.equal(generate(streamed, tokens[:, :3], 5), generate(plain, tokens[:, :3], 5))


@pytest.fixture
def checkpoint(tmp_path):
    save(random_model(tiny_config(n_layers=5)), tmp_path)
    return tmp_path


def test_passes_share_a_visit_and_change_nothing(checkpoint):
    plain, streamed = load(checkpoint), stream(checkpoint)
    allocators = Allocators(plain.config, 6, True)
    allocators.weight.data.normal_(0, .3)
    passes = [
        (torch.randint(50, (n, 9)), policy) for n, policy in ((1, None), (4, AdaK(allocators)), (2, TopK(1)))
    ]
    with torch.no_grad():
        together = streamed.hidden_of(passes)
        for (tokens, policy), hidden in zip(passes, together):
            assert torch.equal(hidden, plain.hidden(tokens, policy))


def test_two_layers_of_memory_and_each_layer_read_once_a_visit(checkpoint):
    streamed = stream(checkpoint)
    memory = {p.untyped_storage().data_ptr() for layer in streamed.layers for p in layer.parameters()}
    assert len(memory) == 2
    read = []
    source, streamed.source = (
        streamed.source,
        lambda views: (read.append(min(views).split('.')[2]), source(views)),
    )
    with torch.no_grad():
        streamed.hidden_of([(torch.randint(50, (1, 4)), None)] * 3)
    assert read == ['0', '1', '2', '3', '4']


def test_streamed_training_ends_with_the_same_bits(checkpoint, monkeypatch):
    monkeypatch.setattr(train, 'PASS_TOKENS', 64)              # several passes, in both
    s = train.Settings(ppo_steps=6, seq=16, ppo_batch=6, calibration_tokens=256, heldout_tokens=256)
    text = Text(torch.randint(50, (3000,)), torch.arange(3000).numpy() // 100)
    ends = []
    for model in (load(checkpoint), stream(checkpoint)):
        families, log = SkipFamilies(model, text, 16), []
        allocators, price = new_allocators(s, model, text, families)
        train.train_ppo(s, model, allocators, price, text, log, text.windows(16, 256))
        rows = train.compare(s, model, allocators, families, text.windows(16, 256), text)
        ends.append((allocators.state_dict(), log, rows))
    (plain, *known), (streamed, *found) = ends
    assert (
        all(torch.equal(plain[name], streamed[name]) for name in plain)
        and len({row['mean_k'] for row in known[0]}) > 1
    )
    assert str(known) == str(found)


def test_no_file_is_mapped_and_no_layer_kept(checkpoint, monkeypatch):
    def mapped(*args, **kwargs):
        raise AssertionError('a map of a whole file would count against ulimit -v')
    monkeypatch.setattr(torch, 'from_file', mapped)
    with torch.no_grad():
        stream(checkpoint)(torch.randint(50, (1, 4)))


def test_no_backward_pass_through_buffers(checkpoint):
    with pytest.raises(AssertionError, match='backward'):
        stream(checkpoint)(torch.randint(50, (1, 4)))


def test_a_file_that_shrinks_while_it_is_streamed(checkpoint):
    streamed = stream(checkpoint)
    with open(checkpoint / 'model.safetensors', 'r+b') as f:
        f.truncate(f.seek(0, 2) // 2)
    with torch.no_grad(), pytest.raises(InputError, match='could not be read to its end'):
        streamed(torch.randint(50, (1, 4)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device here')
@pytest.mark.parametrize('pinned', [True, False])
def test_streamed_logits_on_cuda(checkpoint, pinned):
    plain, streamed = (
        load(checkpoint, torch.bfloat16, 'cuda'),
        stream(checkpoint, torch.bfloat16, 'cuda', pinned),
    )
    tokens = torch.randint(50, (3, 9), device='cuda')
    with torch.no_grad():
        for _ in range(20):
            assert torch.equal(streamed(tokens), plain(tokens))
