"""model.py: a mixture-of-experts transformer that reads and writes real checkpoints.

The Mixtral architecture, top to bottom: RMSNorm, rotary positions (rotate-half), grouped-query attention, and in place of
one MLP a router over N SwiGLU experts of which each token runs the K most probable. Eight switches of `Config` (head_dim,
qkv_bias, qk_norm, norm_topk, shared_dim, shared_gate, dense_layers, tie) turn it into Qwen-MoE, DeepSeek-MoE or OLMoE.
Checkpoints are the Hugging Face hub's own: config.json, model.safetensors (or shards with an index), tokenizer.json.

What the project adds is one seam, `choose_k(layer, x, probs) -> k`: a callable that says how many experts each token runs.
Without it the model runs its own top-k. The model keeps nothing about a pass; whoever wants a record brings a callable
that records.

The same letters in every file:
    B batch, T time, P = B*T tokens, C channels, H heads, D width of a head, V vocabulary
    N routed experts, K the model's own top-k, F hidden width of one expert, L layers with a router (MoE layers)

Read on in this order: model.py -> moe_dispatch.py -> allocator.py -> ppo.py -> train.py -> bench.py.
"""
import codecs
import hashlib
import json
import math
import os
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F

import moe_dispatch


class InputError(ValueError):
    """A wrong input, told in one line: what, where, what to do. The scripts print it and exit with status 2."""


# ================================================================ configuration

FAMILIES = 'mixtral', 'qwen2_moe', 'deepseek', 'olmoe', 'qwen3_moe'


@dataclass
class Config:
    """The sizes and switches of a model. `from_hf` reads a hub config.json, `to_hf` writes one."""
    model_type: str = 'mixtral'
    n_vocab: int = 1024         # V
    dim: int = 128              # C
    n_layers: int = 6           # all layers, with or without a router
    n_heads: int = 4            # H, query heads
    n_kv_heads: int = 2         # key and value heads, each shared by H / n_kv_heads query heads
    head_dim: int = 32          # D
    n_experts: int = 16         # N
    top_k: int = 4              # K
    expert_dim: int = 96        # F
    norm_topk: bool = True      # do the K kept router weights sum to 1?
    shared_dim: int = 0         # hidden width of the expert that every token runs, 0 = none
    shared_gate: bool = False   # is that expert's output scaled by a sigmoid gate?
    dense_layers: tuple = ()    # layers with a plain MLP and no router
    dense_dim: int = 0          # hidden width of that MLP
    qkv_bias: bool = False
    qk_norm: str = ''           # RMSNorm of queries and keys: '' none, 'all' heads at once, each 'head'
    tie: bool = False           # does the head share the embedding's weights?
    rope_theta: float = 1e4
    norm_eps: float = 1e-5
    max_len: int = 2048         # longest sequence the model was made for, in tokens
    bos: int | None = None      # token ids
    eos: int | None = None

    @property
    def moe_layers(self):
        """The layers with a router, in order: L = len(moe_layers)."""
        return [i for i in range(self.n_layers) if i not in self.dense_layers]

    @classmethod
    def from_hf(cls, hf):
        """From a hub config.json (a dict), in the spellings of transformers 4 and 5. InputError names what is not supported."""
        kind = hf.get('model_type')
        if kind not in FAMILIES:
            raise InputError(f'config.json: model_type {kind!r} is not supported, only {", ".join(FAMILIES)}')
        qwen, deepseek = kind in ('qwen2_moe', 'qwen3_moe'), kind == 'deepseek'
        rope = hf.get('rope_parameters') or {}
        scaling = rope if rope.get('rope_type', 'default') != 'default' else hf.get('rope_scaling')
        window = hf.get('sliding_window') if not qwen or hf.get('use_sliding_window') else None
        for name, value in (('quantization_config', hf.get('quantization_config')), ('rope_scaling', scaling),
                            ('sliding_window', window), ('clip_qkv', hf.get('clip_qkv')),
                            ('attention_bias', hf.get('attention_bias'))):
            if value:
                raise InputError(f'config.json: {name} {value} is not supported')
        if hf.get('hidden_act', 'silu') != 'silu':
            raise InputError(f'config.json: hidden_act {hf["hidden_act"]!r} is not supported, only silu')
        try:
            n_layers, dim, heads = hf['num_hidden_layers'], hf['hidden_size'], hf['num_attention_heads']
            if n_layers > 1000:                                # a damaged file; each layer becomes a Python object
                raise InputError(f'config.json: num_hidden_layers {n_layers} is more than any model has')
            layers = range(n_layers)
            if qwen:
                step, plain = hf.get('decoder_sparse_step', 1), hf.get('mlp_only_layers') or []
                dense = tuple(i for i in layers if i in plain or (i + 1) % step)
            elif deepseek:
                dense = tuple(i for i in layers if i < hf.get('first_k_dense_replace', 0) or i % hf.get('moe_layer_freq', 1))
            else:
                dense = ()
            expert_dim = hf['moe_intermediate_size' if qwen or deepseek else 'intermediate_size']
            experts = hf.get('num_local_experts') or hf.get('num_experts') or hf['n_routed_experts']
            shared = {'qwen2_moe': hf.get('shared_expert_intermediate_size') or 0,
                      'deepseek': (hf.get('n_shared_experts') or 0) * expert_dim}.get(kind, 0)
            config = cls(
                kind, hf['vocab_size'], dim, n_layers, heads, hf.get('num_key_value_heads') or heads,
                hf.get('head_dim') or dim // heads, experts, hf['num_experts_per_tok'], expert_dim,
                norm_topk=kind == 'mixtral' or hf.get('norm_topk_prob', False), shared_dim=shared,
                shared_gate=kind == 'qwen2_moe' and shared > 0, dense_layers=dense,
                dense_dim=hf['intermediate_size'] if dense else 0, qkv_bias=kind == 'qwen2_moe' and hf.get('qkv_bias', True),
                qk_norm={'olmoe': 'all', 'qwen3_moe': 'head'}.get(kind, ''), tie=hf.get('tie_word_embeddings', False),
                rope_theta=rope.get('rope_theta') or hf.get('rope_theta', 10000.0), norm_eps=hf['rms_norm_eps'],
                max_len=hf['max_position_embeddings'], bos=hf.get('bos_token_id'), eos=hf.get('eos_token_id'))
        except KeyError as e:
            raise InputError(f'config.json: the field {e} is missing') from None
        except (TypeError, ZeroDivisionError) as e:
            raise InputError(f'config.json: a field has a value that makes no sense ({e})') from None
        sizes = ('n_vocab', 'dim', 'n_layers', 'n_heads', 'n_kv_heads', 'head_dim', 'n_experts', 'top_k', 'expert_dim')
        for name in sizes:
            if type(value := getattr(config, name)) is not int or value < 1:
                raise InputError(f'config.json: {name} is {value!r}, it must be a whole number above 0')
        if config.top_k > config.n_experts or heads % config.n_kv_heads or config.head_dim % 2:
            raise InputError('config.json: top_k above the number of experts, heads that do not divide, or an odd head_dim')
        return config

    def to_hf(self):
        """The hub config.json (a dict) of a mixtral model, as transformers reads it."""
        assert self.model_type == 'mixtral', self.model_type
        return {
            'architectures': ['MixtralForCausalLM'], 'model_type': 'mixtral', 'vocab_size': self.n_vocab,
            'hidden_size': self.dim, 'num_hidden_layers': self.n_layers, 'num_attention_heads': self.n_heads,
            'num_key_value_heads': self.n_kv_heads, 'head_dim': self.head_dim, 'num_local_experts': self.n_experts,
            'num_experts_per_tok': self.top_k, 'intermediate_size': self.expert_dim, 'hidden_act': 'silu',
            'tie_word_embeddings': self.tie, 'rope_theta': self.rope_theta, 'rms_norm_eps': self.norm_eps,
            'max_position_embeddings': self.max_len, 'sliding_window': None, 'bos_token_id': self.bos,
            'eos_token_id': self.eos}


# ================================================================ the transformer, leaves first

class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; the division in fp32, the product in x's dtype, as the published models."""

    def __init__(self, n, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rope_table(config, positions, dtype):
    """cos and sin (T,D) of the rotary angles of positions (T,); computed in fp32."""
    D = config.head_dim
    frequency = 1 / config.rope_theta ** (torch.arange(0, D, 2, device=positions.device).float() / D)    # (D/2,)
    angle = positions.float()[:, None] * frequency                                              # (T,D/2)
    angle = torch.cat([angle, angle], dim=-1)                                                   # (T,D)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    """Rotary positions on x (B,H,T,D): channel i of the first half turns with channel i of the second ("rotate-half")."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class Cache:
    """Keys and values of the tokens seen so far, (layers, B, kv heads, max_len, D) each, filled up to `length`."""

    def __init__(self, config, B, max_len, device, dtype):
        shape = config.n_layers, B, config.n_kv_heads, max_len, config.head_dim
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.length = 0

    def positions(self, T):
        """The positions (T,) of the next T tokens."""
        return torch.arange(self.length, self.length + T, device=self.k.device)

    def mask(self, T):
        """Which of the S tokens seen the next T may look at, (T,S) bool; None where plain causal attention says it."""
        if T == 1 or self.length == 0:
            return None
        return torch.ones(T, self.length + T, dtype=torch.bool, device=self.k.device).tril(self.length)

    def extend(self, layer, k, v):
        """Write k, v (B,kv heads,T,D) behind the tokens seen so far; return all keys and values of the layer."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length:end], self.v[layer, :, :, self.length:end] = k, v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def advance(self, T):
        self.length += T


class StaticCache:
    """A filled Cache taken over for decoding token by token, its length a number on the device.

    Every step is the same kernels over the same memory (attention over all max_len places, the empty ones masked), so a
    CUDA graph can hold one. The methods are those of Cache, with T = 1.
    """

    def __init__(self, cache):
        self.k, self.v = cache.k, cache.v
        self.length = torch.tensor([cache.length], device=cache.k.device)                       # (1,)
        self.places = torch.arange(cache.k.shape[3], device=cache.k.device)                     # (max_len,)

    def positions(self, T):
        return self.length

    def mask(self, T):
        return self.places[None] <= self.length                                                 # (1,max_len)

    def extend(self, layer, k, v):
        self.k[layer].index_copy_(2, self.length, k)
        self.v[layer].index_copy_(2, self.length, v)
        return self.k[layer], self.v[layer]

    def advance(self, T):
        self.length += T                                       # in place: a replayed graph counts on


class Attention(nn.Module):
    """Causal self-attention with grouped queries."""

    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.dim, c.n_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.n_heads * c.head_dim, c.dim, bias=False)
        self.qk_norm = c.qk_norm
        if c.qk_norm:
            head = c.qk_norm == 'head'
            self.q_norm = RMSNorm(c.head_dim if head else c.n_heads * c.head_dim, c.norm_eps)
            self.k_norm = RMSNorm(c.head_dim if head else c.n_kv_heads * c.head_dim, c.norm_eps)

    def forward(self, x, rope, mask, layer, cache):
        B, T, C = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.qk_norm == 'all':
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (z.view(B, T, -1, self.head_dim).transpose(1, 2) for z in (q, k, v))          # (B,heads,T,D)
        if self.qk_norm == 'head':
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.extend(layer, k, v)                                                    # (B,kv heads,S,D), S seen
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and T > 1, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))                                 # (B,T,C)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). The dense layers and the shared expert."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """Router, routed experts, and the shared expert that some families add."""

    def __init__(self, c):
        super().__init__()
        self.top_k, self.norm_topk = c.top_k, c.norm_topk
        self.router = nn.Linear(c.dim, c.n_experts, bias=False)
        self.w_in = nn.Parameter(torch.empty(c.n_experts, 2 * c.expert_dim, c.dim))             # gate rows, then up rows
        self.w_out = nn.Parameter(torch.empty(c.n_experts, c.dim, c.expert_dim))
        self.shared = MLP(c.dim, c.shared_dim) if c.shared_dim else None
        self.shared_gate = nn.Linear(c.dim, 1, bias=False) if c.shared_gate else None

    def forward(self, x, layer, choose_k):                                                      # x (P,C)
        probs = F.softmax(self.router(x), dim=-1, dtype=torch.float32)                          # (P,N)
        if choose_k is None:
            k_max, k = self.top_k, torch.full((len(x),), self.top_k, device=x.device)
        else:
            k_max, k = choose_k.k_max, choose_k(layer, x, probs)                                # (P,)
        select = getattr(choose_k, 'select', moe_dispatch.select)
        ids, weights = select(probs, k, k_max, self.norm_topk)                                  # (P,k_max) both
        w_in, w_out = self.w_in, self.w_out
        if torch.is_autocast_enabled(x.device.type):           # grouped matmuls are not among what autocast knows
            x, w_in, w_out = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, w_in, w_out))
        y = moe_dispatch.moe(x, ids, weights, k, w_in, w_out)                                   # (P,C)
        if self.shared is not None:
            shared = self.shared(x)
            y = y + (shared if self.shared_gate is None else F.sigmoid(self.shared_gate(x)) * shared)
        return y


class Layer(nn.Module):
    def __init__(self, c, i):
        super().__init__()
        self.i, self.dense = i, i in c.dense_layers
        self.input_layernorm = RMSNorm(c.dim, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.dim, c.norm_eps)
        self.mlp = MLP(c.dim, c.dense_dim) if self.dense else MoE(c)

    def forward(self, x, rope, mask, cache, moe_layer, choose_k):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, self.i, cache)
        h = self.post_attention_layernorm(x)
        if self.dense:
            return x + self.mlp(h)
        return x + self.mlp(h.flatten(0, 1), moe_layer, choose_k).view_as(x)


class Transformer(nn.Module):
    """The language model. `choose_k` is the seam: see `forward`."""
    tokens_per_visit = 1            # how many tokens `hidden_of` should be given at least, where there are so many

    def __init__(self, config):
        super().__init__()
        self.config = config
        # weights come from a file or from train.py; nn.Embedding's own start would import half of torch on the meta device
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.n_vocab, config.dim), freeze=False)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.n_vocab, bias=False)
        self.tie()

    def tie(self):
        """Let the head share the embedding's weights where the config says so; `to_empty` gives each its own memory."""
        if self.config.tie:
            self.lm_head.weight = self.embed_tokens.weight

    def visit(self):
        """The layers in order."""
        return iter(self.layers)

    def hidden_of(self, passes, cache=None):
        """[(tokens (B,T) int64, choose_k), ..] -> the last hidden states (B,T,C) of each, what the head reads.

        All passes go through a layer before any goes on to the next, so that they share what bringing its weights costs.
        """
        T = max(tokens.shape[1] for tokens, _ in passes)
        xs = [self.embed_tokens(tokens) for tokens, _ in passes]                                # (B,T,C) each
        positions = torch.arange(T, device=self.device) if cache is None else cache.positions(T)    # (T,)
        rope = rope_table(self.config, positions, xs[0].dtype)                                  # cos and sin (T,D)
        ropes = [[table[:x.shape[1]] for table in rope] for x in xs]                            # passes may differ in T
        mask = None if cache is None else cache.mask(T)
        moe_layer = 0
        for layer in self.visit():
            for i, (_, choose_k) in enumerate(passes):
                xs[i] = layer(xs[i], ropes[i], mask, cache, moe_layer, choose_k)
            moe_layer += not layer.dense
        if cache is not None:
            cache.advance(T)
        return [self.norm(x) for x in xs]

    def hidden(self, tokens, choose_k=None, cache=None):
        """The last hidden states (B,T,C) of one pass. Arguments as in `forward`."""
        return self.hidden_of([(tokens, choose_k)], cache)[0]

    def forward(self, tokens, choose_k=None, cache=None):
        """tokens (B,T) int64 -> logits (B,T,V) in the model's dtype.

        choose_k(layer, x (P,C), probs (P,N)) -> k (P,) integer in 1..choose_k.k_max decides how many experts each token
        runs in MoE layer 0..L-1; x is what the router reads, probs its fp32 softmax. None: the model's own K. A policy with
        a method `select` weighs the experts itself (allocator.py:SoftMixture).
        cache: a `Cache` or `StaticCache`; the tokens are taken to follow those it has seen.
        """
        return self.lm_head(self.hidden(tokens, choose_k, cache))

    @property
    def device(self):
        return self.norm.weight.device

    @property
    def dtype(self):
        return self.norm.weight.dtype


# ---------------------------------------------------------------- a model whose weights are elsewhere

class Streamed(Transformer):
    """The same model with two layers' worth of memory: the layer at work, and the next one on its way.

    The layers' weights stay on the host: in page-locked memory if they fit there and the device is a GPU, else in their files.
    One thread fetches layer i + 1 while layer i computes, on a GPU over a side stream. The parameters of layer i are views into
    buffer i % 2, so they hold its weights only while `visit` is at layer i. A pass brings every weight over once, so a visit
    should be worth it: see `hidden_of` and `tokens_per_visit`. `stream` makes one.
    """
    tokens_per_visit = 2 ** 16      # of Mixtral-8x7B: so many tokens take an H100 longer than their layer's way over PCIe 5

    def prepare(self, source, dtype, device, pinned, progress):
        """Take the buffers. source(views): read those hub tensors from the files; pinned: keep all layers in page-locked memory."""
        sizes = [flat_size(layer) for layer in self.layers]
        take = lambda size, **where: torch.empty(size, dtype=dtype, **where)
        self.buffers = [take(max(sizes), device=device) for _ in range(2)]
        self.host = self.buffers                               # on a CPU the files are read into the buffers
        self.side = torch.cuda.Stream(device) if device.type == 'cuda' else None
        if self.side:
            self.host = [take(size, pin_memory=True) for size in (sizes if pinned else 2 * [max(sizes)])]
        for i, layer in enumerate(self.layers):
            lay_out(layer, self.host[i % len(self.host)])
        views = hub_tensors(self)                              # of the layers: in host memory
        self.places = [{name: view for name, view in views.items() if name.startswith(f'model.layers.{i}.')} for i in range(len(sizes))]
        for i, layer in enumerate(self.layers):
            lay_out(layer, self.buffers[i % 2])
        for module in (self.embed_tokens, self.norm, self.lm_head):
            module.to_empty(device=device)
        self.tie()
        layers = set().union(*self.places)
        source({name: view for name, view in hub_tensors(self).items() if name not in layers})
        self.pinned, self.source, self.copied = pinned, source, [None, None]
        self.thread = ThreadPoolExecutor(1)
        for i, place in enumerate(self.places if pinned else []):
            source(place)
            progress(sum(sizes[:i + 1]) * dtype.itemsize, sum(sizes) * dtype.itemsize)

    def fetch(self, i, free):
        """Bring layer i into its buffer, on CUDA after the event `free`; in the reading thread. Returns the event of its arrival."""
        if not self.pinned:
            if self.copied[i % 2]:
                self.copied[i % 2].synchronize()               # the host buffer has been copied, it may be written again
            self.source(self.places[i])
        if self.side:
            with torch.cuda.stream(self.side):
                self.side.wait_event(free)
                n = flat_size(self.layers[i])
                self.buffers[i % 2][:n].copy_(self.host[i % len(self.host)][:n], non_blocking=True)
                self.copied[i % 2] = self.side.record_event()
        return self.copied[i % 2]

    def ask_for(self, i):
        """The future of `fetch`: layer i may come as soon as the device has done what it was asked to do so far."""
        free = torch.cuda.current_stream(self.side.device).record_event() if self.side else None
        return self.thread.submit(self.fetch, i, free)

    def visit(self):
        assert not torch.is_grad_enabled(), 'a backward pass would find other weights in the buffers'
        coming = self.ask_for(0)
        for i, layer in enumerate(self.layers):
            copied = coming.result()
            if self.side:
                torch.cuda.current_stream(self.side.device).wait_event(copied)
            if i + 1 < len(self.layers):                       # layer i has not been asked for yet, so this waits for i - 1 only
                coming = self.ask_for(i + 1)
            yield layer


def padded(n):
    """The next multiple of 128 numbers, so that every weight in a flat buffer is aligned as its kernels want it."""
    return -(-n // 128) * 128


def flat_size(layer):
    """How many numbers a layer's weights take in a flat buffer."""
    return sum(padded(p.numel()) for p in layer.parameters())


def lay_out(layer, flat):
    """Let a layer's parameters be views into a flat buffer, one behind the other."""
    views, at = {}, 0
    for name, p in layer.named_parameters():
        views[name] = flat[at:at + p.numel()].view(p.shape)
        at += padded(p.numel())
    layer.load_state_dict(views, assign=True)
    layer.requires_grad_(False)


class Sharded(Transformer):
    """The same model over the ranks of torch.distributed: each keeps its part of every layer (torch's FSDP2), `shard` makes one.

    A layer is gathered from all ranks while the one before computes, and given up behind it. Embedding, last norm and head are
    on every rank. All ranks must visit together: the same number of calls of `hidden_of`, whatever is in them.
    """
    tokens_per_visit = 2 ** 14

    def visit(self):
        assert not torch.is_grad_enabled(), 'a backward pass would find the layers given up'
        coming = self.layers[0].unshard(async_op=True)
        for i, layer in enumerate(self.layers):
            coming.wait()
            if i + 1 < len(self.layers):
                coming = self.layers[i + 1].unshard(async_op=True)
            yield layer
            layer.reshard()


def own_rows(p):
    """(number of the first, rows): what this rank keeps of a parameter's first dimension; everything in a model that is not sharded."""
    if not hasattr(p, 'to_local'):
        return 0, p
    return first_row(len(p), p.device_mesh), p.to_local()


def first_row(n, mesh):
    """The first of n rows that this rank keeps: FSDP gives ceil(n / ranks) to each, and the last what is left."""
    return min(mesh.get_local_rank() * -(-n // mesh.size()), n)


class Decoder:
    """One decoding step after another behind a filled cache: step(new (B,1)) -> logits (B,V) fp32 of the next token.

    On CUDA, where torch has a grouped matmul without host sync, the third step is captured in a CUDA graph: from then on a
    step is one launch instead of hundreds. `choose_k` must then be free of host syncs too, as all of allocator.py are.
    """

    def __init__(self, model, choose_k, cache):
        self.model, self.choose_k, self.cache = model, choose_k, cache
        B, self.graph, self.steps = cache.k.shape[1], None, 0
        self.capture = type(model) is Transformer and moe_dispatch.native(cache.k) and B <= moe_dispatch.STATIC_TOKENS
        if self.capture:
            self.cache = StaticCache(cache)
            self.new = torch.zeros(B, 1, dtype=torch.long, device=cache.k.device)               # the graph's input

    def eager(self, new):
        return self.model.lm_head(self.model.hidden(new, self.choose_k, self.cache)[:, -1]).float()

    def __call__(self, new):
        self.steps += 1
        if not self.capture or self.steps < 3:                 # the first steps start up what must not start in a capture
            return self.eager(new)
        self.new.copy_(new)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):                 # records, does not run
                self.logits = self.eager(self.new)
        self.graph.replay()
        return self.logits


@torch.no_grad()
def generate_steps(model, tokens, n, choose_k=None, temperature=0.0, generator=None):
    """Yield the next n tokens after tokens (B,T), (B,1) each, with a KV cache. temperature 0 takes the most probable token."""
    B, T = tokens.shape
    cache = Cache(model.config, B, T + n, model.device, model.dtype)
    logits = model.lm_head(model.hidden(tokens, choose_k, cache)[:, -1]).float()                # (B,V)
    step = Decoder(model, choose_k, cache)
    for i in range(n):
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)                                               # (B,1)
        else:
            new = torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=generator)
        yield new
        if i + 1 < n:
            logits = step(new)


def generate(model, tokens, n, choose_k=None, temperature=0.0, generator=None):
    """Continue tokens (B,T) by n tokens -> (B,T+n). Arguments as in `generate_steps`."""
    return torch.cat([tokens, *generate_steps(model, tokens, n, choose_k, temperature, generator)], dim=1)


# ================================================================ checkpoints: safetensors in the hub's layout

DTYPES = dict(BOOL=torch.bool, U8=torch.uint8, I8=torch.int8, I16=torch.int16, I32=torch.int32, I64=torch.int64,
              F16=torch.float16, BF16=torch.bfloat16, F32=torch.float32, F64=torch.float64,
              F8_E4M3=torch.float8_e4m3fn, F8_E5M2=torch.float8_e5m2)


def write_whole(path, write):
    """Call write(f) on a new file and then rename it to `path`: a reader sees the old file or the new one, never a part.

    Of several ranks only rank 0 writes.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    path = Path(path)
    new = path.with_name(f'{path.name}.{os.getpid()}.new')
    try:
        with open(new, 'wb') as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def write_json(path, value):
    write_whole(path, lambda f: f.write(json.dumps(value, indent=1, ensure_ascii=False).encode()))


def write_safetensors(path, tensors, metadata=None):
    """Write {name: tensor} as a safetensors file: 8 bytes header length, JSON header, then the bytes of the tensors.

    Largest items first, so that every tensor is aligned to its item size. `metadata` is a {str: str} kept in the header.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header, end = {'__metadata__': {'format': 'pt', **(metadata or {})}}, 0
    for name in order:
        t = tensors[name]
        begin, end = end, end + t.numel() * t.dtype.itemsize
        header[name] = {'dtype': names[t.dtype], 'shape': list(t.shape), 'data_offsets': [begin, end]}
    head = json.dumps(header).encode()
    head += b' ' * (-len(head) % 8)

    def write(f):
        f.write(len(head).to_bytes(8, 'little') + head)
        for name in order:
            f.write(tensors[name].detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    write_whole(path, write)


def unique_keys(pairs):
    if len(d := dict(pairs)) != len(pairs):
        raise ValueError('a key appears twice')
    return d


def read_header(path):
    """({name: (dtype, shape, first byte, byte behind the last)} in the order of the file, metadata) of a safetensors file.

    Every number in the header is checked before it is used: the tensors must follow each other without hole or overlap
    and end where the file ends. InputError names the file and the tensor. Nothing is unpickled, values are not checked.
    """
    size = os.path.getsize(path)
    with open(path, 'rb') as f:
        n = int.from_bytes(f.read(8), 'little')
        if size < 8 or n > min(size - 8, 100_000_000):
            raise InputError(f'{path}: says its header has {n:,} bytes, but the file has {size:,}; fetch it again')
        raw = f.read(n)
    try:
        header = json.loads(raw.decode(), object_pairs_hook=unique_keys)
        metadata = header.pop('__metadata__', {})
        entries = sorted(header.items(), key=lambda item: item[1]['data_offsets'])
        layout, end = {}, 0
        for name, t in entries:
            if t['dtype'] not in DTYPES:
                raise ValueError(f'{name}: dtype {t["dtype"]!r} is not supported')
            dtype, shape, (begin, stop) = DTYPES[t['dtype']], t['shape'], t['data_offsets']
            if any(type(i) is not int or i < 0 for i in (*shape, begin, stop)) or begin != end \
                    or stop - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f'{name}: {t} does not follow byte {end}')
            layout[name] = dtype, shape, 8 + n + begin, 8 + n + stop
            end = stop
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise InputError(f'{path}: the header is damaged ({str(e)[:200]}); fetch it again') from None
    if 8 + n + end != size:
        raise InputError(f'{path}: the header describes {8 + n + end:,} bytes, the file has {size:,}; fetch it again')
    return layout, metadata


def read_safetensors(path):
    """({name: tensor}, metadata) over a private memory map of the file: pages are read when a tensor is first used."""
    layout, metadata = read_header(path)
    data = torch.from_file(str(path), shared=False, size=os.path.getsize(path), dtype=torch.uint8)
    tensors = {}
    for name, (dtype, shape, begin, stop) in layout.items():
        part = data[begin:stop]
        if begin % dtype.itemsize:                             # a writer need not align; view() must
            part = part.clone()
        tensors[name] = part.view(dtype).reshape(shape)
    return tensors, metadata


READERS = 4     # threads that read a file: one does not reach what a disk can give


def read_into(path, layout, views):
    """Read those tensors of a safetensors file that {name: view} names, straight into their places where dtype and device allow."""
    def read(name):
        (dtype, shape, begin, stop), view = layout[name], views[name]
        t = view if (view.dtype, view.device.type) == (dtype, 'cpu') else torch.empty(shape, dtype=dtype)
        place = memoryview(t.reshape(-1).view(torch.uint8).numpy())
        while begin < stop:                                    # the system reads at most 2 GB at once
            n = os.preadv(f.fileno(), [place[begin - stop:]], begin)
            if n == 0:
                raise InputError(f'{path}: {name} could not be read to its end; fetch the file again')
            begin += n
        if t is not view:
            view.copy_(t)

    with open(path, 'rb') as f, ThreadPoolExecutor(READERS) as readers:
        list(readers.map(read, (name for name in layout if name in views)))


def hub_tensors(model):
    """{the hub's name of a tensor: a view of our parameter}; the stacked experts are one tensor each on the hub.

    Of a `Sharded` model what this rank keeps: some of the experts, some rows of every other tensor.
    """
    c, views = model.config, {}
    mixtral = c.model_type == 'mixtral'
    gate, up, down = ('w1', 'w3', 'w2') if mixtral else ('gate_proj', 'up_proj', 'down_proj')
    spelling = [('.router.', '.gate.'), ('.shared_gate.', '.shared_expert_gate.'),
                ('.shared.', '.shared_experts.' if c.model_type == 'deepseek' else '.shared_expert.')]
    if mixtral:
        spelling.append(('.mlp.', '.block_sparse_moe.'))
    for name, p in model.named_parameters():                   # a tied head is listed once, as the embedding
        first, p = own_rows(p)
        name = name if name.startswith('lm_head') else 'model.' + name
        for ours, theirs in spelling:
            name = name.replace(ours, theirs)
        block = name.rpartition('.')[0]
        if name.endswith('.w_in'):
            for n, expert in enumerate(p, first):
                views[f'{block}.experts.{n}.{gate}.weight'] = expert[:c.expert_dim]
                views[f'{block}.experts.{n}.{up}.weight'] = expert[c.expert_dim:]
        elif name.endswith('.w_out'):
            for n, expert in enumerate(p, first):
                views[f'{block}.experts.{n}.{down}.weight'] = expert
        else:
            views[name] = p
    return views


def read_json(path):
    """A JSON file, or one clear InputError."""
    try:
        return json.loads(Path(path).read_text(encoding='utf-8'))
    except OSError as e:
        raise InputError(f'{path}: {e.strerror or e}') from None
    except (ValueError, RecursionError) as e:
        raise InputError(f'{path}: not JSON ({str(e)[:100]})') from None


def save(model, folder):
    """Write config.json and model.safetensors as the hub has them: transformers opens the folder. In the model's dtype."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / 'model.safetensors', {n: t.detach() for n, t in hub_tensors(model).items()})
    dtype = str(model.dtype).removeprefix('torch.')
    write_json(folder / 'config.json', {**model.config.to_hf(), 'torch_dtype': dtype})     # last: a folder with a config is complete


# short name: (the hub's id, size in GB)
CHECKPOINTS = {
    'mixtral-8x7b': ('mistralai/Mixtral-8x7B-v0.1', 93), 'mixtral-8x22b': ('mistralai/Mixtral-8x22B-v0.1', 281),
    'qwen1.5-moe': ('Qwen/Qwen1.5-MoE-A2.7B', 29), 'deepseek-moe-16b': ('deepseek-ai/deepseek-moe-16b-base', 33),
    'olmoe-1b-7b': ('allenai/OLMoE-1B-7B-0924', 14), 'qwen3-30b-a3b': ('Qwen/Qwen3-30B-A3B', 61)}


def find_checkpoint(name, config_only=False):
    """The folder of --ckpt: a folder itself, checkpoints/NAME, or the newest snapshot in the Hugging Face cache. InputError says how to get it."""
    if Path(name).is_dir():
        return Path(name)
    if name not in CHECKPOINTS:
        raise InputError(f'--ckpt {name}: no such folder, and not one of {", ".join(CHECKPOINTS)}')
    hub_id, size = CHECKPOINTS[name]
    home = os.environ.get('HF_HOME') or Path.home() / '.cache' / 'huggingface'
    cache = Path(os.environ.get('HF_HUB_CACHE') or Path(home) / 'hub')
    snapshots = (cache / f'models--{hub_id.replace("/", "--")}' / 'snapshots').glob('*/config.json')
    places = [Path('checkpoints') / name, *(p.parent for p in sorted(snapshots, key=os.path.getmtime, reverse=True))]
    for place in places:
        if (place / 'config.json').exists():
            return place
    what, files = ('its config', 'config.json') if config_only else (f'its {size} GB', "--include '*.json' 'model*.safetensors'")
    raise InputError(f'--ckpt {name}: neither in {places[0]} nor in {cache}; get {what} with: hf download {hub_id} {files} --local-dir {places[0]}')


def read_config(folder):
    """The Config of a checkpoint folder; InputError names the file."""
    hf = read_json(Path(folder) / 'config.json')
    if not isinstance(hf, dict):
        raise InputError(f'{folder}/config.json: not a JSON object')
    try:
        return Config.from_hf(hf)
    except InputError as e:
        raise InputError(f'{folder}/{e}') from None


def weight_files(folder):
    """{file name: [the tensors it should hold] or None for all}: what the index says, or the one model.safetensors."""
    index = folder / 'model.safetensors.index.json'
    if not index.exists():
        if not (folder / 'model.safetensors').exists():
            pickles = sorted(p.name for p in folder.glob('*.bin')) + sorted(p.name for p in folder.glob('*.pt'))
            hint = f'; {pickles[0]} is a pickle, which is never read: convert it' if pickles else ''
            raise InputError(f'{folder}: no model.safetensors and no model.safetensors.index.json{hint}')
        return {'model.safetensors': None}
    places = read_json(index)
    places = places.get('weight_map') if isinstance(places, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise InputError(f'{index}: no weight_map of tensor names to file names')
    files = {}
    for name, file in places.items():
        if Path(file).name != file or '\\' in file or not file.endswith('.safetensors'):
            raise InputError(f'{index}: {name} is said to be in {file!r}, which is no .safetensors file of this folder')
        files.setdefault(file, []).append(name)
    return files


def open_checkpoint(folder, dtype, kind):
    """(model on the meta device, {path: layout}) of a hub-format folder whose weights are all there; else InputError names what is wrong."""
    config = read_config(folder)
    files = weight_files(folder)
    for file in files:
        if not (folder / file).exists():
            raise InputError(f'{folder / file}: missing, though the index names it; fetch it again')
    with torch.device('meta'):
        model = kind(config).to(dtype).requires_grad_(False)
    layouts = {file: read_header(folder / file)[0] for file in files}
    check_tensors(folder, files, layouts, {name: view.shape for name, view in hub_tensors(model).items()}, config.model_type)
    return model, {folder / file: layout for file, layout in layouts.items()}


def load(folder, dtype=torch.float32, device='cpu', progress=lambda done, total: None):
    """The Transformer in a hub-format folder, frozen. InputError names the file or tensor that is wrong.

    Every tensor is read once, from its file to its place in the stacked weights, in the wanted dtype and device.
    `progress(bytes so far, of all)` is called after each file.
    """
    model, layouts = open_checkpoint(Path(folder), dtype, Transformer)
    model = model.to_empty(device=device)
    model.tie()
    views, done, total = hub_tensors(model), 0, sum(map(os.path.getsize, layouts))
    for path, layout in layouts.items():
        read_ahead(path)
        read_into(path, layout, views)
        done += os.path.getsize(path)
        progress(done, total)
    return model


def fingerprint(folder):
    """A digest of a checkpoint folder without reading all of it: config, tokenizer, and of each weight file the size, the header and 64 places."""
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(folder).iterdir() if p.name in ('config.json', 'tokenizer.json') or p.suffix == '.safetensors'):
        size = os.path.getsize(path)
        digest.update(f'{path.name} {size} '.encode())
        with open(path, 'rb') as f:
            for i in range(65):
                f.seek(i * max(0, size - 4096) // 64)
                digest.update(f.read(4096))
    return digest.hexdigest()


def stream(folder, dtype=torch.float32, device='cpu', pinned=False, progress=lambda done, total: None):
    """The `Streamed` model in a hub-format folder, frozen. `pinned`: all layers in page-locked host memory, for a CUDA device."""
    model, layouts = open_checkpoint(Path(folder), dtype, Streamed)

    def source(views):
        for path, layout in layouts.items():
            if views.keys() & layout.keys():
                read_into(path, layout, views)
    model.prepare(source, dtype, torch.device(device), pinned, progress)
    return model


def read_ahead(path):
    """Ask the system to fetch the whole file while we copy its first tensors; a map alone fetches little at a time."""
    if hasattr(os, 'posix_fadvise'):
        with open(path, 'rb') as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def shard(folder, dtype, device, progress=lambda done, total: None):
    """The `Sharded` model in a hub-format folder, frozen; each rank reads only its part of the files."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    model, layouts = open_checkpoint(Path(folder), dtype, Sharded)
    mesh = init_device_mesh(torch.device(device).type, (torch.distributed.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=False)             # `visit` does
    model = model.to_empty(device=device)
    model.tie()
    views = hub_tensors(model)
    for i, (path, layout) in enumerate(layouts.items(), 1):
        for name in views.keys() & layout.keys():
            (dtype, shape, begin, stop), mine = layout[name], views[name]
            if mine.shape != torch.Size(shape):                # some rows of this tensor
                row, first = (stop - begin) // shape[0], first_row(shape[0], mesh)
                layout[name] = dtype, mine.shape, begin + first * row, begin + (first + len(mine)) * row
        read_into(path, layout, views)
        progress(i, len(layouts))
    return model


def check_tensors(folder, files, layouts, expected, model_type):
    """Compare the headers of all files with the expected {name: shape}, before any memory of the model's size is taken."""
    left = dict(expected)
    for file, names in files.items():
        path, tensors = folder / file, layouts[file]
        if names is not None and (wrong := sorted(set(names) ^ tensors.keys())):
            raise InputError(f'{path}: tensor {wrong[0]} is {"missing" if wrong[0] in names else "not in the index"}')
        for name, (dtype, shape, _, _) in tensors.items():
            if name.endswith('rotary_emb.inv_freq'):           # old files carry the table that rope_table computes
                continue
            if name not in left:
                raise InputError(f'{path}: tensor {name} is not expected in a {model_type} model of this config.json')
            if torch.Size(shape) != left[name]:
                raise InputError(f'{path}: {name} has shape {shape}, config.json says {list(left[name])}')
            if not dtype.is_floating_point or dtype.itemsize == 1:
                raise InputError(f'{path}: {name} is {dtype}; quantised weights are not supported')
            del left[name]
    if left:
        raise InputError(f'{folder}: tensor {min(left)} is missing from the weight files')


# ================================================================ tokenizers: the hub's tokenizer.json on tiktoken

def byte_characters():
    """GPT-2's printable stand-in for each byte, as tokenizer.json spells byte-level pieces. [65] -> 'A', [32] -> 'Ġ'."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [b for b in range(256) if b not in own]
    return [chr(b) if b in own else chr(256 + other.index(b)) for b in range(256)]


# what the hub's files leave to the library: GPT-2's pattern, and what Unicode (but not Python's re) calls white space
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WHITE_SPACE = r'[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]'


def isolate(pieces, pattern):
    """Cut every piece at the matches of a compiled pattern; matches and what lies between them become pieces."""
    out = []
    for piece in pieces:
        at = 0
        for match in pattern.finditer(piece):
            out += [piece[at:match.start()], match[0]]
            at = match.end()
        out.append(piece[at:])
    return [piece for piece in out if piece]


class Tokenizer:
    """Text to token ids and back, from tokenizer.json (and bos, eos of config.json) in a checkpoint folder.

    tiktoken merges whichever pair of neighbours has the lowest rank, so every kind of BPE is a table of ranks (bytes -> rank)
    and, because a rank need not be an id, a table rank -> ids. Three kinds: SentencePiece with byte fallback (Mixtral),
    byte-level with one pattern (Qwen, OLMoE, our own), byte-level behind several splits (DeepSeek).
    """

    def __init__(self, folder):
        path = Path(folder) / 'tokenizer.json'
        hf, config = read_json(path), read_json(Path(folder) / 'config.json')
        self.bos = config.get('bos_token_id')
        self.eos = config.get('eos_token_id')
        if isinstance(self.eos, list):                         # chat models may name several
            self.eos = self.eos[0]
        self.ranks, self.ids_of_rank, self.bytes_of_id, self.stages = {}, [], {}, []
        try:
            vocab = hf['model']['vocab']
            if hf['model'].get('type', 'BPE') != 'BPE':
                raise InputError(f'{path}: a {hf["model"]["type"]} tokenizer is not supported, only BPE')
            merges = [tuple(m.split(' ')) if isinstance(m, str) else tuple(m) for m in hf['model']['merges']]
            self.spm = bool(hf['model'].get('byte_fallback'))
            normalizer = hf.get('normalizer') or {}
            self.nfc = normalizer.get('type') == 'NFC'
            pattern = self.read_spm(vocab, merges) if self.spm else self.read_byte_level(vocab, merges, hf['pre_tokenizer'])
            self.added = {token['content']: token['id'] for token in hf.get('added_tokens', [])}
            always = [token['content'] for token in hf.get('added_tokens', []) if not token['special']]
        except (KeyError, TypeError, AttributeError, IndexError) as e:
            raise InputError(f'{path}: not a tokenizer.json this project can read ({type(e).__name__}: {e})') from None
        for content, i in self.added.items():
            self.bytes_of_id[i] = content.encode()
        longest_first = lambda tokens: re.compile('|'.join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r'(?!)')
        self.match_added, self.match_always = longest_first(self.added), longest_first(always)
        self.bpe = tiktoken.Encoding(str(path), pat_str=pattern, mergeable_ranks=self.ranks, special_tokens={})
        self.n_vocab = max(self.bytes_of_id) + 1

    def add_rank(self, key, ids):
        if key not in self.ranks:
            self.ranks[key] = len(self.ranks)
            self.ids_of_rank.append(ids)

    def read_byte_level(self, vocab, merges, pre):
        """Ranks: the single bytes, then the merges in order. Returns tiktoken's pattern; further splits go to self.stages."""
        byte_of = {c: b for b, c in enumerate(byte_characters())}
        as_bytes = lambda piece: bytes(byte_of[c] for c in piece)
        for c in byte_characters():
            # a byte that never occurs in UTF-8 may have no token; tiktoken wants a rank for each
            self.add_rank(as_bytes(c), [vocab[c]] if c in vocab else [])
        for left, right in merges:
            self.add_rank(as_bytes(left + right), [vocab[left + right]])
        self.bytes_of_id = {i: as_bytes(piece) for piece, i in vocab.items() if all(c in byte_of for c in piece)}
        steps = pre['pretokenizers'] if pre['type'] == 'Sequence' else [pre]
        patterns = [step['pattern']['Regex'] for step in steps if step['type'] == 'Split']
        digits = any(step['type'] == 'Digits' for step in steps)
        if len(patterns) == 1 and not digits:
            return patterns[0]
        if not patterns and not digits:
            return GPT2_PATTERN
        self.stages = [re.compile(pattern.replace(r'\s', WHITE_SPACE)) for pattern in patterns]
        if digits:
            numbers = (chr(c) for c in range(0x110000) if unicodedata.category(chr(c))[0] == 'N')
            self.stages.append(re.compile('[' + ''.join(numbers) + ']'))
        return r'[\s\S]+'

    def read_spm(self, vocab, merges):
        """SentencePiece BPE with byte fallback: characters first, then words by the order of the merges, not of the ids.

        A character that is no piece falls back to byte tokens, so its bytes must not merge half way: every character piece
        comes before the words, each behind pretended tokens for its unfinished prefixes.
        """
        byte_id = [vocab[f'<0x{b:02X}>'] for b in range(256)]
        for b in range(256):
            c = chr(b).replace(' ', '▁')
            self.add_rank(bytes([b]), [vocab[c] if b < 128 and c in vocab else byte_id[b]])
        for piece, i in vocab.items():
            if len(piece) == 1 and piece != '▁':
                key = piece.encode()
                for n in range(2, len(key)):
                    self.add_rank(key[:n], [byte_id[b] for b in key[:n]])
                self.add_rank(key, [i])
        for left, right in merges:
            self.add_rank((left + right).replace('▁', ' ').encode(), [vocab[left + right]])
        self.bytes_of_id = {i: piece.replace('▁', ' ').encode() for piece, i in vocab.items()}
        self.bytes_of_id.update({i: bytes([b]) for b, i in enumerate(byte_id)})
        return r' *[^ ]+| +'                                   # a run of spaces stays with the word behind it

    def encode(self, text, special=False):
        """Token ids of a text, no bos. `special` obeys special tokens spelled in the text; without it they are plain text."""
        match, ids, at = self.match_added if special else self.match_always, [], 0
        for found in match.finditer(text):
            ids += self.encode_plain(text[at:found.start()]) + [self.added[found[0]]]
            at = found.end()
        return ids + self.encode_plain(text[at:])

    def encode_plain(self, text):
        if not text:
            return []
        if self.spm:
            text = ' ' + text.replace('▁', ' ')                # SentencePiece's dummy prefix
        if self.nfc:
            text = unicodedata.normalize('NFC', text)
        pieces = [text]
        for stage in self.stages:
            pieces = isolate(pieces, stage)
        return [i for piece in pieces for rank in self.bpe.encode_ordinary(piece) for i in self.ids_of_rank[rank]]

    def decode(self, ids):
        """The text of token ids; ids beyond the vocabulary give nothing, bytes that are no UTF-8 give U+FFFD."""
        text = b''.join(self.bytes_of_id.get(int(i), b'') for i in ids).decode('utf-8', errors='replace')
        return text[1:] if self.spm and text.startswith(' ') else text

    def stream(self, ids, first=True):
        """The text of an iterable of ids as it comes, piece by piece; a character appears when its last byte is there.

        `first`: the ids begin a text, so that SentencePiece's space in front of it is dropped.
        """
        decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
        first = first and self.spm
        for i in ids:
            text = decoder.decode(self.bytes_of_id.get(int(i), b''))
            if first and text:
                text, first = text.removeprefix(' '), False
            yield text
        yield decoder.decode(b'', final=True)
