"""The README's tables are what the committed results say, and what the documents name exists."""
import re
import runpy
import sys

import pytest

from conftest import ROOT


def test_tables_come_from_the_results(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['readme.py', '--check'])
    monkeypatch.setattr(sys, 'path', [*sys.path])              # which it adds to
    runpy.run_path(str(ROOT / '.ci/readme.py'))                # it exits where a table differs


@pytest.mark.parametrize('document', ['README.md', 'LESSON.md'])
def test_every_file_and_function_named_exists(document):
    text = (ROOT / document).read_text()
    for file in re.findall(r'\]\((?!http)(.*?)\)', text):
        assert (ROOT / file).exists(), file
    for file, name in re.findall(r'`([\w/]+\.py):(\w+)', text):
        assert re.search(rf'^(def|class) {name}\b', (ROOT / file).read_text(), re.MULTILINE), (file, name)
