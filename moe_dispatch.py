"""moe_dispatch.py: run the chosen experts when every token has its own number of them.

A mixture-of-experts layer computes, for each token x with k experts chosen (paper, eq. 1-3),

    y = sum over its k most probable experts n of  g_n * w_out[n] (silu(gate) * up),   [gate; up] = w_in[n] x

Two paths keep one contract and a test compares them: `moe_loop` is obviously right, `moe_grouped` is fast.

    P tokens, C channels, F hidden width of one expert, N routed experts, K the model's top-k, k_max width of `ids`
"""
import torch
import torch.nn.functional as F


# ---------------------------------------------------------------- which experts, with which weight

def select(probs, k, k_max, renormalise):
    """The k most probable experts of each token and their weights (eq. 1-3).

    probs (P,N) float, k (P,) integer in 1..k_max  ->  ids (P,k_max) int64 by falling probability,
    weights (P,k_max) like probs, exactly 0 from choice k on.
    `renormalise` scales the kept weights to sum to 1, as the base model does or does not (`norm_topk` in Config).
    """
    weights, ids = probs.topk(k_max, dim=-1)                                    # (P,k_max) both
    unused = torch.arange(k_max, device=k.device) >= k[:, None]                 # (P,k_max)
    weights = weights.masked_fill(unused, 0)
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids, weights


# ---------------------------------------------------------------- the reference: a loop over experts

def moe_loop(x, ids, weights, k, w_in, w_out):
    """The reference: three lines per expert, slow and plain. Same contract as `moe`."""
    y = torch.zeros_like(x, dtype=torch.float32)                                # (P,C)
    used = torch.arange(ids.shape[1], device=ids.device) < k[:, None]           # (P,k_max)
    for n in range(len(w_in)):
        token, choice = torch.where((ids == n) & used)
        gate, up = F.linear(x[token], w_in[n]).chunk(2, dim=-1)                 # (rows,F) both
        expert = F.linear(F.silu(gate) * up, w_out[n])                          # (rows,C)
        y = y.index_add(0, token, (weights[token, choice, None] * expert).float())
    return y.to(x.dtype)


# ---------------------------------------------------------------- the fast path: sort by expert, two grouped matmuls

def plan(ids, k, n_experts):
    """Sort the (token, choice) pairs by expert; unused choices go to a pretended expert N, which sorts last.

    ids (P,k_max), k (P,)  ->  token (P*k_max,) the token of each sorted row; row (P,k_max) the sorted row of each choice;
    ends (N,) int32, where each expert's rows end. Rows from ends[-1] on are the unused choices.
    """
    P, k_max = ids.shape
    used = torch.arange(k_max, device=ids.device) < k[:, None]                  # (P,k_max)
    expert, order = torch.where(used, ids, n_experts).flatten().sort(stable=True)
    ends = torch.searchsorted(expert, torch.arange(n_experts, device=ids.device), right=True, out_int32=True)
    row = torch.empty_like(order).scatter_(0, order, torch.arange(P * k_max, device=ids.device)).view(P, k_max)
    # subtle: an unused choice must not read its own row (never written, perhaps NaN, and 0 * NaN = NaN),
    # so it reads the token's first row, which always exists, with weight 0
    return order // k_max, torch.where(used, row, row[:, :1]), ends


def moe_grouped(x, ids, weights, k, w_in, w_out):
    """Sorted grouped matmul over exactly sum(k) rows: one host sync, differentiable. Same contract as `moe`."""
    token, row, ends = plan(ids, k, len(w_in))
    token = token[:ends[-1]]                                                    # the host sync: how many rows there are
    rows = x.index_select(0, token)                                             # (rows,C)
    gate, up = F.grouped_mm(rows, w_in.mT, offs=ends).chunk(2, dim=-1)          # (rows,F) both
    expert = F.grouped_mm(F.silu(gate).mul_(up), w_out.mT, offs=ends)           # (rows,C)
    # gather, weigh and sum in one pass with an fp32 accumulator
    return F.embedding_bag(row, expert, mode='sum', per_sample_weights=weights.to(expert.dtype))


def moe(x, ids, weights, k, w_in, w_out):
    """The routed experts of one layer, each token with its own number of them.

    x (P,C); ids (P,k_max) int64 and weights (P,k_max) from `select`; k (P,) integer in 1..k_max;
    w_in (N,2F,C), gate rows then up rows; w_out (N,C,F)  ->  (P,C) in x's dtype, accumulated in fp32.
    """
    assert ids.shape == weights.shape and len(ids) == len(x) == len(k), (x.shape, ids.shape, weights.shape, k.shape)
    return moe_grouped(x, ids, weights, k, w_in, w_out)


# ---------------------------------------------------------------- what it costs

def flops(config, mean_k, T, allocator_params=0):
    """Forward FLOPs of one token in a sequence of T, a multiply-add counted as two: {'experts', 'total'}.

    A routed expert is three matmuls of C x F, so the routed experts of one layer cost 6*C*F*mean_k; `mean_k` is the mean over
    tokens and MoE layers. Attention is counted as torch.utils.flop_counter counts it, the causal half not discounted.
    `allocator_params` is the number of allocator weights of all layers: linear maps, two FLOPs a weight and token.
    """
    c = config
    attention = 2 * c.dim * c.head_dim * 2 * (c.n_heads + c.n_kv_heads) + 4 * T * c.n_heads * c.head_dim
    experts = 6 * c.dim * c.expert_dim * mean_k * len(c.moe_layers)
    routers = 2 * c.dim * c.n_experts * len(c.moe_layers)
    shared = (6 * c.dim * c.shared_dim + 2 * c.dim * c.shared_gate) * len(c.moe_layers)
    dense = 6 * c.dim * c.dense_dim * len(c.dense_layers)
    head = 2 * c.dim * c.n_vocab
    rest = attention * c.n_layers + routers + shared + dense + head + 2 * allocator_params
    return {'experts': experts, 'total': experts + rest}
