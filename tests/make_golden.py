"""Makes tests/golden/: tiny random models, and what the reference libraries answer for them.

Run once by hand, in an environment that has them; running the tests needs neither:
    pip install torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 && python tests/make_golden.py

Each model folder holds what save_pretrained wrote (weights rounded to bf16, to be small) and
golden.safetensors with tokens (B,T) and the fp32 logits. transformers has no "deepseek" (v1): its reference
is Llama's attention with DeepseekV2Moe as MLP.

Each tokenizer folder holds a tokenizer.json, the pipeline of a family on a vocabulary that was learnt from a
little text, and golden.json: [[text, ids], ..]. They stay; the ids are made anew.
"""
import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

GOLDEN = Path(__file__).parent / 'golden'


def new_folder(name):
    folder = GOLDEN / name
    folder.mkdir()                                             # delete those of before first
    return folder


# ================================================================ models

COMMON = dict(
    vocab_size=32,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
)
SIX = dict(num_experts=6, num_experts_per_tok=3)
FAMILIES = {
    'mixtral': dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=8, sliding_window=None),
    'qwen2_moe': dict(
        SIX, moe_intermediate_size=8, shared_expert_intermediate_size=12, intermediate_size=24,
        use_sliding_window=False),
    'qwen3_moe': dict(SIX, moe_intermediate_size=8, intermediate_size=24, norm_topk_prob=True, head_dim=16),
    'olmoe': dict(SIX, intermediate_size=8),
}


def fill(model, seed):
    """Random weights that bf16 holds exactly, large enough that every part matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            scale = 0.5 if p.dim() == 1 else 1.5 * p.shape[-1] ** -0.5
            new = torch.randn(p.shape, generator=generator) * scale + (p.dim() == 1)
            p.copy_(new.bfloat16())
    return model.eval()


def answer(model, folder):
    tokens = torch.randint(32, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens).logits
    save_file({'tokens': tokens, 'logits': logits.contiguous()}, folder / 'golden.safetensors')


def hub_model(name, family, seed, max_shard_size='50GB', **changes):
    folder = new_folder(name)
    config = transformers.AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **changes})
    model = fill(transformers.AutoModelForCausalLM.from_config(config).float(), seed)
    answer(model, folder)
    model.bfloat16().save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / 'generation_config.json').unlink(missing_ok=True)


def deepseek_model(name, seed):
    folder = new_folder(name)
    sizes = dict(COMMON, num_hidden_layers=3, num_key_value_heads=4)
    experts = dict(
        moe_intermediate_size=8,
        n_routed_experts=6,
        n_shared_experts=2,
        num_experts_per_tok=3,
        first_k_dense_replace=1,
        norm_topk_prob=False,
    )
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, intermediate_size=24)).float()
    for layer in model.model.layers[1:]:
        layer.mlp = DeepseekV2Moe(transformers.DeepseekV2Config(
            **sizes, **experts, topk_method='greedy', routed_scaling_factor=1.0))
    answer(fill(model, seed), folder)
    tensors = {}
    for name, t in model.bfloat16().state_dict().items():
        block = name.rpartition('.')[0]
        if name.endswith('gate_up_proj'):
            for n, expert in enumerate(t):
                gate, up = expert.chunk(2)
                tensors[f'{block}.{n}.gate_proj.weight'] = gate.contiguous()
                tensors[f'{block}.{n}.up_proj.weight'] = up.contiguous()
        elif name.endswith('experts.down_proj'):
            for n, expert in enumerate(t):
                tensors[f'{block}.{n}.down_proj.weight'] = expert.contiguous()
        else:
            tensors[name] = t
    save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})
    config = dict(
        sizes,
        **experts,
        model_type='deepseek',
        intermediate_size=24,
        hidden_act='silu',
        moe_layer_freq=1,
        rope_theta=10000.0,
        rope_scaling=None,
        attention_bias=False,
        tie_word_embeddings=False,
        torch_dtype='bfloat16',
    )
    (folder / 'config.json').write_text(json.dumps(config, indent=1))


def make_models():
    for seed in (1, 2):
        for family in FAMILIES:
            hub_model(f'{family}-{seed}', family, seed)
        deepseek_model(f'deepseek-{seed}', seed)
    hub_model('mixtral-tied-sharded', 'mixtral', 3, '15KB', tie_word_embeddings=True)
    hub_model('qwen2_moe-every-second', 'qwen2_moe', 3, decoder_sparse_step=2)
    hub_model('qwen3_moe-tied', 'qwen3_moe', 3, tie_word_embeddings=True)


# ================================================================ tokenizers

def answer_tokenizer(folder):
    """The ids of the texts in golden.json, by tokenizer.json."""
    path = folder / 'golden.json'
    hf = json.loads((folder / 'tokenizer.json').read_text())
    # a special token in a text is plain text to us, as in text that is not trusted
    hf['added_tokens'] = [token for token in hf['added_tokens'] if not token['special']]
    tokenizer = Tokenizer.from_str(json.dumps(hf))
    golden = []
    for text, _ in json.loads(path.read_text()):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        golden.append([text, ids])
    path.write_text(json.dumps(golden))


if __name__ == '__main__':
    make_models()
    for folder in GOLDEN.glob('tokenizer-*'):
        answer_tokenizer(folder)
