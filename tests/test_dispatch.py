"""moe_dispatch.py: the grouped path against the loop, selection by hand, FLOPs against torch's counter."""
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import moe_dispatch
from allocator import TopK
from conftest import random_model, tiny_config
from moe_dispatch import flops, moe, moe_loop, select

P, C, F, N = 37, 16, 24, 6


def poison():
    """Leave NaN in freed memory: rows that are read but never written then show."""
    blocks = [torch.full((n,), float('nan')) for n in (64, 512, 1024, 4096, 16384) for _ in range(20)]
    del blocks


def case(k, k_max=N, dtype=torch.float32, probs=None):
    x = torch.randn(P, C, dtype=dtype)
    w_in, w_out = torch.randn(N, 2 * F, C, dtype=dtype) / 4, torch.randn(N, C, F, dtype=dtype) / 4
    probs = torch.rand(P, N).softmax(-1) if probs is None else probs
    ids, weights = select(probs, k, k_max, True)
    return x, ids, weights, k, w_in, w_out


def one_expert():
    """Router probabilities with expert 4 first for every token."""
    probs = torch.rand(P, N)
    probs[:, 4] = 9
    return probs / probs.sum(-1, keepdim=True)


CASES = {
    'random k': lambda: case(torch.randint(1, N + 1, (P,))),
    'all 1': lambda: case(torch.ones(P, dtype=torch.long)),
    'all N': lambda: case(torch.full((P,), N)),
    'k_max far above k': lambda: case(torch.ones(P, dtype=torch.long), k_max=N),
    'every token on one expert': lambda: case(torch.ones(P, dtype=torch.long), probs=one_expert()),
    'empty experts': lambda: case(torch.randint(1, 3, (P,)), k_max=2,
                                  probs=torch.cat([torch.rand(P, 2) + 1, torch.rand(P, N - 2) / 9], 1)),
}


@pytest.mark.parametrize('name', CASES)
def test_grouped_equals_loop_forward_and_backward(name):
    args = CASES[name]()
    learnt = [args[i].requires_grad_() for i in (0, 2, 4, 5)]                   # x, weights, w_in, w_out
    poison()
    fast, slow = moe(*args), moe_loop(*args)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(slow)
    poison()
    got = torch.autograd.grad(fast, learnt, direction)
    for g, s in zip(got, torch.autograd.grad(slow, learnt, direction)):
        g = torch.where(torch.arange(g.shape[1]) < args[3][:, None], g, 0) if g.shape == args[2].shape else g
        torch.testing.assert_close(g, s, rtol=1e-4, atol=1e-4)


def test_grouped_equals_loop_in_bf16():
    args = case(torch.randint(1, N + 1, (P,)), dtype=torch.bfloat16)
    x, ids, weights, k, w_in, w_out = args
    exact = moe_loop(x.float(), ids, weights, k, w_in.float(), w_out.float())
    assert (moe(*args).float() - exact).abs().max() < 0.02 * exact.abs().max()  # bf16 has 8 bits: 0.4% a rounding


def test_another_tokens_infinity_stays_there():
    args = case(torch.randint(1, N + 1, (P,)))
    clean = moe(*args)
    args[0][5] = float('inf')
    poisoned = moe(*args)
    keep = torch.arange(P) != 5
    torch.testing.assert_close(poisoned[keep], clean[keep])


def test_select_by_hand():
    probs = torch.tensor([[.1, .4, .2, .3], [.7, .1, .15, .05]])
    ids, weights = select(probs, torch.tensor([2, 1]), 3, True)
    assert ids.tolist() == [[1, 3, 2], [0, 2, 1]]
    torch.testing.assert_close(weights, torch.tensor([[4 / 7, 3 / 7, 0], [1, 0, 0]]))
    _, weights = select(probs, torch.tensor([2, 1]), 3, False)
    torch.testing.assert_close(weights, torch.tensor([[.4, .3, 0], [.7, 0, 0]]))


@pytest.mark.parametrize('k', [1, 2, 3, 5])
def test_flops_equal_torchs_counter(k, monkeypatch):
    # the counter knows plain matmuls, but neither the grouped one nor the CPU's fused attention
    monkeypatch.setattr(moe_dispatch, 'moe', moe_loop)
    config = tiny_config()
    model, B, T = random_model(config), 2, 24
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randint(50, (B, T)), TopK(k))
    assert counter.get_total_flops() == flops(config, k, T)['total'] * B * T
    assert flops(config, 2 * k, T)['experts'] == 2 * flops(config, k, T)['experts']
