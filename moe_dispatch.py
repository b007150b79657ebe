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
from torch.nn.utils.rnn import pad_sequence


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
        weights = weights * used(k, k_max)
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

# from how many rows to how many (w @ x.T).T is faster than x @ w.T on a CPU
W_FIRST = {torch.bfloat16: (1, 352), torch.float32: (5, 48)}


def product(x, w):
    """x @ w.T without gradients: x (C,), (rows,C) or a batch (n,rows,C); w (F,C), or (n,F,C) of a batch."""
    if x.dim() == 1:
        return torch.mv(w, x)
    least, most = W_FIRST.get(x.dtype, (1, 0))
    return (w @ x.mT).mT if least <= x.shape[-2] <= most else x @ w.mT


def swiglu(x, w_in, w_out):
    """One expert, or a batch of them, on a CPU: shapes as in `product`, the result that of x."""
    gate, up = product(x, w_in).chunk(2, dim=-1)                                # (..,F) both
    return product(F.silu(gate, inplace=True).mul_(up), w_out)


def moe_few(x, ids, weights, k, w_in, w_out):
    """A loop over the experts that are hit, each read once: same contract as `moe`, forward only.

    Lists instead of masks and sorts: for a token the kernels of a plan take longer than its experts.
    """
    P, k_max = ids.shape
    hit = {}                                                   # expert -> [(token, weight), ..]
    each = [k_max] * P if k is None else k.tolist()
    for token, kept, chosen, scale in zip(range(P), each, ids.tolist(), weights.tolist()):
        assert 1 <= kept <= k_max, f'k must lie in 1..{k_max}, found {kept}'
        for choice in range(kept):
            hit.setdefault(chosen[choice], []).append((token, scale[choice]))
    low, high, N = min(hit), max(hit), len(w_in)
    assert 0 <= low and high < N, f'expert ids must lie in 0..{N - 1}, found {low}..{high}'
    y = torch.zeros(x.shape, dtype=torch.float32)                               # (P,C)
    for n, pairs in hit.items():
        if len(pairs) == 1:
            rows = [swiglu(x[pairs[0][0]], w_in[n], w_out[n])]                  # one of (C,)
        else:
            rows = swiglu(x[[token for token, _ in pairs]], w_in[n], w_out[n])  # (rows,C)
        for (token, weight), row in zip(pairs, rows):
            y[token].add_(row, alpha=weight)
    return y.to(x.dtype)


# ---------------------------------------------------------------- the fast paths: sort by expert, multiply

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


def alike(sizes, most):
    """Runs of neighbouring experts that padding makes at most PADDING times as long: [9, 8, 2] -> [2, 1]."""
    runs, start = [], 0
    for end in range(1, len(sizes) + 1):
        run = sizes[start:end + 1]
        if end == len(sizes) or len(run) > most or len(run) * max(run) > PADDING * sum(run):
            runs.append(end - start)
            start = end
    return runs


def experts_batched(x, tokens, runs, w_in, w_out):
    """The same for a CPU, a run of experts to a batched matmul; forward only.

    x (P,C), tokens: N times (rows of the expert,), the token of each row -> (rows,C).
    """
    tokens, out, tile = iter(tokens), [], TILE if x.dtype == torch.bfloat16 else 1
    for n, run_in, run_out in zip(runs, w_in.split(runs), w_out.split(runs)):
        own = [next(tokens) for _ in range(n)]
        padded = pad_sequence(own, batch_first=True)                            # (n,longest)
        rows = x[F.pad(padded, (0, -padded.shape[1] % tile))]                   # (n,longest or more,C)
        y = swiglu(rows, run_in, run_out) if n > 1 else [swiglu(rows[0], run_in[0], run_out[0])]
        out += [part[:len(token)] for part, token in zip(y, own)]
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
    token = token[:n_rows]
    sizes = [] if x.is_cuda or torch.is_grad_enabled() else ends.diff(prepend=ends.new_zeros(1)).tolist()
    if runs := batches(sizes, w_in):
        rows = experts_batched(x, token.split(sizes), runs, w_in, w_out)        # (sum(k),C)
    else:
        rows = experts_grouped(x.index_select(0, token), ends, w_in, w_out)     # (sum(k),C)
    return combine(rows, row, weights)


def moe_static(x, ids, weights, k, w_in, w_out):
    """Over all P*k_max rows, of which the matmuls compute the first sum(k) and leave the rest unwritten.

    Same contract as `moe`, forward only: in a backward pass the unwritten rows' gradients would be added to
    real tokens.
    """
    assert not torch.is_grad_enabled(), 'moe_static is forward only: call it under torch.no_grad()'
    token, row, ends = plan(ids, k, len(w_in))
    return combine(experts_grouped(x.index_select(0, token), ends, w_in, w_out), row, weights)


# ---------------------------------------------------------------- the rule

STATIC_TOKENS = 256     # on CUDA, up to here: a host sync would cost more than the rows that static wastes
FEW_TOKENS = 8          # on a CPU in bf16, up to here: large experts are read faster one by one
LARGE = 2 ** 20         # weights of an expert's first matrix
FRESH = 2 ** 25         # bytes: a larger tensor gets new pages from the system every time, on Linux
TILE = 32               # whole tiles of rows are multiplied faster in bf16
BATCH, PADDING = 16, 1.4    # experts to a batched matmul, and its rows to the useful ones, at most


def moe(x, ids, weights, k, w_in, w_out):
    """The routed experts of one layer, each token with its own number of them.

    x (P,C); ids (P,k_max) int64 and weights (P,k_max) from `select`; k (P,) integer in 1..k_max, None: all;
    w_in (N,2F,C), gate rows then up rows; w_out (N,C,F)  ->  (P,C) in x's dtype, accumulated in fp32.
    The rule (`path_of`): without gradients, on CUDA static up to STATIC_TOKENS, on a CPU few for one token,
    and in bf16 up to FEW_TOKENS where experts are large; everything else exact. AssertionErrors name what
    breaks the contract; only static does not look at the values of k and ids, which would be a host sync.
    """
    assert ids.shape == weights.shape and len(ids) == len(x) and (k is None or len(k) == len(x)), \
        (x.shape, ids.shape, weights.shape, None if k is None else k.shape)
    C, width, size = x.shape[1], w_out.shape[2], x.element_size()
    assert C * size % 16 == 0 and width * size % 16 == 0, \
        f'C = {C} or F = {width} in {x.dtype} is no whole number of 16 bytes, which grouped matmuls need'
    if len(x) == 0:
        return torch.zeros_like(x)
    warn_of_fallback(x)
    path = path_of(len(x), w_in)
    if k is None and path is not moe_few:
        k = torch.full((len(x),), ids.shape[1], device=x.device)
    return path(x, ids, weights, k, w_in, w_out)


def path_of(P, w_in):
    """The path that `moe` takes for P tokens and these experts."""
    if torch.is_grad_enabled():
        return moe_exact
    if w_in.is_cuda:
        return moe_static if P <= STATIC_TOKENS else moe_exact
    large = w_in.dtype == torch.bfloat16 and w_in[0].numel() > LARGE
    return moe_few if P == 1 or large and P <= FEW_TOKENS else moe_exact


def batches(sizes, w_in):
    """How many neighbouring experts share each batched matmul; []: a grouped matmul is faster.

    sizes: the rows of each expert, on a CPU and without gradients, else []. There torch's grouped matmul is a
    loop too. One by one, the activations stay in the cache; few rows of small experts in bf16 share.
    """
    if not sizes or sum(sizes) < 4 * len(sizes):
        return []
    between = sum(sizes) * w_in.shape[1] * w_in.element_size()     # bytes between the matmuls of all experts
    if w_in[0].numel() > LARGE or between > FRESH:
        return [1] * len(sizes)
    runs = alike(sizes, BATCH) if w_in.dtype == torch.bfloat16 else []
    return runs if 3 * len(runs) <= len(sizes) else []


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
