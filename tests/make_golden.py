"""Makes tests/golden/: tiny random models and tokenizers with what the reference libraries answer for them.

Run once by hand, in an environment that has them; running the tests needs neither:
    pip install torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 && python tests/make_golden.py

Each model folder holds what save_pretrained wrote (weights rounded to bf16, to be small) and
golden.safetensors with tokens (B,T) and the fp32 logits. transformers has no "deepseek" (v1): its reference
is Llama's attention with DeepseekV2Moe as MLP. Each tokenizer folder holds tokenizer.json and golden.json:
[[text, ids], ..].
"""

import json
import random
import shutil
import sysconfig
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    DeepseekV2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

GOLDEN = Path(__file__).parent / 'golden'
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


# ================================================================ models

def fill(model, seed):
    """Random weights that bf16 holds exactly, large enough that every part matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            scale = 0.5 if p.dim() == 1 else 1.5 * p.shape[-1] ** -0.5
            p.copy_((torch.randn(p.shape, generator=generator) * scale + (p.dim() == 1)).bfloat16())
    return model.eval()


def answer(model, folder):
    tokens = torch.randint(32, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens).logits
    save_file({'tokens': tokens, 'logits': logits.contiguous()}, folder / 'golden.safetensors')


def hub_model(name, config_class, model_class, seed, max_shard_size='50GB', **changes):
    folder = GOLDEN / name
    model = fill(model_class(config_class(**{**COMMON, **changes})).float(), seed)
    answer(model, folder if folder.mkdir(parents=True) is None else None)
    model.bfloat16().save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / 'generation_config.json').unlink(missing_ok=True)


def deepseek_model(name, seed):
    folder = GOLDEN / name
    folder.mkdir(parents=True)
    sizes = dict(COMMON, num_hidden_layers=3, num_key_value_heads=4)
    moe = dict(moe_intermediate_size=8, n_routed_experts=6, n_shared_experts=2, num_experts_per_tok=3,
               first_k_dense_replace=1)
    model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=24)).float()
    for layer in model.model.layers[1:]:
        layer.mlp = DeepseekV2Moe(
            DeepseekV2Config(
                **sizes, **moe, topk_method='greedy', routed_scaling_factor=1.0, norm_topk_prob=False
            )
        )
    answer(fill(model, seed), folder)
    tensors = {}
    for key, t in model.state_dict().items():
        block = key.rpartition('.')[0]
        if key.endswith('gate_up_proj'):
            for e in range(6):
                gate, up = t[e].chunk(2)
                tensors[f'{block}.{e}.gate_proj.weight'], tensors[f'{block}.{e}.up_proj.weight'] = gate, up
        elif key.endswith('experts.down_proj'):
            for e in range(6):
                tensors[f'{block}.{e}.down_proj.weight'] = t[e]
        else:
            tensors[key] = t
    save_file(
        {k: t.bfloat16().contiguous() for k, t in tensors.items()},
        folder / 'model.safetensors',
        {'format': 'pt'},
    )
    hub = dict(
        sizes,
        **moe,
        model_type='deepseek',
        intermediate_size=24,
        hidden_act='silu',
        moe_layer_freq=1,
        norm_topk_prob=False,
        rope_theta=10000.0,
        rope_scaling=None,
        attention_bias=False,
        tie_word_embeddings=False,
        torch_dtype='bfloat16',
    )
    (folder / 'config.json').write_text(json.dumps(hub, indent=1))


def make_models():
    mixtral = dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=8, sliding_window=None)
    qwen2 = dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=8,
                 shared_expert_intermediate_size=12, intermediate_size=24, use_sliding_window=False)
    qwen3 = dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=8, intermediate_size=24,
                 norm_topk_prob=True, head_dim=16)
    olmoe = dict(num_experts=6, num_experts_per_tok=3, intermediate_size=8)
    for seed in (1, 2):
        hub_model(f'mixtral-{seed}', MixtralConfig, MixtralForCausalLM, seed, **mixtral)
        hub_model(f'qwen2_moe-{seed}', Qwen2MoeConfig, Qwen2MoeForCausalLM, seed, **qwen2)
        hub_model(f'olmoe-{seed}', OlmoeConfig, OlmoeForCausalLM, seed, **olmoe)
        hub_model(f'qwen3_moe-{seed}', Qwen3MoeConfig, Qwen3MoeForCausalLM, seed, **qwen3)
        deepseek_model(f'deepseek-{seed}', seed)
    hub_model(
        'mixtral-tied-sharded',
        MixtralConfig,
        MixtralForCausalLM,
        3,
        '15KB',
        tie_word_embeddings=True,
        **mixtral,
    )
    hub_model(
        'qwen2_moe-every-second', Qwen2MoeConfig, Qwen2MoeForCausalLM, 3, decoder_sparse_step=2, **qwen2
    )
    hub_model('qwen3_moe-tied', Qwen3MoeConfig, Qwen3MoeForCausalLM, 3, tie_word_embeddings=True, **qwen3)


# ================================================================ tokenizers: published pipelines, small

QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+")
DEEPSEEK = [
    r'[\r\n]',
    r'\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅ]+',
    r'\s?[!-/:-~！-／：-～‘-‟　-。]+',
    r'\s+$',
    r'[一-龥ࠀ-一가-퟿]+',
]


def corpus():
    root = Path(sysconfig.get_paths()['stdlib'])
    return [(root / name).read_text() for name in ('argparse.py', 'random.py', 'this.py', 'heapq.py')] + [
        'Größe naïve café Москва 漢字かな交じり文 한국어 🙂👍🏽 ½ ٣٤ 12345 x\u0301 ﬁ\n\n\t  \r\n'] * 30


def byte_level(pre, normalizer=None, added=()):
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre, decoders.ByteLevel()
    if normalizer:
        t.normalizer = normalizer
    t.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=450, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    t.add_tokens([AddedToken(content, normalized=False) for content in added])
    t.add_special_tokens(['<|endoftext|>'])
    return t


def sentencepiece_like():
    """Mixtral's tokenizer.json: byte fallback, a space marker in front, no pre-tokenizer."""
    t = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token='<unk>'))
    t.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    t.pre_tokenizer = pre_tokenizers.Split(
        Regex('▁+[^▁]*|[^▁]+'), 'isolated'
    )  # for the training only: no piece with an inner space
    special = ['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256))]
    t.train_from_iterator([c.replace('\n', ' ') for c in corpus()], trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, show_progress=False))
    hf = json.loads(t.to_str())
    hf['pre_tokenizer'] = None
    hf['added_tokens'] = hf['added_tokens'][:3]
    spaces = [['▁', '▁'], ['▁▁', '▁▁']]
    for left, right in spaces:
        if left + right not in hf['model']['vocab']:
            hf['model']['vocab'][left + right] = len(hf['model']['vocab'])
            hf['model']['merges'].append([left, right])
    return Tokenizer.from_str(json.dumps(hf))


def strings():
    rng = random.Random(0)
    kinds = [
        'abc def_ghi',
        ' \t\n\r',
        '0123456789½٣',
        'äößñÀÿøþ',
        '漢字かな한국어',
        '🙂👍🏽\u200d',
        'e\u0301x\u0308',
        '.,;:!?()[]{}"\'',
        '\x00\x1c\x7f\xa0\u3000',
    ]
    texts = [
        '',
        ' ',
        '  ',
        'a',
        ' a',
        'a ',
        "I'll DON'T they've",
        'größe',
        'def f(self):\n        return self.x  # ▁ marker\n',
        'x' * 300,
        ' ' * 50,
        '\n\n\n',
        '12345 67',
        '<s>',
        '</s>',
        '<|endoftext|>',
        '<0x0A>',
        'Việt Nam ẠẢẤ',
        'a\u3000b',
    ]
    for _ in range(100):
        texts.append(''.join(rng.choice(rng.choice(kinds)) for _ in range(rng.randint(1, 40))))
    for text in corpus()[:2]:
        texts += [line for line in text.splitlines(keepends=True)[:25]]
    return texts


def save_tokenizer(name, tokenizer):
    folder = GOLDEN / name
    folder.mkdir(parents=True)
    # a special token in a text is plain text to us: encode without the specials, as for text that is not
    # trusted
    hf = json.loads(tokenizer.to_str())
    plain = Tokenizer.from_str(
        json.dumps({**hf, 'added_tokens': [a for a in hf['added_tokens'] if not a['special']]})
    )
    (folder / 'tokenizer.json').write_text(json.dumps(hf, ensure_ascii=False))
    (folder / 'config.json').write_text('{"bos_token_id": null, "eos_token_id": null}')
    (folder / 'golden.json').write_text(
        json.dumps([[s, plain.encode(s, add_special_tokens=False).ids] for s in strings()], ensure_ascii=True)
    )


def make_tokenizers():
    split = lambda pattern: pre_tokenizers.Split(Regex(pattern), 'isolated')
    plain_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    save_tokenizer(
        'tokenizer-qwen',
        byte_level(pre_tokenizers.Sequence([split(QWEN), plain_bytes]), normalizers.NFC(), ['<think>']),
    )
    save_tokenizer(
        'tokenizer-olmoe',
        byte_level(
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            normalizers.NFC(),
            [' ' * n for n in range(24, 1, -1)],
        ),
    )
    save_tokenizer(
        'tokenizer-deepseek',
        byte_level(
            pre_tokenizers.Sequence(
                [*map(split, DEEPSEEK), pre_tokenizers.Digits(individual_digits=True), plain_bytes]
            ),
            added=list('øöúÿõ÷ûýÀùÁþü'),
        ),
    )
    save_tokenizer('tokenizer-mixtral', sentencepiece_like())


if __name__ == '__main__':
    shutil.rmtree(GOLDEN, ignore_errors=True)
    make_models()
    make_tokenizers()
    print(f'{sum(p.stat().st_size for p in GOLDEN.rglob("*") if p.is_file()) / 1e6:.2f} MB')
