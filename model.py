"""model.py: a mixture-of-experts transformer.

The Mixtral architecture, leaves first: RMSNorm, rotary positions (rotate-half), grouped-query attention, and
in place of one MLP a router over N SwiGLU experts of which each token runs the K most probable. Eight
switches of `Config` (head_dim, qkv_bias, qk_norm, norm_topk, shared_dim, shared_gate, dense_layers, tie) turn
it into Qwen-MoE, DeepSeek-MoE or OLMoE. Weights come from hub/checkpoint.py or base/pretrain.py.

What the project adds is one seam, `choose_k(layer, x, probs) -> k`: a policy (allocator.py) that says how
many experts each token runs. Without one the model runs its own top-k. The model keeps nothing about a pass;
whoever wants a record brings a policy that records.

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
    eos: int | None = None      # the id behind a document

    @property
    def moe_layers(self):
        """The layers with a router, in order: L = len(moe_layers)."""
        return [i for i in range(self.n_layers) if i not in self.dense_layers]


# ================================================================ the transformer, leaves first

class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension; the division in fp32, the product in x's dtype.

    torch's own makes the product in fp32 too.
    """

    def forward(self, x):
        y = F.rms_norm(x.float(), self.normalized_shape, eps=self.eps)
        return self.weight * y.to(x.dtype)


def rotate(x, cos, sin):
    """Rotary positions on x (B,H,T,D): channel i of the first half turns with channel i of the second.

    cos and sin (T,D), as Transformer.positions makes them.
    """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class Attention(nn.Module):
    """Causal self-attention with grouped queries."""

    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.qk_norm = c.qk_norm
        q_dim = c.n_heads * c.head_dim
        kv_dim = c.n_kv_heads * c.head_dim
        self.q_proj = nn.Linear(c.dim, q_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.dim, kv_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.dim, kv_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(q_dim, c.dim, bias=False)
        if c.qk_norm:
            if c.qk_norm == 'head':
                q_dim = kv_dim = c.head_dim
            self.q_norm = RMSNorm(q_dim, c.norm_eps)
            self.k_norm = RMSNorm(kv_dim, c.norm_eps)

    def forward(self, x, positions, layer, cache):
        rope, mask = positions
        q = self.q_proj(x)                                                  # (B,T,H*D)
        k = self.k_proj(x)                                                  # (B,T,kv heads*D)
        v = self.v_proj(x)
        if self.qk_norm == 'all':
            q = self.q_norm(q)
            k = self.k_norm(k)
        q, k, v = [t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v)]             # (B,T,heads,D) each
        if self.qk_norm == 'head':
            q = self.q_norm(q)
            k = self.k_norm(k)
        # queries and keys turn together: fewer kernels
        qk = torch.cat([q, k], dim=2).transpose(1, 2)                       # (B,all heads,T,D)
        v = v.transpose(1, 2)                                               # (B,kv heads,T,D)
        # of these heads the last are the keys'
        q, k = rotate(qk, *rope).tensor_split((-v.shape[1],), dim=1)
        if cache:
            k, v = cache.extend(layer, k, v)                                # (B,kv heads,S,D), S seen
        y = F.scaled_dot_product_attention(
            q, k, v,
            attn_mask=mask,
            is_causal=mask is None and x.shape[1] > 1,
            enable_gqa=True,
        )                                                                   # (B,H,T,D)
        y = y.transpose(1, 2).flatten(2)                                    # (B,T,H*D)
        return self.o_proj(y)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). The dense layers and the shared expert."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        gate = F.silu(self.gate_proj(x))
        up = self.up_proj(x)
        return self.down_proj(gate * up)


class MoE(nn.Module):
    """Router, routed experts, and the shared expert that some families add."""

    def __init__(self, c, moe_layer):
        super().__init__()
        self.moe_layer = moe_layer
        # run/standins.py may change both: the weights where experts are dropped, and what stands in for these
        self.weighting = moe_dispatch.Weighting.of(c)
        self.standins = None
        self.router = nn.Linear(c.dim, c.n_experts, bias=False)
        # the experts, stacked; in w_in the rows of gate, then those of up
        self.w_in = nn.Parameter(torch.empty(c.n_experts, 2 * c.expert_dim, c.dim))
        self.w_out = nn.Parameter(torch.empty(c.n_experts, c.dim, c.expert_dim))
        self.shared = MLP(c.dim, c.shared_dim) if c.shared_dim else None
        self.shared_gate = nn.Linear(c.dim, 1, bias=False) if c.shared_gate else None

    def forward(self, x, choose_k):                                         # x (P,C)
        probs = F.softmax(self.router(x), dim=-1, dtype=torch.float32)      # (P,N)
        if choose_k is None:
            k = None                                                        # all of the top K
            ids, weights, left = moe_dispatch.select(probs, k, 0, self.weighting)
        else:
            k = choose_k(self.moe_layer, x, probs)                          # (P,)
            ids, weights, left = choose_k.select(probs, k, self.weighting)  # (P,width) each
        y = moe_dispatch.moe(x, ids, weights, k, self.w_in, self.w_out)     # (P,C)
        if self.standins and left is not None:
            y += self.standins(x, ids, left)
        if self.shared:
            shared = self.shared(x)
            if self.shared_gate:
                shared = F.sigmoid(self.shared_gate(x)) * shared
            y += shared
        return y


class Layer(nn.Module):
    """Attention, then experts or a plain MLP, each behind a norm and added to its input."""

    def __init__(self, c, i):
        super().__init__()
        self.i = i
        self.dense = i in c.dense_layers
        self.input_layernorm = RMSNorm(c.dim, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.dim, c.norm_eps)
        if self.dense:
            self.mlp = MLP(c.dim, c.dense_dim)
        else:
            self.mlp = MoE(c, c.moe_layers.index(i))

    def forward(self, x, positions, cache, choose_k):                       # x (B,T,C)
        h = self.input_layernorm(x)
        x = x + self.self_attn(h, positions, self.i, cache)
        h = self.post_attention_layernorm(x)
        if self.dense:
            return x + self.mlp(h)
        return x + self.mlp(h.flatten(0, 1), choose_k).view_as(x)


class Transformer(nn.Module):
    """The language model. `choose_k` is the seam: see `forward`."""
    tokens_per_visit = 1            # from how many tokens on a sweep over the layers is worth it (scale/)

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

    def positions(self, T):
        """(cos, sin), (T,D) each, of the first T tokens of a text, and their mask: None, plain causal.

        Of the rotary angles, computed in fp32; the signs of sin are those that `rotate` wants.
        """
        D = self.config.head_dim
        pairs = torch.arange(0, D, 2, device=self.device).float()           # (D/2,)
        frequency = 1 / self.config.rope_theta ** (pairs / D)               # (D/2,)
        places = torch.arange(T, device=self.device)                        # (T,)
        angle = places[:, None] * frequency                                 # (T,D/2)
        angle = torch.cat([-angle, angle], dim=-1)                          # (T,D)
        rope = angle.cos().to(self.dtype), angle.sin().to(self.dtype)
        return rope, None

    def hidden(self, tokens, choose_k=None, cache=None):
        """The last hidden states (B,T,C), for the head. Arguments as in `forward`."""
        x = self.embed_tokens(tokens)                                       # (B,T,C)
        T = tokens.shape[1]
        positions = cache.positions(T) if cache else self.positions(T)
        for layer in self.visit():
            x = layer(x, positions, cache, choose_k)
        if cache:
            cache.length += T
        return self.norm(x)

    def visit(self):
        """The layers in order, each with its weights until the next is asked for."""
        return self.layers

    def hidden_of(self, passes):
        """[(tokens (B,T), choose_k), ..] -> [hidden states (B,T,C), ..].

        In one sweep over the layers for all passes: there are models whose weights come and go layer by layer
        (scale/).
        """
        xs = [self.embed_tokens(tokens) for tokens, _ in passes]            # (B,T,C) each
        positions = [self.positions(tokens.shape[1]) for tokens, _ in passes]
        for layer in self.visit():
            for i, (_, choose_k) in enumerate(passes):
                xs[i] = layer(xs[i], positions[i], None, choose_k)
        return [self.norm(x) for x in xs]

    def forward(self, tokens, choose_k=None, cache=None):
        """tokens (B,T) int64 -> logits (B,T,V) in the model's dtype.

        choose_k(layer, x (P,C), probs (P,N)) -> k (P,) integer in 1..choose_k.k_max decides how many experts
        each token runs in MoE layer 0..L-1; x is what the router reads, probs its fp32 softmax. It is a
        `Policy` of allocator.py; None: the model's own K. cache: a `Cache`, behind whose tokens these stand.
        """
        return self.lm_head(self.hidden(tokens, choose_k, cache))

    @property
    def device(self):
        return self.norm.weight.device

    @property
    def dtype(self):
        return self.norm.weight.dtype


# ================================================================ decoding, token by token

class Cache:
    """Keys and values (layers, 2, B, kv heads, max_len, D) of the tokens seen so far, filled up to `length`.

    AssertionError where more tokens come than it has places for.
    """

    def __init__(self, model, B, max_len):
        c = model.config
        shape = c.n_layers, 2, B, c.n_kv_heads, max_len, c.head_dim
        self.kv = torch.zeros(shape, device=model.device, dtype=model.dtype)
        self.table, _ = model.positions(max_len)                            # (max_len,D) both
        self.length = 0

    def positions(self, T):
        """(cos, sin), (T,D) each, of the next T tokens, and which of the S tokens seen they may look at.

        The latter is (T,S) bool, or None for plain causal attention.
        """
        S = self.length + T
        assert S <= self.kv.shape[4], f'{S} tokens in a cache of {self.kv.shape[4]}'
        rope = [table[self.length:S] for table in self.table]
        if T == 1 or self.length == 0:
            return rope, None
        places = torch.arange(S, device=self.kv.device)
        return rope, places <= places[self.length:, None]

    def extend(self, layer, k, v):
        """Write k, v (B,kv heads,T,D) behind what was seen; return all keys and values of the layer."""
        S = self.length + k.shape[2]
        seen = self.kv[layer, ..., :S, :]                                   # (2,B,kv heads,S,D)
        torch.stack([k, v], out=seen[..., self.length:, :])
        return seen


def eager_decoder(model, choose_k, cache):
    """step(tokens (B,T), behind those of the cache) -> the logits (B,V) in fp32 behind the last of them.

    scale/graph.py has one for T = 1 that a CUDA graph makes faster.
    """
    def step(tokens):
        last = model.hidden(tokens, choose_k, cache)[:, -1]                 # (B,C)
        return model.lm_head(last).float()
    return step


@torch.inference_mode()
def generate_steps(model, tokens, n, choose_k=None, temperature=0.0, decoder=eager_decoder):
    """Yield the n tokens behind tokens (B,T), (B,1) each; temperature 0 takes the most probable."""
    B, T = tokens.shape
    cache = Cache(model, B, T + n)
    logits = eager_decoder(model, choose_k, cache)(tokens)                  # (B,V)
    step = decoder(model, choose_k, cache)
    for i in range(n):
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)                           # (B,1)
        else:
            probs = F.softmax(logits / temperature, dim=-1)
            new = torch.multinomial(probs, 1)                               # (B,1)
        yield new
        if i + 1 < n:
            logits = step(new)


def generate(model, tokens, n, *how, **named):
    """Continue tokens (B,T) by n tokens -> (B,T+n). Arguments as in `generate_steps`."""
    new = generate_steps(model, tokens, n, *how, **named)
    return torch.cat([tokens, *new], dim=1)
