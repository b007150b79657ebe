"""Random damage to the files that the program reads ends in one line, or the file is read all the same.

Damage to a JSON file is a value replaced by one of another type, a key removed, or the file cut; to a file of
tensors, bytes that are changed, or a cut. What is accepted of the hub's files must be as if the damaged value
were not there: nothing else may be made of it.
"""
import copy
import json
import random
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from allocator import Allocators
from base.frozen import is_there
from hub.checkpoint import base_digest, weight_files
from hub.config import read_config
from hub.files import InputError, read_json, write_json
from hub.tokenizer import Tokenizer
from run.state import load_state, save_state
from train import settings_of

GOLDEN = Path(__file__).parent / 'golden'
OTHERS = [
    None,
    True,
    0,
    -1,
    10 ** 30,
    1.5,
    float('nan'),
    '',
    'no such token',
    [],
    [True],
    ['a', 'b'],
    {},
    {'a': 1},
]
NUMBERS = int, float


def places(value):
    """(list or object, key) of every place in a JSON value; of long ones the first."""
    keys = []
    if isinstance(value, dict):
        keys = list(value)
    if isinstance(value, list):
        keys = range(len(value))
    for key in keys[:12]:
        yield value, key
        yield from places(value[key])


def damaged(value, rng):
    """(JSON with another value at a random place, JSON without this place)."""
    value = copy.deepcopy(value)
    holder, key = rng.choice(list(places(value)))
    old = type(holder[key])
    same = NUMBERS if old in NUMBERS else (old,)
    holder[key] = rng.choice([other for other in OTHERS if type(other) not in same])
    replaced = json.dumps(value)
    del holder[key]
    return replaced, json.dumps(value)


def attempt(path, content, read):
    """What is read when the file has this content; None where it is refused, in one line that names it."""
    path.write_bytes(content)
    try:
        return read(path.parent)
    except InputError as e:
        line = str(e)
        assert '\n' not in line
        assert path.name in line or str(path.parent) in line
        return None


def cuts(content):
    return [content[:end] for end in range(1, len(content), len(content) // 5 + 1)]


# ================================================================ JSON files

def tokens_of(folder):
    t = Tokenizer(folder)
    ids = t.encode('def größe(x):\n    return  x + 1  # one, two\n')
    return ids, t.prompt('a'), t.eos, t.stops, t.decode(ids)


def settings(folder):
    flags = Namespace(run=folder, ckpt='', device='cpu', stream=False)
    return settings_of(flags)


def recipe(folder):
    whole = read_json(folder / 'whole')
    return is_there(folder, whole)


@pytest.mark.parametrize('name, source, read, times', [
    ('tokenizer.json', 'tokenizer-qwen', tokens_of, 40),
    ('tokenizer_config.json', 'tokenizer-mixtral', tokens_of, 20),
    ('generation_config.json', 'tokenizer-mixtral', tokens_of, 10),
    ('config.json', 'qwen2_moe-1', read_config, 60),
    ('model.safetensors.index.json', 'mixtral-tied-sharded', weight_files, 20),
    ('results.json', '.', settings, 40),
    ('recipe.json', 'base', recipe, 40),
])
def test_damage_to_json_is_one_line_or_ignored(name, source, read, times, smoke, tmp_path):
    rng = random.Random(name)
    ours = read in (settings, recipe)
    path = tmp_path / 'case' / name
    shutil.copytree((smoke[0] if ours else GOLDEN) / source, path.parent)
    if name == 'tokenizer_config.json':
        bos = {'content': '<s>'}
        write_json(path, {'add_bos_token': True, 'bos_token': bos, 'eos_token': '</s>'})
    if name == 'generation_config.json':
        write_json(path, {'eos_token_id': [2, 3], 'bos_token_id': 1})
    whole = path.read_bytes()
    (path.parent / 'whole').write_bytes(whole)
    right = read(path.parent)
    for _ in range(times):
        replaced, without = damaged(json.loads(whole), rng)
        plain = attempt(path, without.encode(), read)
        found = attempt(path, replaced.encode(), read)
        assert ours or found in (None, right, plain)
    for cut in cuts(whole):
        assert attempt(path, cut, read) is None
    for other in (b'', b'[]', b'null', b'3', b'"x"', b'{"a": ' * 5000):
        assert attempt(path, other, read) is None


# ================================================================ tensors

@pytest.mark.parametrize('name', ['allocator.safetensors', 'state.pt'])
def test_damage_to_our_tensors_is_one_line_or_they_are_read(name, smoke, tmp_path):
    base = smoke[0] / 'base'
    config = read_config(base)
    digest = base_digest(base)
    path = tmp_path / name
    s = settings(smoke[0])
    allocators = Allocators.load(smoke[0] / 'allocator.safetensors', config, digest)
    optimizer = torch.optim.AdamW(allocators.parameters())
    parts = s, {'base_loss': 5.0}, allocators, optimizer, torch.Generator()
    if name == 'state.pt':
        save_state(path, *parts, [{'step': 1, 'price': 0.1}])
    else:
        allocators.save(path, digest)

    def read(folder):
        if name == 'state.pt':
            return load_state(path, *parts)
        return Allocators.load(path, config, digest)

    whole = path.read_bytes()
    rng = random.Random(name)
    assert read(tmp_path) is not None
    for _ in range(40):
        content = bytearray(whole)
        begin = rng.randrange(2000)                             # there is more to break in the first bytes
        content[begin:begin + 8] = rng.randbytes(8)
        attempt(path, content, read)
    for cut in cuts(whole):
        assert attempt(path, cut, read) is None
