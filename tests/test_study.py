"""study/: classes of tokens by hand, then frontier, bases, recipes and analysis end to end at smoke size."""
import importlib
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

import run.rules
import study.analysis
import study.bases
import study.frontier
import study.recipes
import study.study
from conftest import refusal
from hub.checkpoint import base_digest
from hub.files import write_json
from hub.tokenizer import Tokenizer
from study.analysis import CLASSES, findings, runs, token_classes
from study.bases import WAYS
from study.frontier import METHODS, RULES, by_budget
from train import PRESETS, Settings

FEWER = dict(ppo_steps=4, warm_steps=2, heldout_tokens=2048)


# ================================================================ token classes

def test_runs_of_characters_and_their_classes():
    assert list(runs('The größe12__):\n  def')) == [
        ('The', 'function word'),
        (' ', 'white space'),
        ('größe', 'content word'),
        ('12', 'number'),
        ('__):', 'operator, punctuation'),
        ('\n  ', 'white space'),
        ('def', 'function word'),
    ]


def test_token_classes_follow_the_bytes(smoke):
    tokenizer = Tokenizer(smoke[0] / 'base')
    ids = tokenizer.encode('  größe:\n漢 + 10') + [tokenizer.eos]
    *classes, of_eos = token_classes(tokenizer, ids)
    for i, kind in zip(ids, classes):
        piece = tokenizer.bytes_of_id[i].strip()
        assert (kind == 'white space') == (not piece)
        assert piece not in (b'+', b':') or kind == 'operator, punctuation'
    assert classes[-1] == 'number'
    assert of_eos == 'white space'


# ================================================================ end to end

@pytest.fixture(autouse=True, scope='module')
def small(smoke):
    """Few budgets, seeds, recipes and tokens; the base, the same in all tests, is opened once.

    It asks for `smoke`, so that this is made before, as it is for all other tests.
    """
    base_model = study.study.base_model
    opened = []

    def open_once(s, out):
        if not opened:
            opened.append(base_model(s, out))
        return opened[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study.study, 'base_model', open_once)
        patch.setattr(run.rules, 'SEARCH_TOKENS', 1024)
        patch.setattr(study.frontier, 'BUDGETS', (0.75, 0.5))
        patch.setattr(study.frontier, 'SEEDS', 1)
        patch.setattr(study.recipes, 'BATCH', 256)
        patch.setattr(study.recipes, 'STEPS', 3)
        yield


@pytest.fixture(scope='module')
def studied(smoke, tmp_path_factory):
    """A copy of the smoke run, of fewer steps and tokens, with its frontier and analysis."""
    run = tmp_path_factory.mktemp('studied') / 'run'
    shutil.copytree(smoke[0], run)
    results = json.loads((run / 'results.json').read_text())
    results['config'].update(FEWER, fresh=True, resume=True)   # it is only read
    write_json(run / 'results.json', results)
    path = run / 'allocator.safetensors'                       # names the steps that it was trained for
    path.write_bytes(path.read_bytes().replace(b'ppo_steps\\": 12', b'ppo_steps\\":  4'))
    before = (run / 'base/model.safetensors').stat()
    study.frontier.main([str(run)])
    study.analysis.main([str(run)])
    after = (run / 'base/model.safetensors').stat()
    assert after.st_mtime_ns == before.st_mtime_ns
    return run


@pytest.fixture
def copied(studied, tmp_path):
    return shutil.copytree(studied, tmp_path / 'fine')


def rows_of(run, name='frontier/frontier'):
    return json.loads((run / f'{name}.json').read_text())['rows']


def test_frontier_has_every_row_and_adds_up(studied):
    columns = by_budget(rows_of(studied))
    assert set(METHODS) - set(columns['0.75 K']) == {'ada-k, dialled'}
    assert set(METHODS) == set(columns['0.5 K'])
    for rows in columns.values():
        for method in RULES:
            row = rows[method]
            target = 4 * (row['budget'] - 1 / 6) / (5 / 6)     # a stand-in costs a sixth of an expert
            assert row['mean_k'] == pytest.approx(target, rel=0.05)
        ada = rows['ada-k']
        assert ada['best_free']['method'] in RULES             # the best one on training text
        for lead in (ada['best_free'], ada['soft']):
            other = rows[lead['method']]
            assert lead['difference'] == pytest.approx(ada['delta'] - other['delta'], abs=1e-9)
            charged = lead['at_equal_k'] - lead['difference']
            more = ada['mean_k'] - other['mean_k']
            assert charged * more >= 0


def forbid_work(monkeypatch):
    for name in ('evaluate', 'calibrate', 'train_ppo', 'train_soft'):
        monkeypatch.setattr(study.study, name, None)           # a call would fail


def test_a_second_run_reuses_every_row(copied, monkeypatch, capsys):
    forbid_work(monkeypatch)
    before = rows_of(copied)
    (copied / 'frontier/frontier.json').unlink()
    study.frontier.main([str(copied)])
    assert rows_of(copied) == before
    assert '| ada-k |' in capsys.readouterr().out


def test_a_missing_row_is_trained_again_to_the_same_bits(copied):
    before = rows_of(copied)
    for path in (copied / 'frontier').glob('ada-k-0.5-*'):
        path.unlink()
    study.frontier.main([str(copied)])
    assert rows_of(copied) == before


def test_bases_put_together_what_is_there_and_measure_the_rest(copied, monkeypatch, capsys):
    out = copied.parent / 'out'
    there = json.loads((copied / 'frontier/frontier.json').read_text())
    there['rows'] = [row for row in there['rows'] if row['budget'] == 0.75]
    for name in ('fine', 'prose'):
        shutil.copytree(copied, out / name)
        monkeypatch.setitem(PRESETS, name, {**PRESETS['smoke'], **FEWER})
        for way in WAYS:
            (out / name / f'bases-{way}').mkdir()
            write_json(out / name / f'bases-{way}/bases.json', there)
    (out / 'fine/bases-rho/bases.json').unlink()
    monkeypatch.chdir(copied.parent)
    study.bases.main(['--only', 'fine', 'prose'])
    results = json.loads((out / 'bases/bases.json').read_text())
    assert list(results) == ['fine', 'prose']
    assert results['prose']['rows'] == results['prose']['ways']['published']['rows'] == there['rows']
    rho = {row['method']: row for row in results['fine']['ways']['rho']['rows']}
    assert set(rho) == {*RULES, 'ada-k'}
    assert rho['random-mix']['mean_k'] == pytest.approx(3, rel=0.05)       # nothing stands in for an expert
    assert (out / 'bases/bases.png').exists()
    assert '| seeds | fine, K = 4 | prose, K = 4 |' in capsys.readouterr().out


def test_every_ablation_changes_the_recipe():
    s = Settings()
    cases = study.recipes.ablations(s).values()
    default, *others = [replace(s, **changes) for changes in cases]
    assert default not in others
    assert len(others) >= 12


@pytest.mark.parametrize('flags, names', [
    ([], ['default', 'discount 0']),
    (['--published'], [
        'default, 16,384 tokens',
        'published, 4,096 tokens',
        'published, 768 tokens',
    ]),
])
def test_recipes_are_measured_once(flags, names, copied, monkeypatch, capsys):
    few = {'default': {}, 'discount 0': {'discount': 0.0}}
    monkeypatch.setattr(study.recipes, 'ablations', lambda s: few)
    study.recipes.main([str(copied), *flags])
    forbid_work(monkeypatch)
    capsys.readouterr()
    study.recipes.main([str(copied), *flags])
    rows = rows_of(copied, 'recipes/published' if flags else 'recipes/ablations')
    assert [row['what'] for row in rows] == names
    assert f'| {names[-1]} |' in capsys.readouterr().out


@pytest.mark.parametrize('fact, value', [
    ('base', 'another'),
    ('text', [1, 2, 3]),
    ('discount', 0.1),
])
def test_a_study_of_something_else_is_not_mixed_in(fact, value, copied, capsys):
    path = copied / 'frontier/study.json'
    write_json(path, {**json.loads(path.read_text()), fact: value})
    assert f'another {fact}:' in refusal(capsys, 'study.frontier', study.frontier.main, copied)


@pytest.mark.parametrize('damage, says', [
    ('results.json', 'damaged'),
    ('base/recipe.json', 'not complete'),
    ('frontier/study.json', 'damaged'),
    ('frontier/top-p-0.75-seed0.row', 'damaged'),
])
def test_a_damaged_study_is_one_line(damage, says, copied, capsys):
    path = copied / damage
    path.write_bytes(b'{"half')
    if says == 'not complete':
        path.unlink()
    assert says in refusal(capsys, 'study.frontier', study.frontier.main, copied)


def test_allocators_of_another_base_are_refused(copied, capsys):
    path = copied / 'allocator.safetensors'
    digest = base_digest(copied / 'base').encode()
    path.write_bytes(path.read_bytes().replace(digest, b'0' * len(digest)))
    assert 'another base' in refusal(capsys, 'study.analysis', study.analysis.main, copied)


def test_the_files_of_somebody_else_are_not_overwritten(copied, capsys):
    shutil.rmtree(copied / 'analysis')
    (copied / 'analysis').mkdir()
    (copied / 'analysis/analysis.json').write_text('mine')
    assert 'analysis.json' in refusal(capsys, 'study.analysis', study.analysis.main, copied)
    assert (copied / 'analysis/analysis.json').read_text() == 'mine'


@pytest.mark.parametrize('name, args, says', [
    ('frontier', [], 'required: run'),
    ('recipes', ['/no/such'], 'no/such'),
    ('analysis', ['/no/such'], 'no/such'),
    ('bases', ['--only', 'huge'], 'huge'),
])
def test_a_study_of_nothing_is_refused(name, args, says, capsys):
    program = importlib.import_module(f'study.{name}')
    assert says in refusal(capsys, f'study.{name}', program.main, *args)


# ================================================================ analysis

def test_analysis_adds_up(studied):
    r = json.loads((studied / 'analysis/analysis.json').read_text())
    mean_k = r['mean_k']
    k = range(1, 1 + len(r['histogram']))
    assert sum(r['histogram']) == pytest.approx(1)
    assert np.dot(r['histogram'], k) == pytest.approx(mean_k)
    assert np.mean(r['by_layer']) == pytest.approx(mean_k)
    assert np.mean(r['by_difficulty']) == pytest.approx(mean_k, rel=0.01)
    assert min(r['by_class'].values()) < mean_k < max(r['by_class'].values())
    assert (studied / 'analysis/analysis.png').stat().st_size > 10000


RESULTS = {
    'K': 2,
    'mean_k': 1.5,
    'histogram': [0.5, 0.4, 0.1],
    'by_layer': [1.2, 1.9, 1.4],
    'by_class': {**dict.fromkeys(CLASSES, 1.2), 'content word': 1.3, 'number': 1.7},
    'by_difficulty': list(range(10)),
}


def test_findings_say_what_holds():
    *claims, words = findings(RESULTS).splitlines()
    assert 'k = 1 for 50%, 2 for 40%, 3 for 10% of' in claims[0]
    assert all('** holds here' in claim for claim in claims)
    assert 'does not hold here: number 1.70, content word 1.30, ' in words


@pytest.mark.parametrize('text, n_sentences', [
    ('the 1 größe.', 4),
    ('no punctuation in line 1', 3),
    ('12 345', 3),
    ('7', 3),
    ('漢字 漢字。', 3),
    ('', 3),
])
def test_a_missing_class_has_no_sentence(text, n_sentences, smoke, tmp_path):
    tokenizer = Tokenizer(smoke[0] / 'base')
    classes = token_classes(tokenizer, [tokenizer.eos, *tokenizer.encode(text)])
    r = {**RESULTS, 'by_class': dict.fromkeys(classes, 1.5)}
    assert len(findings(r).splitlines()) == n_sentences
    study.analysis.analysis_figure(tmp_path / 'analysis.png', r)
    assert (tmp_path / 'analysis.png').exists()
