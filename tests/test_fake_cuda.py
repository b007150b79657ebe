"""Every CUDA path on tensors without numbers: devices do not mix, no decoding step waits for the host.

Fake tensors know shapes, dtypes and devices only; an operation that needs a value on the host raises. They
need a torch with CUDA compiled in, not a GPU.
"""
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import moe_dispatch
import ppo
import train
from allocator import AdaK, Allocators, Counted, RandomMix, Rollout, Skip, TopK, TopP
from conftest import tiny_config
from model import Cache, Decoder, StaticCache, Transformer
from run.evaluate import divergences, token_logp

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason='this torch has no CUDA compiled in')
SIZES = dict(dim=64, head_dim=16, expert_dim=32, n_experts=8, top_k=2)
FAMILIES = {
    'mixtral': {}, 'qwen2_moe': dict(norm_topk=False, shared_dim=32, shared_gate=True, qkv_bias=True),
    'deepseek': dict(norm_topk=False, shared_dim=32, dense_layers=(0,), dense_dim=64),
    'olmoe': dict(norm_topk=False, qk_norm='all'), 'qwen3_moe': dict(qk_norm='head'), 'tied': dict(tie=True)}
POLICIES = {
    'top-k': lambda c: None, 'static k': lambda c: TopK(3), 'random mix': lambda c: RandomMix(1.5),
    'top-p': lambda c: TopP(0.6, c.n_experts), 'skip': lambda c: Skip(0.5, c.top_k),
    'skip by layer': lambda c: Skip([0.5] * 3, c.top_k), 'ada-k': lambda c: ada_k(c, True),
    'ada-k as published': lambda c: ada_k(c, False)}


def made(kind, *args, dtype=torch.float32):
    """A module that is made on the device and in the dtype: a fake one cannot be moved there."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device('cuda'):
            return kind(*args)
    finally:
        torch.set_default_dtype(torch.float32)


def ada_k(c, extended):
    return AdaK(made(Allocators, c, 4, extended))


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    """A pretended H100: tensors without numbers, the fast kernels native."""
    monkeypatch.setattr(moe_dispatch, 'native', lambda x: True)
    monkeypatch.setattr(moe_dispatch, 'warn_of_fallback', lambda x: None)
    with FakeTensorMode(), torch.no_grad():
        yield


def model_of(family, T=6):
    """(model, tokens (2,T)) on the device."""
    c = tiny_config(**{**SIZES, **FAMILIES[family]})
    return made(Transformer, c, dtype=torch.bfloat16), torch.randint(50, (2, T), device='cuda')


@pytest.mark.parametrize('policy', POLICIES)
@pytest.mark.parametrize('family', FAMILIES)
def test_prefill_and_static_decoding_without_the_host(family, policy):
    model, tokens = model_of(family)
    choose_k, c = POLICIES[policy](model.config), model.config
    if choose_k:
        choose_k = Counted(choose_k, len(c.moe_layers), 'cuda')
    cache = Cache(c, 2, 10, 'cuda', torch.bfloat16)
    logits = model(tokens, choose_k, cache)
    assert logits.shape == (2, 6, 50) and logits.device.type == 'cuda' and logits.dtype == torch.bfloat16
    step = Decoder(model, choose_k, cache)
    assert isinstance(step.cache, StaticCache) and step.capture
    for _ in range(2):                                         # the third would be captured
        out = step(logits[:, -1].argmax(-1, keepdim=True))
        assert out.shape == (2, 50) and out.device.type == 'cuda' and out.dtype == torch.float32


def test_many_tokens_do_wait_for_the_host():
    model, tokens = model_of('mixtral', 200)
    with pytest.raises(DataDependentOutputException):
        model(tokens)


@pytest.mark.parametrize('family', FAMILIES)
def test_rollout_reward_and_update(family, monkeypatch):
    monkeypatch.setattr(moe_dispatch, 'STATIC_TOKENS', 10 ** 6)
    model, tokens = model_of(family, 12)
    c, L, P = model.config, len(model.config.moe_layers), 24
    allocators = made(Allocators, c, 4, True)
    s = train.Settings(group=2, ppo_batch=2, seq=12)
    for reward in ('expected', 'sampled'):
        rollout = Rollout(allocators, torch.rand(L, 2 * P, device='cuda'))
        found, of_topk = train.rollout_reward(train.replace(s, reward=reward), model, tokens, tokens, rollout)
        assert found.shape == (2, P) and of_topk.shape == (P,) and found.device.type == 'cuda'
        advantage = ppo.group_advantage(ppo.reward_to_go(found.view(2, 2, 12), 0.9).flatten(1))
        assert advantage.device.type == 'cuda' and rollout.k.device.type == 'cuda'


def test_losses_and_divergences():
    model, tokens = model_of('qwen2_moe')
    assert token_logp(model, model.hidden(tokens), tokens).device.type == 'cuda'
    [(nats, tally)] = divergences(model, (tokens, tokens, None), [Skip(0.5, 2)])
    assert nats.shape == (12,) and tally.counts.device.type == 'cuda'
