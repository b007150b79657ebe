"""run/experts_cpu.py: the routed experts where that is faster on a CPU only; forward only.

moe_dispatch.py holds the algorithm and is right everywhere; what is here computes the same sums. On a CPU
torch runs a grouped matmul as a loop over the experts, which leaves room for three things:
    moe_few    a handful of tokens: lists instead of masks and sorts, which take longer than experts
    experts    many rows: experts one by one, or all in one batched matmul
    product    the order of the factors that oneDNN or MKL multiplies faster
"""
from collections import defaultdict

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

# the numbers of rows at which (w @ x.T).T is faster than x @ w.T
W_FIRST = {
    torch.bfloat16: range(1, 353),
    torch.float32: range(5, 49),
}
FEW_TOKENS = 8          # in bf16, up to here: large experts are read faster one by one
LARGE = 2 ** 20         # weights of an expert's first matrix
FRESH = 2 ** 25         # bytes: on Linux a larger tensor gets new pages from the system every time
TILE = 32               # in bf16 whole tiles of rows are multiplied faster
PADDING = 1.4           # rows of a batched matmul with padding to those without, at most


def product(x, w):
    """x @ w.T: x (C,), (rows,C) or a batch (n,rows,C); w (F,C), or (n,F,C) for a batch."""
    if x.dim() == 1:
        return torch.mv(w, x)
    if x.shape[-2] in W_FIRST.get(x.dtype, ()):
        return (w @ x.mT).mT
    return x @ w.mT


def swiglu(x, w_in, w_out):
    """One expert, or a batch of them: shapes as in `product`, the result that of x."""
    gate, up = product(x, w_in).chunk(2, dim=-1)                                # (..,F) both
    hidden = F.silu(gate, inplace=True).mul_(up)
    return product(hidden, w_out)


# ---------------------------------------------------------------- a handful of tokens

def few_is_faster(P, w_in):
    """Is `moe_few` the faster path for P tokens and these experts?"""
    large = w_in.dtype == torch.bfloat16 and w_in[0].numel() > LARGE
    return P == 1 or large and P <= FEW_TOKENS


def moe_few(x, ids, weights, k, w_in, w_out):
    """A loop over the experts that are hit, each read once. Contract as moe_dispatch.py:moe.

    What a token does not run is told by its weight, 0.
    """
    hit = defaultdict(dict)                                    # expert -> {token: weight}
    for token, choices in enumerate(zip(ids.tolist(), weights.tolist())):
        for n, weight in zip(*choices):
            if weight:
                hit[n][token] = weight
    y = torch.zeros(x.shape, dtype=torch.float32)                               # (P,C)
    for n, weight_of in hit.items():
        tokens = list(weight_of)
        if len(tokens) == 1:
            rows = [swiglu(x[tokens[0]], w_in[n], w_out[n])]                    # [(C,)]
        else:
            rows = swiglu(x[tokens], w_in[n], w_out[n])                         # (rows,C)
        for token, row in zip(tokens, rows):
            y[token].add_(row, alpha=weight_of[token])
    return y.to(x.dtype)


# ---------------------------------------------------------------- many rows

def experts(x, token, ends, w_in, w_out):
    """moe_dispatch.py:experts_grouped, or None where that is faster.

    Large experts, and many rows, go one by one: the activations of an expert stay in the CPU's cache. Small
    experts with about as many rows each go together in bf16, padded to the longest.
    """
    N = len(ends)
    n_rows = len(token)
    if x.is_cuda or torch.is_grad_enabled() or n_rows < 4 * N:
        return None
    tokens = token.tensor_split(ends[:-1].tolist())            # of each expert
    bf16 = x.dtype == torch.bfloat16
    tile = TILE if bf16 else 1
    between = n_rows * w_in.shape[1] * w_in.itemsize           # bytes between the two matmuls of all experts
    if w_in[0].numel() > LARGE or between > FRESH:
        rows = []
        for own, one_in, one_out in zip(tokens, w_in, w_out):
            n = len(own)
            padded = F.pad(own, (0, -n % tile))
            y = swiglu(x[padded], one_in, one_out)
            rows.append(y[:n])
        return torch.cat(rows)
    longest = max(map(len, tokens))
    if bf16 and N * longest < PADDING * n_rows:
        padded = pad_sequence(tokens, batch_first=True, padding_value=-1)       # (N,longest)
        padded = F.pad(padded, (0, -longest % tile), value=-1)
        return swiglu(x[padded], w_in, w_out)[padded >= 0]     # -1 reads some token, for nothing
    return None
