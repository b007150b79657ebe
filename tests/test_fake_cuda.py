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
from hub.plug import Tally, router_hook
from model import Cache, Transformer
from run.evaluate import evaluate
from scale.graph import Captured, graph_decoder

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason='this torch has no CUDA compiled in')
SIZES = dict(dim=64, head_dim=16, expert_dim=32, n_experts=8, top_k=2)
FAMILIES = {
    'mixtral': {},
    'qwen2_moe': dict(norm_topk=False, shared_dim=32, shared_gate=True, qkv_bias=True),
    'deepseek': dict(norm_topk=False, shared_dim=32, dense_layers=(0,), dense_dim=64),
    'olmoe': dict(norm_topk=False, qk_norm='all'),
    'qwen3_moe': dict(qk_norm='head'),
    'tied': dict(tie=True),
}
POLICIES = {
    'top-k': lambda c: None,
    'static k': lambda c: TopK(3),
    'random-mix': lambda c: RandomMix(1.5),
    'top-p': lambda c: TopP(0.6, c.n_experts),
    'skip': lambda c: Skip(0.5, c.top_k),
    'skip, per layer': lambda c: Skip([0.5] * 3, c.top_k),
    'ada-k': lambda c: AdaK(made(Allocators, c, 4, True)),
    'published': lambda c: AdaK(made(Allocators, c, 4, False)),
}


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
    c = model.config
    choose_k = POLICIES[policy](c)
    if choose_k:
        choose_k = Counted(choose_k, len(c.moe_layers), 'cuda')
    cache = Cache(c, 2, 10, 'cuda', torch.bfloat16)
    logits = model(tokens, choose_k, cache)
    assert logits.shape == (2, 6, 50)
    assert logits.device.type == 'cuda' and logits.dtype == torch.bfloat16
    step = graph_decoder(model, choose_k, cache)
    assert isinstance(step, Captured)
    for _ in range(2):                                         # the third would be captured
        out = step(logits[:, -1].argmax(-1, keepdim=True))
        assert out.shape == (2, 50)
        assert out.device.type == 'cuda' and out.dtype == torch.float32


def test_many_tokens_do_wait_for_the_host():
    model, tokens = model_of('mixtral', 200)
    with pytest.raises(DataDependentOutputException):
        model(tokens)


@pytest.mark.parametrize('family', FAMILIES)
def test_rollout_reward_and_update(family, monkeypatch):
    monkeypatch.setattr(moe_dispatch, 'STATIC_TOKENS', 10 ** 6)
    model, tokens = model_of(family, 12)
    L = len(model.config.moe_layers)
    allocators = made(Allocators, model.config, 4, True)
    for reward in ('expected', 'sampled'):
        s = train.Settings(group=2, ppo_batch=2, seq=12, reward=reward)
        rollout = Rollout(allocators, torch.rand(L, 2 * 24, device='cuda'), torch.float)
        found, of_topk = train.rollout_reward(s, model, tokens, tokens, rollout)
        assert found.shape == (2, 2, 12) and of_topk.shape == (2, 12)
        advantage = ppo.group_advantage(ppo.reward_to_go(found, 0.9, tokens).flatten(1))
        assert advantage.device.type == rollout.k.device.type == 'cuda'


@pytest.mark.parametrize('expected', [False, True])
def test_evaluation(expected):
    model, tokens = model_of('qwen2_moe')
    [(nats, tally)] = evaluate(model, (tokens, tokens, None), [Skip(0.5, 2)], expected)
    assert nats.shape == (12,) and tally.counts.shape == (3, 3)


class Decoder:
    """What hub/plug.py asks a model of transformers, or its cache."""

    def forward(self, input_ids, attention_mask=None, past_key_values=None):
        pass

    def get_seq_length(self):
        return torch.zeros((), dtype=torch.int, device='cuda')


@pytest.mark.parametrize('policy', POLICIES)
@pytest.mark.parametrize('mask', [(2, 9), (2, 1, 6, 9), None])
def test_hooks_inside_transformers(policy, mask):
    c = tiny_config(**SIZES)
    choose_k = POLICIES[policy](c) or TopK(c.top_k)
    x = torch.rand(12, c.dim, device='cuda')
    logits = torch.rand(12, c.n_experts, device='cuda')
    if mask:
        mask = torch.ones(mask, dtype=torch.bool, device='cuda')
    tally = Tally(choose_k, len(c.moe_layers))
    tally.here.ended = torch.zeros(2, dtype=torch.bool, device='cuda')
    tally.begin(Decoder(), (torch.ones(2, 6, dtype=torch.long, device='cuda'), mask, Decoder()), {})
    hook = router_hook(1, choose_k, c, tally)
    _, weights, ids = hook(None, (x,), (logits, logits, None))
    assert weights.shape == ids.shape == (12, choose_k.k_max)
    assert ids.device.type == tally.by_layer[1].device.type == 'cuda'


def test_a_policy_follows_the_model_to_another_device():
    c = tiny_config(**SIZES)
    policy = AdaK(Allocators(c, 4, True))
    for device in ('cpu', 'cuda', 'cpu'):
        k = policy(0, torch.rand(12, c.dim, device=device), torch.rand(12, c.n_experts, device=device))
        assert k.device.type == device
