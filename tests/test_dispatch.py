"""moe_dispatch.py, run/experts_cpu.py: every path against the loop; selection by hand."""
import pytest
import torch

import moe_dispatch
import run.experts_cpu as cpu
from conftest import needs_cuda
from moe_dispatch import Weighting, moe, moe_exact, moe_loop, moe_static, select
from run.experts_cpu import moe_few

P, C, F, N = 37, 16, 24, 6
ONES = torch.ones(P, dtype=torch.long)
KS = {
    'every k': torch.arange(P) % N + 1,
    'all on one expert': ONES,
    'all N': N * ONES,
    'a token': torch.tensor([3]),
    'five tokens': torch.tensor([2, 5, 1, 4, 4]),
}
every_case = pytest.mark.parametrize('k', KS.values(), ids=KS)


def case(k, dtype=torch.float32, width=F):
    """Arguments of `moe` for as many tokens as k has. Expert 4 is the first choice of all."""
    probs = torch.rand(len(k), N) + torch.eye(N)[4]
    ids, weights, _ = select(probs, k, N, Weighting(N, True))
    x = torch.randn(len(k), C).to(dtype)
    w_in = torch.randn(N, 2 * width, C).to(dtype) / 4
    w_out = torch.randn(N, C, width).to(dtype) / 4
    return [x, ids, weights, k.clone(), w_in, w_out]


def poison():
    """Leave NaN in freed memory: rows that are read but never written then show."""
    blocks = [torch.full((n,), float('nan')) for n in (64, 512, 1024, 4096, 16384) for _ in range(20)]
    del blocks


def assert_close(found, args, tolerance):
    in_fp32 = [a.float() if a.is_floating_point() else a for a in args]
    slow = moe_loop(*in_fp32)
    assert found.dtype == args[0].dtype
    assert (found.float() - slow).abs().max() < tolerance * slow.abs().max()


# ---------------------------------------------------------------- every path is the loop

@every_case
def test_forward_and_backward(k):
    args = case(k)
    learnt = [args[i].requires_grad_() for i in (0, 2, 4, 5)]                       # x, weights, w_in, w_out
    poison()
    fast, slow = moe(*args), moe_loop(*args)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(slow)
    poison()
    found = list(torch.autograd.grad(fast, learnt, direction))
    found[1] *= moe_dispatch.used(k, args[1])                  # unused choices have a gradient of no meaning
    right = torch.autograd.grad(slow, learnt, direction)
    torch.testing.assert_close(found, list(right), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@every_case
@pytest.mark.parametrize('dtype, tolerance', [
    (torch.float32, 1e-5),
    (torch.bfloat16, 0.02),                                    # it has 8 bits: 0.4% a rounding
])
def test_forward_only_paths(k, dtype, tolerance, monkeypatch):
    args = case(k, dtype)
    for path in (moe, moe_static, moe_few):
        poison()
        assert_close(path(*args), args, tolerance)
    # in bf16 all experts together; then one by one
    for limit, value in ('PADDING', 1e9), ('LARGE', 0):
        monkeypatch.setattr(cpu, limit, value)
        poison()
        assert_close(moe_exact(*args), args, tolerance)


def test_a_width_that_grouped_matmuls_cannot_take():
    args = case(ONES, torch.bfloat16, width=4)                 # 8 bytes a row of w_out, 16 are the least
    assert_close(moe(*args), args, 0.02)


def test_no_token_at_all_and_no_k():
    x, ids, weights, k, *experts = args = case(KS['all N'])
    assert moe(x[:0], ids[:0], weights[:0], k[:0], *experts).shape == (0, C)
    for path in (moe, moe_few):
        torch.testing.assert_close(path(x, ids, weights, None, *experts), moe_loop(*args))  # None: all


def test_another_tokens_infinity_stays_there():
    args = case(KS['every k'])
    clean = moe(*args)
    args[0][0] = float('inf')
    torch.testing.assert_close(moe(*args)[1:], clean[1:])


@needs_cuda
def test_paths_equal_the_loop_on_cuda():
    args = [a.cuda() for a in case(KS['every k'], torch.bfloat16)]
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


def test_when_the_grouped_matmul_is_not_used_on_a_cpu(monkeypatch):
    x, _, _, _, *experts = case(ONES, torch.bfloat16)

    def faster(sizes):
        token = torch.zeros(sum(sizes), dtype=torch.long)
        return cpu.experts(x, token, torch.tensor(sizes).cumsum(0), *experts) is not None
    even, uneven = [9] * N, [9, 30] * 3
    assert not faster(even)                                    # with gradients never
    with torch.no_grad():
        assert faster(even)                                    # all in one batched matmul
        assert not faster(uneven)                              # too much padding
        monkeypatch.setattr(cpu, 'LARGE', 0)
        assert faster(uneven)                                  # one by one


@pytest.mark.parametrize('which, place, value', [
    (3, 4, 0),
    (3, 4, N + 1),
    (1, (4, 0), N),
    (1, (4, 0), -1),
])
def test_wrong_plans_are_refused_with_the_value(which, place, value):
    args = case(ONES)
    args[which][place] = value                                 # of k or ids
    with pytest.raises(AssertionError, match=f'found .*{value}'):
        moe(*args)


def test_gradients_of_moe_static_and_a_k_of_another_length_are_refused():
    args = case(ONES)
    with pytest.raises(AssertionError, match='forward only'):
        moe_static(*args)
    args[3] = args[3][:-1]
    with pytest.raises(AssertionError, match='36'):
        moe(*args)


# ---------------------------------------------------------------- selection

@pytest.mark.parametrize('k, renormalise, rho, eta, weights, left', [
    (1, True, 1.0, 1.0, [9, 0, 0, 0], [0, 3, 2, 0]),           # as published
    (1, False, 0.0, 1.0, [3.6, 0, 0, 0], [0, 2.7, 1.8, 0]),    # of a family that does not renormalise
    (1, True, 0.0, 1.0, [4, 0, 0, 0], [0, 3, 2, 0]),           # kept
    (2, True, 0.5, 1.0, [4 * 8 / 7, 3 * 8 / 7, 0, 0], [0, 0, 2, 0]),
    (4, True, 0.0, 0.5, [4, 3, 2, 0.5], [0, 0, 0, 0]),         # one beyond K
    (4, True, 1.0, 1.0, [3.6, 2.7, 1.8, 0.9], [0, 0, 0, 0]),
])
def test_select_by_hand(k, renormalise, rho, eta, weights, left):
    """In ninths, since of K = 3 the g are 4/9, 3/9, 2/9."""
    probs = torch.tensor([[.1, .4, .2, .3]])
    ids, *found = select(probs, torch.tensor([k]), 4, Weighting(3, renormalise, rho, eta))
    assert ids.tolist() == [[1, 3, 2, 0]]
    right = torch.tensor([weights, left]) / 9
    torch.testing.assert_close(torch.cat(found), right)
