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

import pytest

from base.frozen import is_there
from conftest import GOLDEN
from hub.checkpoint import read_layout
from hub.config import read_config
from hub.files import InputError, read_json, write_json
from hub.tokenizer import Tokenizer
from run.state import in_state, load_state, save_state
from test_resume import parts
from train import Settings, settings_of

NUMBERS = int, float
OTHERS = [None, True, 0, -1, 10 ** 30, 1.5, float('nan'), '', 'no such token', [], ['a', 'b'], {}, {'a': 1}]


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


def tensor_names(folder):
    return read_layout(folder).keys()


def settings(folder):
    return settings_of(Namespace(run=folder, ckpt='', device='cpu', stream=False))


def recipe(folder):
    return is_there(folder, read_json(folder / 'whole'))


@pytest.mark.parametrize('name, source, read', [
    ('tokenizer.json', 'tokenizer-qwen', tokens_of),
    ('tokenizer_config.json', 'tokenizer-mixtral', tokens_of),
    ('config.json', 'qwen2_moe-1', read_config),
    ('model.safetensors.index.json', 'mixtral-tied-sharded', tensor_names),
    ('results.json', '.', settings),
    ('recipe.json', 'base', recipe),
])
def test_damage_to_json_is_one_line_or_ignored(name, source, read, smoke, tmp_path):
    rng = random.Random(name)
    ours = read in (settings, recipe)
    folder = shutil.copytree((smoke[0] if ours else GOLDEN) / source, tmp_path / 'case')
    path = folder / name
    if name == 'tokenizer_config.json':
        write_json(path, {'add_bos_token': True, 'bos_token': {'content': '<s>'}, 'eos_token': '</s>'})
    whole = path.read_bytes()
    (folder / 'whole').write_bytes(whole)
    right = read(folder)
    for _ in range(40):
        replaced, without = damaged(json.loads(whole), rng)
        plain = attempt(path, without.encode(), read)
        found = attempt(path, replaced.encode(), read)
        assert ours or found in (None, right, plain)
    for broken in (*cuts(whole), b'', b'[]', b'null', b'"x"', b'{"a": ' * 5000):
        assert attempt(path, broken, read) is None


# ================================================================ the state of a run

def test_damage_to_a_state_is_one_line_or_it_is_read(tmp_path):
    path = tmp_path / 'state.pt'
    state = path, {**in_state(Settings()), 'base': 'a'}, *parts()
    save_state(*state, [{'step': 1, 'price': 0.1}])

    def read(folder):
        return load_state(*state)
    whole = path.read_bytes()
    assert read(tmp_path)
    rng = random.Random(0)
    for _ in range(40):
        content = bytearray(whole)
        begin = rng.randrange(2000)                            # there is more to break in the first bytes
        content[begin:begin + 8] = rng.randbytes(8)
        attempt(path, content, read)
    for cut in cuts(whole):
        assert attempt(path, cut, read) is None
