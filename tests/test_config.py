"""config.json, the dtype of weights, tied heads, which base it is, and where a checkpoint is."""
import shutil
import sys
from pathlib import Path

import pytest
import torch

from conftest import random_model, tiny_config
from hub.checkpoint import base_digest, find_checkpoint, load, save, weight_dtype
from hub.config import from_hf, read_config, to_hf
from hub.files import InputError, read_json, write_json
from hub.safetensors import read_safetensors, write_safetensors

GOLDEN = Path(__file__).parent / 'golden'


def changed(name, *left_out, **fields):
    """The config.json of a golden model with fields changed and others left out."""
    hf = {**read_json(GOLDEN / name / 'config.json'), **fields}
    return {key: value for key, value in hf.items() if key not in left_out}


@pytest.mark.parametrize('name, theta, eps', [
    ('mixtral-1', 1e6, 1e-5),
    ('qwen2_moe-1', 1e4, 1e-6),
    ('qwen3_moe-1', 1e4, 1e-6),
    ('olmoe-1', 1e4, 1e-5),
    ('deepseek-1', 1e4, 1e-6),
])
def test_what_is_missing_or_null_is_the_familys_own_default(name, theta, eps):
    missing = from_hf(changed(name, 'rope_parameters', 'rope_theta', 'rope_scaling', 'rms_norm_eps'))
    assert (missing.rope_theta, missing.norm_eps) == (theta, eps)
    null = from_hf(changed(name, 'rope_parameters', rope_theta=None, rope_scaling=None, rms_norm_eps=None))
    assert null == missing


@pytest.mark.parametrize('field, value', [
    ('rope_scaling', {'rope_type': 'default'}),
    ('rope_scaling', {'type': 'default'}),
    ('sliding_window', None),
    ('hidden_act', 'swish'),
    ('attention_bias', False),
    ('clip_qkv', None),
    ('quantization_config', None),
    ('head_dim', None),
    ('routed_scaling_factor', 1.0),
])
def test_what_changes_nothing_is_accepted(field, value):
    assert from_hf(changed('mixtral-1', **{field: value})) == from_hf(changed('mixtral-1'))


@pytest.mark.parametrize('name, window, uses, longest', [
    ('mixtral-1', 16, None, 16),
    ('mixtral-1', 10 ** 6, None, 64),
    ('qwen2_moe-1', 16, False, 64),
    ('qwen2_moe-1', 16, True, 16),
])
def test_a_window_is_the_longest_sequence(name, window, uses, longest):
    assert from_hf(changed(name, sliding_window=window, use_sliding_window=uses)).max_len == longest


def test_what_we_write_is_what_we_read():
    config = tiny_config(tie=True)
    assert from_hf(to_hf(config)) == config


@pytest.mark.parametrize('field, value', [
    ('rms_norm_eps', '1e-5'),
    ('rms_norm_eps', float('nan')),
    ('hidden_size', 32.0),
    ('vocab_size', True),
    ('vocab_size', 10 ** 30),
    ('num_local_experts', 10 ** 6),
    ('num_local_experts', '8'),
    ('head_dim', 7),
    ('tie_word_embeddings', 'false'),
    ('num_key_value_heads', 3),
    ('num_experts_per_tok', 5),
    ('mlp_only_layers', ['x']),
    ('mlp_only_layers', [0, 1]),
    ('rope_parameters', {'rope_theta': 'big'}),
    ('rope_parameters', {'rope_theta': float('inf')}),
    ('rope_scaling', {'type': 'linear', 'factor': 2}),
    ('sliding_window', 'long'),
    ('model_type', None),
    ('model_type', ['mixtral']),
    ('hidden_act', 'gelu'),
    ('quantization_config', {'bits': 4}),
])
def test_what_makes_no_sense_is_one_line_that_names_it(field, value, tmp_path):
    write_json(tmp_path / 'config.json', changed('mixtral-1', 'num_experts', **{field: value}))
    with pytest.raises(InputError) as error:
        read_config(tmp_path)
    line = str(error.value)
    inner = {'rope_parameters': 'rope_theta', 'rope_scaling': 'type'}
    assert inner.get(field, field) in line or 'do not go together' in line
    assert 'config.json' in line and '\n' not in line


# ================================================================ weights

@pytest.mark.parametrize('dtype, read_as', [
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float32),
])
def test_the_dtype_is_that_of_the_largest_weights(dtype, read_as, tmp_path):
    tensors, _ = read_safetensors(GOLDEN / 'mixtral-1/model.safetensors')
    tensors = {name: t.to(torch.float32 if 'norm' in name else dtype) for name, t in tensors.items()}
    assert weight_dtype(tmp_path) == torch.bfloat16            # no weights there yet
    write_safetensors(tmp_path / 'model.safetensors', tensors)
    assert weight_dtype(tmp_path) == read_as


def test_a_head_that_is_tied_is_not_read_from_the_file(tmp_path):
    golden = GOLDEN / 'qwen3_moe-tied'
    folder = tmp_path / 'model'
    shutil.copytree(golden, folder)
    path = folder / 'model.safetensors'
    tensors, _ = read_safetensors(path)
    write_safetensors(path, {**tensors, 'lm_head.weight': torch.zeros(32, 32)})
    tokens = torch.arange(8)[None]
    assert torch.equal(load(folder)(tokens), load(golden)(tokens))


def test_the_digest_tells_another_base_and_no_other_precision(tmp_path):
    model = random_model(tiny_config()).bfloat16()
    save(model, tmp_path / 'bf16')
    digest = base_digest(tmp_path / 'bf16')
    save(model.float(), tmp_path / 'fp32')
    assert base_digest(tmp_path / 'fp32') == digest
    model.layers[1].mlp.w_out.data[2, 0, 3] += 1
    save(model, tmp_path / 'another')
    assert base_digest(tmp_path / 'another') != digest


# ================================================================ where a checkpoint is

def test_short_names_are_a_folder_here_then_the_snapshot_of_refs_main(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    constants = pytest.importorskip('huggingface_hub.constants')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    with pytest.raises(InputError, match='get it with: hf download mistralai/Mixtral-8x7B-v0.1 --inc'):
        find_checkpoint('mixtral-8x7b')
    place = tmp_path / 'cache/models--mistralai--Mixtral-8x7B-v0.1'
    for name in ('a', 'b'):
        shutil.copytree(GOLDEN / 'mixtral-1', place / 'snapshots' / name)
    (place / 'refs').mkdir()
    for name in ('a', 'b'):
        (place / 'refs/main').write_text(name)
        assert find_checkpoint('mixtral-8x7b') == place / 'snapshots' / name

    here = Path('checkpoints/mixtral-8x7b')
    here.mkdir(parents=True)
    shutil.copy(GOLDEN / 'mixtral-1/config.json', here)
    assert find_checkpoint('mixtral-8x7b', config_only=True) == here
    # a config does not hide the weights
    assert find_checkpoint('mixtral-8x7b') == place / 'snapshots/b'
    shutil.copy(GOLDEN / 'mixtral-1/model.safetensors', here)
    assert find_checkpoint('mixtral-8x7b') == here
    assert find_checkpoint(str(here)) == here
    with pytest.raises(InputError, match='not one of'):
        find_checkpoint('gpt-9')


def test_without_huggingface_hub_the_line_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    assert find_checkpoint('qwen1.5-moe', config_only=True) is None
    with pytest.raises(InputError, match='get it with: hf download Qwen'):
        find_checkpoint('qwen1.5-moe')
