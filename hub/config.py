"""hub/config.py: the hub's config.json of five families of MoE models, to and from `Config`.

What a family calls its sizes, and what it leaves to its own code, differs; what a Config cannot express
(quantised weights, scaled positions, sliding windows, ..) is refused by name. Spellings of transformers 4 and
5 are both read.
"""
from pathlib import Path

import torch

from hub.files import InputError, read_json
from model import Config

FAMILIES = 'mixtral', 'qwen2_moe', 'deepseek', 'olmoe', 'qwen3_moe'
MOST_LAYERS = 1000      # more is a damaged file, and each becomes a Python object


def from_hf(hf):
    """The Config of a hub config.json (a dict). InputError names what is missing or not supported."""
    family = hf.get('model_type')
    if family not in FAMILIES:
        raise InputError(f'config.json: model_type {family!r} is not supported, only {", ".join(FAMILIES)}')
    refuse_what_is_not_supported(hf)
    try:
        config = Config(**sizes(hf, family))
    except KeyError as e:
        raise InputError(f'config.json: the field {e} is missing') from None
    except (TypeError, ZeroDivisionError) as e:
        raise InputError(f'config.json: a field has a value that makes no sense ({e})') from None
    check_sizes(config)
    return config


def refuse_what_is_not_supported(hf):
    """InputError for a switch that changes the model in a way that model.py does not compute."""
    rope = hf.get('rope_parameters') or {}
    scaled = rope.get('rope_type', 'default') != 'default'
    has_window = not hf['model_type'].startswith('qwen') or hf.get('use_sliding_window')
    switches = {
        'quantization_config': hf.get('quantization_config'),
        'rope_scaling': rope if scaled else hf.get('rope_scaling'),
        'sliding_window': hf.get('sliding_window') if has_window else None,
        'clip_qkv': hf.get('clip_qkv'),
        'attention_bias': hf.get('attention_bias')}
    for name, value in switches.items():
        if value:
            raise InputError(f'config.json: {name} {value} is not supported')
    if hf.get('hidden_act', 'silu') != 'silu':
        raise InputError(f'config.json: hidden_act {hf["hidden_act"]!r} is not supported, only silu')


def sizes(hf, family):
    """The fields of Config. KeyError, TypeError where hf lacks a field or has a wrong one."""
    n_layers, dim, heads = hf['num_hidden_layers'], hf['hidden_size'], hf['num_attention_heads']
    if n_layers > MOST_LAYERS:
        raise InputError(f'config.json: num_hidden_layers {n_layers} is more than any model has')
    qwen, deepseek = family in ('qwen2_moe', 'qwen3_moe'), family == 'deepseek'
    expert_dim = hf['moe_intermediate_size' if qwen or deepseek else 'intermediate_size']
    shared_dim = 0
    if family == 'qwen2_moe':
        shared_dim = hf.get('shared_expert_intermediate_size') or 0
    elif deepseek:
        shared_dim = (hf.get('n_shared_experts') or 0) * expert_dim
    dense = dense_layers(hf, family, range(n_layers))
    rope = hf.get('rope_parameters') or {}
    return dict(
        model_type=family, n_vocab=hf['vocab_size'], dim=dim, n_layers=n_layers,
        n_heads=heads, n_kv_heads=hf.get('num_key_value_heads') or heads,
        head_dim=hf.get('head_dim') or dim // heads,
        n_experts=hf.get('num_local_experts') or hf.get('num_experts') or hf['n_routed_experts'],
        top_k=hf['num_experts_per_tok'], expert_dim=expert_dim,
        norm_topk=family == 'mixtral' or hf.get('norm_topk_prob', False),
        shared_dim=shared_dim, shared_gate=family == 'qwen2_moe' and shared_dim > 0,
        dense_layers=dense, dense_dim=hf['intermediate_size'] if dense else 0,
        qkv_bias=family == 'qwen2_moe' and hf.get('qkv_bias', True),
        qk_norm={'olmoe': 'all', 'qwen3_moe': 'head'}.get(family, ''),
        tie=hf.get('tie_word_embeddings', False),
        rope_theta=rope.get('rope_theta') or hf.get('rope_theta', 10000.0),
        norm_eps=hf['rms_norm_eps'], max_len=hf['max_position_embeddings'],
        bos=hf.get('bos_token_id'), eos=hf.get('eos_token_id'))


def dense_layers(hf, family, layers):
    """Those of the layers that have a plain MLP and no router, a tuple of numbers."""
    if family.startswith('qwen'):
        step, plain = hf.get('decoder_sparse_step', 1), hf.get('mlp_only_layers') or []
        return tuple(i for i in layers if i in plain or (i + 1) % step)
    if family == 'deepseek':
        first, step = hf.get('first_k_dense_replace', 0), hf.get('moe_layer_freq', 1)
        return tuple(i for i in layers if i < first or i % step)
    return ()


def check_sizes(config):
    """InputError for sizes that no model can have."""
    names = ('n_vocab', 'dim', 'n_layers', 'n_heads', 'n_kv_heads', 'head_dim', 'n_experts', 'top_k',
             'expert_dim')
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise InputError(f'config.json: {name} is {value!r}, it must be a whole number above 0')
    if config.top_k > config.n_experts or config.n_heads % config.n_kv_heads or config.head_dim % 2:
        raise InputError('config.json: top_k above the number of experts, heads that do not divide, '
                         'or an odd head_dim')


def to_hf(config):
    """The hub config.json (a dict) of a mixtral model, as transformers reads it."""
    c = config
    assert c.model_type == 'mixtral', c.model_type
    return {
        'architectures': ['MixtralForCausalLM'], 'model_type': 'mixtral', 'vocab_size': c.n_vocab,
        'hidden_size': c.dim, 'num_hidden_layers': c.n_layers, 'num_attention_heads': c.n_heads,
        'num_key_value_heads': c.n_kv_heads, 'head_dim': c.head_dim, 'num_local_experts': c.n_experts,
        'num_experts_per_tok': c.top_k, 'intermediate_size': c.expert_dim, 'hidden_act': 'silu',
        'tie_word_embeddings': c.tie, 'rope_theta': c.rope_theta, 'rms_norm_eps': c.norm_eps,
        'max_position_embeddings': c.max_len, 'sliding_window': None,
        'bos_token_id': c.bos, 'eos_token_id': c.eos}


def read_config(folder):
    """The Config of a checkpoint folder; InputError names the file."""
    hf = read_json(Path(folder) / 'config.json')
    if not isinstance(hf, dict):
        raise InputError(f'{folder}/config.json: not a JSON object')
    try:
        return from_hf(hf)
    except InputError as e:
        raise InputError(f'{folder}/{e}') from None


def weight_dtype(folder):
    """The torch dtype that a checkpoint's config.json names; fp32 where it names none."""
    hf = read_json(Path(folder) / 'config.json')
    dtypes = {'bfloat16': torch.bfloat16, 'float16': torch.float16}
    return dtypes.get(hf.get('torch_dtype') or hf.get('dtype'), torch.float32)
