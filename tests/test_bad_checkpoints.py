"""Damaged, malicious, unsupported checkpoints: each is refused with one line that names file or tensor."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch

from hub.checkpoint import find_checkpoint, load
from hub.files import InputError, read_json, write_json
from hub.safetensors import read_safetensors, write_safetensors
from hub.tokenizer import Tokenizer
from base.frozen import check_forward

GOLDEN = Path(__file__).parent / 'golden'
NORM = 'model.norm.weight'


def header(path):
    data = path.read_bytes()
    n = int.from_bytes(data[:8], 'little')
    return json.loads(data[8:8 + n]), data[8 + n:]


def put(path, head, data, length=None):
    raw = head if isinstance(head, bytes) else json.dumps(head).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, 'little') + raw + data)


def change_header(change):
    """A damage of model.safetensors: change(header) edits it in place or returns another."""
    def damage(folder):
        path = folder / 'model.safetensors'
        head, data = header(path)
        put(path, change(head) or head, data)
    return damage


def change_tensors(change):
    def damage(folder):
        path = folder / 'model.safetensors'
        tensors = {name: t.clone() for name, t in read_safetensors(path)[0].items()}
        change(tensors)
        write_safetensors(path, tensors)
    return damage


def change_bytes(change):
    def damage(folder):
        path = folder / 'model.safetensors'
        path.write_bytes(change(path.read_bytes()))
    return damage


def change_config(**fields):
    return lambda folder: write_json(folder / 'config.json', {**read_json(folder / 'config.json'), **fields})


def offsets(head, a, b):
    head[NORM]['data_offsets'] = [a, b]


def last(head):
    return max((n for n in head if n != '__metadata__'), key=lambda n: head[n]['data_offsets'][1])


def duplicate_key(head):
    raw = json.dumps(head)
    return (raw[:-1] + f', "{NORM}": ' + json.dumps(head[NORM]) + '}').encode()


DAMAGES = {
    'empty file': (change_bytes(lambda d: b''), 'header'),
    'shorter than the length field': (change_bytes(lambda d: d[:5]), 'header'),
    'header length beyond the file': (
        change_bytes(lambda d: (10**6).to_bytes(8, 'little') + d[8:]),
        'header',
    ),
    'header length of 2^63': (change_bytes(lambda d: (2**63).to_bytes(8, 'little') + d[8:]), 'header'),
    'header is not JSON': (change_header(lambda h: b'{not json'), 'header'),
    'header is not UTF-8': (change_header(lambda h: b'\xff\xfe{}'), 'header'),
    'header is a list': (change_header(lambda h: b'[1, 2]'), 'header'),
    'header is nested a hundred thousand deep': (change_header(lambda h: b'[' * 100_000), 'header'),
    'a key twice': (change_header(duplicate_key), 'twice'),
    'overlap': (change_header(lambda h: offsets(h, 0, 64)), 'follow'),
    'hole': (
        change_header(
            lambda h: (
                h.pop(min((n for n in h if n != '__metadata__'), key=lambda n: h[n]['data_offsets'])) and None
            )
        ),
        'follow',
    ),
    'end before begin': (change_header(lambda h: offsets(h, 64, 0)), 'follow|header'),
    'negative offset': (change_header(lambda h: offsets(h, -64, 0)), 'follow'),
    'float offset': (change_header(lambda h: offsets(h, 0.0, 64.0)), 'follow'),
    'offsets that are no list': (change_header(lambda h: h[NORM].update(data_offsets=7)), 'header'),
    'negative shape': (change_header(lambda h: h[NORM].update(shape=[-32])), 'follow'),
    'shape that overflows': (change_header(lambda h: h[NORM].update(shape=[2**40, 2**40])), 'follow'),
    'wrong length': (change_header(lambda h: h[NORM].update(shape=[33])), 'follow'),
    'unknown dtype': (change_header(lambda h: h[NORM].update(dtype='F7')), 'F7'),
    'missing field': (change_header(lambda h: h[NORM].pop('dtype') and None), 'header'),
    'offsets past the end': (
        change_header(
            lambda h: h.update(
                {
                    last(h) + 'x': {
                        'dtype': 'U8',
                        'shape': [10**15],
                        'data_offsets': [
                            h[last(h)]['data_offsets'][1],
                            h[last(h)]['data_offsets'][1] + 10**15,
                        ],
                    }
                }
            )
        ),
        'bytes',
    ),
    'trailing bytes': (change_bytes(lambda d: d + b'1234'), 'bytes'),
    'truncated': (change_bytes(lambda d: d[:-100]), 'bytes'),
    'tensor missing': (change_tensors(lambda t: t.pop(NORM)), f'{NORM} is missing'),
    'expert missing': (
        change_tensors(lambda t: t.pop('model.layers.1.block_sparse_moe.experts.3.w2.weight')),
        'experts.3.w2',
    ),
    'tensor too many': (change_tensors(lambda t: t.update(extra=torch.zeros(2))), 'extra is not expected'),
    'wrong shape': (change_tensors(lambda t: t.update({NORM: torch.zeros(8, 4)})), NORM),
    'integer weights': (change_tensors(lambda t: t.update({NORM: torch.zeros(32, dtype=torch.int8)})), NORM),
    'float8 weights': (
        change_tensors(lambda t: t.update({NORM: torch.zeros(32).to(torch.float8_e4m3fn)})),
        NORM,
    ),
    'no config': (lambda f: (f / 'config.json').unlink(), 'config.json'),
    'config is not JSON': (lambda f: (f / 'config.json').write_text('{'), 'config.json'),
    'config is a list': (lambda f: (f / 'config.json').write_text('[]'), 'config.json'),
    'unknown model_type': (change_config(model_type='gpt9'), 'gpt9'),
    'quantised': (change_config(quantization_config={'bits': 4}), 'quantization_config'),
    'rope scaling': (
        change_config(rope_parameters={'rope_type': 'yarn', 'factor': 4, 'rope_theta': 1e4}),
        'rope_parameters',
    ),
    'old rope scaling': (change_config(rope_scaling={'type': 'linear', 'factor': 2}), 'rope_scaling'),
    'another activation': (change_config(hidden_act='gelu'), 'gelu'),
    'field missing': (
        lambda f: write_json(
            f / 'config.json', {k: v for k, v in read_json(f / 'config.json').items() if k != 'vocab_size'}
        ),
        'vocab_size',
    ),
    'field of another kind': (change_config(num_hidden_layers='two'), 'config.json'),
    'no layers': (change_config(num_hidden_layers=0), 'n_layers'),
    'more experts a token than there are': (change_config(num_experts_per_tok=9), 'num_experts_per_tok'),
    'config of a model a million times larger': (
        change_config(hidden_size=32_000, vocab_size=10**9),
        'shape',
    ),
    'a billion layers': (change_config(num_hidden_layers=10**9), 'num_hidden_layers'),
    'pickle only': (lambda f: (f / 'model.safetensors').rename(f / 'pytorch_model.bin'), 'pickle'),
    'no weights': (lambda f: (f / 'model.safetensors').unlink(), 'no model.safetensors'),
}


@pytest.fixture(scope='module', autouse=True)
def warm():
    load(GOLDEN / 'mixtral-1')  # what torch imports at its first use is not the file's doing


@pytest.mark.parametrize('name', DAMAGES)
def test_damaged_checkpoint_is_refused(name, tmp_path):
    damage, says = DAMAGES[name]
    folder = tmp_path / 'model'
    shutil.copytree(GOLDEN / 'mixtral-1', folder)
    damage(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=says) as error:
        load(folder)
    assert '\n' not in str(error.value)
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024
    )  # kB: nothing huge was allocated


def shards(folder):
    index = folder / 'model.safetensors.index.json'
    return index, read_json(index)['weight_map']


def repoint(target):
    def damage(folder):
        index, places = shards(folder)
        write_json(index, {'weight_map': {**places, NORM: target}})
    return damage


SHARD_DAMAGES = {
    'shard missing': (lambda f: (f / shards(f)[1][NORM]).unlink(), 'missing, though the index'),
    'shard truncated': (lambda f: os.truncate(f / shards(f)[1][NORM], 500), 'model-0'),
    'index points outside': (repoint('../elsewhere.safetensors'), NORM),
    'index points to an absolute path': (repoint('/etc/passwd'), NORM),
    'index points to a pickle': (repoint('pytorch_model.bin'), NORM),
    'index points to another shard': (
        lambda f: repoint(min(set(shards(f)[1].values()) - {shards(f)[1][NORM]}))(f),
        'model-0',
    ),
    'index is a list': (lambda f: write_json(shards(f)[0], [1]), 'weight_map'),
    'index without places': (lambda f: write_json(shards(f)[0], {'weight_map': {}}), 'weight_map'),
    'index with numbers': (lambda f: write_json(shards(f)[0], {'weight_map': {NORM: 3}}), 'weight_map'),
}


@pytest.mark.parametrize('name', SHARD_DAMAGES)
def test_damaged_shards_are_refused(name, tmp_path):
    damage, says = SHARD_DAMAGES[name]
    folder = tmp_path / 'model'
    shutil.copytree(GOLDEN / 'mixtral-tied-sharded', folder)
    damage(folder)
    with pytest.raises(InputError, match=says):
        load(folder)


@pytest.mark.parametrize(
    'content',
    [
        None,
        '{',
        '[]',
        '{}',
        '{"model": {"vocab": {"a": 0}, "merges": [], "type": "Unigram"}}',
        '{"model": {"vocab": {"a": 0}, "merges": [["a", "b"]]}, "pre_tokenizer": {"type": "ByteLevel"}}',
    ],
)
def test_damaged_tokenizer_is_refused(content, tmp_path):
    write_json(tmp_path / 'config.json', {})
    if content is not None:
        (tmp_path / 'tokenizer.json').write_text(content)
    with pytest.raises(InputError, match='tokenizer.json'):
        Tokenizer(tmp_path)


def test_nan_in_a_weight_is_found_at_the_first_forward_by_name(tmp_path):
    shutil.copytree(GOLDEN / 'mixtral-1', tmp_path / 'model')
    name = 'model.layers.1.block_sparse_moe.experts.2.w3.weight'
    change_tensors(lambda t: t[name].view(-1)[5:].fill_(float('nan')))(tmp_path / 'model')
    model = load(tmp_path / 'model')
    with pytest.raises(InputError, match=name):
        check_forward(model, torch.randint(32, (1, 60)))


# ---------------------------------------------------------------- where checkpoints are looked for

def test_short_names_are_looked_up_here_then_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path / 'cache'))
    with pytest.raises(InputError, match='93 GB.*hf download mistralai/Mixtral-8x7B-v0.1'):
        find_checkpoint('mixtral-8x7b')
    snapshots = tmp_path / 'cache/models--mistralai--Mixtral-8x7B-v0.1/snapshots'
    for age, name in ((200, 'old'), (100, 'new')):
        (snapshots / name).mkdir(parents=True)
        (snapshots / name / 'config.json').write_text('{}')
        os.utime(snapshots / name / 'config.json', (10 ** 9 - age, 10 ** 9 - age))
    assert find_checkpoint('mixtral-8x7b') == snapshots / 'new'
    monkeypatch.delenv('HF_HUB_CACHE')
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'home'))
    (tmp_path / 'cache').rename(tmp_path / 'hub')
    (tmp_path / 'home').mkdir()
    (tmp_path / 'hub').rename(tmp_path / 'home/hub')
    assert find_checkpoint('mixtral-8x7b').name == 'new'
    (tmp_path / 'checkpoints/mixtral-8x7b').mkdir(parents=True)
    (tmp_path / 'checkpoints/mixtral-8x7b/config.json').write_text('{}')
    assert find_checkpoint('mixtral-8x7b') == Path('checkpoints/mixtral-8x7b')
    with pytest.raises(InputError, match='not one of'):
        find_checkpoint('gpt-9')
