"""hub/config.py: the hub's config.json of five families of MoE models, to and from `Config`.

FIELDS and DEFAULTS say what each value may be and what a family takes where it is missing. What a Config
cannot express (quantised weights, scaled positions, ..) is refused by name; what changes nothing is accepted.
Spellings of transformers 4 and 5 are both read.
"""
from pathlib import Path

from hub.files import REQUIRED, InputError, checked, read_object
from model import Config

FAMILIES = 'mixtral', 'qwen2_moe', 'deepseek', 'olmoe', 'qwen3_moe'
MOST_LAYERS = 1000      # more is a damaged file, and each becomes a Python object
LARGEST = 2 ** 40       # of any size

# every field that is read: (type or values, least, most)
FIELDS = {
    'model_type': (FAMILIES, None, None), 'hidden_act': (('silu', 'swish'), None, None),
    'vocab_size': (int, 1, LARGEST), 'hidden_size': (int, 1, LARGEST),
    'num_hidden_layers': (int, 1, MOST_LAYERS), 'num_attention_heads': (int, 1, LARGEST),
    'num_key_value_heads': (int, 1, LARGEST), 'head_dim': (int, 2, LARGEST),
    'intermediate_size': (int, 1, LARGEST), 'moe_intermediate_size': (int, 1, LARGEST),
    'shared_expert_intermediate_size': (int, 0, LARGEST), 'n_shared_experts': (int, 0, LARGEST),
    'num_local_experts': (int, 1, LARGEST), 'num_experts': (int, 1, LARGEST),
    'n_routed_experts': (int, 1, LARGEST), 'num_experts_per_tok': (int, 1, LARGEST),
    'norm_topk_prob': (bool, None, None), 'decoder_sparse_step': (int, 1, LARGEST),
    'mlp_only_layers': (list, None, None), 'first_k_dense_replace': (int, 0, LARGEST),
    'moe_layer_freq': (int, 1, LARGEST), 'qkv_bias': (bool, None, None),
    'tie_word_embeddings': (bool, None, None), 'rope_theta': (float, 1e-3, 1e15),
    'rms_norm_eps': (float, 0, 1), 'max_position_embeddings': (int, 1, LARGEST),
    'sliding_window': (int, 0, LARGEST), 'use_sliding_window': (bool, None, None),
    'rope_parameters': (dict, None, None), 'rope_scaling': (dict, None, None)}
# what a field is where the file does not say; sizes that are not here must be there
OPTIONAL = dict(
    hidden_act='silu', num_key_value_heads=None, head_dim=None, shared_expert_intermediate_size=0,
    n_shared_experts=0, num_local_experts=None, num_experts=None, n_routed_experts=None, norm_topk_prob=False,
    decoder_sparse_step=1, mlp_only_layers=[], first_k_dense_replace=0, moe_layer_freq=1, qkv_bias=True,
    tie_word_embeddings=False, rope_theta=1e4, rms_norm_eps=1e-6, sliding_window=None,
    use_sliding_window=False, rope_parameters={}, rope_scaling={})
DEFAULTS = {
    'mixtral': dict(rope_theta=1e6, rms_norm_eps=1e-5, num_experts_per_tok=2, max_position_embeddings=131072),
    'qwen2_moe': dict(num_experts_per_tok=4, max_position_embeddings=32768),
    'qwen3_moe': dict(num_experts_per_tok=8, max_position_embeddings=32768),
    'olmoe': dict(rms_norm_eps=1e-5, num_experts_per_tok=8, max_position_embeddings=4096),
    'deepseek': dict(max_position_embeddings=2048)}
# switches that change a model in a way that model.py does not compute, and the values that do not
UNSUPPORTED = {
    'quantization_config': (None, {}), 'clip_qkv': (None,), 'attention_bias': (None, False),
    'mlp_bias': (None, False), 'routed_scaling_factor': (None, 1), 'scoring_func': (None, 'softmax'),
    'partial_rotary_factor': (None, 1)}
PLAIN_ROPE = None, 'default'


def from_hf(hf):
    """The Config of a hub config.json (a dict). InputError names what is missing or not supported."""
    where = 'config.json'
    family = checked(hf, 'model_type', where, FAMILIES)
    for name, plain in UNSUPPORTED.items():
        if hf.get(name) not in plain:
            raise InputError(f'{where}: {name} {hf[name]} is not supported')
    defaults = {**OPTIONAL, **DEFAULTS[family]}

    def get(name, values=hf):
        kind, least, most = FIELDS[name]
        return checked(values, name, where, kind, defaults.get(name, REQUIRED), least, most)
    get('hidden_act')
    config = Config(**sizes(get, family), rope_theta=rope_theta(get), max_len=longest(get, hf))
    c = config
    if c.top_k > c.n_experts:
        raise InputError(f'{where}: num_experts_per_tok {c.top_k} is more than the {c.n_experts} experts')
    if c.n_heads % c.n_kv_heads or c.head_dim % 2 or not c.head_dim:
        raise InputError(f'{where}: {c.n_heads} query heads, {c.n_kv_heads} key and value heads and a '
                         f'head_dim of {c.head_dim} do not go together')
    for name in ('bos_token_id', 'eos_token_id'):
        setattr(config, name[:3], first_id(hf, name, where))
    return config


def sizes(get, family):
    """The fields of Config that shape its weights and its computation."""
    n_layers, dim, heads = get('num_hidden_layers'), get('hidden_size'), get('num_attention_heads')
    qwen, deepseek = family in ('qwen2_moe', 'qwen3_moe'), family == 'deepseek'
    expert_dim = get('moe_intermediate_size' if qwen or deepseek else 'intermediate_size')
    shared_dim = {'qwen2_moe': lambda: get('shared_expert_intermediate_size'),
                  'deepseek': lambda: get('n_shared_experts') * expert_dim}.get(family, lambda: 0)()
    dense = dense_layers(get, family, range(n_layers))
    names = ['num_local_experts', 'num_experts', 'n_routed_experts']
    n_experts = [n for n in map(get, names) if n is not None]
    if len(set(n_experts)) != 1:
        raise InputError(f'config.json: one of {", ".join(names)} must say how many experts there are')
    return dict(
        model_type=family, n_vocab=get('vocab_size'), dim=dim, n_layers=n_layers, n_heads=heads,
        n_kv_heads=get('num_key_value_heads') or heads, head_dim=get('head_dim') or dim // heads,
        n_experts=n_experts[0], top_k=get('num_experts_per_tok'), expert_dim=expert_dim,
        norm_topk=family == 'mixtral' or get('norm_topk_prob'),
        shared_dim=shared_dim, shared_gate=family == 'qwen2_moe' and shared_dim > 0,
        dense_layers=dense, dense_dim=get('intermediate_size') if dense else 0,
        qkv_bias=family == 'qwen2_moe' and get('qkv_bias'),
        qk_norm={'olmoe': 'all', 'qwen3_moe': 'head'}.get(family, ''),
        tie=get('tie_word_embeddings'), norm_eps=get('rms_norm_eps'))


def dense_layers(get, family, layers):
    """Those of the layers that have a plain MLP and no router, a tuple of numbers."""
    if family.startswith('qwen'):
        step, plain = get('decoder_sparse_step'), get('mlp_only_layers')
        if any(type(i) is not int for i in plain):
            raise InputError(f'config.json: mlp_only_layers {plain} are no numbers of layers')
        dense = tuple(i for i in layers if i in plain or (i + 1) % step)
    elif family == 'deepseek':
        first, step = get('first_k_dense_replace'), get('moe_layer_freq')
        dense = tuple(i for i in layers if i < first or i % step)
    else:
        dense = ()
    if len(dense) == len(layers):
        raise InputError('config.json: no layer has experts')
    return dense


def rope_theta(get):
    """The base of the rotary angles; InputError for positions that are scaled."""
    theta = get('rope_theta')
    for name in ('rope_scaling', 'rope_parameters'):
        rope = get(name)
        kind = rope.get('rope_type', rope.get('type'))
        scaled = kind not in PLAIN_ROPE and (kind, rope.get('factor')) != ('linear', 1)
        if scaled or rope.get('partial_rotary_factor') not in (None, 1):
            raise InputError(f'config.json: {name} {rope} is not supported')
        if rope.get('rope_theta') is not None:
            theta = get('rope_theta', rope)
    return float(theta)


def longest(get, hf):
    """The longest sequence that the model computes as model.py does: within its positions and its window."""
    slides = get('use_sliding_window') or not hf['model_type'].startswith('qwen')
    window = get('sliding_window') if slides else None
    return min(get('max_position_embeddings'), window or LARGEST)


def token_ids(values, name, where):
    """The ids of a field that holds one, a list of them, or nothing."""
    ids = values.get(name)
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    return [checked({name: i}, name, where, int, least=0) for i in ids]


def first_id(values, name, where):
    return next(iter(token_ids(values, name, where)), None)


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
    hf = read_object(Path(folder) / 'config.json')
    try:
        return from_hf(hf)
    except InputError as e:
        raise InputError(f'{folder}/{e}') from None
