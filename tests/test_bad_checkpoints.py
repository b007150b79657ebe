"""Damaged, malicious, unsupported checkpoints: each is refused with one line that names file or tensor."""
import json
import os
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch

from hub.checkpoint import load
from hub.files import InputError, read_json, write_json
from hub.safetensors import read_safetensors, write_safetensors

GOLDEN = Path(__file__).parent / 'golden'
NORM = 'model.norm.weight'
EXPERT = 'model.layers.1.block_sparse_moe.experts.3.w2.weight'


# ================================================================ ways to damage a folder

def change_bytes(change):
    def damage(folder):
        path = folder / 'model.safetensors'
        path.write_bytes(change(path.read_bytes()))
    return damage


def change_length(n):
    return change_bytes(lambda old: n.to_bytes(8, 'little') + old[8:])


def change_header(change):
    """change(header) edits it in place, or returns the bytes of another."""
    def in_bytes(old):
        n = int.from_bytes(old[:8], 'little')
        header = json.loads(old[8:8 + n])
        raw = change(header)
        if not isinstance(raw, bytes):
            raw = json.dumps(header).encode()
        return len(raw).to_bytes(8, 'little') + raw + old[8 + n:]
    return change_bytes(in_bytes)


def change_norm(**fields):
    return change_header(lambda header: header[NORM].update(fields))


def other_tensor(name, t):
    """Another tensor of this name in the file; None takes it out."""
    def damage(folder):
        path = folder / 'model.safetensors'
        tensors, _ = read_safetensors(path)
        tensors[name] = t
        if t is None:
            del tensors[name]
        write_safetensors(path, tensors)
    return damage


def change_config(**fields):
    def damage(folder):
        path = folder / 'config.json'
        write_json(path, {**read_json(path), **fields})
    return damage


def write_text(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(name):
    return lambda folder: (folder / name).unlink()


def key_twice(header):
    again = json.dumps({NORM: header[NORM]})
    raw = json.dumps(header)[:-1] + ',' + again[1:]
    return raw.encode()


def beyond_the_end(header):
    end = max(t['data_offsets'][1] for name, t in header.items() if name != '__metadata__')
    n = 10 ** 15
    header['x'] = {'dtype': 'U8', 'shape': [n], 'data_offsets': [end, end + n]}


HEADERS = {
    'empty file': change_bytes(lambda d: b''),
    'header beyond the file': change_length(10 ** 6),
    'header of 2^63 bytes': change_length(2 ** 63),
    'trailing bytes': change_bytes(lambda d: d + b'1234'),
    'truncated': change_bytes(lambda d: d[:-100]),
    'header is not JSON': change_header(lambda h: b'{not json'),
    'header nested a hundred thousand deep': change_header(lambda h: b'[' * 100_000),
    'a key twice': change_header(key_twice),
    'hole': change_header(lambda h: h.pop(EXPERT)),
    'offsets past the end': change_header(beyond_the_end),
    'missing field': change_header(lambda h: h[NORM].pop('dtype')),
    'unknown dtype': change_norm(dtype='F7'),
    'overlap': change_norm(data_offsets=[0, 64]),
    'negative offset': change_norm(data_offsets=[-64, 0]),
    'float offset': change_norm(data_offsets=[0.0, 64.0]),
    'negative shape': change_norm(shape=[-32]),
    'shape that overflows': change_norm(shape=[2 ** 40, 2 ** 40]),
    'wrong length': change_norm(shape=[33]),
}
CONTENTS = {
    'tensor missing': (other_tensor(NORM, None), f'{NORM} is missing'),
    'expert missing': (other_tensor(EXPERT, None), f'{EXPERT} is missing'),
    'tensor too many': (other_tensor('a\nb', torch.zeros(2)), r"'a\\nb' has shape .* says none"),
    'wrong shape': (other_tensor(NORM, torch.zeros(8, 4)), NORM),
    'integer weights': (other_tensor(NORM, torch.zeros(32).byte()), NORM),
    'float8 weights': (change_norm(dtype='F8_E4M3'), 'F8_E4M3'),
    'no config': (remove('config.json'), 'config.json: No such file'),
    'config is not JSON': (write_text('config.json', '{'), 'config.json'),
    'config is a list': (write_text('config.json', '[]'), 'config.json'),
    'unknown model_type': (change_config(model_type='gpt9'), 'gpt9'),
    'field missing': (change_config(vocab_size=None), 'vocab_size'),
    'too many experts a token': (change_config(num_experts_per_tok=9), 'do not go together.*top_k=9'),
    'a far larger model': (change_config(hidden_size=2 ** 20, intermediate_size=2 ** 20), 'shape'),
    'a billion layers': (change_config(num_hidden_layers=10 ** 9), 'num_hidden_layers'),
    'no weights': (remove('model.safetensors'), 'no model.safetensors.*pickle'),
}


@pytest.fixture(scope='module', autouse=True)
def warm():
    load(GOLDEN / 'mixtral-1')  # what torch imports at its first use is not the file's doing


def refused(damage, tmp_path, golden='mixtral-1'):
    """The line that refuses a damaged copy of a model."""
    folder = tmp_path / 'model'
    shutil.copytree(GOLDEN / golden, folder)
    damage(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError) as error:
        load(folder)
    line = str(error.value)
    assert '\n' not in line
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 * 1024                    # kB: nothing huge was allocated
    return line


@pytest.mark.parametrize('name', HEADERS)
def test_damaged_headers_are_refused(name, tmp_path):
    line = refused(HEADERS[name], tmp_path)
    assert 'model.safetensors: damaged' in line


@pytest.mark.parametrize('name', CONTENTS)
def test_other_contents_are_refused(name, tmp_path):
    damage, says = CONTENTS[name]
    line = refused(damage, tmp_path)
    assert re.search(says, line)


# ================================================================ shards

def repoint(file):
    """The index says that a tensor is in another file."""
    def damage(folder):
        path = folder / 'model.safetensors.index.json'
        places = read_json(path)['weight_map']
        write_json(path, {'weight_map': {**places, NORM: file}})
    return damage


SHARD = 'model-00002-of-00002.safetensors'
SHARD_DAMAGES = {
    'shard missing': (remove(SHARD), f'{SHARD}: No such file'),
    'shard truncated': (lambda folder: os.truncate(folder / SHARD, 500), SHARD),
    'index points outside': (repoint('../elsewhere.safetensors'), 'elsewhere'),
    'index points to an absolute path': (repoint('/etc/passwd'), 'passwd'),
    'index points to a pickle': (repoint('pytorch_model.bin'), 'pytorch_model.bin'),
    'index without places': (write_text('model.safetensors.index.json', '{}'), 'index.json'),
    'index with numbers': (repoint(3), 'index.json'),
}


@pytest.mark.parametrize('name', SHARD_DAMAGES)
def test_damaged_shards_are_refused(name, tmp_path):
    damage, says = SHARD_DAMAGES[name]
    line = refused(damage, tmp_path, 'mixtral-tied-sharded')
    assert says in line
