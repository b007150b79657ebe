"""allocator.py: the rules on rows worked by hand, calibration, the file."""
import math

import pytest
import torch

from allocator import AdaK, Allocators, Counted, RandomMix, Rollout, Skip, TopK, TopP, find_knob
from conftest import random_model, tiny_config
from hub.files import InputError

ROWS = torch.tensor([[.05, .5, .15, .3], [.25, .25, .25, .25], [.97, .01, .01, .01]])


@pytest.mark.parametrize('p, k', [
    (0.8, [2, 4, 1]),
    (0.985, [4, 4, 3])])
def test_top_p_by_hand(p, k):
    assert TopP(p, 4)(0, ROWS, ROWS).tolist() == k


@pytest.mark.parametrize('beta, k', [
    (.5, [2, 2, 1]),     # row 0, K = 3: tails .45 > .25, .15 <= .4; row 1: .5 > .125, .25 <= .25
    (.01, [3, 3, 3]),    # row 2: .02 > .0097, .01 > .0098
    (2, [1, 1, 1])])
def test_skip_by_hand(beta, k):
    assert Skip(beta, 3)(0, ROWS, ROWS).tolist() == k


def test_skip_for_top_2_is_the_published_rule():
    probs = torch.rand(500, 8).softmax(-1)
    w = probs.topk(2).values
    assert torch.equal(Skip(.9, 2)(0, probs, probs), torch.where(w[:, 1] <= .9 * w[:, 0], 1, 2))


def test_random_mix_has_its_mean_and_is_the_same_again():
    x = torch.zeros(20000, 1)
    k = RandomMix(2.3)(0, x, x)
    assert set(k.tolist()) == {2, 3}
    assert abs(k.float().mean() - 2.3) < .01
    torch.manual_seed(0)                                       # as before every test
    assert torch.equal(k, RandomMix(2.3)(0, x, x))
    assert RandomMix(2.0).k_max == 2


def test_find_knob_meets_the_target_both_ways_and_stops_at_an_end():
    mass = find_knob(lambda p: 1 + 3 * p ** 9, 2.5, 0, 1, 4)
    assert abs(mass - .5 ** (1 / 9)) < 2e-3
    price = find_knob(lambda price: 1 + 1 / (1 + math.exp(40 * (price - .1))), 1.5, 5, -5, 2)
    assert abs(price - .1) < 1e-3
    assert find_knob(None, 5, 0, 1, 4) == 1
    assert find_knob(None, 1, 0, 1, 4) == 0


def test_counted_tallies_by_layer():
    tally = Counted(TopK(3), random_model(tiny_config(n_layers=2)))
    x = torch.zeros(5, 1)
    for layer in (0, 1, 1):
        tally(layer, x, x)
    assert tally.counts.tolist() == [[0, 0, 0, 5], [0, 0, 0, 10]]
    assert tally.mean() == 3


@pytest.fixture
def trained():
    allocators = Allocators(tiny_config(), 5, True)
    for p in (allocators.weight, allocators.bias):
        p.data.normal_()
    allocators.mean.normal_()
    allocators.std.uniform_(0.2, 3)
    return allocators


def test_adak_takes_the_argmax_and_the_price_is_a_dial(trained):
    x, probs = torch.randn(300, 32), torch.randn(300, 8).softmax(-1)
    logits = trained.logits(1, trained.inputs(1, x, probs))
    trained.price.fill_(0.7)
    priced = logits - 0.7 * torch.arange(1, 6)
    assert torch.equal(AdaK(trained)(1, x, probs), 1 + priced.argmax(-1))
    means = [AdaK(trained, price)(1, x, probs).float().mean().item() for price in (-99, -1, 0, 1, 99)]
    assert means == sorted(means, reverse=True)
    assert means[0] == 5
    assert means[-1] == 1


def test_rollout_records_what_it_drew(trained):
    x, probs = torch.randn(1, 32), torch.randn(1, 8).softmax(-1)
    rollout = Rollout(trained, torch.rand(2, 4000))
    for layer in range(2):
        passes = [rollout(layer, x.expand(n, -1), probs.expand(n, -1)) for n in (1000, 2900, 100)]
        k = torch.cat(passes)
        z = trained.inputs(layer, x, probs)
        p = trained.logits(layer, z).softmax(-1)[0]
        torch.testing.assert_close(torch.bincount(k - 1, minlength=5) / 4000, p, rtol=0, atol=.03)
        kept_z, kept_k, kept_logp = map(torch.cat, zip(*rollout.drawn[layer]))
        torch.testing.assert_close(kept_logp.exp(), p[k - 1])
        torch.testing.assert_close(kept_z, z.expand(4000, -1))
        assert torch.equal(kept_k, k)


def test_file_keeps_the_allocators_and_refuses_another_base(trained, tmp_path):
    path = tmp_path / 'allocator.safetensors'
    trained.fitted = {'rho': torch.rand(2)}
    trained.save(path, 'a base')
    again = Allocators.load(path, tiny_config(), 'a base')
    assert all(map(torch.equal, trained.state_dict().values(), again.state_dict().values()))
    assert torch.equal(again.fitted['rho'], trained.fitted['rho'])
    with pytest.raises(InputError, match='another base'):
        Allocators.load(path, tiny_config(), 'another base')
    with pytest.raises(InputError, match='damaged'):
        Allocators.load(path, tiny_config(top_k=2), 'a base')
    trained.weight.data[0, 0, 0] = float('nan')
    trained.save(path, 'a base')
    with pytest.raises(InputError, match='NaN'):
        Allocators.load(path, tiny_config(), 'a base')
