"""model.py: the seam, the cache, checkpoints and the tokenizer."""

import pytest
import torch

import moe_dispatch
from allocator import AdaK, Allocators, Counted, RandomMix, TopK
from conftest import random_model, tiny_config
from hub.checkpoint import load, save
from hub.files import InputError, write_json
from hub.safetensors import read_safetensors, write_safetensors
from hub.tokenizer import Tokenizer
from model import Cache, StaticCache, generate
from base.text import learn_bpe, tokenizer_json


def test_static_k_equals_the_plain_model():
    model = random_model(tiny_config())
    tokens = torch.randint(50, (2, 20))
    assert torch.equal(model(tokens), model(tokens, TopK(3)))
    assert not torch.allclose(model(tokens), model(tokens, TopK(2)))


def test_allocators_that_always_say_K_equal_the_plain_model():
    model = random_model(tiny_config())
    allocators = Allocators(model.config, 8, False)
    allocators.bias.data[:, 2] = 9                             # action k = 3 = K
    tokens = torch.randint(50, (2, 20))
    torch.testing.assert_close(model(tokens), model(tokens, AdaK(allocators)), rtol=1e-5, atol=1e-5)


def test_future_tokens_change_nothing_before_them():
    model = random_model(tiny_config())
    allocators = Allocators(model.config, 8, True)
    allocators.weight.data.normal_()
    chosen = []

    class Watch(AdaK):
        def __call__(self, layer, x, probs):
            chosen.append(super().__call__(layer, x, probs))
            return chosen[-1]
    a = torch.randint(50, (1, 20))
    b = a.clone()
    b[0, 12:] = (b[0, 12:] + 7) % 50
    logits_a, logits_b = model(a, Watch(allocators)), model(b, Watch(allocators))
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
def test_decoding_in_a_cuda_graph_gives_the_eager_tokens(policy, monkeypatch):
    model = random_model(tiny_config(dim=64, expert_dim=32, head_dim=16)).to('cuda', torch.bfloat16)
    tokens = torch.randint(50, (2, 5), device='cuda')
    tally = Counted(policy or TopK(3), 3, 'cuda')
    graphed = generate(model, tokens, 12, tally)
    assert tally.counts.sum(1).tolist() == [2 * (5 + 11)] * 3
    if not isinstance(policy, RandomMix):                      # a graph draws other numbers
        monkeypatch.setattr(moe_dispatch, 'STATIC_TOKENS', 0)
        assert torch.equal(graphed, generate(model, tokens, 12, policy))


def test_save_then_load_gives_the_same_model(tmp_path):
    model = random_model(tiny_config(bos=1, eos=2))
    save(model, tmp_path)
    again = load(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    names = read_safetensors(tmp_path / 'model.safetensors')[0]
    assert names['model.layers.2.block_sparse_moe.experts.7.w2.weight'].shape == (32, 16)


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path):
    save(random_model(tiny_config()), tmp_path)
    path = tmp_path / 'model.safetensors'
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(InputError, match='model.safetensors'):
        load(tmp_path)
    tensors, _ = read_safetensors_bytes(path, whole)
    del tensors['model.norm.weight']
    write_safetensors(path, tensors)
    with pytest.raises(InputError, match='model.norm.weight is missing'):
        load(tmp_path)


def read_safetensors_bytes(path, content):
    path.write_bytes(content)
    tensors, metadata = read_safetensors(path)
    return {name: t.clone() for name, t in tensors.items()}, metadata


def test_safetensors_keep_every_bit(tmp_path):
    tensors = {'b': torch.randn(3, 5).bfloat16(), 'scalar': torch.tensor(7), 'none': torch.empty(0, 4),
               'odd': torch.tensor([True, False, True]), 'f': torch.randn(2, 3)[:, ::2]}
    write_safetensors(tmp_path / 'x', tensors, {'note': 'ü'})
    got, metadata = read_safetensors(tmp_path / 'x')
    assert metadata['note'] == 'ü' and got.keys() == tensors.keys()
    assert all(torch.equal(got[n], tensors[n]) and got[n].dtype == tensors[n].dtype for n in tensors)


# ---------------------------------------------------------------- tokenizer

@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tokenizer')
    merges = learn_bpe(
        ['def f(self):\n    return self.f(x)\n' * 9, 'größe, größer, am größten 12345 ' * 5], 300
    )
    write_json(folder / 'tokenizer.json', tokenizer_json(merges))
    write_json(folder / 'config.json', {'eos_token_id': 256 + len(merges)})
    return Tokenizer(folder)


def test_bpe_learns_the_textbook_merges():
    # 'aaabdaaabac': aa is the most frequent pair, then (aa)a, then (aaa)b; ties go to the larger pair
    assert learn_bpe(['aaabdaaabac'], 259) == [(97, 97), (256, 97), (257, 98)]


def test_bpe_round_trips_any_text(tokenizer):
    texts = ['', ' ', '\n\n  \t x', 'größe 漢字 🙂\u200d\x00\x7f', 'x' * 5000, '<|endoftext|>'] + [
        ''.join(map(chr, torch.randint(1, 0xd7ff, (50,)).tolist())) for _ in range(50)]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.eos not in ids


def test_bpe_joins_what_it_has_learnt(tokenizer):
    assert len(tokenizer.encode('return self.f(x)')) < 8 < len('return self.f(x)')
    assert tokenizer.decode([tokenizer.encode('ü')[0]]) == '\ufffd'                 # half a character


def test_every_byte_has_a_token(tokenizer):
    every = sorted(tokenizer.bytes_of_id[i] for i in range(256))
    assert every == [bytes([b]) for b in range(256)]


def test_a_cache_that_is_full_says_so():
    model = random_model(tiny_config())
    cache = Cache(model.config, 1, 4, 'cpu', torch.float32)
    model(torch.zeros(1, 3, dtype=torch.long), None, cache)
    with pytest.raises(AssertionError, match='5 tokens in a cache of 4'):
        model(torch.zeros(1, 2, dtype=torch.long), None, cache)
