"""The README's tables are what the committed results say, and its files exist."""
import re
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_tables_come_from_the_results(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['readme.py', '--check'])
    monkeypatch.setattr(sys, 'path', [*sys.path])              # which it adds to
    runpy.run_path(str(ROOT / '.ci/readme.py'))                # it exits where a table differs


def test_every_file_and_function_named_exists():
    text = (ROOT / 'README.md').read_text()
    for figure in re.findall(r'!\[.*?\]\((.*?)\)', text):
        assert (ROOT / figure).exists(), figure
    for file, name in re.findall(r'`([\w/]+\.py):(\w+)`', text):
        assert re.search(rf'^(def|class) {name}\b', (ROOT / file).read_text(), re.MULTILINE), (file, name)
