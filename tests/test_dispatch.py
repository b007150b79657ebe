"""moe_dispatch.py: the grouped path against the loop, selection by hand, FLOPs against torch's counter."""
import itertools
import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import moe_dispatch
from allocator import TopK
from conftest import random_model, tiny_config
from moe_dispatch import flops, moe, moe_exact, moe_few, moe_loop, moe_static, select

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
    learnt = [args[i].requires_grad_() for i in (0, 2, 4, 5)]                       # x, weights, w_in, w_out
    poison()
    fast, slow = moe(*args), moe_loop(*args)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(moe(*args), slow, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(slow)
    poison()
    got = torch.autograd.grad(fast, learnt, direction)
    for g, s in zip(got, torch.autograd.grad(slow, learnt, direction)):
        g = torch.where(torch.arange(g.shape[1]) < args[3][:, None], g, 0) if g.shape == args[2].shape else g
        torch.testing.assert_close(g, s, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize('name', CASES)
def test_batched_and_grouped_equal_the_loop(name, dtype, tolerance, monkeypatch):
    # which of the two exact takes on a CPU depends on dtype, size and the number of rows
    args = [a.to(dtype) if a.is_floating_point() and i != 2 else a for i, a in enumerate(CASES[name]())]
    slow = moe_loop(args[0].float(), *args[1:4], args[4].float(), args[5].float())
    for runs in ([], [1] * N, [1, 3, 2], [N]):
        monkeypatch.setattr(moe_dispatch, 'batches', lambda sizes, w_in: runs)
        poison()
        with torch.no_grad():
            found = moe_exact(*args)
        assert found.dtype == dtype and (found.float() - slow).abs().max() < tolerance * slow.abs().max()


def test_neighbours_that_share_a_batched_matmul():
    assert moe_dispatch.alike([9, 8, 2], 8) == [2, 1]          # 3 * 9 > 1.4 * 19
    assert moe_dispatch.alike([4, 4, 4, 4, 4], 2) == [2, 2, 1]
    assert moe_dispatch.alike([0, 5, 5, 0], 8) == [1, 2, 1]
    assert moe_dispatch.alike([7], 8) == [1]
    even, uneven, small, large = [9] * 8, [9, 20] * 4, torch.zeros(8, 4, 4), torch.zeros(1, 2, 2 ** 20)
    for w_in, sizes, runs in (
            (small, even, []), (small.bfloat16(), even, [8]), (small.bfloat16(), uneven, []),
            (large, uneven, [1] * 8), (large.bfloat16(), [3] * 8, []), (small, [], []),
            (small.bfloat16(), [2 ** 20] * 8, [1] * 8), (small, [2 ** 20] * 8, [1] * 8)):
        assert moe_dispatch.batches(sizes, w_in) == runs
    for _ in range(200):
        sizes = torch.randint(30, (int(torch.randint(1, 20, ())),)).tolist()
        runs = moe_dispatch.alike(sizes, 5)
        assert sum(runs) == len(sizes) and max(runs) <= 5
        for start, n in zip(itertools.accumulate([0, *runs]), runs):
            run = sizes[start:start + n]
            assert n * max(run) <= moe_dispatch.PADDING * sum(run)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_products_the_other_way_round(dtype, monkeypatch):
    x, w = torch.randn(3, 7, 16).to(dtype), torch.randn(3, 24, 16).to(dtype)
    right = x.float() @ w.float().mT
    for limits in ({}, {dtype: (1, 7)}):
        monkeypatch.setattr(moe_dispatch, 'W_FIRST', limits)
        for rows, one, wanted in ((x, w, right), (x[1], w[1], right[1]), (x[1, 0], w[1], right[1, 0])):
            found = moe_dispatch.product(rows, one)
            assert found.shape == wanted.shape
            torch.testing.assert_close(found.float(), wanted, rtol=2e-2, atol=5e-2)


def test_no_token_at_all():
    x, ids, weights, k, w_in, w_out = case(torch.ones(P, dtype=torch.long))
    assert moe(x[:0], ids[:0], weights[:0], k[:0], w_in, w_out).shape == (0, C)


def test_grouped_equals_loop_in_bf16():
    args = case(torch.randint(1, N + 1, (P,)), dtype=torch.bfloat16)
    x, ids, weights, k, w_in, w_out = args
    exact = moe_loop(x.float(), ids, weights, k, w_in.float(), w_out.float())
    assert (
        moe(*args).float() - exact
    ).abs().max() < 0.02 * exact.abs().max()  # bf16 has 8 bits: 0.4% a rounding


def test_another_tokens_infinity_stays_there():
    args = case(torch.randint(1, N + 1, (P,)))
    clean = moe(*args)
    args[0][5] = float('inf')
    poisoned = moe(*args)
    keep = torch.arange(P) != 5
    torch.testing.assert_close(poisoned[keep], clean[keep])


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize('name', CASES)
def test_few_equals_the_loop(name, dtype, tolerance):
    args = [a.to(dtype) if a.is_floating_point() and i != 2 else a for i, a in enumerate(CASES[name]())]
    slow = moe_loop(args[0].float(), *args[1:4], args[4].float(), args[5].float())
    for p in (1, 2, P):
        few = [a[:p] if len(a) == P else a for a in args]
        with torch.no_grad():
            found = moe_few(*few)
        assert found.dtype == dtype and (found.float() - slow[:p]).abs().max() < tolerance * slow.abs().max()


def test_the_rule_that_chooses_a_path(monkeypatch):
    small, large = torch.zeros(N, 2 * F, C), torch.zeros(1, 2, 2 ** 20, dtype=torch.bfloat16)
    assert moe_dispatch.path_of(1, small) is moe_exact         # with gradients always
    with torch.no_grad():
        assert moe_dispatch.path_of(1, small) is moe_few and moe_dispatch.path_of(2, small) is moe_exact
        assert moe_dispatch.path_of(8, large) is moe_few and moe_dispatch.path_of(9, large) is moe_exact
        assert moe_dispatch.path_of(2, large.float()) is moe_exact


def test_no_k_means_every_choice():
    x, ids, weights, k, w_in, w_out = case(torch.full((P,), 3), k_max=3)
    same_ids, same_weights = select(torch.rand(P, N), None, 3, True)
    assert (same_weights > 0).all() and same_ids.shape == (P, 3)
    slow = moe_loop(x, ids, weights, k, w_in, w_out)
    torch.testing.assert_close(moe(x, ids, weights, None, w_in, w_out), slow)


@pytest.mark.parametrize('name', CASES)
def test_static_equals_the_loop_and_reads_no_garbage(name):
    args = CASES[name]()
    slow = moe_loop(*args)
    poison()
    with torch.no_grad():
        torch.testing.assert_close(moe_static(*args), slow, rtol=1e-5, atol=1e-5)


def test_static_refuses_gradients():
    with pytest.raises(AssertionError, match='forward only'):
        moe_static(*case(torch.ones(P, dtype=torch.long)))


def test_one_token_and_random_k_in_bf16():
    for p in (1, 2, 5):
        args = case(torch.randint(1, N + 1, (P,)), dtype=torch.bfloat16)
        args = [a[:p] if len(a) == P else a for a in args]
        poison()
        with torch.no_grad():
            for path in (moe_exact, moe_static, moe_few):
                exact = moe_loop(args[0].float(), *args[1:4], args[4].float(), args[5].float())
                assert (path(*args).float() - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize(
    'damage, says',
    [
        (lambda a: a[3].__setitem__(4, 0), '1..6, found 0'),
        (lambda a: a[3].__setitem__(4, 7), 'found 1..7'),
        (lambda a: a[1].__setitem__((4, 0), 6), 'found 0..6'),
        (lambda a: a[1].__setitem__((4, 0), -1), 'found -1..5'),
        (
            lambda a: a.__setitem__(5, torch.randn(N, C, 23)) or a.__setitem__(4, torch.randn(N, 46, C)),
            'F = 23',
        ),
        (lambda a: a.__setitem__(3, a[3][:-1]), 'torch.Size([36])'),
    ],
)
def test_wrong_plans_are_refused_with_the_value(damage, says):
    args = list(case(torch.ones(P, dtype=torch.long)))
    damage(args)
    with pytest.raises(AssertionError, match=re.escape(says)):
        moe(*args)
    if len(args[3]) == P and 'F' not in says:
        with pytest.raises(AssertionError, match='must lie in'):
            moe_few(*args)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device here')
def test_paths_equal_the_loop_on_cuda():
    args = [a.cuda() for a in case(torch.randint(1, N + 1, (P,)), dtype=torch.bfloat16)]
    exact = moe_loop(args[0].float(), *args[1:4], args[4].float(), args[5].float())
    with torch.no_grad():
        for path in (moe_exact, moe_static, moe):
            assert (path(*args).float() - exact).abs().max() < 0.02 * exact.abs().max()


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
