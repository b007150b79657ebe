"""base/pretrain.py: a small Mixtral from scratch: Muon for matrices, Adam for the rest, balanced experts."""
import collections
import time

import torch
import torch.nn.functional as F

from allocator import TopK, Watched
from model import Config, Transformer
from run.console import Progress

BATCH = 16              # sequences of a training step
MUON_LR = 0.02          # of the matrices
MOMENTUM = 0.95         # of Muon
ADAM_LR = 4e-2          # of embedding, head, norms: high, for steps are few
ROUTER_LR = 3e-3        # of routers: a fast one would soon give one expert all the weight
BALANCE = 0.01          # weight of the load-balancing loss
WHOLE = 1.7             # how long the default run takes, in times of this stage
SIZES = 'n_layers', 'dim', 'n_heads', 'n_experts', 'top_k', 'expert_dim'


def orthogonalise(G):
    """Newton-Schulz iteration on a stack (..,m,n): nearly U V^T of each G = U S V^T (Muon, Jordan 2024)."""
    tall = G.shape[-2] > G.shape[-1]
    X = G.mT if tall else G
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(3):              # five are usual; three cost less and measured the same here
        A = X @ X.mT
        B = -4.7750 * A + 2.0315 * A @ A
        X = 3.4445 * X + B @ X
    return X.mT if tall else X


class Muon:
    """Momentum orthogonalised by Newton-Schulz, of all matrices of one shape at once."""

    def __init__(self, params):
        self.groups = collections.defaultdict(list)            # {(..,m,n): parameters of this shape}
        for p in params:
            self.groups[p.shape].append(p)
        self.averages = collections.defaultdict(lambda: torch.zeros(()))

    @torch.no_grad()
    def step(self, lr):
        for shape, params in self.groups.items():
            grads = torch.stack([p.grad for p in params])                   # (params,..,m,n)
            average = grads.lerp(self.averages[shape], MOMENTUM)
            self.averages[shape] = average
            updates = orthogonalise(grads.lerp(average, MOMENTUM))
            m, n = shape[-2:]
            scale = -lr * max(1, m / n) ** 0.5
            for p, update in zip(params, updates):
                p.add_(update, alpha=scale)


def balance_loss(router_probs, top_k):
    """N * sum_n (share of choices that go to n) * (mean probability of n); 1 when balanced (Fedus 2021).

    router_probs: [(P,N) of each MoE layer]; the mean over layers.
    """
    total = 0
    for probs in router_probs:
        chosen = probs.topk(top_k).indices                                  # (P,K)
        share = torch.zeros_like(probs).scatter_(1, chosen, 1 / top_k)      # (P,N)
        balance = share.mean(0) * probs.mean(0)                             # (N,)
        total += len(balance) * balance.sum()
    return total / len(router_probs)


@torch.no_grad()
def new_model(config):
    """A Transformer with fresh weights, always the same: embedding 0.02, matrices 1/sqrt(fan-in), smaller at
    residuals.
    """
    model = Transformer(config)
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            std = p.shape[-1] ** -0.5 if 'layers' in name else 0.02
            p.normal_(0, std, generator=generator)
        if name.endswith(('o_proj.weight', 'w_out')):
            p.mul_((2 * config.n_layers) ** -0.5)
    return model


def learn_base(s, n_vocab, text):
    """The base model, learnt in s.base_steps on `text`: cross-entropy plus the load-balancing loss.

    n_vocab: the tokens that were learnt, s.n_vocab at most.
    """
    config = Config(
        **{name: getattr(s, name) for name in SIZES},
        n_vocab=n_vocab,
        n_kv_heads=s.n_heads // 2,
        head_dim=s.dim // s.n_heads,
        eos=n_vocab - 1,
        max_len=max(s.seq, Config.max_len),
    )
    model = new_model(config).to(s.device)
    matrices = []
    routers = []
    others = []
    for name, p in model.named_parameters():
        if 'router' in name:
            routers.append(p)
        elif p.dim() > 1 and 'layers' in name:
            matrices.append(p)
        else:
            others.append(p)
    muon = Muon(matrices)
    groups = [{'params': others, 'highest': ADAM_LR}, {'params': routers, 'highest': ROUTER_LR}]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.95))
    batches = text.batches(BATCH, seed=0)
    progress = Progress('base')
    for step in range(1, s.base_steps + 1):
        inputs, targets, _ = next(batches)                                  # (B,T) each
        router_probs = []                                                   # (P,N), layer by layer
        policy = Watched(
            TopK(config.top_k),
            lambda layer, x, probs, k: router_probs.append(probs),
        )
        logits = model(inputs.to(s.device), policy)                         # (B,T,V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.to(s.device).flatten())
        (loss + BALANCE * balance_loss(router_probs, config.top_k)).backward()
        rise = step / 10
        fall = (s.base_steps - step + 1) / (0.5 * s.base_steps)
        scale = min(rise, fall, 1)                                          # warm up, hold, linear to 0
        muon.step(MUON_LR * scale)
        for group in adam.param_groups:
            group['lr'] = group['highest'] * scale
        adam.step()
        model.zero_grad()
        progress(step, s.base_steps, inputs.numel(), loss=loss.item())
        if step == 20:
            minutes = WHOLE * s.base_steps / 20 * (time.monotonic() - progress.start) / 60
            print(f'at this rate the whole run takes about {minutes:.0f} minutes')
    return model
