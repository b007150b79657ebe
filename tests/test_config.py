"""config.json, the dtype of weights, tied heads, the Hugging Face cache: read as their makers mean them."""
import os
import shutil
from pathlib import Path

import pytest
import torch

from hub.checkpoint import find_checkpoint, load, weight_dtype
from hub.config import from_hf, read_config
from hub.files import InputError, read_json, write_json
from hub.safetensors import read_safetensors, write_safetensors

GOLDEN = Path(__file__).parent / 'golden'


def changed(name, *left_out, **fields):
    """The config.json of a golden model with fields changed and others left out."""
    hf = {**read_json(GOLDEN / name / 'config.json'), **fields}
    return {key: value for key, value in hf.items() if key not in left_out}


def copy_of(name, folder, **fields):
    shutil.copytree(GOLDEN / name, folder)
    write_json(folder / 'config.json', changed(name, **fields))
    return folder


@pytest.mark.parametrize('name, theta, eps', [
    ('mixtral-1', 1e6, 1e-5), ('qwen2_moe-1', 1e4, 1e-6), ('qwen3_moe-1', 1e4, 1e-6), ('olmoe-1', 1e4, 1e-5),
    ('deepseek-1', 1e4, 1e-6)])
def test_what_is_missing_or_null_is_the_familys_own_default(name, theta, eps):
    missing = from_hf(changed(name, 'rope_parameters', 'rope_theta', 'rope_scaling', 'rms_norm_eps'))
    assert (missing.rope_theta, missing.norm_eps) == (theta, eps)
    null = from_hf(changed(name, 'rope_parameters', rope_theta=None, rope_scaling=None, rms_norm_eps=None))
    assert null == missing


@pytest.mark.parametrize('fields', [
    dict(rope_scaling={'rope_type': 'default'}), dict(rope_scaling={'type': 'default'}),
    dict(rope_scaling={'type': 'linear', 'factor': 1.0}), dict(sliding_window=None), dict(hidden_act='swish'),
    dict(attention_bias=False), dict(clip_qkv=None), dict(quantization_config=None),
    dict(head_dim=None), dict(eos_token_id=[2, 3]), dict(routed_scaling_factor=1.0)])
def test_what_changes_nothing_is_accepted(fields):
    assert from_hf(changed('mixtral-1', **fields)) == from_hf(changed('mixtral-1'))


def test_a_window_is_the_longest_sequence():
    assert from_hf(changed('mixtral-1', sliding_window=16)).max_len == 16
    assert from_hf(changed('mixtral-1', sliding_window=10 ** 6)).max_len == 64
    assert from_hf(changed('qwen2_moe-1', sliding_window=16, use_sliding_window=False)).max_len == 64
    assert from_hf(changed('qwen2_moe-1', sliding_window=16, use_sliding_window=True)).max_len == 16


def test_eos_that_is_an_empty_list_is_none():
    assert from_hf(changed('mixtral-1', eos_token_id=[])).eos is None


@pytest.mark.parametrize('field, value', [
    ('rms_norm_eps', '1e-5'), ('bos_token_id', 1.5), ('eos_token_id', [2, 'x']), ('rope_theta', 0),
    ('rope_theta', float('inf')), ('hidden_size', 32.0), ('vocab_size', True), ('head_dim', -8),
    ('tie_word_embeddings', 'false'), ('num_key_value_heads', 3), ('max_position_embeddings', 0),
    ('rope_parameters', []), ('rope_parameters', {'rope_theta': 'big'}), ('sliding_window', 'long'),
    ('model_type', None), ('model_type', ['mixtral']), ('num_local_experts', None), ('hidden_act', 'gelu'),
    ('quantization_config', {'bits': 4}), ('clip_qkv', 8.0), ('attention_bias', True), ('mlp_bias', True)])
def test_what_makes_no_sense_is_one_line_that_names_it(field, value, tmp_path):
    write_json(tmp_path / 'config.json', changed('mixtral-1', 'num_experts', **{field: value}))
    with pytest.raises(InputError) as error:
        read_config(tmp_path)
    named = {'num_key_value_heads': 'key and value heads', 'rope_parameters': 'rope_'}
    named = named.get(field, field[:-1])
    assert named in str(error.value) and 'config.json' in str(error.value) and '\n' not in str(error.value)


# ---------------------------------------------------------------- weights

@pytest.mark.parametrize('says', ['float32', 'torch.bfloat16', 'auto', None, 'bfloat16'])
def test_the_dtype_is_that_of_the_weights_whatever_the_config_says(says, tmp_path):
    folder = copy_of('mixtral-1', tmp_path / 'm', torch_dtype=says, dtype=says)
    assert weight_dtype(folder) == torch.bfloat16


@pytest.mark.parametrize('dtype, read_as', [
    (torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float64, torch.float32)])
def test_other_dtypes_and_a_few_wider_tensors(dtype, read_as, tmp_path):
    folder = copy_of('mixtral-1', tmp_path / 'm')
    tensors, _ = read_safetensors(folder / 'model.safetensors')
    tensors = {n: t.to(torch.float32 if 'norm' in n else dtype) for n, t in tensors.items()}
    write_safetensors(folder / 'model.safetensors', tensors)
    assert weight_dtype(folder) == read_as


def test_before_the_weights_are_there_the_config_says_the_dtype(tmp_path):
    names = {'torch.bfloat16': torch.bfloat16, 'float16': torch.float16, None: torch.float32}
    for says, dtype in names.items():
        write_json(tmp_path / 'config.json', changed('mixtral-1', 'dtype', torch_dtype=says))
        assert weight_dtype(tmp_path) == dtype


@pytest.mark.parametrize('same', [True, False])
def test_a_tied_head_in_the_file_must_be_the_embedding(same, tmp_path):
    folder = copy_of('qwen3_moe-tied', tmp_path / 'm')
    tensors, _ = read_safetensors(folder / 'model.safetensors')
    head = tensors['model.embed_tokens.weight'].clone()
    write_safetensors(folder / 'model.safetensors', {**tensors, 'lm_head.weight': head if same else head + 1})
    if same:
        tokens = torch.arange(8)[None]
        assert torch.equal(load(folder)(tokens), load(GOLDEN / 'qwen3_moe-tied')(tokens))
    else:
        with pytest.raises(InputError, match='ties lm_head'):
            load(folder)


# ---------------------------------------------------------------- the cache

def snapshot(cache, name, age, complete):
    folder = cache / 'models--mistralai--Mixtral-8x7B-v0.1/snapshots' / name
    if complete:
        shutil.copytree(GOLDEN / 'mixtral-1', folder)
    else:                                                      # what `hf download X config.json` leaves
        folder.mkdir(parents=True)
        shutil.copy(GOLDEN / 'mixtral-1/config.json', folder)
    os.utime(folder / 'config.json', (10 ** 9 - age, 10 ** 9 - age))
    return folder


def test_the_snapshot_of_refs_main_then_the_newest_complete_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path))
    config_only = snapshot(tmp_path, 'c', 0, complete=False)
    assert find_checkpoint('mixtral-8x7b') == config_only      # its error then names the missing weights
    old, new = snapshot(tmp_path, 'a', 20, True), snapshot(tmp_path, 'b', 10, True)
    assert find_checkpoint('mixtral-8x7b') == new
    refs = tmp_path / 'models--mistralai--Mixtral-8x7B-v0.1/refs'
    refs.mkdir()
    (refs / 'main').write_text('a\n')
    assert find_checkpoint('mixtral-8x7b') == old == find_checkpoint('mixtral-8x7b', config_only=True)
    (refs / 'main').write_text('c')
    assert find_checkpoint('mixtral-8x7b') == new
    here = tmp_path / 'checkpoints/mixtral-8x7b'
    here.mkdir(parents=True)
    shutil.copy(GOLDEN / 'mixtral-1/config.json', here)
    assert find_checkpoint('mixtral-8x7b') == new              # a config alone does not hide the weights


@pytest.mark.parametrize('variables', [
    {'HF_HUB_CACHE': '$PLACE/hub'}, {'HF_HOME': '~/cache'}, {'HF_HOME': '${PLACE}/cache'},
    {'HUGGINGFACE_HUB_CACHE': '~/old'}, {'XDG_CACHE_HOME': '~/xdg'}, {}])
def test_the_cache_is_where_huggingface_hub_looks(variables, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('HF_HUB_CACHE', 'HF_HOME', 'HUGGINGFACE_HUB_CACHE', 'XDG_CACHE_HOME'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('PLACE', str(tmp_path / 'place'))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    place = {'HF_HUB_CACHE': 'place/hub', 'HUGGINGFACE_HUB_CACHE': 'home/old',
             'XDG_CACHE_HOME': 'home/xdg/huggingface/hub'}
    expected = {'~/cache': 'home/cache/hub', '${PLACE}/cache': 'place/cache/hub'}.get(
        variables.get('HF_HOME'), place.get(next(iter(variables), ''), 'home/.cache/huggingface/hub'))
    folder = snapshot(tmp_path / expected, 'a', 0, True)
    assert find_checkpoint('mixtral-8x7b').resolve() == folder


def test_no_home_folder_is_no_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('HOME', 'HF_HOME', 'HF_HUB_CACHE'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, 'getuid', lambda: 10 ** 6)
    with pytest.raises(InputError, match='neither in'):
        find_checkpoint('mixtral-8x7b')
