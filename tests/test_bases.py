"""study/bases.py and study/published.py end to end at smoke size."""
import json
import shutil

import study.bases
import study.published
import study.study
from conftest import refusal
from study.frontier import TRAINING_FREE


def test_the_published_length_is_measured_once(smoke, tmp_path, monkeypatch, capsys):
    shutil.copytree(smoke[0], tmp_path / 'run')
    studied = tmp_path / 'run'
    study.published.main([str(studied), '--quick'])
    rows = json.loads((studied / 'published' / 'published.json').read_text())['rows']
    assert [r['steps'] for r in rows] == [12, 12, 8]
    assert [r['tokens'] for r in rows] == [12 * 16 * 4 * 64, 12 * 16 * 64, 8 * 4 * 64]     # steps x B x G x T
    capsys.readouterr()
    monkeypatch.setattr(study.study, 'evaluate', None)         # a call would fail
    study.published.main([str(studied), '--quick'])
    assert '| published recipe, published length | 8 |' in capsys.readouterr().out


def test_bases_at_smoke_size(tmp_path, capsys):
    study.bases.main(['fine', 'prose', '--quick', '--out', str(tmp_path)])
    results = json.loads((tmp_path / 'bases' / 'bases.json').read_text())
    assert list(results) == ['fine', 'prose'] and (tmp_path / 'bases' / 'bases.png').exists()
    for base in results.values():
        rows = study.bases.at_budget(base)
        assert set(rows) >= set(study.bases.SHOWN)
        free = min((rows[m] for m in TRAINING_FREE if m in rows), key=lambda r: r['delta'])
        assert rows['Ada-K']['best_free']['method'] == free['method']
    table = capsys.readouterr().out.splitlines()
    assert '| 10⁻³ nats/token, minus Top-K | seeds | fine | prose |' in table
    before = (tmp_path / 'fine/frontier/ada-k-0.75-seed0.safetensors').stat().st_mtime_ns
    study.bases.main(['fine', '--quick', '--out', str(tmp_path)])               # goes on where it was
    assert (tmp_path / 'fine/frontier/ada-k-0.75-seed0.safetensors').stat().st_mtime_ns == before


def test_a_base_that_does_not_exist_is_refused(tmp_path, capsys):
    line = refusal(capsys, 'study.bases', study.bases.main, 'fine', 'huge', '--out', tmp_path)
    assert 'huge: no such base' in line and not list(tmp_path.iterdir())
