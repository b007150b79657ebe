"""Random damage to every JSON file that the program reads: one line, or what the file still says.

Damage is a value replaced by one of another type, a key removed, or the file cut. What is accepted must be as
if the damaged value were not there: nothing else may be made of it.
"""
import copy
import json
import random
import shutil
from pathlib import Path

import pytest
import torch

import train
from allocator import Allocators
from base.frozen import is_there
from hub.checkpoint import weight_files
from hub.config import read_config
from hub.files import InputError
from hub.safetensors import read_safetensors, write_safetensors
from hub.tokenizer import Tokenizer
from run.state import load_state
from study.frontier import seconds_of
from study.published import read_rows
from study.study import check_facts

GOLDEN = Path(__file__).parent / 'golden'
OTHERS = [None, True, 0, -1, 10 ** 30, 1.5, float('nan'), '', 'no such token', [], [True], ['a', 'b'], {},
          {'a': 1}]
NUMBERS = int, float
TEXT = 'def größe(x):\n    return  x + 1  # one, two\n'


def places(value, path=()):
    """Every (path, value) in a JSON value, without most of a long list or object."""
    yield path, value
    if isinstance(value, (dict, list)):
        keys = list(value if isinstance(value, dict) else range(len(value)))
        for key in keys[:12] + keys[-2:]:
            yield from places(value[key], (*path, key))


def damaged(value, rng):
    """(the value damaged at a random place, the value without that place or None, what was done)."""
    path, old = rng.choice([place for place in places(value) if place[0]])
    whole, without = copy.deepcopy(value), copy.deepcopy(value)

    def parent(root):
        for key in path[:-1]:
            root = root[key]
        return root
    del parent(without)[path[-1]]
    if rng.random() < 0.3:
        return without, None, f'{path} removed'
    new = rng.choice([other for other in OTHERS if type(other) is not type(old)
                      and not (type(other) in NUMBERS and type(old) in NUMBERS)])
    parent(whole)[path[-1]] = new
    return whole, without, f'{path} = {new!r}'


# ---------------------------------------------------------------- what is read, and how

def tokens_of(folder):
    t = Tokenizer(folder)
    return t.encode(TEXT), t.prompt(TEXT), t.eos, t.stops, t.decode(t.encode(TEXT))


READERS = {
    'tokenizer.json': ('tokenizer-qwen', tokens_of, 60),
    'tokenizer_config.json': ('tokenizer-mixtral', tokens_of, 20),
    'generation_config.json': ('tokenizer-mixtral', tokens_of, 10),
    'config.json': ('qwen2_moe-1', read_config, 60), 'model.safetensors.index.json': (
        'mixtral-tied-sharded', weight_files, 20),
    'results.json': ('run', train.run_settings, 60),
    'recipe.json': ('base', lambda folder: is_there(folder, json.loads((folder / 'whole').read_text())), 20),
    'published.json': ('rows', lambda folder: read_rows(folder / 'published.json'), 20),
    'frontier.json': ('rows', lambda folder: seconds_of(folder / 'frontier.json'), 30),
    'study.json': ('rows', lambda folder: check_facts(folder / 'study.json', FACTS), 20)}
FACTS = {'base': 'abc', 'text': [9, 2, 3], 'seq': 64, 'lr': 0.1, 'paper': False, 'data': None}
FILES = {
    'frontier.json': {'rows': [{'method': 'a', 'delta': 0.1}], 'K': 2, 'seconds': 3.5}, 'study.json': FACTS,
    'tokenizer_config.json': {'add_bos_token': True, 'bos_token': {'content': '<s>'}, 'eos_token': '</s>'},
    'generation_config.json': {'eos_token_id': [2, 3], 'bos_token_id': 1},
    'published.json': {'rows': [{'what': 'a', 'steps': 1, 'tokens': 2, 'seconds': 3.0, 'delta': 0.1,
                                 'delta_se': 0.01, 'mean_k': 2.0}], 'K': 2, 'budget': 0.75}}


def folder_of(name, kind, smoke, tmp_path):
    folder = tmp_path / 'case'
    if kind in ('run', 'base'):
        shutil.copytree(smoke[0] if kind == 'run' else smoke[0] / 'base', folder)
        shutil.copy(smoke[0] / 'base/recipe.json', folder / 'whole')
    elif kind == 'rows':
        folder.mkdir()
    else:
        shutil.copytree(GOLDEN / kind, folder)
    if name in FILES:
        (folder / name).write_text(json.dumps(FILES[name]))
    return folder


@pytest.mark.parametrize('name', READERS)
def test_damage_is_one_line_or_as_if_the_value_were_not_there(name, smoke, tmp_path):
    kind, read, times = READERS[name]
    folder, rng = folder_of(name, kind, smoke, tmp_path), random.Random(name)
    path = folder / name
    whole, refused = json.loads(path.read_text()), 0
    right = [read(folder)]

    def attempt(text):
        nonlocal refused
        path.write_text(text)
        try:
            return read(folder)
        except InputError as e:
            refused += 1
            assert '\n' not in str(e) and (path.name in str(e) or str(folder) in str(e)), e
    for _ in range(times):
        value, without, what = damaged(whole, rng)
        found = attempt(json.dumps(value))
        if found is not None and without is not None:
            assert found in [*right, attempt(json.dumps(without))], what
    for _ in range(5):
        text = json.dumps(whole)
        assert attempt(text[:rng.randrange(1, len(text) - 1)]) is None
    for text in ('', '[]', 'null', '3', '"x"', '{"a": ' * 5000):
        attempt(text)
    assert refused >= 8


@pytest.mark.parametrize('name', ['allocator.safetensors', 'state.safetensors'])
def test_damage_to_the_notes_and_numbers_of_our_tensors(name, smoke, tmp_path):
    c, rng = read_config(smoke[0] / 'base'), random.Random(name)
    tensors, metadata = read_safetensors(smoke[0] / 'allocator.safetensors')
    tensors = {n: t.clone() for n, t in tensors.items()}
    s, note = train.Settings(preset='smoke', ppo_steps=5), 'allocators'
    if name.startswith('state'):
        from run.state import in_state
        note, log = 'state', [{'step': 1, 'price': 0.1}]
        metadata = {note: json.dumps({'settings': in_state(s), 'log': log, 'base_loss': 5.0})}
        tensors = {f'allocators.{n}': t for n, t in tensors.items()}
        tensors['generator'] = torch.Generator().get_state()
    whole, path, refused = json.loads(metadata[note]), tmp_path / name, 0

    def attempt(tensors, values):
        nonlocal refused
        write_safetensors(path, tensors, {note: values if isinstance(values, str) else json.dumps(values)})
        allocators = Allocators(c, 8, True)
        try:
            if note == 'state':
                optimizer = torch.optim.AdamW(allocators.parameters())
                load_state(path, s, {'base_loss': 5.0}, allocators, optimizer, torch.Generator())
            else:
                allocators = Allocators.load(path, c)
            assert all(t.isfinite().all() for t in allocators.state_dict().values())
        except InputError as e:
            refused += 1
            assert '\n' not in str(e) and name in str(e)
    attempt(tensors, whole)
    assert refused == 0
    for _ in range(30):
        attempt(tensors, damaged(whole, rng)[0])
    for text in ('', '[]', '3', '{'):
        attempt(tensors, text)
    seen = refused
    for n, t in tensors.items():
        if t.is_floating_point():
            for bad in (float('nan'), float('inf')):
                attempt({**tensors, n: torch.full_like(t, bad)}, whole)
        attempt({**tensors, n: t.reshape(-1)[:0]}, whole)
        attempt({m: u for m, u in tensors.items() if m != n}, whole)
    assert refused - seen >= 3 * len(tensors) and seen > 10
