"""study/: rows and classes by hand, then frontier, ablations and analysis end to end at smoke size."""
import importlib
import json
import shutil

import numpy as np
import pytest
import torch

import bench
import study.ablations
import study.analysis
import study.bases
import study.frontier
import study.published
import study.study
import train
from allocator import AdaK, Allocators, Counted, TopK
from base.documents import read_documents, split_documents
from conftest import refusal, tiny_config
from hub.tokenizer import Tokenizer
from run.evaluate import clustered_error
from study.ablations import some_layers
from study.analysis import Loads, findings
from study.classes import prose_classes, python_classes, token_classes
from study.frontier import LOOKS, TRAINING_FREE, between, oracle
from study.passage import Scale


# ================================================================ rows

def test_oracle_by_hand_and_never_worse_than_a_fixed_plan():
    losses = torch.tensor([[3., 1., 2.], [1., 1., 2.5], [.5, .8, -.5]])            # k = 1, 2, 3; three tokens
    loss, k = oracle(losses, 1.)
    assert k.tolist() == [2, 1, 3] and loss.tolist() == [
        1.0,
        1.0,
        -0.5,
    ]  # with the price 4, 3, 3.5 | 2, 3, 3.8 | 3, 4.5, 2.5
    losses = torch.randn(6, 500)
    for price in (0, .1, 1):
        loss, k = oracle(losses, price)
        assert all((loss + price * k).mean() <= (losses[i] + price * (i + 1)).mean() for i in range(6))


def test_between_mixes_the_neighbouring_plans():
    path = {8: [4, 4], 7: [4, 3], 6: [3, 3]}
    assert between(path, 8) == [4, 4] and between(path, 6.5) == [3.5, 3] and between(path, 7.25) == [4, 3.25]


def test_standard_error_of_a_row_against_a_bootstrap_over_documents():
    rng = np.random.default_rng(0)
    document = np.repeat(np.arange(60), rng.integers(5, 40, 60))
    delta = rng.normal(size=60)[document] + rng.normal(size=len(document))
    means = []
    groups = [delta[document == d] for d in range(60)]
    for _ in range(4000):
        means.append(np.concatenate([groups[d] for d in rng.integers(0, 60, 60)]).mean())
    assert clustered_error(delta, document) == pytest.approx(np.std(means), rel=.1)


# ================================================================ token classes

SOURCE = '''"""A docstring."""
def size(x):  # größe
    """Of x."""
    return f(x, 'a b') + 10
'''


def test_python_classes_by_hand():
    classes = python_classes(SOURCE)
    at = lambda piece: {classes[i] for i in range(SOURCE.index(piece), SOURCE.index(piece) + len(piece))}
    assert at('"""A docstring."""') == at('"""Of x."""') == at('# größe') == {'comment, docstring'}
    assert (
        at('def') == at('return') == {'keyword'} and at('size') == {'identifier'} and at('10') == {'number'}
    )
    assert (
        at("'a b'") == {'string'}
        and at('+') == at('):') == {'operator, punctuation'}
        and at('    r') == {'white space', 'keyword'}
    )


def test_broken_python_has_classes_too():
    classes = python_classes('x = 1\ndef (:\n  "unclosed')
    assert len(classes) == 24 and classes[0] == 'identifier'


def test_prose_classes_by_hand():
    assert prose_classes('The cat, 12') == ['function word'] * 3 + ['white space'] + ['content word'] * 3 + \
        ['operator, punctuation', 'white space', 'number', 'number']


def test_token_classes_follow_the_bytes(smoke):
    tokenizer = Tokenizer(smoke[0] / 'base')
    ids = tokenizer.encode(SOURCE)
    classes = token_classes(tokenizer, ids, python_classes)
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
    for program in (study.frontier, study.ablations, study.analysis):
        program.main([str(run), '--quick'])
    return run


def test_frontier_has_every_row_and_adds_up(studied):
    results = json.loads((studied / 'frontier' / 'frontier.json').read_text())
    rows = {(r['method'], r['budget']): r for r in results['rows']}
    for method in LOOKS:
        assert (method, .75) in rows and (method, .5) in rows, method
    for (method, budget), r in rows.items():
        if method in (
            'random mix',
            'per-layer static k',
            'Top-P',
            'expert skipping',
            'entropy bands',
            'oracle (hindsight)',
        ):
            assert r['mean_k'] == pytest.approx(4 * budget, rel=.02), method
        assert r['expert_flops'] == pytest.approx(r['mean_k'] / 4)
    assert rows['static k', 1.0]['delta'] == 0 == rows['static k', 1.0]['delta_se']
    ada = rows['Ada-K', .75]
    best = min(
        (r for (method, budget), r in rows.items() if budget == 0.75 and method in TRAINING_FREE),
        key=lambda r: r['delta'],
    )
    assert ada['best_free']['method'] == best['method']
    assert ada['best_free']['difference'] == pytest.approx(ada['delta'] - best['delta'], abs=1e-9)
    assert ada['best_free']['at_equal_k'] == pytest.approx(
        ada['delta'] - best['delta'] + ada['worth'] * (ada['mean_k'] - best['mean_k']), abs=1e-9
    )
    assert rows['oracle (hindsight)', 0.75]['delta'] <= min(
        rows['static k', k / 4]['delta'] for k in (1, 2, 3)
    )


def test_a_second_run_reuses_every_row(studied, monkeypatch, capsys):
    before = json.loads((studied / 'frontier' / 'frontier.json').read_text())['rows']
    for name in ('evaluate', 'calibrate', 'train_ppo', 'train_soft'):
        monkeypatch.setattr(study.study, name, None)           # a call would fail
    study.frontier.main([str(studied), '--quick'])
    assert json.loads((studied / 'frontier' / 'frontier.json').read_text())['rows'] == before
    assert '| Ada-K |' in capsys.readouterr().out


def test_another_base_is_not_mixed_in(studied, tmp_path, capsys):
    run = tmp_path / 'run'
    shutil.copytree(studied, run)
    facts = json.loads((run / 'frontier' / 'study.json').read_text())
    (run / 'frontier' / 'study.json').write_text(json.dumps({**facts, 'base': 'another'}))
    assert 'another base' in refusal(capsys, 'study.frontier', study.frontier.main, run, '--quick')


@pytest.mark.parametrize('main, flags', [(study.frontier.main, []), (bench.main, ['--run'])])
def test_an_incomplete_run_is_refused(main, flags, studied, tmp_path, capsys):
    run = tmp_path / 'run'
    shutil.copytree(studied, run)
    shutil.rmtree(run / 'base')
    assert 'not complete' in refusal(capsys, 'x', main, *flags, run)


def test_a_run_of_an_earlier_version_is_refused_by_name(studied, tmp_path, capsys):
    run = tmp_path / 'run'
    shutil.copytree(studied, run)
    results = json.loads((run / 'results.json').read_text())
    results['config']['muon_lr'] = 0.02
    (run / 'results.json').write_text(json.dumps(results))
    line = refusal(capsys, 'study.frontier', study.frontier.main, run)
    assert 'another version' in line and 'muon_lr' in line


@pytest.mark.parametrize('name', ['frontier', 'ablations', 'analysis', 'sample', 'tasks'])
def test_every_study_has_its_own_help(name, capsys):
    program = importlib.import_module(f'study.{name}')
    with pytest.raises(SystemExit) as exit:
        program.main(['--help'])
    assert exit.value.code == 0 and f'python -m study.{name}' in capsys.readouterr().out


@pytest.mark.parametrize('name', ['frontier', 'ablations', 'analysis'])
def test_a_study_of_nothing_is_refused(name, capsys):
    program = importlib.import_module(f'study.{name}')
    assert 'folder of a run' in refusal(capsys, f'study.{name}', program.main)
    assert 'no/such' in refusal(capsys, f'study.{name}', program.main, '/no/such')


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
    study.frontier.main([str(run), '--quick'])
    after = (run / 'base/model.safetensors').stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    rows = [json.loads((folder / 'frontier/frontier.json').read_text())['rows'] for folder in (studied, run)]
    assert rows[0] == rows[1]                                  # trained again to the same bits


def test_ablations_change_one_thing_each(studied):
    rows = json.loads((studied / 'ablations' / 'ablations.json').read_text())['rows']
    assert len(rows) == len({r['what'] for r in rows}) >= 13
    half = next(r for r in rows if '1/2' in r['what'])
    assert half['mean_k'] > 2  # the layer without an allocator runs 4, the other at least 1


def test_layers_without_an_allocator_always_run_K():
    allocators = Allocators(tiny_config(n_layers=4, top_k=3), 6, True)
    allocators.weight.data.normal_()
    some_layers(1 / 2)(allocators)
    x, probs = torch.randn(50, 32), torch.rand(50, 8).softmax(-1)
    k = torch.stack([AdaK(allocators)(layer, x, probs) for layer in range(4)])
    assert (k[[0, 2]] == 3).all() and len(k[[1, 3]].unique()) > 1


def test_analysis_adds_up(studied):
    r = json.loads((studied / 'analysis' / 'analysis.json').read_text())
    mean = r['mean_k']
    assert sum(r['histogram']) == pytest.approx(1) and sum(
        i * share for i, share in enumerate(r['histogram'], 1)
    ) == pytest.approx(mean)
    assert np.mean(r['by_layer']) == pytest.approx(mean)
    assert sum(
        k * share for k, share in zip(r['by_class'], r['class_share']) if k is not None
    ) == pytest.approx(mean, rel=1e-4)
    assert np.mean(r['by_difficulty']) == pytest.approx(mean, rel=.01)
    assert all(sum(layer) == pytest.approx(1) for layers in r['load'].values() for layer in layers)
    assert len(findings(r).splitlines()) == 5


def test_the_passage_of_the_analysis_is_held_out_text(studied):
    r = json.loads((studied / 'analysis' / 'analysis.json').read_text())
    base = Tokenizer(studied / 'base')
    text = ''.join(piece for piece, _ in r['passage'])
    heldout = split_documents(read_documents('', 60))[2]
    assert len(r['passage']) == 64 and any(base.decode(base.encode(text)) in document for document in heldout)
    assert all(1 <= k <= 8 for _, k in r['passage']) and len({k for _, k in r['passage']}) > 1


def test_scale_has_five_equal_steps():
    scale = Scale([1.0, 3.5, 2.0])
    assert [scale.step(k) for k in (1.0, 1.49, 1.5, 2.2, 3.0, 3.5)] == [0, 0, 1, 2, 4, 4]
    assert scale.labels() == ['1.00-1.50', '1.50-2.00', '2.00-2.50', '2.50-3.00', '3.00-3.50']
    assert Scale([2.0, 2.0]).step(2.0) == 0


def test_loads_count_experts_by_hand():
    loads = Loads(TopK(2), 1, 3, 'cpu')
    loads(0, torch.zeros(2, 1), torch.tensor([[.5, .3, .2], [.1, .6, .3]]))
    assert (
        loads.load.tolist() == [[1, 2, 1]]
        and isinstance(loads, Counted)
        and loads.counts.tolist() == [[0, 0, 2]]
    )
