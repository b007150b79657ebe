"""study/: classes of tokens by hand, then frontier, bases, recipes and analysis end to end at smoke size."""
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import run.rules
import study.analysis
import study.bases
import study.frontier
import study.recipes
import study.study
from conftest import refusal
from hub.files import read_json, write_json
from study.analysis import CLASSES, findings, token_classes
from study.frontier import METHODS, RULES
from train import PRESETS, Settings

FEWER = dict(ppo_steps=4, warm_steps=2, heldout_tokens=1024)


# ================================================================ token classes

@pytest.mark.parametrize('pieces, classes', [
    (['The', ' ', 'größe', '12', '__):', '\n  ', 'def'], 'fwcnowf'),
    ([b'  gr\xc3', b'\xb6\xc3\x9fe:', b'\n', b': 1', b' 12', b'0'], 'ccwonn'),
    (['<s>', ' for', 'mat', ' for', ' 漢', '_', '_x'], 'wccfcoo'),
])
def test_a_token_is_of_the_class_of_its_first_letter_in_the_text(pieces, classes):
    of_id = {i: piece if isinstance(piece, bytes) else piece.encode() for i, piece in enumerate(pieces)}
    tokenizer = SimpleNamespace(marks={i for i in of_id if pieces[i] == '<s>'}, bytes_of_id=of_id)
    found = token_classes(tokenizer, range(len(pieces)))
    assert [name[0] for name in found] == list(classes)


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
        patch.setattr(run.rules, 'SEARCH_TOKENS', 512)
        patch.setattr(study.frontier, 'BUDGETS', (0.75, 0.5))
        patch.setattr(study.recipes, 'BATCH', 256)
        patch.setattr(study.recipes, 'STEPS', 3)
        yield


@pytest.fixture(scope='module')
def studied(smoke, tmp_path_factory):
    """A copy of the smoke run, of fewer steps and tokens, with its frontier and analysis."""
    run = shutil.copytree(smoke[0], tmp_path_factory.mktemp('studied') / 'run')
    results = read_json(run / 'results.json')
    results['config'].update(FEWER, fresh=True, resume=True)   # it is only read
    write_json(run / 'results.json', results)
    path = run / 'allocator.safetensors'                       # names the steps that it was trained for
    path.write_bytes(path.read_bytes().replace(b'ppo_steps\\": 12', b'ppo_steps\\":  4'))
    study.frontier.main([str(run)])
    study.analysis.main([str(run)])
    return run


@pytest.fixture
def copied(studied, tmp_path):
    return shutil.copytree(studied, tmp_path / 'out/fine')


def columns_of(run):
    return read_json(run / 'frontier/frontier.json')['columns']


def test_frontier_has_every_row_and_adds_up(studied):
    columns = columns_of(studied)
    assert set(METHODS) - set(columns['0.75 K']) == {'ada-k, dialled'}      # is trained there
    assert set(METHODS) == set(columns['0.5 K'])
    for title, rows in columns.items():
        for method in RULES:
            budget = float(title.removesuffix(' K'))
            target = 4 * (budget - 1 / 24) / (23 / 24)         # a stand-in costs a 24th of an expert
            assert rows[method]['mean_k'] == pytest.approx(target, rel=0.05)
        ada = rows['ada-k']
        assert ada['best_free']['method'] in RULES             # the best one on training text
        for lead in (ada['best_free'], ada['soft']):
            other = rows[lead['method']]
            assert lead['difference'] == pytest.approx(ada['delta'] - other['delta'], abs=1e-9)
            charged = lead['at_equal_k'] - lead['difference']
            assert charged * (ada['mean_k'] - other['mean_k']) >= 0


def test_a_second_start_measures_what_is_missing_to_the_same_bits(copied, capsys):
    before = columns_of(copied)
    for path in (copied / 'frontier').glob('ada-k-0.5-seed0.*'):
        path.unlink()
    study.frontier.main([str(copied)])
    assert columns_of(copied) == before
    printed = capsys.readouterr().out
    assert printed.count('training ') == printed.count(' nats at mean k ') == 1
    assert '| ada-k |' in printed


def test_bases_put_together_what_is_there_and_measure_the_rest(copied, monkeypatch, capsys):
    there = read_json(copied / 'frontier/frontier.json')
    del there['columns']['0.5 K']
    for way in ('published', 'stand-ins', 'beyond'):
        (copied / f'bases-{way}').mkdir()
        write_json(copied / f'bases-{way}/bases.json', there)
    monkeypatch.setitem(PRESETS, 'fine', {**PRESETS['smoke'], **FEWER})
    monkeypatch.chdir(copied.parent.parent)
    study.bases.main(['--only', 'fine'])
    base = read_json(Path('out/bases/bases.json'))['fine']
    assert base['stand-ins'] == base['published'] == there
    kept = base['kept']['columns']['0.75 K']
    assert set(kept) == {*RULES, 'ada-k'}
    assert kept['random-mix']['mean_k'] == pytest.approx(3, rel=0.05)       # nothing stands in for an expert
    assert '| 10⁻³ nats/token, minus top-k | fine, K = 4 |' in capsys.readouterr().out


def test_every_ablation_changes_the_recipe():
    s = Settings()
    default, *others = [replace(s, **changes) for changes in study.recipes.ablations(s).values()]
    assert default not in others


def test_the_published_recipe_has_a_row_of_each_length(copied):
    study.recipes.main([str(copied), '--published'])
    assert list(read_json(copied / 'recipes/published.json')) == [
        'the default',
        'published, as long',
        'published, as long, its step in logits',
        'published, whole',
    ]


def test_a_study_of_something_else_is_not_mixed_in(copied, capsys):
    path = copied / 'frontier/study.json'
    write_json(path, {**read_json(path), 'discount': 0.1})
    assert 'another discount:' in refusal(capsys, 'study.frontier', study.frontier.main, copied)


@pytest.mark.parametrize('name', ['frontier/study.json', 'frontier/top-p-0.75-seed0.row'])
def test_a_damaged_study_is_one_line(name, copied, capsys):
    (copied / name).write_text('{"half')
    assert f'{name}: damaged' in refusal(capsys, 'study.frontier', study.frontier.main, copied)


def test_a_run_that_is_not_complete_is_one_line(copied, capsys):
    (copied / 'base/recipe.json').unlink()
    assert 'not complete' in refusal(capsys, 'study.frontier', study.frontier.main, copied)


def test_the_files_of_somebody_else_are_not_overwritten(copied, capsys):
    (copied / 'analysis/.ada-k').unlink()
    assert 'choose another' in refusal(capsys, 'study.analysis', study.analysis.main, copied)


# ================================================================ analysis

def test_analysis_adds_up(studied):
    r = read_json(studied / 'analysis/analysis.json')
    mean_k = r['mean_k']
    assert np.dot(r['histogram'], range(1, 5)) == pytest.approx(mean_k)
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


def test_findings_say_what_holds_and_nothing_of_a_class_that_is_missing():
    *claims, words = findings(RESULTS).splitlines()
    assert 'k = 1 for 50%, 2 for 40%, 3 for 10% of' in claims[0]
    assert all('** holds here' in claim for claim in claims)
    assert 'does not hold here: number 1.70, content word 1.30, ' in words
    assert findings({**RESULTS, 'by_class': {'number': 1.5}}).splitlines() == claims
