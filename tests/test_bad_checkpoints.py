"""Damaged, malicious, unsupported checkpoints: each is refused with one line that names file or tensor.

Damage to config.json: test_config.py; random damage: test_damage.py.
"""
import json
import os
import re
import resource
import shutil

import pytest
import torch

from conftest import ROOT
from hub.checkpoint import load
from hub.files import InputError, read_json, write_json
from hub.safetensors import write_safetensors

GOLDEN = ROOT / 'tests/golden/mixtral-tied-sharded'
INDEX = 'model.safetensors.index.json'
SHARD = 'model-00002-of-00002.safetensors'
END = 12672                             # bytes of its tensors
NORM = 'model.norm.weight'              # the last of them: 32 numbers of 2 bytes


# ================================================================ ways to damage a folder

def change_bytes(change):
    def damage(folder):
        path = folder / SHARD
        path.write_bytes(change(path.read_bytes()))
    return damage


def change_header(change):
    """change(header) edits it in place, or returns another text."""
    def in_bytes(old):
        n = int.from_bytes(old[:8], 'little')
        header = json.loads(old[8:8 + n])
        text = change(header) or json.dumps(header)
        return len(text).to_bytes(8, 'little') + text.encode() + old[8 + n:]
    return change_bytes(in_bytes)


def change_norm(**fields):
    return change_header(lambda header: header[NORM].update(fields))


def only_norm(t):
    """A shard with no other tensor."""
    return lambda folder: write_safetensors(folder / SHARD, {NORM: t})


def remove(name):
    return lambda folder: (folder / name).unlink()


def far_larger(folder):
    path = folder / 'config.json'
    write_json(path, {**read_json(path), 'hidden_size': 2 ** 20})


def repoint(file):
    """The index says that a tensor is in another file."""
    return lambda folder: write_json(folder / INDEX, {'weight_map': {NORM: file}})


def pickled(folder):
    torch.save({'a': torch.zeros(9)}, folder / 'pytorch_model.bin')
    repoint('pytorch_model.bin')(folder)


DAMAGED = f'{SHARD}: damaged'
SECOND = ', "%s": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}' % NORM
CASES = {
    'header of 2^63 bytes': (change_bytes(lambda old: (2 ** 63).to_bytes(8, 'little') + old), DAMAGED),
    'trailing bytes': (change_bytes(lambda old: old + b'1234'), DAMAGED),
    'nested a hundred thousand deep': (change_header(lambda header: '[' * 100_000), DAMAGED),
    'a key twice': (change_header(lambda h: json.dumps(h)[:-1] + SECOND), DAMAGED),
    'hole': (change_norm(shape=[31], data_offsets=[END - 62, END]), DAMAGED),
    'overlap': (change_norm(data_offsets=[0, 64]), DAMAGED),
    'float offset': (change_norm(data_offsets=[END - 64.0, END]), DAMAGED),
    'negative shape': (change_norm(shape=[-4, -8]), DAMAGED),
    'wrong length': (change_norm(shape=[2 ** 40, 2 ** 40]), DAMAGED),
    'unknown dtype': (change_norm(dtype='F8_E4M3'), DAMAGED),
    'tensor missing': (only_norm(torch.zeros(32)), 'experts.0.w1.weight is missing'),
    'tensor too many': (change_header(lambda h: h.update({'a\nb': h.pop(NORM)})), r"'a\\nb' .* says none"),
    'integer weights': (only_norm(torch.zeros(32).long()), NORM),
    'a far larger model': (far_larger, 'has shape'),
    'no weights': (remove(INDEX), 'model.safetensors: No such file'),
    'shard missing': (remove(SHARD), f'{SHARD}: No such file'),
    'shard truncated': (lambda folder: os.truncate(folder / SHARD, 500), DAMAGED),
    'index points elsewhere': (repoint('../elsewhere.safetensors'), 'a file outside of this folder'),
    'index points to a pickle': (pickled, 'pytorch_model.bin: damaged'),
    'index points to no name': (repoint(1), f'{INDEX}: damaged'),
}


@pytest.fixture(scope='module', autouse=True)
def warm():
    load(GOLDEN)  # what torch imports at its first use is not the file's doing


@pytest.mark.parametrize('name', CASES)
def test_damage_is_refused(name, tmp_path):
    damage, says = CASES[name]
    folder = shutil.copytree(GOLDEN, tmp_path / 'model')
    damage(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError) as error:
        load(folder)
    line = str(error.value)
    assert '\n' not in line
    assert re.search(says, line)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 * 1024                    # kB: nothing huge was allocated
