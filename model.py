"""model.py: a mixture-of-experts transformer.

The Mixtral architecture, leaves first: RMSNorm, rotary positions (rotate-half), grouped-query attention, and
in place of one MLP a router over N SwiGLU experts of which each token runs the K most probable. Eight
switches of `Config` (head_dim, qkv_bias, qk_norm, norm_topk, shared_dim, shared_gate, dense_layers, tie) turn
it into Qwen-MoE, DeepSeek-MoE or OLMoE. Weights come from hub/checkpoint.py or base/pretrain.py.

What the project adds is one seam, `choose_k(layer, x, probs) -> k`: a callable that says how many experts
each token runs. Without it the model runs its own top-k. The model keeps nothing about a pass; whoever wants
a record brings a callable that records.

The same letters in every file:
    B batch, T time, P = B*T tokens, C channels, H heads, D width of a head, V vocabulary
    N routed experts, K the model's own top-k, F hidden width of one expert
    L layers with a router (MoE layers)

Read on in this order: model.py -> moe_dispatch.py -> allocator.py -> ppo.py -> train.py -> bench.py.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import moe_dispatch


# ================================================================ configuration

@dataclass
class Config:
    """The sizes and switches of a model. hub/config.py reads and writes it as the hub's config.json."""
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


# ================================================================ the transformer, leaves first

class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; the division in fp32, the product in x's dtype.

    In fp32 and without gradients that is torch's own, one call instead of six.
    """

    def __init__(self, n, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.eps = eps

    def forward(self, x):
        if x.dtype == torch.float32 and not torch.is_grad_enabled():
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rope_table(config, positions, dtype):
    """cos and sin (T,D) of the rotary angles of positions (T,), sin signed for `rotate`; computed in fp32."""
    D = config.head_dim
    pairs = torch.arange(0, D, 2, device=positions.device).float()          # (D/2,)
    frequency = 1 / config.rope_theta ** (pairs / D)                        # (D/2,)
    angle = positions.float()[:, None] * frequency                          # (T,D/2)
    sin = angle.sin()
    return torch.cat([angle, angle], dim=-1).cos().to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)


def rotate(x, cos, sin):
    """Rotary positions on x (B,H,T,D): channel i of the first half turns with channel i of the second."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class Cache:
    """Keys and values (layers, B, kv heads, max_len, D) of the tokens seen so far, filled up to `length`.

    AssertionError where more tokens come than it has places for.
    """

    def __init__(self, config, B, max_len, device, dtype):
        shape = config.n_layers, B, config.n_kv_heads, max_len, config.head_dim
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.table = rope_table(config, torch.arange(max_len, device=device), dtype)        # (max_len,D) both
        self.length = 0

    def rope(self, T):
        """cos and sin (T,D) of the next T tokens."""
        end = self.length + T
        assert end <= self.k.shape[3], f'{end} tokens in a cache of {self.k.shape[3]}'
        return [table[self.length:end] for table in self.table]

    def mask(self, T):
        """Which of the S tokens seen the next T may look at, (T,S) bool; None: plain causal attention."""
        if T == 1 or self.length == 0:
            return None
        return torch.ones(T, self.length + T, dtype=torch.bool, device=self.k.device).tril(self.length)

    def extend(self, layer, k, v):
        """Write k, v (B,kv heads,T,D) behind what was seen; return all keys and values of the layer."""
        T, seen = k.shape[2], []
        for places, new in ((self.k[layer], k), (self.v[layer], v)):
            places.narrow(2, self.length, T).copy_(new)
            seen.append(places.narrow(2, 0, self.length + T))
        return seen

    def advance(self, T):
        self.length += T


class StaticCache:
    """A filled Cache taken over for decoding token by token, its length a number on the device.

    Every step is the same kernels over the same memory (attention over all max_len places, the empty ones
    masked), so a CUDA graph can hold one. The methods are those of Cache, with T = 1.
    """

    def __init__(self, cache):
        self.k, self.v, self.table = cache.k, cache.v, cache.table
        self.length = torch.tensor([cache.length], device=cache.k.device)   # (1,)
        self.places = torch.arange(cache.k.shape[3], device=cache.k.device)  # (max_len,)

    def rope(self, T):
        return [table.index_select(0, self.length) for table in self.table]

    def mask(self, T):
        return self.places[None] <= self.length                             # (1,max_len)

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
        q_dim, kv_dim = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        self.q_proj = nn.Linear(c.dim, q_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.dim, kv_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.dim, kv_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(q_dim, c.dim, bias=False)
        self.qk_norm = c.qk_norm
        if c.qk_norm:
            each = c.qk_norm == 'head'
            self.q_norm = RMSNorm(c.head_dim if each else q_dim, c.norm_eps)
            self.k_norm = RMSNorm(c.head_dim if each else kv_dim, c.norm_eps)

    def forward(self, x, rope, mask, layer, cache):
        B, T, C = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.qk_norm == 'all':
            q, k = self.q_norm(q), self.k_norm(k)
        elif self.qk_norm == 'head':
            q = self.q_norm(q.view(B, T, -1, self.head_dim)).flatten(2)
            k = self.k_norm(k.view(B, T, -1, self.head_dim)).flatten(2)
        qk = torch.cat([q, k], -1).view(B, T, -1, self.head_dim).transpose(1, 2)            # (B,heads,T,D)
        v = v.view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = rotate(qk, *rope).tensor_split((qk.shape[1] - v.shape[1],), dim=1)
        if cache is not None:
            k, v = cache.extend(layer, k, v)                                # (B,kv heads,S,D), S seen
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and T > 1, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))             # (B,T,C)


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
        # the experts, stacked; in w_in the rows of gate, then those of up
        self.w_in = nn.Parameter(torch.empty(c.n_experts, 2 * c.expert_dim, c.dim))
        self.w_out = nn.Parameter(torch.empty(c.n_experts, c.dim, c.expert_dim))
        self.shared = MLP(c.dim, c.shared_dim) if c.shared_dim else None
        self.shared_gate = nn.Linear(c.dim, 1, bias=False) if c.shared_gate else None

    def forward(self, x, layer, choose_k):                                  # x (P,C)
        probs = F.softmax(self.router(x), dim=-1, dtype=torch.float32)      # (P,N)
        if choose_k is None:
            k_max, k = self.top_k, None                                     # all of them
        else:
            k_max, k = choose_k.k_max, choose_k(layer, x, probs)            # (P,)
        select = getattr(choose_k, 'select', moe_dispatch.select)         # a policy may weigh the experts too
        ids, weights = select(probs, k, k_max, self.norm_topk)              # (P,k_max) both
        w_in, w_out = self.w_in, self.w_out
        if torch.is_autocast_enabled(x.device.type):                        # which knows no grouped matmul
            dtype = torch.get_autocast_dtype(x.device.type)
            x, w_in, w_out = x.to(dtype), w_in.to(dtype), w_out.to(dtype)
        y = moe_dispatch.moe(x, ids, weights, k, w_in, w_out)               # (P,C)
        if self.shared is not None:
            shared = self.shared(x)
            if self.shared_gate is not None:
                shared = F.sigmoid(self.shared_gate(x)) * shared
            y = y + shared
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
    tokens_per_visit = 1            # how many tokens `hidden_of` should be given at least

    def __init__(self, config):
        super().__init__()
        self.config = config
        # nn.Embedding's own start values would import half of torch on the meta device
        empty = torch.empty(config.n_vocab, config.dim)
        self.embed_tokens = nn.Embedding.from_pretrained(empty, freeze=False)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.n_vocab, bias=False)
        self.tie()

    def tie(self):
        """Let the head share the embedding's weights if config says so; `to_empty` gives each its own."""
        if self.config.tie:
            self.lm_head.weight = self.embed_tokens.weight

    def visit(self):
        """The layers in order."""
        return iter(self.layers)

    def hidden_of(self, passes, cache=None):
        """[(tokens (B,T) int64, choose_k), ..] -> the last hidden states (B,T,C) of each, for the head.

        All passes go through a layer before any goes on to the next, and share the cost of having it there.
        """
        T = max(tokens.shape[1] for tokens, _ in passes)
        xs = [self.embed_tokens(tokens) for tokens, _ in passes]            # (B,T,C) each
        if cache is None:
            rope, mask = rope_table(self.config, torch.arange(T, device=self.device), xs[0].dtype), None
        else:
            rope, mask = cache.rope(T), cache.mask(T)         # cos and sin (T,D); (T,S) bool or None
        ropes = [[table[:x.shape[1]] for table in rope] for x in xs]        # passes may differ in T
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

        choose_k(layer, x (P,C), probs (P,N)) -> k (P,) integer in 1..choose_k.k_max decides how many experts
        each token runs in MoE layer 0..L-1; x is what the router reads, probs its fp32 softmax. None: the
        model's own K. A policy with a method `select` weighs the experts too, as moe_dispatch.py:select does.
        cache: a `Cache` or `StaticCache`; the tokens are taken to follow those it has seen.
        """
        return self.lm_head(self.hidden(tokens, choose_k, cache))

    @property
    def device(self):
        return self.norm.weight.device

    @property
    def dtype(self):
        return self.norm.weight.dtype


class Decoder:
    """One decoding step after another behind a filled cache: step(new (B,1)) -> the next logits (B,V) fp32.

    On CUDA, where torch has a grouped matmul without host sync, the third step is captured in a CUDA graph:
    from then on a step is one launch instead of hundreds. `choose_k` must then be free of host syncs too, as
    all of allocator.py are.
    """

    def __init__(self, model, choose_k, cache):
        self.model, self.choose_k, self.cache = model, choose_k, cache
        B = cache.k.shape[1]
        self.graph, self.steps = None, 0
        resident, few = type(model) is Transformer, B <= moe_dispatch.STATIC_TOKENS
        self.capture = resident and few and moe_dispatch.native(cache.k)
        if self.capture:
            self.cache = StaticCache(cache)
            self.new = torch.zeros(B, 1, dtype=torch.long, device=cache.k.device)  # the graph's input

    def eager(self, new):
        return self.model.lm_head(self.model.hidden(new, self.choose_k, self.cache)[:, -1]).float()

    def __call__(self, new):
        self.steps += 1
        if not self.capture or self.steps < 3:     # the first steps start what must not start in a capture
            return self.eager(new)
        self.new.copy_(new)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):                 # records, does not run
                self.logits = self.eager(self.new)
        self.graph.replay()
        return self.logits


@torch.inference_mode()
def generate_steps(model, tokens, n, choose_k=None, temperature=0.0, generator=None):
    """Yield the n tokens behind tokens (B,T), (B,1) each; temperature 0 takes the most probable."""
    B, T = tokens.shape
    cache = Cache(model.config, B, T + n, model.device, model.dtype)
    logits = model.lm_head(model.hidden(tokens, choose_k, cache)[:, -1]).float()  # (B,V)
    step = Decoder(model, choose_k, cache)
    for i in range(n):
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)                           # (B,1)
        else:
            new = torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=generator)
        yield new
        if i + 1 < n:
            logits = step(new)


def generate(model, tokens, n, choose_k=None, temperature=0.0, generator=None):
    """Continue tokens (B,T) by n tokens -> (B,T+n). Arguments as in `generate_steps`."""
    return torch.cat([tokens, *generate_steps(model, tokens, n, choose_k, temperature, generator)], dim=1)
