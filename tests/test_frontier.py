"""bench.py --frontier, --ablations, --analysis: their parts by hand, then end to end at smoke size."""
import json
import shutil

import numpy as np
import pytest
import torch

import bench
import ppo
import train
from allocator import AdaK, Allocators, Counted, EntropyBands, PerLayer, Skip, SoftMixture, TopK, TopP, tail_ratios
from conftest import random_model, tiny_config
from hub.tokenizer import Tokenizer
from train import Settings, Text


# ================================================================ policies

def test_entropy_bands_by_hand():
    uniform, sure, half = torch.full((1, 4), .25), torch.tensor([[1., 0, 0, 0]]), torch.tensor([[.5, .5, 0, 0]])
    assert [EntropyBands(.5, 4)(0, p, p).item() for p in (uniform, sure, half)] == [2, 1, 1]    # exp(H) = 4, 1, 2
    assert [EntropyBands(1.3, 4)(0, p, p).item() for p in (uniform, sure, half)] == [4, 1, 3]   # 5.2 is cut to k_max, 2.6 rounds up


def test_per_layer_has_each_layers_mean():
    x = torch.zeros(20000, 1)
    policy = PerLayer([2, 1.25, 4])
    assert policy.k_max == 4 and policy(0, x, x).unique().tolist() == [2] and policy(2, x, x).unique().tolist() == [4]
    k = policy(1, x, x)
    assert set(k.tolist()) == {1, 2} and abs(k.float().mean() - 1.25) < .01


def test_tail_ratios_by_hand():
    torch.testing.assert_close(tail_ratios(torch.tensor([[.4, .3, .2, .1]])), torch.tensor([[.6 / .4, .3 / .7, .1 / .9]]))


@pytest.mark.parametrize('norm_topk', [True, False])
def test_a_sure_soft_mixture_is_the_static_k_it_is_sure_of(norm_topk):
    model, tokens = random_model(tiny_config(norm_topk=norm_topk)), torch.randint(50, (2, 9))
    allocators = Allocators(model.config, 5, True)
    for k in (1, 3, 5):
        allocators.bias.data.copy_(60.0 * (torch.arange(1, 6) == k))
        mixture = SoftMixture(allocators)
        torch.testing.assert_close(model(tokens, mixture), model(tokens, TopK(k)), rtol=1e-3, atol=1e-3)
        assert mixture.pi.shape == (3, 18, 5) and mixture.pi[..., k - 1].min() > .999


def test_the_gradient_through_a_soft_mixture_is_that_of_finite_differences():
    model, tokens = random_model(tiny_config(n_layers=2)), torch.randint(50, (1, 6))
    allocators = Allocators(model.config, 4, True)
    allocators.bias.data.normal_()
    loss = lambda: model(tokens, SoftMixture(allocators)).double().log_softmax(-1)[0, :, 7].mean()
    gradient = torch.autograd.grad(loss(), allocators.bias)[0]
    for at in ((0, 0), (1, 2)):
        step = torch.zeros_like(allocators.bias)
        step[at] = 1e-2
        values = []
        for sign in (1, -1):
            allocators.bias.data.add_(sign * step)
            values.append(loss().item())
            allocators.bias.data.sub_(sign * step)
        assert abs((values[0] - values[1]) / 2e-2 - gradient[at].item()) < .01 * gradient.abs().max().item()


@pytest.mark.parametrize('budget', [.9, .6])
def test_allocators_start_as_expert_skipping(budget):
    model = random_model(tiny_config(top_k=4))
    s = Settings(budget=budget, seq=16)
    text = Text(torch.randint(50, (4000,)), np.zeros(4000, int))
    allocators = train.new_allocators(s, model, text)
    inputs = text.windows(16, 1600)[0]
    probs = torch.cat([p for _, p in train.look(s, model, inputs)])
    seen = [(layer, x, p) for layer, (x, p) in enumerate(train.look(s, model, inputs))]
    k = torch.cat([AdaK(allocators)(*one) for one in seen])
    assert abs(k.float().mean() - budget * 4) < .1
    # some beta gives nearly the same decisions: it was fitted on another batch, so search it
    agreement = max((Skip(beta, 4)(0, None, probs) == k).float().mean().item() for beta in np.geomspace(.01, 4, 800))
    assert agreement > .995


def test_calibration_hits_its_mean_k_within_a_percent():
    model = random_model(tiny_config(top_k=4))
    windows = Text(torch.randint(50, (6000,)), np.zeros(6000, int)).windows(32, 4096)
    allocators = Allocators(model.config, 8, True)
    allocators.weight.data.normal_(0, .1)
    for policy_of, low, high in ((lambda p: TopP(p, 8), 0, 1), (lambda beta: Skip(beta, 4), 4, 0),
                                 (lambda scale: EntropyBands(scale, 8), 0, 4), (lambda price: AdaK(allocators, price), 20, -20)):
        knob = train.calibrate(model, windows, policy_of, 2.6, low, high)
        assert abs(train.evaluate(model, windows, policy_of(knob))[1].mean() - 2.6) < .026


# ================================================================ rewards

def test_expected_reward_by_enumeration_and_by_drawing():
    logits, topk = torch.randn(3, 2, 5), torch.randn(2, 5)
    p, q = topk.softmax(-1), logits.softmax(-1)
    got = ppo.expected_gain(logits, topk)
    by_hand = [[sum(p[t, v] * (q[g, t, v] / p[t, v]).log() for v in range(5)) for t in range(2)] for g in range(3)]
    torch.testing.assert_close(got, torch.tensor(by_hand))
    assert (ppo.expected_gain(topk, topk) == 0).all()
    # it is the mean of what the plan gains over top-k in the sampled reward, over the model's own next tokens
    draws = torch.multinomial(p, 200000, replacement=True)                      # (2,draws)
    gained = (q[0] / p).log().gather(1, draws).mean(1)
    torch.testing.assert_close(got[0], gained, atol=.02, rtol=0)


@pytest.mark.parametrize('size', [1e-3, .1, 1, 10])
def test_expected_reward_keeps_its_digits_however_small_the_change(size):
    topk = torch.randn(500, 1000) * 3
    logits = topk + size * torch.randn_like(topk)
    p, q = topk.double().log_softmax(-1), logits.double().log_softmax(-1)
    torch.testing.assert_close(ppo.expected_gain(logits, topk).double(), (p.exp() * (q - p)).sum(-1), rtol=1e-5, atol=1e-6 * size)


def test_expected_reward_of_a_plan_that_ruins_the_prediction_is_finite():
    topk, logits = torch.zeros(2, 100), torch.zeros(2, 100)
    logits[0, 0], logits[1, 0] = 1e4, torch.nan
    gain = ppo.expected_gain(logits, topk)
    assert -80 < gain[0] < -70 and gain[1].isnan()             # a NaN of the model stays one


@pytest.mark.parametrize('reward', ['expected', 'sampled'])
def test_rollout_rewards_are_those_of_separate_passes(reward):
    model = random_model(tiny_config())
    s = Settings(group=2, reward=reward)
    inputs, targets = torch.randint(50, (3, 8)), torch.randint(50, (3, 8))
    got, got_topk = train.rollout_reward(s, model, inputs, targets, TopK(2))
    logits, topk = model(inputs, TopK(2)), model(inputs)
    measure = lambda logits: ppo.expected_gain(logits, topk) if reward == 'expected' else ppo.next_token_logp(logits, targets)
    torch.testing.assert_close(got, measure(logits).flatten().expand(2, -1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got_topk, measure(topk).flatten(), rtol=1e-4, atol=1e-4)


# ================================================================ rows

def test_oracle_by_hand_and_never_worse_than_a_fixed_plan():
    losses = torch.tensor([[3., 1., 2.], [1., 1., 2.5], [.5, .8, -.5]])        # k = 1, 2, 3; three tokens
    loss, k = bench.oracle(losses, 1.)
    assert k.tolist() == [2, 1, 3] and loss.tolist() == [1., 1., -.5]           # with the price 4, 3, 3.5 | 2, 3, 3.8 | 3, 4.5, 2.5
    losses = torch.randn(6, 500)
    for price in (0, .1, 1):
        loss, k = bench.oracle(losses, price)
        assert all((loss + price * k).mean() <= (losses[i] + price * (i + 1)).mean() for i in range(6))


def test_between_mixes_the_neighbouring_plans():
    path = {8: [4, 4], 7: [4, 3], 6: [3, 3]}
    assert bench.between(path, 8) == [4, 4] and bench.between(path, 6.5) == [3.5, 3] and bench.between(path, 7.25) == [4, 3.25]


def test_standard_error_of_a_row_against_a_bootstrap_over_documents():
    rng = np.random.default_rng(0)
    document = np.repeat(np.arange(60), rng.integers(5, 40, 60))
    delta = rng.normal(size=60)[document] + rng.normal(size=len(document))
    means = []
    groups = [delta[document == d] for d in range(60)]
    for _ in range(4000):
        means.append(np.concatenate([groups[d] for d in rng.integers(0, 60, 60)]).mean())
    assert train.clustered_error(delta, document) == pytest.approx(np.std(means), rel=.1)


# ================================================================ token classes

SOURCE = '''"""A docstring."""
def size(x):  # größe
    """Of x."""
    return f(x, 'a b') + 10
'''


def test_python_classes_by_hand():
    classes = bench.python_classes(SOURCE)
    at = lambda piece: {classes[i] for i in range(SOURCE.index(piece), SOURCE.index(piece) + len(piece))}
    assert at('"""A docstring."""') == at('"""Of x."""') == at('# größe') == {'comment, docstring'}
    assert at('def') == at('return') == {'keyword'} and at('size') == {'identifier'} and at('10') == {'number'}
    assert at("'a b'") == {'string'} and at('+') == at('):') == {'operator, punctuation'} and at('    r') == {'white space', 'keyword'}


def test_broken_python_has_classes_too():
    classes = bench.python_classes('x = 1\ndef (:\n  "unclosed')
    assert len(classes) == 24 and classes[0] == 'identifier'


def test_prose_classes_by_hand():
    assert bench.prose_classes('The cat, 12') == ['function word'] * 3 + ['white space'] + ['content word'] * 3 + \
        ['operator, punctuation', 'white space', 'number', 'number']


def test_token_classes_follow_the_bytes(smoke):
    tokenizer = Tokenizer(smoke[0] / 'base')
    ids = tokenizer.encode(SOURCE)
    classes = bench.token_classes(tokenizer, ids, SOURCE, bench.python_classes(SOURCE))
    assert len(classes) == len(ids)
    for i, kind in zip(ids, classes):
        piece = tokenizer.bytes_of_id[i].strip()
        assert (kind == 'white space') == (not piece)
        if piece in (b'+', b'(', b'):'):
            assert kind == 'operator, punctuation'
    assert classes[-2 if not tokenizer.bytes_of_id[ids[-1]].strip() else -1] == 'number'


# ================================================================ end to end

@pytest.fixture(scope='module')
def studied(smoke, tmp_path_factory):
    """A copy of the smoke run with its frontier, ablations and analysis."""
    run = tmp_path_factory.mktemp('studied') / 'run'
    shutil.copytree(smoke[0], run)
    for study in ('frontier', 'ablations', 'analysis'):
        bench.command_line([f'--{study}', str(run), '--quick'])
    return run


def test_frontier_has_every_row_and_adds_up(studied):
    results = json.loads((studied / 'frontier' / 'frontier.json').read_text())
    rows = {(r['method'], r['budget']): r for r in results['rows']}
    for method in bench.LOOKS:
        assert (method, .75) in rows and (method, .5) in rows, method
    for (method, budget), r in rows.items():
        if method in ('random mix', 'per-layer static k', 'Top-P', 'expert skipping', 'entropy bands', 'oracle (hindsight)'):
            assert r['mean_k'] == pytest.approx(4 * budget, rel=.02), method
        assert r['expert_flops'] == pytest.approx(r['mean_k'] / 4)
    assert rows['static k', 1.0]['delta'] == 0 == rows['static k', 1.0]['delta_se']
    ada = rows['Ada-K', .75]
    best = min((r for (method, budget), r in rows.items() if budget == .75 and method in bench.TRAINING_FREE), key=lambda r: r['delta'])
    assert ada['best_free']['method'] == best['method']
    assert ada['best_free']['difference'] == pytest.approx(ada['delta'] - best['delta'], abs=1e-9)
    slope = rows['static k', 1.0]['delta'] - rows['static k', .75]['delta']     # from k = 3 to k = 4
    assert ada['best_free']['at_equal_k'] == pytest.approx(ada['delta'] - best['delta'] - slope * (ada['mean_k'] - best['mean_k']), abs=1e-9)
    assert rows['oracle (hindsight)', .75]['delta'] <= min(rows['static k', k / 4]['delta'] for k in (1, 2, 3))


def test_a_second_run_reuses_every_row(studied, monkeypatch, capsys):
    before = json.loads((studied / 'frontier' / 'frontier.json').read_text())['rows']
    for name in ('evaluate', 'calibrate', 'train_ppo', 'train_soft'):
        monkeypatch.setattr(bench, name, None)                 # a call would fail
    bench.command_line(['--frontier', str(studied), '--quick'])
    assert json.loads((studied / 'frontier' / 'frontier.json').read_text())['rows'] == before
    assert '| Ada-K |' in capsys.readouterr().out


def test_another_base_is_not_mixed_in(studied, tmp_path, capsys):
    run = tmp_path / 'run'
    shutil.copytree(studied, run)
    facts = json.loads((run / 'frontier' / 'study.json').read_text())
    (run / 'frontier' / 'study.json').write_text(json.dumps({**facts, 'base': 'another'}))
    with pytest.raises(SystemExit) as exit:
        bench.command_line(['--frontier', str(run), '--quick'])
    assert exit.value.code == 2 and 'another base' in capsys.readouterr().err


@pytest.mark.parametrize('flag', ['--frontier', '--run'])
def test_an_incomplete_run_is_refused(flag, studied, tmp_path, capsys):
    run = tmp_path / 'run'
    shutil.copytree(studied, run)
    shutil.rmtree(run / 'base')
    with pytest.raises(SystemExit) as exit:
        bench.command_line([flag, str(run)])
    assert exit.value.code == 2 and 'not complete' in capsys.readouterr().err


def test_a_run_that_was_fresh_or_resumed_is_only_read(studied, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree(studied, run)
    results = json.loads((run / 'results.json').read_text())
    results['config'].update(fresh=True, resume=True)
    (run / 'results.json').write_text(json.dumps(results))
    s = train.run_settings(run)
    assert not s.fresh and not s.resume
    before = (run / 'base/model.safetensors').stat()
    (run / 'frontier/ada-k-0.5-seed0.safetensors').unlink()    # one to train again
    (run / 'frontier/ada-k-0.5-seed0.row').unlink()
    bench.command_line(['--frontier', str(run), '--quick'])
    after = (run / 'base/model.safetensors').stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    rows = [json.loads((folder / 'frontier/frontier.json').read_text())['rows'] for folder in (studied, run)]
    assert rows[0] == rows[1]                                  # trained again to the same bits


def test_ablations_change_one_thing_each(studied):
    rows = json.loads((studied / 'ablations' / 'ablations.json').read_text())['rows']
    assert len(rows) == len({r['what'] for r in rows}) >= 13
    half = next(r for r in rows if '1/2' in r['what'])
    assert half['mean_k'] > 2                                  # the layer without an allocator runs 4, the other at least 1


def test_layers_without_an_allocator_always_run_K():
    allocators = Allocators(tiny_config(n_layers=4, top_k=3), 6, True)
    allocators.weight.data.normal_()
    bench.some_layers(1 / 2)(allocators)
    x, probs = torch.randn(50, 32), torch.rand(50, 8).softmax(-1)
    k = torch.stack([AdaK(allocators)(layer, x, probs) for layer in range(4)])
    assert (k[[0, 2]] == 3).all() and len(k[[1, 3]].unique()) > 1


def test_analysis_adds_up(studied):
    r = json.loads((studied / 'analysis' / 'analysis.json').read_text())
    mean = r['mean_k']
    assert sum(r['histogram']) == pytest.approx(1) and sum(i * share for i, share in enumerate(r['histogram'], 1)) == pytest.approx(mean)
    assert np.mean(r['by_layer']) == pytest.approx(mean)
    assert sum(k * share for k, share in zip(r['by_class'], r['class_share']) if k is not None) == pytest.approx(mean, rel=1e-4)
    assert np.mean(r['by_difficulty']) == pytest.approx(mean, rel=.01)
    assert all(sum(layer) == pytest.approx(1) for layers in r['load'].values() for layer in layers)
    assert len(bench.findings(r).splitlines()) == 5


def test_loads_count_experts_by_hand():
    loads = bench.Loads(TopK(2), 1, 3, 'cpu')
    loads(0, torch.zeros(2, 1), torch.tensor([[.5, .3, .2], [.1, .6, .3]]))
    assert loads.load.tolist() == [[1, 2, 1]] and isinstance(loads, Counted) and loads.counts.tolist() == [[0, 0, 2]]
