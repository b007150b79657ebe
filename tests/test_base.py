"""base/ and run/evaluate.py: documents, splits, windows; Muon, load balance; errors and bits by hand."""
import io
import math

import numpy as np
import pytest
import torch

import train
from allocator import TopK
from base.documents import docstrings_and_comments, read_documents, split_documents, text_digest
from base.frozen import base_model, is_there
from base.pretrain import balance_loss, learn_base, orthogonalise
from base.text import Text, learn_bpe
from hub.files import InputError, read_json
from hub.safetensors import read_safetensors, write_safetensors
from run.evaluate import clustered_error, effective_documents, evaluate


# ---------------------------------------------------------------- text

@pytest.mark.parametrize('n, size', [(1, 1000), (1, 3_000_000), (50, 100)])
def test_documents_are_split_once_even_if_a_name_is_no_utf8(n, size):
    documents = {f'{i}\udcff.py': 'x' * size for i in range(n)}
    assert len(text_digest(documents)) == 64
    parts = split_documents(documents)
    train, *others = [sum(map(len, part)) for part in parts]
    assert train + sum(others) == n * size
    assert train > 0.7 * n * size
    assert min(others) > 0.04 * n * size
    assert all(len(part) >= 2 for part in parts)


NUMBERS = torch.arange(1001)
TEXT = Text(NUMBERS, NUMBERS // 7, 10)


def test_windows_predict_each_token_once_behind_what_stands_in_front():
    text = Text(TEXT.tokens.int(), TEXT.document, 10, front=(9999,))
    inputs, targets, document = text.windows(1000)
    assert torch.equal(targets.flatten(), NUMBERS[1:])
    assert torch.equal(document.flatten(), NUMBERS[1:] // 7)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert (inputs[:, 0] == 9999).all()
    inputs, targets, _ = next(text.batches(2, seed=0))
    assert inputs[:, 0].tolist() == [9999] * 2
    assert 9999 not in targets


def test_batches_show_every_token_before_any_twice():
    batches = TEXT.batches(4, seed=0)
    seen = torch.cat([next(batches)[0] for _ in range(24)])
    assert seen.numel() == len(seen.unique()) == 960


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


def test_prose_is_docstrings_and_comments_up_to_where_a_file_breaks():
    prose = docstrings_and_comments(io.StringIO(SOURCE))
    assert prose == 'What it is.\nfor the paths\nOf x,\n    in two lines.\nthe end'
    assert docstrings_and_comments(io.StringIO('# before\nx = (')) == 'before'


def test_prose_documents_are_those_with_enough_of_it(tmp_path):
    much = 'words and ' * 30
    (tmp_path / 'much.py').write_text(f'x = 1  # {much}\n')
    (tmp_path / 'little.py').write_text('x = 1  # one\n')
    (tmp_path / 'text.txt').write_text('a text')
    found = read_documents(train.Settings(data=tmp_path, prose=True))
    assert found == {'much.py': much.strip(), 'text.txt': 'a text'}


def test_the_default_text_is_the_standard_library_without_tests_and_tables():
    parts = {part for name in read_documents(train.Settings()) for part in name.split('/')}
    assert {'argparse.py', 'json', 'email'} <= parts
    assert not {'encodings', 'pydoc_data', 'test', 'tests', 'site-packages'} & parts


# ---------------------------------------------------------------- learning a base

def test_muon_orthogonalises():
    matrices = orthogonalise(torch.randn(3, 20, 12))
    values = torch.linalg.svdvals(matrices)
    assert 0.3 < values.min() <= values.max() < 1.6


@pytest.mark.parametrize('chosen, loss', [
    ([0, 1, 2, 3], 1),
    ([0, 0, 0, 0], 4),
])
def test_balance_loss_is_1_when_balanced_and_grows_to_N(chosen, loss):
    probs = torch.eye(4)[chosen]                               # (P,N), each sure of its expert
    assert balance_loss([probs], 1) == pytest.approx(loss)


def test_a_base_learns_a_text_that_repeats():
    sentence = torch.randint(50, (40,))
    text = Text(sentence.repeat(100), torch.zeros(4000), 32)
    s = train.Settings(base_steps=12, seq=32, n_layers=2, dim=32, expert_dim=16)
    model = learn_base(s, 50, text)
    [(loss, _)] = evaluate(model, text.windows(640), [TopK(2)])
    assert loss.mean() < math.log(50) - 0.3                    # of a model that knows nothing


# ---------------------------------------------------------------- a base that is there

def test_a_base_of_the_same_recipe_is_used_again(smoke):
    folder = smoke[0] / 'base'
    recipe = read_json(folder / 'recipe.json')
    del recipe['seq']                                          # a file of another version may hold more
    assert is_there(folder, recipe)
    with pytest.raises(InputError, match='learnt with another dim.*--fresh'):
        is_there(folder, {**recipe, 'dim': 64})


def test_a_base_that_gives_nan_is_refused(finished):
    path = finished / 'base/model.safetensors'
    tensors, metadata = read_safetensors(path)
    tensors['model.norm.weight'][3] = math.nan
    write_safetensors(path, tensors, metadata)
    with pytest.raises(InputError, match='NaN on ordinary text'):
        base_model(train.parse(['--preset', 'smoke']), finished)


# ---------------------------------------------------------------- numbers

def test_clustered_error_by_hand():
    """Of four equal documents; of a single one it is that of its 16 parts."""
    document = np.arange(4).repeat(100)
    of_means = np.std([0, 1, 2, 5], ddof=1) / 4 ** 0.5
    delta = np.array([0, 1, 2, 5])[document]
    assert clustered_error(delta, document) == pytest.approx(of_means * 5 / 3)
    delta = np.random.default_rng(0).normal(size=4096)
    parts = np.arange(4096) // 256
    assert clustered_error(delta, np.zeros(4096)) == pytest.approx(clustered_error(delta, parts))


@pytest.mark.parametrize('sizes', [
    [800, 800],
    [1584, 16],
    [320, *[18] * 70],
])
@pytest.mark.parametrize('of_documents', [0, 1])
def test_two_errors_hold_the_truth_however_many_documents(sizes, of_documents):
    rng = np.random.default_rng(0)
    document = np.arange(len(sizes)).repeat(sizes)
    within = 0
    for _ in range(400):
        delta = rng.normal(size=len(document))
        delta += of_documents * rng.normal(size=len(sizes))[document]
        within += abs(delta.mean()) < 1.96 * clustered_error(delta, document)
    assert within >= 0.85 * 400


def test_effective_documents_by_hand():
    assert effective_documents(np.array([1, 1, 1, 4])) == 1.6
