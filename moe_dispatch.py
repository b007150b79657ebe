"""moe_dispatch.py: run the chosen experts when every token has its own number of them.

A mixture-of-experts layer computes, for each token x with k experts chosen (paper, eq. 1-3),

    y = sum over its k most probable experts n of  g_n * w_out[n] (silu(gate) * up),   [gate; up] = w_in[n] x

Four paths keep one contract and tests compare them; `moe` chooses:
    moe_loop      the reference, obviously right
    moe_few       the same for a handful of tokens on a CPU, without its masks; forward only
    moe_exact     rows sorted by expert, grouped matmuls over sum(k) rows; one host sync; has a gradient
    moe_static    the same over P*k_max rows; no host sync, so a CUDA graph can hold it; forward only

    P tokens, C channels, F hidden width of one expert, N routed experts, k_max width of `ids`
"""
import sys

import torch
import torch.nn.functional as F


# ---------------------------------------------------------------- which experts, with which weight

def used(k, k_max):
    """Which of a token's k_max choices it runs, the first k: (P,) integer -> (P,k_max) bool."""
    return torch.arange(k_max, device=k.device) < k[:, None]


def select(probs, k, k_max, renormalise):
    """The k most probable experts of each token and their weights (eq. 1-3).

    probs (P,N) float, k (P,) integer in 1..k_max, or None: all  ->  ids (P,k_max) int64, likely ones first,
    weights (P,k_max) like probs, exactly 0 from choice k on.
    `renormalise` scales the kept weights to sum to 1, as the base model does or does not (`norm_topk` in
    Config).
    """
    weights, ids = probs.topk(k_max, dim=-1)                                    # (P,k_max) both
    if k is not None:
        weights = weights.masked_fill(~used(k, k_max), 0)
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids, weights


# ---------------------------------------------------------------- the reference: a loop over experts

def moe_loop(x, ids, weights, k, w_in, w_out):
    """The reference: three lines per expert, slow and plain. Same contract as `moe`."""
    y = torch.zeros_like(x, dtype=torch.float32)                                # (P,C)
    k = torch.full((len(x),), ids.shape[1], device=x.device) if k is None else k
    chosen = torch.where(used(k, ids.shape[1]), ids, -1)                        # (P,k_max)
    for n in range(len(w_in)):
        token, choice = torch.where(chosen == n)                                # (rows,) both
        gate, up = F.linear(x[token], w_in[n]).chunk(2, dim=-1)                 # (rows,F) both
        expert = F.linear(F.silu(gate) * up, w_out[n])                          # (rows,C)
        y = y.index_add(0, token, (weights[token, choice, None] * expert).float())
    return y.to(x.dtype)


# ---------------------------------------------------------------- on a CPU, and a handful of tokens there

def product(x, w):
    """x @ w.T on a CPU: x (rows,C), w (F,C) -> (rows,F).

    In bf16 F.linear of up to 64 rows takes a third longer than the product the other way round.
    """
    if x.dtype != torch.bfloat16 or len(x) > 64:
        return F.linear(x, w)
    return torch.mv(w, x[0])[None] if len(x) == 1 else torch.mm(w, x.T).T


def moe_few(x, ids, weights, k, w_in, w_out):
    """A loop over the experts that are hit, each read once: same contract as `moe`, forward only.

    Lists instead of masks and sorts: for a token the kernels of a plan take longer than its experts.
    """
    hit = {}                                                   # expert -> [(token, weight), ..]
    for token, n, chosen, scale in zip(range(len(x)), k.tolist(), ids.tolist(), weights.tolist()):
        assert 1 <= n <= len(chosen), f'k must lie in 1..{len(chosen)}, found {n}'
        for expert, weight in zip(chosen[:n], scale):
            hit.setdefault(expert, []).append((token, weight))
    N = len(w_in)
    assert 0 <= min(hit) and max(hit) < N, f'expert ids must lie in 0..{N - 1}, found {min(hit)}..{max(hit)}'
    y, alone = torch.zeros(x.shape, dtype=torch.float32), len(x) == 1           # (P,C)
    for expert, pairs in hit.items():
        rows = x if alone else x[[token for token, _ in pairs]]                 # (rows,C)
        gate, up = product(rows, w_in[expert]).chunk(2, dim=-1)                # (rows,F) both
        out = product(F.silu(gate).mul_(up), w_out[expert])                    # (rows,C)
        for (token, weight), row in zip(pairs, [out] if alone else out.unbind()):
            (y if alone else y[token]).add_(row, alpha=weight)
    return y.to(x.dtype)


# ---------------------------------------------------------------- the fast paths: sort by expert, two grouped
# matmuls

def plan(ids, k, n_experts):
    """Sort the (token, choice) pairs by expert; unused choices go to a pretended expert N, which sorts last.

    ids (P,k_max), k (P,)  ->  token (P*k_max,) the token of each sorted row; row (P,k_max) the sorted row of
    each choice; ends (N,) int32, where each expert's rows end. Rows from ends[-1] on are the unused choices.
    """
    P, k_max = ids.shape
    mask = used(k, k_max)                                                       # (P,k_max)
    expert, order = torch.where(mask, ids, n_experts).flatten().sort(stable=True)
    experts = torch.arange(n_experts, device=ids.device)
    ends = torch.searchsorted(expert, experts, right=True, out_int32=True)
    rows = torch.arange(P * k_max, device=ids.device)
    row = torch.empty_like(order).scatter_(0, order, rows).view(P, k_max)       # the inverse of `order`
    # subtle: an unused choice must not read its own row (never written, perhaps NaN, and 0 * NaN = NaN),
    # so it reads the token's first row, which always exists, with weight 0
    return order // k_max, torch.where(mask, row, row[:, :1]), ends


def experts_grouped(rows, ends, w_in, w_out):
    """Two grouped matmuls over sorted rows (rows,C) -> (rows,C); rows from ends[-1] on are never written."""
    gate, up = F.grouped_mm(rows, w_in.mT, offs=ends).chunk(2, dim=-1)          # (rows,F) both
    return F.grouped_mm(F.silu(gate).mul_(up), w_out.mT, offs=ends)             # (rows,C)


def experts_split(rows, ends, w_in, w_out):
    """The same for a CPU and many rows: expert by expert, what is between its two matmuls stays in the cache.

    torch's grouped matmul is a loop on a CPU anyway. Needs ends[-1] == len(rows).
    """
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    out = []
    for part, expert_in, expert_out in zip(rows.split(sizes), w_in.unbind(), w_out.unbind()):
        if len(part):
            gate, up = product(part, expert_in).chunk(2, dim=-1)                # (size,F) both
            out.append(product(F.silu(gate).mul_(up), expert_out))              # (size,C)
    return torch.cat(out)


def combine(expert, row, weights):
    """Gather, weigh and sum with an fp32 accumulator: expert (rows,C), row and weights (P,k_max) -> (P,C)."""
    weights = weights.to(expert.dtype)
    if weights.requires_grad and expert.is_cuda and expert.dtype == torch.bfloat16:
        return torch.bmm(weights[:, None], expert[row]).squeeze(1)        # embedding_bag has no such gradient
    return F.embedding_bag(row, expert, mode='sum', per_sample_weights=weights)


def moe_exact(x, ids, weights, k, w_in, w_out):
    """Over exactly sum(k) rows: none is wasted, none is garbage, gradients are right. Contract as `moe`."""
    token, row, ends = plan(ids, k, len(w_in))
    n_rows = checked(ids, k, ends)                             # the host sync
    rows = x.index_select(0, token[:n_rows])                                    # (sum(k),C)
    between = n_rows * w_in.shape[1] * x.element_size()        # bytes between the two matmuls of all experts
    split = between > SPLIT_BYTES or w_in[0].numel() > LARGE
    split = split and not x.is_cuda and not torch.is_grad_enabled()
    experts = experts_split if split else experts_grouped
    return combine(experts(rows, ends, w_in, w_out), row, weights)


def moe_static(x, ids, weights, k, w_in, w_out):
    """Over all P*k_max rows, of which the matmuls compute the first sum(k) and leave the rest unwritten.

    Same contract as `moe`, forward only: in a backward pass the unwritten rows' gradients would be added to
    real tokens.
    """
    assert not torch.is_grad_enabled(), 'moe_static is forward only: call it under torch.no_grad()'
    token, row, ends = plan(ids, k, len(w_in))
    return combine(experts_grouped(x.index_select(0, token), ends, w_in, w_out), row, weights)


# ---------------------------------------------------------------- the rule

FEW_TOKENS = 32         # on a CPU in bf16, up to here: large experts are read faster one by one
LARGE = 2 ** 20         # weights of an expert's first matrix
STATIC_TOKENS = 256     # on CUDA, up to here: a host sync would cost more than the rows that static wastes
SPLIT_BYTES = 2 ** 24   # on a CPU more than this between the two matmuls of all experts would leave the cache


def moe(x, ids, weights, k, w_in, w_out):
    """The routed experts of one layer, each token with its own number of them.

    x (P,C); ids (P,k_max) int64 and weights (P,k_max) from `select`; k (P,) integer in 1..k_max, None: all;
    w_in (N,2F,C), gate rows then up rows; w_out (N,C,F)  ->  (P,C) in x's dtype, accumulated in fp32.
    The rule (`path_of`): without gradients, on CUDA static up to STATIC_TOKENS, on a CPU few for one token,
    and in bf16 up to FEW_TOKENS where experts are large; everything else exact. AssertionErrors name what
    breaks the contract; only static does not look at the values of k and ids, which would be a host sync.
    """
    shapes = x.shape, ids.shape, weights.shape, None if k is None else k.shape
    assert ids.shape == weights.shape and len(ids) == len(x) and (k is None or len(k) == len(x)), shapes
    for name, width in (('C', w_in.shape[2]), ('F', w_out.shape[2])):
        assert width * x.element_size() % 16 == 0, \
            f'{name} = {width} in {x.dtype} is no whole number of 16 bytes, which grouped matmuls need'
    if len(x) == 0:
        return torch.zeros_like(x)
    warn_of_fallback(x)
    if k is None:
        k = torch.full((len(x),), ids.shape[1], device=x.device)
    return path_of(len(x), w_in)(x, ids, weights, k, w_in, w_out)


def path_of(P, w_in):
    """The path that `moe` takes for P tokens and these experts."""
    if torch.is_grad_enabled():
        return moe_exact
    if w_in.is_cuda:
        return moe_static if P <= STATIC_TOKENS else moe_exact
    large = w_in.dtype == torch.bfloat16 and w_in[0].numel() > LARGE
    return moe_few if P == 1 or large and P <= FEW_TOKENS else moe_exact


def checked(ids, k, ends):
    """sum(k), read with the extremes of k and ids in one host sync; these must lie in 1..k_max and 0..N-1."""
    numbers = torch.stack([ends[-1].long(), *k.aminmax(), *ids.aminmax()])
    n_rows, k_low, k_high, id_low, id_high = numbers.tolist()
    k_max, N = ids.shape[1], len(ends)
    assert 1 <= k_low and k_high <= k_max, f'k must lie in 1..{k_max}, found {k_low}..{k_high}'
    assert 0 <= id_low and id_high < N, f'expert ids must lie in 0..{N - 1}, found {id_low}..{id_high}'
    return n_rows


def native(x):
    """Does torch run grouped matmuls of this dtype and device as one kernel, without a host sync?"""
    if not x.is_cuda or x.dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(x.device)[0] in (9, 10)


warned = set()


def warn_of_fallback(x):
    """Say once which dtype is a loop with a host sync on this GPU: correct, but slow and in no CUDA graph."""
    if x.is_cuda and not native(x) and x.dtype not in warned:
        warned.add(x.dtype)
        gpu = torch.cuda.get_device_name(x.device)
        print(f'moe_dispatch: grouped matmuls in {x.dtype} are a loop on {gpu}; the fast kernel wants '
              f'bfloat16 and compute capability 9.x or 10.x', file=sys.stderr)


# ---------------------------------------------------------------- what it costs

def flops(config, mean_k, T, allocator_params=0):
    """Forward FLOPs of one token in a sequence of T, a multiply-add counted as two: {'experts', 'total'}.

    A routed expert is three matmuls of C x F, so the routed experts of a layer cost 6*C*F*mean_k; `mean_k` is
    the mean over tokens and MoE layers. Attention is counted as torch.utils.flop_counter does, the causal
    half not discounted. `allocator_params`: the allocator weights of all layers, linear maps of two FLOPs a
    weight and token.
    """
    c, L = config, len(config.moe_layers)
    projections = 2 * c.dim * c.head_dim * 2 * (c.n_heads + c.n_kv_heads)
    attention = projections + 4 * T * c.n_heads * c.head_dim
    experts = 6 * c.dim * c.expert_dim * mean_k * L
    routers = 2 * c.dim * c.n_experts * L
    shared = (6 * c.dim * c.shared_dim + 2 * c.dim * c.shared_gate) * L
    dense = 6 * c.dim * c.dense_dim * len(c.dense_layers)
    head = 2 * c.dim * c.n_vocab
    rest = attention * c.n_layers + routers + shared + dense + head + 2 * allocator_params
    return {'experts': experts, 'total': experts + rest}
