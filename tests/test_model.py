"""model.py: the seam, the cache, decoding; a model in files is the same model."""
import pytest
import torch

from allocator import AdaK, Allocators, Counted, RandomMix, TopK, Watched
from conftest import random_model, tiny_config
from hub.checkpoint import load, save
from hub.safetensors import read_safetensors, write_safetensors
from model import Cache, generate
from scale.graph import StaticCache, graph_decoder


def test_static_k_equals_the_plain_model():
    model = random_model(tiny_config())
    tokens = torch.randint(50, (2, 20))
    assert torch.equal(model(tokens), model(tokens, TopK(3)))
    assert not torch.allclose(model(tokens), model(tokens, TopK(2)))


def test_future_tokens_change_nothing_before_them():
    model = random_model(tiny_config())
    allocators = Allocators(model.config, 8, True)
    allocators.weight.data.normal_()
    chosen = []

    watched = Watched(AdaK(allocators), lambda layer, x, probs, k: chosen.append(k))
    a = torch.randint(50, (1, 20))
    b = a.clone()
    b[0, 12:] = (b[0, 12:] + 7) % 50
    logits_a, logits_b = model(a, watched), model(b, watched)
    torch.testing.assert_close(logits_a[:, :12], logits_b[:, :12], rtol=1e-5, atol=1e-5)
    for k_a, k_b in zip(chosen[:3], chosen[3:]):
        assert torch.equal(k_a[:12], k_b[:12])
    assert any(not torch.equal(k_a[12:], k_b[12:]) for k_a, k_b in zip(chosen[:3], chosen[3:]))


def test_cached_generation_equals_full_recomputation():
    model = random_model(tiny_config())
    allocators = Allocators(model.config, 8, True)
    allocators.weight.data.normal_(0, 0.3)
    for policy in (None, AdaK(allocators)):
        tokens = torch.randint(50, (2, 5))
        got = generate(model, tokens, 12, policy)
        for _ in range(12):
            tokens = torch.cat([tokens, model(tokens, policy)[:, -1].argmax(-1, keepdim=True)], 1)
        assert torch.equal(got, tokens)


def test_cache_takes_several_tokens_at_a_time():
    model = random_model(tiny_config())
    tokens = torch.randint(50, (2, 17))
    cache = Cache(model.config, 2, 17, 'cpu', torch.float32)
    parts = [model(part, None, cache) for part in tokens.split([5, 1, 7, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=1e-4, atol=1e-4)


def test_static_cache_decodes_what_the_growing_one_does():
    model = random_model(tiny_config())
    tokens = torch.randint(50, (2, 12))
    caches = [Cache(model.config, 2, 15, 'cpu', torch.float32) for _ in range(2)]   # 3 places stay empty
    for cache in caches:
        model(tokens[:, :5], None, cache)
    caches[1].k[:, :, :, 5:] = 9                               # what lies behind the end must not matter
    caches[1] = StaticCache(caches[1])
    for t in range(5, 12):
        plain, static = (model(tokens[:, t:t + 1], None, cache) for cache in caches)
        torch.testing.assert_close(static, plain, rtol=1e-4, atol=1e-4)
    assert caches[1].length.tolist() == [12]


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device here')
@pytest.mark.parametrize('policy', [None, TopK(2), RandomMix(1.5)])
def test_decoding_in_a_cuda_graph_gives_the_eager_tokens(policy):
    model = random_model(tiny_config(dim=64, expert_dim=32, head_dim=16)).to('cuda', torch.bfloat16)
    tokens = torch.randint(50, (2, 5), device='cuda')
    tally = Counted(policy or TopK(3), 3, 'cuda')
    graphed = generate(model, tokens, 12, tally, decoder=graph_decoder)
    assert tally.counts.sum(1).tolist() == [2 * (5 + 11)] * 3
    if not isinstance(policy, RandomMix):                      # a graph draws other numbers
        assert torch.equal(graphed, generate(model, tokens, 12, policy))


def test_save_then_load_gives_the_same_model(tmp_path):
    model = random_model(tiny_config())
    save(model, tmp_path)
    again = load(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    names = read_safetensors(tmp_path / 'model.safetensors')[0]
    assert names['model.layers.2.block_sparse_moe.experts.7.w2.weight'].shape == (32, 16)


def test_safetensors_keep_every_bit(tmp_path):
    tensors = {'b': torch.randn(3, 5).bfloat16(), 'scalar': torch.tensor(7), 'none': torch.empty(0, 4),
               'odd': torch.tensor([True, False, True]), 'f': torch.randn(2, 3)[:, ::2]}
    write_safetensors(tmp_path / 'x', tensors, {'note': 'ü'})
    got, metadata = read_safetensors(tmp_path / 'x')
    assert metadata['note'] == 'ü' and got.keys() == tensors.keys()
    assert all(torch.equal(got[n], tensors[n]) and got[n].dtype == tensors[n].dtype for n in tensors)


def test_a_cache_that_is_full_says_so():
    model = random_model(tiny_config())
    cache = Cache(model.config, 1, 4, 'cpu', torch.float32)
    model(torch.zeros(1, 3, dtype=torch.long), None, cache)
    with pytest.raises(AssertionError, match='5 tokens in a cache of 4'):
        model(torch.zeros(1, 2, dtype=torch.long), None, cache)
