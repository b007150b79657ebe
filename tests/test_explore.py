"""study/explore.py: its numbers against separate passes, text like markup, and the page in Chromium."""
import base64
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

import study.explore
from allocator import AdaK, Counted, TopK
from conftest import model_and_policy, refusal
from hub.tokenizer import Tokenizer
from study.explore import BUDGETS, PAGE_BYTES, SHOWN

TEXT = 'def größe(x):  # </script><script>document.title = "run"</script>\n\treturn "漢" < \'&amp;\'\n'
T = 64                  # tokens of a window of the smoke run
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


@pytest.fixture(scope='module')
def run(smoke, tmp_path_factory):
    """A copy of the smoke run, so that other tests find theirs as it was."""
    return shutil.copytree(smoke[0], tmp_path_factory.mktemp('explored') / 'run')


def made(run, *flags):
    """(the page, the data in it) of the program with these flags."""
    study.explore.main([str(run), *flags])
    page = (run / 'explore.html').read_text(encoding='utf-8')
    [data] = re.findall('id="data">(.*?)</script>', page)
    return page, json.loads(data)


@pytest.fixture(scope='module')
def explored(run):
    """The page of TEXT, which is longer than a window, and its data."""
    path = run / 'text'
    path.write_text(TEXT, encoding='utf-8')
    return made(run, '--text', str(path))


def unpacked(text, *shape):
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(shape)


@pytest.fixture(scope='module')
def separate(run):
    """(model, ids, allocators) to compute the numbers once more."""
    model, policy = model_and_policy(run)
    return model, Tokenizer(run / 'base').encode(TEXT), policy.allocators


@torch.no_grad()
def read(model, ids, policy):
    """(loss of every next token, probabilities (n,V), tally) of windows read one after the other."""
    tally = Counted(policy, model)
    logits = [model(torch.tensor([ids[at:at + T]]), tally)[0] for at in range(0, len(ids), T)]
    logp = torch.cat(logits).log_softmax(-1)
    loss = [-logp[t, i].item() for t, i in enumerate(ids[1:])]
    return loss, logp.exp(), tally


def test_rows_are_those_of_separate_passes(explored, separate):
    model, ids, allocators = separate
    _, page = explored
    n = len(ids)
    assert n > T
    rows = [(page['top-k'], TopK(4))]
    rows += [(row, AdaK(allocators, row['knob'])) for row in page['policies']['ada-k'][1:-1:3]]
    for row, policy in rows:
        loss, probs, tally = read(model, ids, policy)
        assert row['losses'] == pytest.approx(loss, abs=2e-4)
        assert row['loss'] == pytest.approx(np.mean(loss), abs=1e-5)
        assert row['mean_k'] == pytest.approx(tally.mean(), abs=1e-6)
        k = unpacked(row['k'], 2, n)
        for layer, counts in enumerate(tally.counts):
            assert np.bincount(k[layer], minlength=5).tolist() == counts.tolist()
        best = 100 * probs.sort(descending=True).values[:, :SHOWN]
        assert unpacked(row['sure'], n, SHOWN) == pytest.approx(best.numpy(), abs=0.51)


def test_policies_share_the_mean_k_and_end_at_one_expert_and_at_top_k(explored):
    _, page = explored
    topk = page['top-k']
    for name, rows in page['policies'].items():
        assert len(rows) == BUDGETS
        for row, ada in zip(rows, page['policies']['ada-k']):
            assert row['mean_k'] == pytest.approx(ada['mean_k'], rel=0.02)
        assert rows[0]['mean_k'] == pytest.approx(1, abs=0.01)
        if name != 'top-p':
            assert rows[-1]['losses'] == topk['losses']


def test_choices_are_probabilities_and_the_most_probable_k_runs(explored, separate):
    _, page = explored
    n = len(page['tokens'])
    for row in page['policies']['ada-k']:
        choices = unpacked(row['choices'], 2, n, 4).astype(int)
        assert choices.sum(-1) == pytest.approx(100, abs=2)
        of_k = np.take_along_axis(choices, unpacked(row['k'], 2, n, 1) - 1, -1)
        assert (of_k == choices.max(-1, keepdims=True)).all()


def test_the_text_is_shown_as_it_is_and_cannot_end_its_element(explored):
    html, page = explored
    assert ''.join(page['tokens']) == TEXT
    assert html.count('</script>') == 2
    assert not re.search('src=|href=|http:', html)
    assert len(html) < PAGE_BYTES


def test_heldout_text_by_default_and_no_page_that_is_too_large(run, monkeypatch, capsys):
    monkeypatch.setattr(study.explore, 'BUDGETS', 2)
    html, page = made(run)
    assert len(page['tokens']) == 256
    monkeypatch.setattr(study.explore, 'PAGE_BYTES', 1000)
    assert 'shorter passage' in refusal(capsys, 'study.explore', study.explore.main, run, '--prompt', 'x y')
    assert (run / 'explore.html').read_text(encoding='utf-8') == html


@pytest.mark.parametrize('prompt', ['', 'x y z ' * 200])
def test_too_short_and_too_long_a_text_is_refused(prompt, run, capsys):
    line = refusal(capsys, 'study.explore', study.explore.main, run, '--prompt', prompt)
    assert 'give 2 to 512' in line


# ---------------------------------------------------------------- in a browser

BY_HAND = '''
    $('budget').value = 6;
    $('budget').dispatchEvent(new Event('input'));
    document.querySelector('[value=skip]').click();
    spans[2].focus();
    $('passage').dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowRight' }));
    $('layer').value = 1;
    $('layer').dispatchEvent(new Event('input'));
'''


@pytest.mark.skipif(not CHROMIUM, reason='no Chromium here to open the page in')
@pytest.mark.parametrize('address, script', [
    ('#budget=6&policy=skip&token=3&layer=1', ''),
    ('', BY_HAND),
], ids=['address', 'slider and keys'])
def test_the_page_shows_what_was_computed(address, script, explored, tmp_path):
    html, page = explored
    path = tmp_path / 'page.html'
    script = f'<script>{script}; $("hint").textContent = location.hash</script></body>'
    path.write_text(html.replace('</body>', script), encoding='utf-8')
    flags = '--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={tmp_path}', '--dump-dom'
    done = subprocess.run([CHROMIUM, *flags, f'file://{path}{address}'], capture_output=True, timeout=120)
    document = done.stdout.decode()
    row = page['policies']['skip'][6]
    change = row['loss'] - page['top-k']['loss']
    for name, text in {
        'mean-k': f'{row["mean_k"]:.3f}',
        'loss': f'{row["loss"]:.4f}',
        'flops': f'{100 * row["expert_flops"]:.1f}%',
        'change': f'{change:+.4f}'.replace('-', '−'),
        'hint': '#budget=6&amp;policy=skip&amp;token=3&amp;layer=1',
    }.items():
        assert re.search(f'id="{name}"[^>]*>([^<]*)<', document)[1] == text
    assert f'{row["losses"][3]:.4f} under skip' in document
    assert '<title>How many' in document                       # the passage's script did not run
    k = unpacked(row['k'], 2, len(page['tokens']))
    shown = re.findall('<span class="[a-z -]*" role="option"[^>]* title="k = ([0-9.]+)"', document)
    assert [float(k) for k in shown] == pytest.approx(k.mean(0), abs=0.006)
