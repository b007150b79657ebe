"""moe_dispatch.py: run the experts when every token has its own number of them.

A mixture-of-experts layer computes, for each token x and the k experts chosen for it (paper, eq. 1-3),

    y = sum over its k most probable experts n of  g_n * w_out[n] (silu(gate) * up),   [gate; up] = w_in[n] x

The same sum in three ways, which tests compare:
    moe_loop      the reference: a loop over the experts
    moe_exact     (token, expert) pairs sorted by expert, then two grouped matmuls over exactly sum(k) rows
    moe_static    the same over P*k_max rows: no shape depends on k, so a CUDA graph can hold it
`moe` chooses. What is only faster on a CPU is in run/experts_cpu.py.

    P tokens, C channels, F hidden width of one expert, N routed experts, k_max width of `ids`
"""
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import run.experts_cpu as cpu


# ================================================================ which experts, with which weight (eq. 1-3)

def used(k, ids):
    """Which of its choices ids (P,k_max) a token runs, the first k (P,) of them: (P,k_max) bool."""
    return torch.arange(ids.shape[1], device=k.device) < k[:, None]


@dataclass
class Weighting:
    """What the weight of an expert depends on, beside the router: the model family, and what was fitted."""
    top_k: int              # K
    renormalise: bool       # do the weights of the K sum to 1?
    rho: float = 1.0        # the share of a dropped expert's weight that goes to those that run
    eta: float = 1.0        # the share of its weight that an expert beyond K gets

    @classmethod
    def of(cls, config):
        """That of a model as published: where weights are not renormalised, they stay as they are."""
        return cls(config.top_k, config.norm_topk, rho=float(config.norm_topk))


def select(probs, k, k_max, how):
    """The most probable experts of each token, and their weights (eq. 1-3).

    probs (P,N) float; k (P,) integer in 1..k_max, or None for all K, with k_max 0; how a Weighting
      ->  ids (P,width) int64, the most probable first, width = max(k_max, K)
          weights (P,width) like probs, exactly 0 behind the first k
          left (P,width), the weight of those of the K that do not run; None where all do

    With g = p, or p / (p_1 + .. + p_K) where how.renormalise, and e_j = 1 up to K, eta beyond,

        c_j = e_j g_j (1 + rho dropped / kept)

    where kept is the sum of e_j g_j over those that run, dropped = (g_1 + .. + g_K) - kept. rho = 1 is eq. 3:
    the kept weights sum to 1 again. A token whose second expert points elsewhere than its first is better
    served by rho = 0, the weights as they were.
    """
    K = how.top_k
    p, ids = probs.topk(max(k_max, K), dim=-1)                                  # (P,width) both
    g = p
    if how.renormalise:
        g = p / p[:, :K].sum(-1, keepdim=True)
    if k is None:
        return ids, g, None
    own = torch.arange(p.shape[1], device=p.device) < K                         # (width,)
    run = used(k, ids)                                                          # (P,width)
    weights = g * run * torch.where(own, 1.0, how.eta)
    left = g * (own & ~run)
    beyond = weights * ~own
    dropped = (left - beyond).sum(-1, keepdim=True)                             # exactly 0 where k = K
    kept = weights.sum(-1, keepdim=True)
    return ids, weights * (1 + how.rho * dropped / kept), left


# ================================================================ the reference: a loop over the experts

def run_expert(x, w_in, w_out):
    """One expert at x (rows,C) -> (rows,C): w_in (2F,C), gate rows then up rows; w_out (C,F)."""
    gate, up = F.linear(x, w_in).chunk(2, dim=-1)                               # (rows,F) both
    return F.linear(F.silu(gate) * up, w_out)


def moe_loop(x, ids, weights, k, w_in, w_out):
    """The reference, slow and plain. Contract as `moe`."""
    y = torch.zeros_like(x, dtype=torch.float32)                                # (P,C)
    mask = used(k, ids)                                                         # (P,k_max)
    for n in range(len(w_in)):
        token, choice = torch.where((ids == n) & mask)                          # (rows,) both
        weight = weights[token, choice, None]                                   # (rows,1)
        out = weight * run_expert(x[token], w_in[n], w_out[n])                  # (rows,C)
        y = y.index_add(0, token, out.float())
    return y.to(x.dtype)


# ================================================================ sorted by expert, two grouped matmuls

def sort_by_expert(ids, k, n_experts):
    """Sort the (token, choice) pairs by expert; unused choices get the sentinel N, which sorts last.

    ids (P,k_max), k (P,)  ->  token (P*k_max,) the token of each sorted row; row (P,k_max) the sorted row of
    each choice; ends (N,) int32, where each expert's rows end. Rows from ends[-1] on are the unused choices.
    """
    P, k_max = ids.shape
    mask = used(k, ids)                                                         # (P,k_max)
    keys = torch.where(mask, ids, n_experts).flatten()                          # (P*k_max,)
    expert, order = keys.sort(stable=True)
    experts = torch.arange(n_experts, device=ids.device)
    ends = torch.searchsorted(expert, experts, right=True, out_int32=True)
    rows = torch.arange(P * k_max, device=ids.device)
    inverse = torch.empty_like(order).scatter_(0, order, rows)
    row = inverse.view_as(ids)
    # subtle: an unused choice must not read its own row (never written, perhaps NaN, and 0 * NaN = NaN),
    # so it reads the token's first row, which always exists, with weight 0
    row = torch.where(mask, row, row[:, :1])
    return order // k_max, row, ends


def experts_grouped(x, token, ends, w_in, w_out):
    """Two grouped matmuls over the sorted rows: x (P,C), token (rows,) -> (rows,C).

    Rows from ends[-1] on are never written.
    """
    rows = x.index_select(0, token)                                             # (rows,C)
    hidden = F.grouped_mm(rows, w_in.mT, offs=ends)                             # (rows,2F)
    gate, up = hidden.chunk(2, dim=-1)
    hidden = F.silu(gate).mul_(up)                                              # (rows,F)
    return F.grouped_mm(hidden, w_out.mT, offs=ends)


def combine(expert, row, weights):
    """Gather, weigh and sum in fp32: expert (rows,C), row and weights (P,k_max) -> (P,C)."""
    weights = weights.to(expert.dtype)
    if weights.requires_grad and expert.is_cuda and expert.dtype == torch.bfloat16:
        # embedding_bag has no gradient of such weights
        return torch.bmm(weights[:, None], expert[row]).squeeze(1)
    return F.embedding_bag(row, expert, mode='sum', per_sample_weights=weights)


def moe_exact(x, ids, weights, k, w_in, w_out):
    """Over exactly sum(k) rows: none is wasted, none is garbage, gradients are right. Contract as `moe`.

    Reading sum(k) waits for the device once (a host sync).
    """
    token, row, ends = sort_by_expert(ids, k, len(w_in))
    token = token[:check(ids, k, ends)]                                         # (sum(k),)
    expert = cpu.experts(x, token, ends, w_in, w_out)      # None on a GPU, with gradients, where not faster
    if expert is None:
        expert = experts_grouped(x, token, ends, w_in, w_out)                   # (sum(k),C)
    return combine(expert, row, weights)


def moe_static(x, ids, weights, k, w_in, w_out):
    """Over all P*k_max rows, of which the matmuls compute the first sum(k). Contract as `moe`.

    A CUDA graph replays the same kernels over the same memory, so it can hold neither a host sync nor a shape
    that depends on k. Forward only: in a backward pass the gradients of the unwritten rows would be added to
    real tokens.
    """
    assert not torch.is_grad_enabled(), 'moe_static is forward only: call it under torch.no_grad()'
    token, row, ends = sort_by_expert(ids, k, len(w_in))
    expert = experts_grouped(x, token, ends, w_in, w_out)                       # (P*k_max,C)
    return combine(expert, row, weights)


# ================================================================ the rule

STATIC_TOKENS = 256     # on a GPU, up to here: a host sync costs more than the rows that moe_static wastes


def moe(x, ids, weights, k, w_in, w_out):
    """The routed experts of one layer, each token with its own number of them.

    x (P,C); ids (P,k_max) int64 and weights (P,k_max) from `select`; k (P,) integer in 1..k_max, None: all;
    w_in (N,2F,C), gate rows then up rows; w_out (N,C,F)  ->  (P,C) in x's dtype, summed in fp32.
    AssertionErrors name what breaks this contract; only moe_exact looks at the values of k and ids.
    """
    P = len(x)
    if k is None:
        k = torch.full((P,), ids.shape[1], device=x.device)
    lengths = {len(t) for t in (x, ids, weights, k)}
    assert len(lengths) == 1, f'x, ids, weights, k are of {lengths} tokens'
    if P == 0:
        return torch.zeros_like(x)
    if x.is_cuda and not native(x):                            # Python shows a warning once
        warnings.warn(f'grouped matmuls in {x.dtype} are a loop with host syncs on this GPU: correct, but '
                      f'slow; the fast kernel wants bfloat16 and compute capability 9.x or 10.x')
    path = path_of(P, w_in)
    return path(x, ids, weights, k, w_in, w_out)


def path_of(P, w_in):
    """The path that `moe` takes for P tokens and these experts."""
    _, two_F, C = w_in.shape
    size = w_in.itemsize
    if C * size % 16 or two_F // 2 * size % 16:    # grouped matmuls want rows of whole 16 bytes
        return moe_loop
    if torch.is_grad_enabled():
        return moe_exact
    if w_in.is_cuda:
        return moe_static if P <= STATIC_TOKENS else moe_exact
    return cpu.moe_few if cpu.few_is_faster(P, w_in) else moe_exact


def check(ids, k, ends):
    """sum(k), read in one host sync with the extremes of k and ids, which must lie in 1..k_max and 0..N-1."""
    numbers = [ends[-1].long(), *k.aminmax(), *ids.aminmax()]
    n_rows, k_low, k_high, id_low, id_high = torch.stack(numbers).tolist()
    k_max = ids.shape[1]
    N = len(ends)
    assert 1 <= k_low and k_high <= k_max, f'k must lie in 1..{k_max}, found {k_low}..{k_high}'
    assert 0 <= id_low and id_high < N, f'expert ids must lie in 0..{N - 1}, found {id_low}..{id_high}'
    return n_rows


def native(x):
    """Does torch run grouped matmuls of this dtype and device as one kernel, without a host sync?"""
    fits = x.is_cuda and x.dtype == torch.bfloat16
    return fits and torch.cuda.get_device_capability(x.device)[0] in (9, 10)


# ================================================================ what it costs

def flops(config, mean_k, T, allocator_params=0, mean_left=0, rank=0):
    """Forward FLOPs of one token in a sequence of T, a multiply-add counted as two: {'experts', 'total'}.

    A routed expert is three matmuls of C x F, so the routed experts of a layer cost 6*C*F*mean_k, `mean_k`
    being the mean over tokens and MoE layers. Attention is counted as torch.utils.flop_counter does, without
    a discount for the causal half. `allocator_params`: the allocator weights of all layers, each of them a
    multiply-add a token. mean_left: how many experts of a token have a stand-in of that rank in their place;
    these count as experts.
    """
    c = config
    L = len(c.moe_layers)
    experts = (6 * c.dim * c.expert_dim * mean_k + 4 * c.dim * rank * mean_left) * L
    attention = 4 * T * c.n_heads * c.head_dim * c.n_layers
    # the rest is two FLOPs a weight: how many weights has each of the C channels?
    projections = 2 * c.head_dim * (c.n_heads + c.n_kv_heads) * c.n_layers
    router_and_shared = (c.n_experts + 3 * c.shared_dim + c.shared_gate) * L
    dense = 3 * c.dense_dim * len(c.dense_layers)
    weights = c.dim * (projections + router_and_shared + dense + c.n_vocab)
    total = experts + attention + 2 * (weights + allocator_params)
    return {'experts': experts, 'total': total}
