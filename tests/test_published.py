"""The six published models on the meta device: parameters, tensors in the files, allocator sizes."""
import pytest
import torch

from allocator import Allocators
from hub.checkpoint import hub_tensors
from hub.config import from_hf
from model import Transformer

MIXTRAL = dict(
    model_type='mixtral',
    num_local_experts=8,
    num_experts_per_tok=2,
    num_key_value_heads=8,
    vocab_size=32000,
    max_position_embeddings=65536,
)
HUB = {
    'mixtral-8x7b': dict(
        MIXTRAL,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        intermediate_size=14336,
    ),
    'mixtral-8x22b': dict(
        MIXTRAL,
        hidden_size=6144,
        num_hidden_layers=56,
        num_attention_heads=48,
        intermediate_size=16384,
    ),
    'qwen1.5-moe': dict(
        model_type='qwen2_moe',
        hidden_size=2048,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=5632,
        moe_intermediate_size=1408,
        num_experts=60,
        num_experts_per_tok=4,
        shared_expert_intermediate_size=5632,
        vocab_size=151936,
        max_position_embeddings=8192,
    ),
    'deepseek-moe-16b': dict(
        model_type='deepseek',
        hidden_size=2048,
        num_hidden_layers=28,
        num_attention_heads=16,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_shared_experts=2,
        first_k_dense_replace=1,
        vocab_size=102400,
        max_position_embeddings=4096,
    ),
    'olmoe-1b-7b': dict(
        model_type='olmoe',
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=16,
        intermediate_size=1024,
        num_experts=64,
        num_experts_per_tok=8,
        vocab_size=50304,
        max_position_embeddings=4096,
    ),
    'qwen3-30b-a3b': dict(
        model_type='qwen3_moe',
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        vocab_size=151936,
        max_position_embeddings=40960,
    ),
}
# parameters; tensors on disk; the paper's allocator size in millions (None: not in the paper)
SIZES = {
    'mixtral-8x7b': (46_702_792_704, 995, 1.05),
    'mixtral-8x22b': (140_620_634_112, 1739, 2.75),
    'qwen1.5-moe': (14_315_784_192, 4659, 2.95),
    'deepseek-moe-16b': (16_375_728_128, 5466, 3.54),
    'olmoe-1b-7b': (6_919_161_856, 3219, None),
    'qwen3-30b-a3b': (30_532_122_624, 18867, None),
}


@pytest.mark.parametrize('name', HUB)
def test_published_model_on_the_meta_device(name):
    config = from_hf(HUB[name])
    with torch.device('meta'):
        tensors = hub_tensors(Transformer(config)).values()
        allocators = Allocators(config, config.n_experts, False)
    parameters, files, millions = SIZES[name]
    assert sum(t.numel() for t in tensors) == parameters
    assert len(tensors) == files
    assert millions in (None, round(allocators.n_params() / 1e6, 2))
