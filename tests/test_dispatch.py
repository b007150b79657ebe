"""moe_dispatch.py, run/experts_cpu.py: every path against the loop; selection by hand."""
import re

import pytest
import torch

import moe_dispatch
import run.experts_cpu as cpu
from moe_dispatch import Weighting, moe, moe_exact, moe_loop, moe_static, select
from run.experts_cpu import moe_few

P, C, F, N = 37, 16, 24, 6
BOTH = [(torch.float32, 1e-5), (torch.bfloat16, 0.02)]         # bf16 has 8 bits: 0.4% a rounding


def poison():
    """Leave NaN in freed memory: rows that are read but never written then show."""
    blocks = [torch.full((n,), float('nan')) for n in (64, 512, 1024, 4096, 16384) for _ in range(20)]
    del blocks


def case(k, k_max=N, probs=None, width=F):
    """(x, ids, weights, k, w_in, w_out) in fp32, of as many tokens as k has."""
    probs = torch.rand(len(k), N) if probs is None else probs
    ids, weights, _ = select(probs, k, k_max, Weighting(k_max, True))
    w_in = torch.randn(N, 2 * width, C) / 4
    w_out = torch.randn(N, C, width) / 4
    return [torch.randn(len(k), C), ids, weights, k, w_in, w_out]


def favourite():
    """Router probabilities with expert 4 first for every token."""
    probs = torch.rand(P, N)
    probs[:, 4] = 9
    return probs


ONES = torch.ones(P, dtype=torch.long)
CASES = {
    'random k': lambda: case(torch.randint(1, N + 1, (P,))),
    'all 1': lambda: case(ONES, k_max=1),
    'all N': lambda: case(torch.full((P,), N)),
    'k_max far above k': lambda: case(ONES),
    'every token on one expert': lambda: case(ONES, probs=favourite()),
    'empty experts': lambda: case(
        torch.randint(1, 3, (P,)), k_max=2, probs=torch.rand(P, N) + torch.eye(N)[0]),
    'a token': lambda: case(torch.tensor([3])),
    'two tokens': lambda: case(torch.tensor([1, 6])),
    'five tokens': lambda: case(torch.tensor([2, 5, 1, 4, 4])),
}
every_case = pytest.mark.parametrize('name', CASES)
every_dtype = pytest.mark.parametrize('dtype, tolerance', BOTH)


def in_dtype(args, dtype):
    x, ids, weights, k, w_in, w_out = args
    return [x.to(dtype), ids, weights, k, w_in.to(dtype), w_out.to(dtype)]


def assert_close(found, args, tolerance):
    slow = moe_loop(*in_dtype(args, torch.float32))
    assert (found.float() - slow).abs().max() < tolerance * slow.abs().max()


# ---------------------------------------------------------------- every path is the loop

@every_case
def test_forward_and_backward(name):
    args = CASES[name]()
    learnt = [args[i].requires_grad_() for i in (0, 2, 4, 5)]                       # x, weights, w_in, w_out
    poison()
    fast, slow = moe(*args), moe_loop(*args)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(slow)
    poison()
    grads = torch.autograd.grad(fast, learnt, direction), torch.autograd.grad(slow, learnt, direction)
    used = moe_dispatch.used(args[3], args[1].shape[1])        # unused choices have a gradient of no meaning
    for i, (g, right) in enumerate(zip(*grads)):
        torch.testing.assert_close(g * used if i == 1 else g, right, rtol=1e-4, atol=1e-4)


@every_dtype
@every_case
def test_forward_only_paths(name, dtype, tolerance, monkeypatch):
    args = in_dtype(CASES[name](), dtype)
    with torch.no_grad():
        for path in (moe, moe_static, moe_few):
            poison()
            found = path(*args)
            assert found.dtype == dtype
            assert_close(found, args, tolerance)
        monkeypatch.setattr(cpu, 'LARGE', 0)                   # one by one
        poison()
        assert_close(moe_exact(*args), args, tolerance)
        monkeypatch.setattr(cpu, 'LARGE', 2 ** 20)
        monkeypatch.setattr(cpu, 'PADDING', 1e9)               # in bf16 together
        poison()
        assert_close(moe_exact(*args), args, tolerance)


@pytest.mark.parametrize('width, dtype', [(37, torch.float32), (3, torch.float32), (20, torch.bfloat16)])
def test_sizes_that_grouped_matmuls_cannot_take(width, dtype):
    args = in_dtype(case(torch.randint(1, N + 1, (P,)), width=width), dtype)
    assert_close(moe(*args), args, 0.02)


def test_no_token_at_all_and_no_k():
    x, ids, weights, k, w_in, w_out = args = case(torch.full((P,), 3), k_max=3)
    assert moe(x[:0], ids[:0], weights[:0], k[:0], w_in, w_out).shape == (0, C)
    torch.testing.assert_close(moe(x, ids, weights, None, w_in, w_out), moe_loop(*args))        # None: all
    with torch.no_grad():
        torch.testing.assert_close(moe_few(x, ids, weights, None, w_in, w_out), moe_loop(*args))
    assert (select(torch.rand(P, N), None, 0, Weighting(3, True))[1] > 0).all()


def test_another_tokens_infinity_stays_there():
    args = CASES['random k']()
    clean = moe(*args)
    args[0][5] = float('inf')
    keep = torch.arange(P) != 5
    torch.testing.assert_close(moe(*args)[keep], clean[keep])


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device here')
def test_paths_equal_the_loop_on_cuda():
    args = [a.cuda() for a in in_dtype(CASES['random k'](), torch.bfloat16)]
    with torch.no_grad():
        for path in (moe_exact, moe_static, moe):
            assert_close(path(*args), args, 0.02)


# ---------------------------------------------------------------- the rule, and what is refused

def test_the_rule_that_chooses_a_path():
    small = torch.zeros(N, 2 * F, C)
    large = torch.zeros(1, 16, 2 ** 17, dtype=torch.bfloat16)
    path_of = moe_dispatch.path_of
    assert path_of(1, small) is moe_exact                      # with gradients always
    with torch.no_grad():
        assert path_of(1, small) is moe_few and path_of(2, small) is moe_exact
        assert path_of(8, large) is moe_few and path_of(9, large) is moe_exact
        assert path_of(2, large.float()) is moe_exact


def test_static_refuses_gradients():
    with pytest.raises(AssertionError, match='forward only'):
        moe_static(*case(ONES))


@pytest.mark.parametrize('which, place, value, says', [
    (3, 4, 0, '1..6, found 0'),
    (3, 4, 7, 'found 1..7'),
    (1, (4, 0), 6, 'found 0..6'),
    (1, (4, 0), -1, 'found -1..5'),
])
def test_wrong_plans_are_refused_with_the_value(which, place, value, says):
    args = case(ONES.clone())
    args[which][place] = value
    with pytest.raises(AssertionError, match=re.escape(says)):
        moe(*args)
    with pytest.raises(AssertionError, match='must lie in'):
        moe_few(*args)


def test_a_k_of_another_length_is_refused():
    args = case(ONES)
    args[3] = args[3][:-1]
    with pytest.raises(AssertionError, match=re.escape('(36,)')):
        moe(*args)


# ---------------------------------------------------------------- what is only faster on a CPU

SMALL, LARGE = torch.ones(8, 4, 4), torch.ones(8, 2, 2 ** 20)
EVEN, UNEVEN, FEW, MANY = [9] * 8, [9, 30] * 4, [3] * 8, [2 ** 19] * 8


@pytest.mark.parametrize('w_in, sizes, faster', [
    (SMALL, EVEN, False),
    (SMALL.bfloat16(), EVEN, True),
    (SMALL.bfloat16(), UNEVEN, False),
    (LARGE, UNEVEN, True),
    (LARGE.bfloat16(), FEW, False),
    (SMALL, MANY, True),
])
def test_when_the_grouped_matmul_is_not_used_on_a_cpu(w_in, sizes, faster, monkeypatch):
    ends = torch.tensor(sizes).cumsum(0)
    token = torch.zeros(sum(sizes), dtype=torch.long)
    x = torch.ones(1, 1, dtype=w_in.dtype)
    monkeypatch.setattr(cpu, 'swiglu', lambda x, w_in, w_out: x)
    args = x, token, ends, w_in, w_in
    assert cpu.experts(*args) is None                          # with gradients never
    with torch.no_grad():
        found = cpu.experts(*args)
    assert (found is not None) == faster
    assert not faster or len(found) == sum(sizes)


@every_dtype
def test_products_the_other_way_round(dtype, tolerance, monkeypatch):
    x, w = torch.randn(3, 7, 16).to(dtype), torch.randn(3, 24, 16).to(dtype)
    right = x.float() @ w.float().mT
    for limits in ({}, {dtype: (1, 7)}):
        monkeypatch.setattr(cpu, 'W_FIRST', limits)
        for rows, one, wanted in ((x, w, right), (x[1], w[1], right[1]), (x[1, 0], w[1], right[1, 0])):
            torch.testing.assert_close(cpu.product(rows, one).float(), wanted, rtol=2e-2, atol=5e-2)


# ---------------------------------------------------------------- selection

@pytest.mark.parametrize('renormalise, right', [
    (True, [[4 / 7, 3 / 7, 0], [1, 0, 0]]),
    (False, [[.4, .3, 0], [.7, 0, 0]]),
])
def test_select_by_hand(renormalise, right):
    probs = torch.tensor([[.1, .4, .2, .3], [.7, .1, .15, .05]])
    how = Weighting(3, renormalise, rho=float(renormalise))
    ids, weights, _ = select(probs, torch.tensor([2, 1]), 3, how)
    assert ids.tolist() == [[1, 3, 2], [0, 2, 1]]
    torch.testing.assert_close(weights, torch.tensor(right))
