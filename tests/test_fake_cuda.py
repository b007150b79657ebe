"""Every CUDA path on tensors without numbers: devices do not mix, no decoding step waits for the host.

Fake tensors know shapes, dtypes and devices only; an operation that needs a value on the host raises. They
need a torch with CUDA compiled in, not a GPU.
"""
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import moe_dispatch
import ppo
import train
from allocator import AdaK, Allocators, Counted, RandomMix, Rollout, Skip, TopK, TopP
from conftest import tiny_config
from hub.plug import Tally, router_hook
from model import Cache, Transformer
from scale.graph import Captured, graph_decoder

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason='this torch has no CUDA compiled in')
FAMILIES = {
    'mixtral': {},
    'qwen2_moe, deepseek, olmoe': dict(
        norm_topk=False,
        shared_dim=32,
        shared_gate=True,
        qkv_bias=True,
        dense_layers=(0,),
        dense_dim=64,
        qk_norm='all',
    ),
    'qwen3_moe': dict(qk_norm='head', tie=True),
}
POLICIES = {
    'top-k': lambda c: TopK(c.top_k),
    'random-mix': lambda c: RandomMix(1.5),
    'top-p': lambda c: TopP(0.6, c.n_experts),
    'skip': lambda c: Skip([0.5] * 3, c.top_k),
    'ada-k': lambda c: AdaK(made(Allocators, c, 4, True)),
}
every_family = pytest.mark.parametrize('family', FAMILIES)
every_policy = pytest.mark.parametrize('policy', POLICIES)


def made(kind, *args, dtype=torch.float32):
    """A module that is made on the device and in the dtype: a fake one cannot be moved there."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device('cuda'):
            return kind(*args)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    """A pretended H100: tensors without numbers, the fast kernels native."""
    monkeypatch.setattr(moe_dispatch, 'native', lambda x: True)
    with FakeTensorMode(), torch.no_grad():
        yield


def model_of(family, T=6):
    """(model, tokens (2,T)) on the device."""
    config = tiny_config(dim=64, head_dim=16, expert_dim=32, **FAMILIES[family])
    model = made(Transformer, config, dtype=torch.bfloat16)
    return model, torch.randint(50, (2, T), device='cuda')


@every_policy
@every_family
def test_prefill_and_static_decoding_without_the_host(family, policy):
    model, tokens = model_of(family)
    choose_k = Counted(POLICIES[policy](model.config), model)
    cache = Cache(model, 2, 10)
    model(tokens, choose_k, cache)
    step = graph_decoder(model, choose_k, cache)
    assert isinstance(step, Captured)
    for _ in range(2):                                         # the third would be captured
        logits = step(tokens[:, :1])
        assert logits.shape == (2, 50)
        assert logits.device.type == 'cuda' and logits.dtype == torch.float32


def test_many_tokens_do_wait_for_the_host():
    model, tokens = model_of('mixtral', 200)
    with pytest.raises(DataDependentOutputException):
        model(tokens)


@every_family
@pytest.mark.parametrize('reward', ['expected', 'sampled'])
def test_rollout_and_reward(family, reward, monkeypatch):
    monkeypatch.setattr(moe_dispatch, 'STATIC_TOKENS', 10 ** 6)
    model, tokens = model_of(family, 12)
    s = train.Settings(group=2, ppo_batch=2, seq=12, reward=reward)
    allocators = made(Allocators, model.config, 4, True)
    noise = torch.rand(len(model.config.moe_layers), 2 * 24, device='cuda')
    rollout = Rollout(allocators, noise)
    found = train.rollout_reward(s, model, tokens, tokens, rollout)
    credit = ppo.reward_to_go(found, 0.9, tokens)              # (1+G,B,T)
    [(_, k, _)] = rollout.drawn[0]
    assert credit.device.type == k.device.type == 'cuda'


@every_policy
def test_hooks_inside_transformers(policy):
    c = tiny_config()
    choose_k = POLICIES[policy](c)
    decoder = SimpleNamespace(forward=lambda input_ids, attention_mask, past_key_values: None)
    tally = Tally(choose_k, len(c.moe_layers))
    hook = router_hook(1, tally, moe_dispatch.Weighting.of(c), None, c)
    with torch.device('cuda'):
        past = torch.zeros((), dtype=torch.int)
        cache = SimpleNamespace(get_seq_length=lambda: past)
        tally.begin(decoder, (torch.ones(2, 6), torch.ones(2, 9), cache), {})
        logits = torch.rand(12, c.n_experts)
        _, weights, ids = hook(None, (torch.rand(12, c.dim),), (logits, logits, None))
    assert weights.shape == ids.shape == (12, max(choose_k.k_max, c.top_k))
    assert ids.device.type == tally.by_layer[1].device.type == 'cuda'


def test_a_policy_follows_the_model_to_another_device():
    c = tiny_config()
    policy = AdaK(Allocators(c, 4, True))
    x = torch.rand(12, c.dim)
    probs = torch.rand(12, c.n_experts)
    for device in ('cpu', 'cuda', 'cpu'):
        k = policy(0, x.to(device), probs.to(device))
        assert k.device.type == device
