"""config.json, the dtype of weights, tied heads, which base it is, and where a checkpoint is."""
import shutil
import sys
from pathlib import Path

import pytest
import torch

from conftest import GOLDEN
from hub.checkpoint import PUBLISHED, base_digest, find_checkpoint, load, save, weight_dtype
from hub.config import from_hf
from hub.files import InputError, read_json
from hub.safetensors import read_safetensors, write_safetensors


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
def test_what_is_missing_is_the_familys_own_default(name, theta, eps):
    config = from_hf(changed(name, 'rope_parameters', 'rope_theta', 'rms_norm_eps'))
    assert (config.rope_theta, config.norm_eps) == (theta, eps)


@pytest.mark.parametrize('field, value', [
    ('rope_scaling', {'type': 'default'}),
    ('hidden_act', 'swish'),
    ('rms_norm_eps', None),
    ('routed_scaling_factor', 1.0),
])
def test_what_changes_nothing_is_accepted(field, value):
    assert from_hf(changed('mixtral-1', **{field: value})) == from_hf(changed('mixtral-1'))


@pytest.mark.parametrize('name, uses, longest', [
    ('mixtral-1', None, 16),
    ('qwen2_moe-1', False, 64),
    ('qwen2_moe-1', True, 16),
])
def test_a_window_is_the_longest_sequence(name, uses, longest):
    assert from_hf(changed(name, sliding_window=16, use_sliding_window=uses)).max_len == longest


@pytest.mark.parametrize('field, value', [
    ('rms_norm_eps', float('nan')),
    ('hidden_size', 32.0),
    ('vocab_size', None),
    ('num_hidden_layers', 10 ** 9),
    ('mlp_only_layers', ['x']),
    ('model_type', ['mixtral']),
    ('quantization_config', {'bits': 4}),
    ('rope_type', 'yarn'),
    # these with others
    ('head_dim', 7),
    ('num_key_value_heads', 3),
    ('num_experts_per_tok', 5),
    ('num_local_experts', 10 ** 6),
    ('mlp_only_layers', [0, 1]),
])
def test_what_makes_no_sense_is_one_line_that_names_it(field, value):
    with pytest.raises(InputError, match=f'^config.json: ({field} |these numbers do not go together)'):
        from_hf(changed('mixtral-1', 'rope_parameters', **{field: value}))


# ================================================================ weights

@pytest.mark.parametrize('dtype, read_as', [
    (torch.float16, torch.float16),
    (torch.float64, torch.float32),
])
def test_the_dtype_is_that_of_the_largest_weights(dtype, read_as, tmp_path):
    tensors = {'norm': torch.ones(2), 'w': torch.ones(9, dtype=dtype)}
    assert weight_dtype(tmp_path) == torch.bfloat16            # no weights there yet
    write_safetensors(tmp_path / 'model.safetensors', tensors)
    assert weight_dtype(tmp_path) == read_as


def test_a_head_that_is_tied_is_not_read_from_the_file(tmp_path):
    golden = GOLDEN / 'qwen3_moe-tied'
    folder = shutil.copytree(golden, tmp_path / 'model')
    path = folder / 'model.safetensors'
    tensors, _ = read_safetensors(path)
    write_safetensors(path, {**tensors, 'lm_head.weight': torch.zeros(32, 32)})
    tokens = torch.arange(8)[None]
    assert torch.equal(load(folder)(tokens), load(golden)(tokens))


def test_the_digest_tells_another_base_and_no_other_precision(tmp_path):
    digest = base_digest(GOLDEN / 'mixtral-1')
    model = load(GOLDEN / 'mixtral-1')
    save(model, tmp_path)                                      # in fp32, there in bf16
    assert base_digest(tmp_path) == digest
    model.layers[1].mlp.w_out.data[2, 0, 3] += 1
    save(model, tmp_path)
    assert base_digest(tmp_path) != digest


# ================================================================ where a checkpoint is

def test_a_short_name_is_a_folder_here_or_a_snapshot_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    constants = pytest.importorskip('huggingface_hub.constants')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    place = tmp_path / 'cache/models--mistralai--Mixtral-8x7B-v0.1'
    snapshot = place / 'snapshots/a'
    here = Path('checkpoints/mixtral-8x7b')
    for folder in snapshot, place / 'refs', here:
        folder.mkdir(parents=True)
    (place / 'refs/main').write_text('a')
    (snapshot / 'model.safetensors').touch()
    (here / 'config.json').touch()
    assert find_checkpoint('mixtral-8x7b', wanted='config.json') == here
    assert find_checkpoint('mixtral-8x7b') == snapshot         # a config does not hide the weights
    (here / 'model.safetensors').touch()
    assert find_checkpoint('mixtral-8x7b') == here


def test_what_is_not_there_can_be_got(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    assert find_checkpoint('qwen1.5-moe', wanted='config.json') == PUBLISHED / 'qwen1.5-moe'
    with pytest.raises(InputError, match='get it with: hf download Qwen'):
        find_checkpoint('qwen1.5-moe')
