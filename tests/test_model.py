"""model.py: the cache, decoding; hub/safetensors.py: tensors in a file."""
import pytest
import torch

from allocator import Counted, TopK
from conftest import needs_cuda, random_ada_k, random_model, tiny_config
from hub.safetensors import read_safetensors, write_safetensors
from model import Cache, generate
from scale.graph import StaticCache, graph_decoder


@pytest.fixture
def model():
    return random_model(tiny_config())


def test_a_cache_takes_several_tokens_at_a_time_and_says_when_it_is_full(model):
    policy = random_ada_k(model.config, 8)
    tokens = torch.randint(50, (2, 17))
    cache = Cache(model, 2, 17)
    parts = [model(part, policy, cache) for part in tokens.split([5, 1, 7, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens, policy), rtol=1e-4, atol=1e-4)
    with pytest.raises(AssertionError, match='19 tokens in a cache of 17'):
        model(tokens[:, :2], None, cache)


def test_a_static_cache_decodes_what_the_whole_model_does(model):
    tokens = torch.randint(50, (2, 12))
    whole = model(tokens)
    cache = Cache(model, 2, 15)                                            # 3 places stay empty
    model(tokens[:, :5], None, cache)
    cache.kv[..., 5:, :] = 9                                   # what lies behind the end must not matter
    static = StaticCache(cache)
    for t in range(5, 12):
        found = model(tokens[:, t:t + 1], None, static)
        torch.testing.assert_close(found[:, 0], whole[:, t], rtol=1e-4, atol=1e-4)
    assert static.length.tolist() == [12]


@needs_cuda
def test_decoding_in_a_cuda_graph_gives_the_eager_tokens():
    model = random_model(tiny_config(dim=64, expert_dim=32, head_dim=16)).to('cuda', torch.bfloat16)
    tokens = torch.randint(50, (2, 5), device='cuda')
    tally = Counted(TopK(2), model)
    graphed = generate(model, tokens, 12, tally, decoder=graph_decoder)
    assert tally.counts.sum(1).tolist() == [2 * (5 + 11)] * 3
    assert torch.equal(graphed, generate(model, tokens, 12, TopK(2)))


def test_safetensors_keep_every_bit(tmp_path):
    tensors = {
        'b': torch.randn(3, 5).bfloat16(),
        'none': torch.empty(0, 4),
        'odd': torch.randn(3).half(),                          # what follows begins at no multiple of 4
        'strided': torch.randn(2, 3)[:, ::2],
    }
    write_safetensors(tmp_path / 'x', tensors, {'note': 'ü'})
    got, metadata = read_safetensors(tmp_path / 'x')
    assert metadata['note'] == 'ü' and got.keys() == tensors.keys()
    assert all(torch.equal(got[n], tensors[n]) and got[n].dtype == tensors[n].dtype for n in tensors)
