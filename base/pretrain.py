"""base/pretrain.py: a small Mixtral from scratch: Muon for matrices, AdamW for the rest, balanced experts."""
import torch
import torch.nn.functional as F

from allocator import TopK, Watched
from base.documents import digest_of
from model import Transformer
from run.console import Progress

MUON_LR = 0.02          # of the matrices
ADAM_LR = 3e-3          # of embedding, head, routers, norms
BALANCE = 0.01          # weight of the load-balancing loss
# the settings that a base model depends on, beside its text
RECIPE = ('n_vocab', 'seq', 'n_layers', 'dim', 'n_heads', 'n_kv_heads', 'n_experts', 'top_k', 'expert_dim',
          'base_steps', 'base_batch', 'bf16')


def orthogonalise(G):
    """Newton-Schulz iteration on a stack (..,m,n): nearly U V^T of each G = U S V^T (Muon, Jordan 2024)."""
    tall = G.shape[-2] > G.shape[-1]
    X = G.mT if tall else G
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(3):              # five are usual; three cost less and measured the same here
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.mT if tall else X


class Muon:
    """Momentum orthogonalised by Newton-Schulz; torch's own takes single matrices, the experts are stacks."""

    def __init__(self, params, lr, momentum=0.95):
        self.params, self.lr, self.momentum = params, lr, momentum
        self.averages = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self, scale):
        for p, average in zip(self.params, self.averages):
            average.lerp_(p.grad, 1 - self.momentum)
            update = orthogonalise(p.grad.lerp(average, self.momentum))
            p.add_(update, alpha=-scale * self.lr * max(1, p.shape[-2] / p.shape[-1]) ** 0.5)


def balance_loss(router_probs, top_k):
    """N * sum_n (share of choices that go to n) * (mean probability of n); 1 when balanced (Fedus 2021).

    router_probs: [(P,N) of each MoE layer]; the mean over layers.
    """
    total = 0
    for probs in router_probs:
        chosen = torch.zeros_like(probs).scatter_(1, probs.topk(top_k).indices, 1 / top_k)  # (P,N)
        total = total + probs.shape[1] * (chosen.mean(0) * probs.mean(0)).sum()
    return total / len(router_probs)


def new_model(config, seed):
    """A Transformer with fresh weights: embedding 0.02, matrices 1/sqrt(fan-in), smaller at residuals."""
    model, generator = Transformer(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                std = 0.02 if name.startswith(('embed', 'lm_head')) else p.shape[-1] ** -0.5
                p.normal_(0, std, generator=generator)
            if name.endswith(('o_proj.weight', 'w_out')):
                p.mul_((2 * config.n_layers) ** -0.5)
    return model


def learn_base(s, config, text):
    """The base model, learnt in s.base_steps on `text`: cross-entropy plus the load-balancing loss."""
    model = new_model(config, seed=0).to(s.device)
    matrices, others = [], []
    for name, p in model.named_parameters():
        is_matrix = p.dim() > 1 and not name.startswith(('embed', 'lm_head')) and 'router' not in name
        (matrices if is_matrix else others).append(p)
    muon = Muon(matrices, MUON_LR)
    adam = torch.optim.AdamW(others, ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0)
    batches = text.batches(s.base_batch, s.seq, torch.Generator().manual_seed(0))
    progress = Progress('base', s.base_steps)
    for step in range(1, s.base_steps + 1):
        inputs, targets = (z.to(s.device) for z in next(batches))           # (B,T) both
        seen = []                                                         # the routers' (P,N), layer by layer
        watched = Watched(TopK(s.top_k), lambda layer, x, probs, k: seen.append(probs))
        with torch.autocast(model.device.type, torch.bfloat16, enabled=s.bf16):
            logits = model(inputs, watched)                                 # (B,T,V)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        (loss + BALANCE * balance_loss(seen, s.top_k)).backward()
        rise, fall = step / 10, (s.base_steps - step + 1) / (0.5 * s.base_steps)
        scale = min(rise, fall, 1)                                          # warm up, hold, linear to 0
        muon.step(scale)
        adam.param_groups[0]['lr'] = ADAM_LR * scale
        adam.step()
        for p in model.parameters():
            p.grad = None
        progress(step, step * inputs.numel(), loss=loss.item())
    return model


def base_recipe(s, documents):
    """What a base model depends on: settings, and a digest of the text."""
    return {'text': digest_of(documents), **{name: getattr(s, name) for name in RECIPE}}
