"""base/ and run/evaluate.py: documents, splits, windows; Muon, load balance; errors and bits by hand."""
import math
import shutil

import numpy as np
import pytest
import torch

import train
from allocator import TopK
from base.documents import docstrings_and_comments, read_documents, split_documents
from base.frozen import base_model
from base.pretrain import balance_loss, learn_base, new_model, orthogonalise
from base.text import Text, learn_bpe
from conftest import tiny_config
from hub.files import InputError, read_json, write_json
from hub.safetensors import read_safetensors, write_safetensors
from run.evaluate import clustered_error, effective_documents, evaluate


# ---------------------------------------------------------------- text

def test_documents_are_split_once():
    documents = {f'{i}.py': f'document {i}' for i in range(50)}
    train, calibration, heldout = split_documents(documents)
    together = train + calibration + heldout
    assert sorted(together) == sorted(documents.values())
    assert len(calibration) == 5
    assert len(heldout) == 5


NUMBERS = np.arange(1001)
TEXT = Text(torch.from_numpy(NUMBERS), NUMBERS // 7)


def test_windows_predict_each_token_once():
    inputs, targets, document = TEXT.windows(10)
    assert np.array_equal(targets.flatten(), NUMBERS[1:])
    assert np.array_equal(document.flatten(), NUMBERS[1:] // 7)
    assert torch.equal(inputs + 1, targets)


def test_a_limit_leaves_windows_that_are_spread():
    inputs, _, _ = TEXT.windows(10, limit=40)
    assert inputs[:, 0].tolist() == [0, 330, 660, 990]


def test_batches_show_every_token_before_any_twice():
    batches = TEXT.batches(4, 10, torch.Generator())
    inputs = [next(batches)[0] for _ in range(24)]
    seen = torch.cat(inputs).flatten()
    assert len(seen) == 960
    assert len(seen.unique()) == 960


def test_byte_pairs_by_hand():
    merges = learn_bpe(['aaabdaaabac'], 259)
    assert merges == [(97, 97), (256, 97), (257, 98)]


SOURCE = '''"""What it is."""
import os  # for the paths

def f(x):
    """Of x,
    in two lines."""
    return 'not this', """nor this"""
# the end
'''


def test_prose_is_docstrings_and_comments():
    prose = docstrings_and_comments(SOURCE)
    assert prose == 'What it is.\nfor the paths\nOf x,\n    in two lines.\nthe end'


def test_of_a_broken_file_the_prose_before_is_read():
    assert docstrings_and_comments('# before\nx = (') == 'before'


def test_prose_documents_are_those_with_enough_of_it(tmp_path):
    much = 'words and ' * 30
    (tmp_path / 'much.py').write_text(f'x = 1  # {much}\n')
    (tmp_path / 'little.py').write_text('x = 1  # one\n')
    (tmp_path / 'text.txt').write_text('a text')
    found = read_documents(tmp_path, 99, prose=True)
    assert found == {'much.py': much.strip(), 'text.txt': 'a text'}


def test_the_default_text_is_the_standard_library_without_tests_and_tables():
    parts = {part for name in read_documents('', 10 ** 9) for part in name.split('/')}
    assert {'argparse.py', 'json', 'email'} <= parts
    assert not {'encodings', 'pydoc_data', 'test', 'tests', 'site-packages'} & parts


# ---------------------------------------------------------------- learning a base

def test_muon_orthogonalises():
    matrices = orthogonalise(torch.randn(3, 20, 12))
    values = torch.linalg.svdvals(matrices)
    assert 0.3 < values.min()
    assert values.max() < 1.6


@pytest.mark.parametrize('chosen, loss', [
    ([0, 1, 2, 3], 1),
    ([0, 0, 0, 0], 4),
])
def test_balance_loss_is_1_when_balanced_and_grows_to_N(chosen, loss):
    probs = torch.eye(4)[chosen]                               # (P,N), each sure of its expert
    found = balance_loss([probs], 1)
    assert found == pytest.approx(loss)


def test_a_base_learns_a_text_that_repeats():
    config = tiny_config(n_layers=2)
    sentence = torch.randint(50, (40,))
    tokens = sentence.repeat(100)
    text = Text(tokens, np.zeros(len(tokens)))
    windows = text.windows(32, 640)
    model = new_model(config, 0)
    [(before, _)] = evaluate(model, windows, [TopK(3)])
    s = train.Settings(base_steps=12, seq=32)
    model = learn_base(s, config, text)
    [(after, _)] = evaluate(model, windows, [TopK(3)])
    assert after.mean() < before.mean() - 0.3


# ---------------------------------------------------------------- a base that is there

@pytest.fixture
def run(smoke, tmp_path):
    """(Settings, folder) of a copy of the smoke run."""
    out = tmp_path / 'run'
    shutil.copytree(smoke[0], out)
    return train.parse(['--preset', 'smoke']), out


def test_a_recipe_of_the_previous_version_is_the_same_base(run, capsys):
    s, out = run
    path = out / 'base/recipe.json'
    recipe = read_json(path)
    more = {'bf16': False, 'base_batch': 16, 'n_kv_heads': 1}
    write_json(path, {**recipe, **more})
    base_model(s, out)
    assert 'used again' in capsys.readouterr().out
    write_json(path, {**recipe, 'dim': 64})
    with pytest.raises(InputError, match='learnt with another dim.*--fresh'):
        base_model(s, out)


def test_a_base_that_gives_nan_is_refused(run):
    s, out = run
    path = out / 'base/model.safetensors'
    tensors, metadata = read_safetensors(path)
    tensors['model.norm.weight'][3] = math.nan
    write_safetensors(path, tensors, metadata)
    with pytest.raises(InputError, match='NaN on ordinary text'):
        base_model(s, out)


# ---------------------------------------------------------------- numbers

def test_clustered_error_equals_a_bootstrap_over_documents():
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 200, 40)
    document = np.repeat(np.arange(40), lengths)
    of_document = rng.normal(size=40)
    delta = of_document[document] + rng.normal(size=len(document))
    means = []
    for _ in range(2000):
        drawn = rng.integers(0, 40, 40)
        picked = [delta[document == d] for d in drawn]
        means.append(np.concatenate(picked).mean())
    error = clustered_error(delta, document)
    assert error == pytest.approx(np.std(means) * 41 / 39, rel=0.1)


EQUAL = [[1 / m] * m for m in (2, 5, 10, 70)]


@pytest.mark.parametrize('shares', [
    *EQUAL,
    [0.99, 0.01],
    [0.95, 0.02, 0.01, 0.01, 0.01],
    [0.5, 0.2, *[0.0375] * 8],
    [0.2, *[0.8 / 69] * 69],
])
@pytest.mark.parametrize('of_documents', [0, 1])
def test_two_errors_hold_the_truth_however_many_documents(shares, of_documents):
    rng = np.random.default_rng(0)
    sizes = np.rint(np.array(shares) * 1600).astype(int)
    document = np.arange(len(sizes)).repeat(sizes)
    within = 0
    for _ in range(400):
        delta = rng.normal(size=len(document))
        delta += of_documents * rng.normal(size=len(sizes))[document]
        within += abs(delta.mean()) < 1.96 * clustered_error(delta, document)
    assert within >= 0.85 * 400


def test_effective_documents_by_hand():
    assert effective_documents(np.arange(10) // 5) == 2
    assert effective_documents(np.array([1, 1, 1, 4])) == 1.6


def test_what_stands_in_front_of_a_text_begins_every_window():
    text = Text(torch.arange(40, dtype=torch.int32), np.zeros(40, int), front=(99,))
    inputs, targets, _ = text.windows(8)
    assert inputs[:, 0].tolist() == [99] * 4
    assert torch.equal(targets.flatten(), torch.arange(1, 33))             # each token is predicted, once
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    inputs, targets, _ = next(text.batches(2, 8, torch.Generator()))
    assert inputs[:, 0].tolist() == [99] * 2 and 99 not in targets
