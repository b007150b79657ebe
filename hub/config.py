"""hub/config.py: the hub's config.json of five families of MoE models, to and from `Config`.

What a Config cannot express (quantised weights, scaled positions, ..) is refused by name; what changes
nothing is accepted. Spellings of transformers 4 and 5 are both read.
"""
from functools import partial

from hub.files import InputError, read_json
from model import Config

# the hub's name of a field: ours
FIELDS = {
    'vocab_size': 'n_vocab',
    'hidden_size': 'dim',
    'num_hidden_layers': 'n_layers',
    'num_attention_heads': 'n_heads',
    'num_key_value_heads': 'n_kv_heads',
    'head_dim': 'head_dim',
    'num_experts_per_tok': 'top_k',
    'tie_word_embeddings': 'tie',
    'rope_theta': 'rope_theta',
    'rms_norm_eps': 'norm_eps',
    'max_position_embeddings': 'max_len',
}
EXPERTS = 'num_local_experts', 'num_experts', 'n_routed_experts'     # one thing, spelled in three ways
# what decides about the computation, and the values for which model.py computes the same
SUPPORTED = {
    'model_type': (
        'mixtral',
        'qwen2_moe',
        'qwen3_moe',
        'olmoe',
        'deepseek',
    ),
    'quantization_config': (None, {}),
    'hidden_act': (None, 'silu', 'swish'),
    'clip_qkv': (None,),
    'routed_scaling_factor': (None, 1),
    'scoring_func': (None, 'softmax'),
    'partial_rotary_factor': (None, 1),
    'rope_type': (None, 'default'),
    'type': (None, 'default'),              # the same in older files
}
# larger numbers come from a damaged file: each layer and each expert becomes a Python object
LARGEST = {int: 2 ** 20, float: 1e15}
MOST_EXPERTS = 100_000      # of all layers


def field(hf, name, default=None):
    """A value of a config.json, of the default's type; a number is above 0 or the default itself.

    Missing or null: the default. Without one it must be there, a whole number. InputError names the field.
    """
    value = hf.get(name)
    if value is None:
        value = default
    kind = int if default is None else type(default)
    right = type(value) is kind or kind is float and type(value) is int
    if right and kind in LARGEST:
        right = 0 < value <= LARGEST[kind] or value == default
    if not right:
        raise InputError(f'config.json: {name} is {value!r:.60}: missing, of another type, or out of range')
    return kind(value)


def from_hf(hf):
    """The Config of a hub config.json (a dict). InputError names what is missing or not supported.

    Without eos, which is the tokenizer's.
    """
    # transformers 4 and 5 keep what belongs to the rotary angles in an object of its own
    hf = hf | field(hf, 'rope_parameters', {}) | field(hf, 'rope_scaling', {})
    get = partial(field, hf)
    for name, known in SUPPORTED.items():
        value = hf.get(name)
        if value not in known:
            raise InputError(f'config.json: {name} {value!r:.60} is not supported, only {known}')

    family = hf['model_type']
    heads = get('num_attention_heads')
    defaults = {                            # what a file of the family means that does not say it
        'num_key_value_heads': heads,
        'head_dim': get('hidden_size') // heads,
        'tie_word_embeddings': False,
        'rope_theta': 1e6 if family == 'mixtral' else 1e4,
        'rms_norm_eps': 1e-5 if family in ('mixtral', 'olmoe') else 1e-6,
    }
    fields = {ours: get(theirs, defaults.get(theirs)) for theirs, ours in FIELDS.items()}
    c = Config(model_type=family, **fields)

    c.n_experts = get(next(filter(hf.get, EXPERTS), 'num_experts'))
    one_width = family in ('mixtral', 'olmoe')                  # else dense layers have another
    c.expert_dim = get('intermediate_size' if one_width else 'moe_intermediate_size')
    c.norm_topk = family == 'mixtral' or get('norm_topk_prob', False)
    c.qk_norm = {'olmoe': 'all', 'qwen3_moe': 'head'}.get(family, '')
    if family == 'deepseek':
        c.shared_dim = get('n_shared_experts', 0) * c.expert_dim
    if family == 'qwen2_moe':
        c.shared_dim = get('shared_expert_intermediate_size', 0)
        c.shared_gate = c.shared_dim > 0
        c.qkv_bias = get('qkv_bias', True)
    c.dense_layers = dense_layers(hf, c.n_layers)
    if c.dense_layers:
        c.dense_dim = get('intermediate_size')
    window = get('sliding_window', 0)
    if window and get('use_sliding_window', family == 'mixtral'):
        c.max_len = min(c.max_len, window)                      # up to there a window changes nothing

    fits = (
        c.n_layers * c.n_experts <= MOST_EXPERTS
        and c.top_k <= c.n_experts
        and c.n_heads % c.n_kv_heads == 0
        and c.head_dim % 2 == 0 < c.head_dim
        and len(c.dense_layers) < c.n_layers
    )
    if not fits:
        raise InputError(f'config.json: these numbers do not go together: {c}')
    return c


def dense_layers(hf, n_layers):
    """The layers that have a plain MLP and no router, as the fields of Qwen's and DeepSeek's files say."""
    plain = token_ids(hf, 'mlp_only_layers', 'config.json')
    qwen_step = field(hf, 'decoder_sparse_step', 1)
    deepseek_first = field(hf, 'first_k_dense_replace', 0)
    return tuple(
        i for i in range(n_layers)
        if i in plain or (i + 1) % qwen_step or i < deepseek_first
    )


def token_ids(values, name, where):
    """The ids of a field that holds one, a list of them, or nothing."""
    ids = values.get(name)
    if ids is None:
        return []
    if not isinstance(ids, list):
        ids = [ids]
    if not all(type(i) is int and 0 <= i < 2 ** 31 for i in ids):
        raise InputError(f'{where}: {name} {ids!r:.60} is no number from 0 on, or a list of them')
    return ids


def to_hf(c):
    """The hub config.json (a dict) of a mixtral model, from its Config c, as transformers reads it."""
    assert c.model_type == 'mixtral', c.model_type
    return {
        'architectures': ['MixtralForCausalLM'],
        'model_type': 'mixtral',
        **{theirs: getattr(c, ours) for theirs, ours in FIELDS.items()},
        'num_local_experts': c.n_experts,
        'intermediate_size': c.expert_dim,
        'bos_token_id': None,
        'eos_token_id': c.eos,
    }


def read_config(folder):
    """The Config of a checkpoint folder."""
    return from_hf(read_json(folder / 'config.json'))
