"""run/standins.py: what a token loses with an expert that does not run, and how to have it for less.

Dropping an expert leaves a hole in the layer's output. The published rule fills it with more of the experts
that run (eq. 3), which mostly point elsewhere. Better ways:
    kept        those that run keep the weights that they have in top-k
    stand-ins   the same, and for each expert n a linear map of rank r stands in, e_n(x) ~ B_n A_n x + b_n

Stand-ins are fitted in closed form on training text under the model's own top-k, in seconds. One costs
4 r C FLOPs where an expert costs 6 C F. It is fitted on the tokens that drop its expert, on which the expert
is an easier function than on all, so every policy has stand-ins of its own: PPO begins with those of expert
skipping at the budget, and what it has learnt gets its own at the end.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from allocator import TopK
from hub.files import InputError
from moe_dispatch import STATIC_TOKENS, Weighting, run_expert
from run.console import Progress
from run.evaluate import evaluate
from run.rules import look

ETA = 0.3               # about the best share of an expert beyond K
RIDGE = 1e-3            # of the mean variance of x
FEW_TOKENS = 8          # on a CPU, up to here StandIns.one_by_one is faster


def rank_of(s, config):
    """The rank of the stand-ins of a run: 0 where there are none. InputError if --rank is too high."""
    if s.dropped != 'stand-ins':
        return 0
    rank = s.rank or default_rank(config)
    most = min(config.dim, 3 * config.expert_dim // 2 - 1)     # C channels; cheaper than the expert
    if rank > most:
        raise InputError(f'--rank {rank}: at most {most} for these experts, {config.expert_dim} wide')
    return rank


def default_rank(config):
    """A quarter of C, less where experts are small: a stand-in costs at most a ninth of one.

    In whole eights, as grouped matmuls want them, where there are that many.
    """
    rank = min(config.dim // 4, config.expert_dim // 6)
    return max(1, rank // 8 * 8)


def blocks(model):
    """The MoE blocks of a model (model.py:MoE), in order."""
    return [layer.mlp for layer in model.layers if not layer.dense]


def rank_in(model):
    """The rank of the stand-ins that a model runs with."""
    used = blocks(model)[0].standins
    return used.A.shape[1] if used else 0


def target_k(s, config):
    """The mean k with which experts and stand-ins cost s.budget of the FLOPs of all K experts, at least 1."""
    K = config.top_k
    share = 4 * rank_of(s, config) / (6 * config.expert_dim)               # a stand-in's FLOPs, an expert's
    return max(1, K * (s.budget - share) / (1 - share))


def fit(s, model, inputs, policy):
    """{name: fp32 tensor}: numbers rho and eta, and with stand-ins A (L,N,r,C), B (L,N,C,r), b (L,N,C).

    s.dropped says which. inputs (B,T): training text. Stand-ins are fitted on the choices that the policy
    drops there: an expert that is dropped is another function than one that runs. eta stays as it is.
    """
    config = model.config
    experts = blocks(model)
    rank = rank_of(s, config)
    fitted = {
        'rho': torch.tensor(float(config.norm_topk and s.dropped == 'published')),
        'eta': torch.tensor(experts[0].weighting.eta),
    }
    if rank == 0 or config.top_k == 1:
        return fitted
    progress = Progress('stand-ins')

    def fit_layer(layer, x, probs):
        moe = experts[layer]
        progress(layer + 1, len(experts))
        ids, _, left = policy.select(probs, policy(layer, x, probs), moe.weighting)         # (P,width)
        maps = [fit_expert(moe, x, left, ids, n, rank) for n in range(config.n_experts)]
        return [torch.stack(of_experts) for of_experts in zip(*maps)]
    layers = look(model, inputs, fit_layer)                    # L of A, B, b
    for name, of_layers in zip('ABb', zip(*layers)):
        fitted[name] = torch.stack(of_layers).cpu()
    poor = fitted['b'].any(2) & ~fitted['A'].any((2, 3))                    # (L,N)
    if poor.any():
        print(f'stand-ins: too few tokens drop {poor.sum()} of the experts: their mean output stands in')
    return fitted


def refit(s, model, text, policy):
    """Let the model run with what is fitted for the policy on training text -> what `fit` returns."""
    torch.manual_seed(s.seed)                                  # all ranks draw the same
    fitted = fit(s, model, text.windows(s.heldout_tokens)[0], policy)
    use(model, fitted)
    return fitted


def fit_expert(moe, x, left, ids, n, rank):
    """A (r,C), B (C,r), b (C,) of expert n: reduced-rank regression of its output on x.

    left (P,K): the weights of the choices ids (P,K) that do not run, 0 of the others. Over the tokens that do
    not run n, weighted by the square, their part of the layer's error. Fewer than the rank leave the mean.
    """
    token, choice = torch.where((ids == n) & (left > 0))
    C = x.shape[1]
    weight = left[token, choice, None].double().square()                    # (rows,1)
    weight /= weight.sum()
    X = x[token].double()
    Y = run_expert(x[token], moe.w_in[n], moe.w_out[n]).double()
    mean_x = (weight * X).sum(0)
    mean_y = (weight * Y).sum(0)
    B = X.new_zeros(C, rank)
    A = B.T
    if len(token) > rank:
        X -= mean_x
        moments = X.T @ (weight * X)                                        # (C,C)
        ridge = RIDGE * moments.diagonal().mean() * torch.eye(C).to(X)
        W = torch.linalg.solve(moments + ridge, X.T @ (weight * (Y - mean_y)))      # (C,C), Y ~ X W
        _, directions = torch.linalg.eigh(W.T @ moments @ W)                # of what is predicted, rising
        B = directions[:, -rank:]
        A = (W @ B).T
    b = mean_y - B @ (A @ mean_x)
    return A.float(), B.float(), b.float()


def fit_eta(model, fitted, windows):
    """Set fitted['eta'], by the loss of windows of text with K + 1 experts for every token; the model has it.

    The loss is nearly a parabola in eta: the lowest point of the one through three losses.
    """
    one_more = TopK(min(model.config.top_k + 1, model.config.n_experts))
    losses = []
    for eta in 0, ETA, 2 * ETA:
        fitted['eta'].fill_(eta)
        use(model, fitted)
        [(loss, _)] = evaluate(model, windows, [one_more])
        losses.append(loss.mean().item())
    none, some, much = losses
    bend = none - 2 * some + much
    best = ETA * (1 + (none - much) / (2 * bend)) if bend > 0 else 0
    fitted['eta'].fill_(best).clamp_(0, 1)
    use(model, fitted)


# ================================================================ in the model

@dataclass
class StandIns:
    """The stand-ins of one layer.

    Called with x (P,C), ids and left (P,width) from moe_dispatch.py:select it gives (P,C) in x's dtype:
    the sum over the choices j of left_j (B A x + b).
    """

    A: torch.Tensor     # (N,r,C)
    B: torch.Tensor     # (N,C,r)
    b: torch.Tensor     # (N,C)

    def __call__(self, x, ids, left):
        if len(x) <= FEW_TOKENS and not x.is_cuda and not torch.is_grad_enabled():
            return self.one_by_one(x, ids, left)
        # `left` with a column for every expert, in x's dtype
        share = x.new_zeros(len(x), len(self.b)).scatter(1, ids, left.to(x.dtype))      # (P,N)
        # grouped matmuls want rows of whole 16 bytes
        misaligned = any(n * self.A.itemsize % 16 for n in self.A.shape[1:])
        if x.is_cuda and len(x) <= STATIC_TOKENS or misaligned:
            return self.plain(x, share)
        return self.many(x, share)

    def plain(self, x, share):
        """The reference: every map at every token. No shape depends on k, so a CUDA graph can hold it."""
        low = torch.einsum('pc,nrc->pnr', x, self.A)
        return torch.einsum('pnr,ncr->pc', share[..., None] * low, self.B) + share @ self.b

    def one_by_one(self, x, ids, left):
        """The same for a handful of tokens on a CPU, forward only: just the maps that are needed are read."""
        y = torch.zeros_like(x)                                             # (P,C)
        for token, out, numbers, weights in zip(x, y, ids.tolist(), left.tolist()):
            for n, weight in zip(numbers, weights):
                if weight:
                    low = self.A[n] @ token                                 # (r,)
                    out += weight * torch.addmv(self.b[n], self.B[n], low)
        return y

    def many(self, x, share):
        """The same over exactly the choices that do not run, sorted by expert; one host sync."""
        dropped = share > 0
        expert, token = torch.where(dropped.T)                              # (rows,) both
        ends = dropped.sum(0).cumsum(0, dtype=torch.int32)                  # (N,) where an expert's rows end
        low = share[token, expert, None] * F.grouped_mm(x[token], self.A.mT, offs=ends)     # (rows,r)
        out = F.grouped_mm(low, self.B.mT, offs=ends)                       # (rows,C)
        return (share @ self.b).index_add(0, token, out)


def of_layer(config, fitted, layer, like):
    """How a layer weighs its experts, and its StandIns or None, with what `fit` returned; {}: as published.

    The stand-ins get the device and dtype of the tensor `like`.
    """
    how = Weighting.of(config)
    stand_in = None
    if fitted:
        how.rho = fitted['rho'].item()
        how.eta = fitted['eta'].item()
        if 'A' in fitted:
            stand_in = StandIns(*(fitted[name][layer].to(like) for name in 'ABb'))
    return how, stand_in


def use(model, fitted):
    """Let the model run with what `fit` returned, or with {} as published."""
    for layer, moe in enumerate(blocks(model)):
        moe.weighting, moe.standins = of_layer(model.config, fitted, layer, model.norm.weight)
