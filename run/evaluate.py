"""run/evaluate.py: the loss under a policy, its error, and the knob that gives a wanted mean k.

Windows are (inputs, targets, documents), each (n,T), as base/text.py:Text.windows gives them.
"""
import math

import numpy as np
import torch

import ppo
from allocator import Counted, bisect
from run.ranks import gathered, ranks
from scale.memory import LOGITS

BLOCKS = 16             # of one document, whose tokens say nothing about how documents differ


def token_logp(model, hidden, targets):
    """log p(target) in nats, (B,T) fp32, of last states (B,T,C) and targets (B,T), a few rows at a time."""
    rows = max(1, LOGITS // (model.config.n_vocab * targets.shape[1]))
    chunks = zip(hidden.split(rows), targets.split(rows))
    return torch.cat([ppo.next_token_logp(model.lm_head(h), y) for h, y in chunks])


@torch.no_grad()
def evaluate(model, windows, choose_k, batch=32):
    """Loss in nats of every target token under a policy, and its tally: ((n*T,) float64 on the CPU, Counted).

    Under several ranks each takes its part of the windows, and all have the whole result.
    """
    (rank, size), device = ranks(), model.device
    tally = Counted(choose_k, len(model.config.moe_layers), device)
    inputs, targets = (z.tensor_split(size)[rank] for z in windows[:2])     # this rank's windows
    T = inputs.shape[1]
    together = batch * max(1, model.tokens_per_visit // (batch * T))      # windows that share a layer's visit
    losses = []
    for at in range(0, -(-len(windows[0]) // size), together):              # as many visits on every rank
        x, y = inputs[at:at + together], targets[at:at + together]
        passes = [(part.to(device), tally) for part in x.split(batch)]
        if len(x) == 0:
            passes = [(windows[0][:1].to(device), None)]
        for hidden, part in zip(model.hidden_of(passes), y.split(batch)):
            if len(part):
                losses.append(-token_logp(model, hidden, part.to(device)).flatten().cpu().double())
    mine = torch.cat(losses) if losses else torch.zeros(0).double()
    parts = gathered((mine, tally.counts.cpu()))
    tally.counts = sum(counts for _, counts in parts).to(device)
    return torch.cat([loss for loss, _ in parts]), tally


@torch.no_grad()
def divergences(model, windows, policies, batch=32):
    """KL in nats from the Top-K prediction to each policy's, per token, with its tally: [((n*T,), Counted),
    ..].

    It is the loss that a policy costs, expected under the Top-K prediction instead of taken on the text's own
    token.
    """
    tallies = [Counted(policy, len(model.config.moe_layers), model.device) for policy in policies]
    rows = max(1, LOGITS // (model.config.n_vocab * windows[0].shape[1]))
    found = [[] for _ in policies]
    for part in windows[0].split(batch):
        tokens = part.to(model.device)
        topk, *hidden = model.hidden_of([(tokens, choose_k) for choose_k in (None, *tallies)])       # (B,T,C)
        for at in range(0, len(tokens), rows):
            logits_topk = model.lm_head(topk[at:at + rows])                 # (rows,T,V)
            for nats, h in zip(found, hidden):
                gain = ppo.expected_gain(model.lm_head(h[at:at + rows]), logits_topk)
                nats.append(-gain.flatten().cpu().double())
    return [(torch.cat(nats), tally) for nats, tally in zip(found, tallies)]


def calibrate(model, windows, policy_of, target, low, high):
    """The knob at which policy_of(knob) has mean k = target on `windows`, by bisection with real passes."""
    def mean_k(knob):
        return evaluate(model, windows, policy_of(knob))[1].mean()
    return bisect(mean_k, target, low, high)


def clustered_error(delta, document):
    """Standard error of the mean of `delta` (n,), tokens of one document taken as dependent.

    Where all is one document, tokens of one of BLOCKS equal parts of it.
    """
    _, number = np.unique(document, return_inverse=True)
    if not number.any():
        number = np.arange(len(delta)) * BLOCKS // len(delta)
    sums = np.bincount(number, weights=delta - delta.mean())                # one per document
    m = len(sums)
    return math.sqrt((sums ** 2).sum() * m / max(m - 1, 1)) / len(delta)


def bits_per_byte(nats, windows, tokenizer):
    """Mean bits per byte of the target text; `nats`: the loss of all its tokens. bos and eos are no bytes."""
    n_bytes = [0 if i in tokenizer.marks else len(tokenizer.bytes_of_id.get(i, b''))
               for i in range(int(windows[1].max()) + 1)]
    return nats / math.log(2) / torch.tensor(n_bytes)[windows[1]].sum().item()
