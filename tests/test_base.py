"""base/ and run/evaluate.py: documents, splits, windows; Muon, load balance; errors and bits by hand."""
import numpy as np
import pytest
import torch

import train
from allocator import TopK
from base.pretrain import balance_loss, learn_base, new_model, orthogonalise
from base.documents import docstrings_and_comments, read_documents, split_documents
from base.text import Text
from conftest import refusal, tiny_config
from hub.files import InputError
from hub.tokenizer import Tokenizer
from run.evaluate import bits_per_byte, clustered_error, evaluate


def test_documents_are_split_once_and_windows_predict_each_token_once(tmp_path):
    documents = {f'{i}.py': f'document {i}' for i in range(50)}
    parts = split_documents(documents)
    assert sorted(sum(parts, [])) == sorted(documents.values()) and [len(p) for p in parts] == [40, 5, 5]
    text = Text(torch.arange(101), np.arange(101) // 10)
    inputs, targets, document = text.windows(10)
    assert torch.equal(targets.flatten(), torch.arange(1, 101)) and torch.equal(inputs + 1, targets)
    assert np.array_equal(document.flatten(), np.arange(1, 101) // 10)
    assert text.windows(10, 40)[0].shape == (4, 10)


def test_batches_show_every_token_before_any_twice():
    batches = Text(torch.arange(1000), np.zeros(1000)).batches(4, 10, torch.Generator().manual_seed(0))
    seen = torch.cat([next(batches)[0].flatten() for _ in range(24)])
    assert len(seen.unique()) == len(seen) == 960


def test_clustered_error_equals_a_bootstrap_over_documents():
    rng = np.random.default_rng(0)
    document = np.repeat(np.arange(40), rng.integers(20, 200, 40))
    delta = rng.normal(size=40)[document] + rng.normal(size=len(document))  # tokens of a document go together
    means = []
    for _ in range(2000):
        drawn = rng.integers(0, 40, 40)
        picked = np.concatenate([delta[document == d] for d in drawn])
        means.append(picked.mean())
    assert clustered_error(delta, document) == pytest.approx(np.std(means), rel=0.15)


def test_bits_per_byte_by_hand(smoke):
    tokenizer = Tokenizer(smoke[0] / 'base')
    ids = torch.tensor([tokenizer.encode('abc') + [tokenizer.eos]])
    assert bits_per_byte(3 * np.log(2), (None, ids), tokenizer) == pytest.approx(1)


def test_muon_orthogonalises():
    u = orthogonalise(torch.randn(3, 20, 12))
    assert torch.linalg.svdvals(u).min() > 0.3 and torch.linalg.svdvals(u).max() < 1.6


def test_balance_loss_is_1_when_balanced_and_grows_to_N():
    assert balance_loss([torch.eye(4)], 1) == pytest.approx(1)
    assert balance_loss([torch.eye(4)[:1].repeat(4, 1)], 1) == pytest.approx(4)


def test_jsonl_rows_become_documents(tmp_path):
    (tmp_path / 'a.jsonl').write_text(
        '{"text": "one"}\n\n{"messages": [{"role": "user", "content": "two"}]}\n'
    )
    (tmp_path / 'b.txt').write_text('three')
    (tmp_path / 'c.md').write_text('not read')
    assert list(read_documents(str(tmp_path), 99).values()) == ['one', 'user: two', 'three']


@pytest.mark.parametrize(
    'line',
    ['{', '[]', '{"txt": "x"}', '{"text": 3}', '{"messages": "x"}', '{"messages": [{"role": "user"}]}'],
)
def test_wrong_jsonl_is_refused_by_line(line, capsys, tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"text": "fine"}\n' + line)
    assert 'a.jsonl:2' in refusal(
        capsys, 'train.py', train.main, '--preset', 'smoke', '--out', tmp_path / 'o', '--data', tmp_path
    )


def test_base_learnt_in_bf16_is_nearly_that_in_fp32():
    config = tiny_config(n_layers=2)
    tokens = torch.randint(50, (40,)).repeat(100)              # a text that repeats can be learnt
    text = Text(tokens, np.zeros(len(tokens), int))
    losses = []
    for bf16 in (False, True):
        s = train.Settings(base_steps=12, seq=32, base_batch=8, bf16=bf16, top_k=3)
        model = learn_base(s, config, text)
        assert all(p.dtype == torch.float32 for p in model.parameters())
        losses.append(evaluate(model, text.windows(32, 640), TopK(3))[0].mean().item())
    start = evaluate(new_model(config, 0), text.windows(32, 640), TopK(3))[0].mean().item()
    assert abs(losses[0] - losses[1]) < .05 * (start - losses[0]) and losses[0] < start - .3


SOURCE = '''"""What it is."""
import os  # for the paths

def f(x):
    """Of x,
    in two lines."""
    return 'not this', """nor this"""
# the end
'''


def test_prose_is_docstrings_and_comments():
    assert docstrings_and_comments(SOURCE) == 'What it is.\nfor the paths\nOf x,\n    in two lines.\nthe end'
    assert docstrings_and_comments('# before\nx = (') == 'before'      # of a broken file what stands before


def test_prose_documents_are_those_with_enough_of_it(tmp_path):
    (tmp_path / 'much.py').write_text(f'# {"words and words " * 20}\nx = 1\n')
    (tmp_path / 'little.py').write_text('# one\nx = 1\n')
    (tmp_path / 'text.txt').write_text('a text stays as it is')
    found = read_documents(str(tmp_path), 99, prose=True)
    assert list(found) == ['much.py', 'text.txt'] and 'x = 1' not in found['much.py']
    (tmp_path / 'text.txt').unlink()
    (tmp_path / 'much.py').write_text('x = 1\n' * 99)
    with pytest.raises(InputError, match='no docstrings or comments'):
        read_documents(str(tmp_path), 99, prose=True)
