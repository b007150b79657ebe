"""run/evaluate.py: the loss under a policy, its error, and the knob that gives a wanted mean k.

Windows are (inputs, targets, documents), each (n,T), as base/text.py:Text.windows gives them.
"""
import math

import numpy as np
import torch

import ppo
from allocator import Counted, find_knob
from run.ranks import gathered, my_rank, n_ranks
from scale.memory import LOGITS, sequences_of_pass

BLOCKS = 16             # a document longer than this part of the text counts as several


def evaluate(model, windows, policies, expected=False):
    """The loss of every token under each policy, and the policy's tally: [((n*T,) float64 CPU, Counted), ..].

    In nats, of the text's own next token; or with `expected` the loss that a policy costs, expected under the
    top-k prediction: KL(p_topk || p), without the luck of the text.
    """
    tallies = [Counted(policy, model) for policy in policies]
    deciders = [None, *tallies] if expected else tallies       # None: top-k
    T = windows[0].shape[1]

    def losses(inputs, targets):
        return -rewards_under(model, inputs, targets, dict.fromkeys(deciders, 1), expected)
    few = max(sequences_of_pass(T), model.tokens_per_visit // T)            # windows of a sweep
    loss = by_parts(model, windows, few, losses)[-len(policies):]           # (policies,n*T)
    for tally in tallies:
        tally.counts = sum(gathered(tally.counts.cpu()))
    return list(zip(loss.double(), tallies))


@torch.no_grad()
def by_parts(model, windows, few, see):
    """see(inputs, targets), (any,P,..), of all windows, a few at a time -> (any,n*T,..) on the CPU.

    Under several ranks each takes its part of the windows, and all have the whole result. `see` is called
    equally often on all of them, on some with no windows left.
    """
    size = n_ranks()
    inputs, targets = (part.tensor_split(size)[my_rank()].to(model.device) for part in windows[:2])
    most = -(-len(windows[0]) // size)                         # windows of the rank that has most
    found = [see(inputs[at:at + few], targets[at:at + few]).cpu() for at in range(0, most, few)]
    return torch.cat(gathered(torch.cat(found, dim=1)), dim=1)


def rewards_under(model, inputs, targets, times, expected):
    """The reward (n,P) of the P tokens of inputs and targets (B,T), in one sweep over the layers.

    times: {policy: how many of the n times it decides}; with `expected` the first decides once.
    """
    few = sequences_of_pass(inputs.shape[1])
    passes = []
    for policy, n in times.items():
        passes += [(part, policy) for part in inputs.repeat(n, 1).split(few)]
    hidden = torch.cat(model.hidden_of(passes))                             # (n*B,T,C)
    hidden = hidden.view(sum(times.values()), -1, model.config.dim)         # (n,P,C)
    return rewards(model, hidden, targets.flatten(), expected)


def rewards(model, hidden, targets, expected):
    """The reward (n,P) of last states (n,P,C): those of P tokens under n policies.

    The log-probability of targets (P,), or with `expected` its mean under hidden[0], less that of hidden[0]
    itself (ppo.py:expected_gain). The head runs on a few tokens at a time.
    """
    few = max(1, LOGITS // (len(hidden) * model.config.n_vocab))            # tokens
    found = []
    for h, y in zip(hidden.split(few, dim=1), targets.split(few)):
        if expected:
            # the head is linear: of a small change of states it makes an exact change of logits
            change = model.lm_head(h - h[0])                                # (n,few,V)
            reward = ppo.expected_gain(change, model.lm_head(h[0]))
        else:
            logits = model.lm_head(h)                                       # (n,few,V)
            reward = ppo.next_token_logp(logits, y.expand(len(h), -1))
        found.append(reward)                                                # (n,few)
    return torch.cat(found, dim=1)


def calibrate(model, windows, policy_of, target, low, high):
    """policy_of(knob) with the knob at which its mean k on `windows` is target, by real passes.

    low, high: the knobs of 1 expert and of k_max (allocator.py:find_knob).
    """
    def mean_k(knob):
        [(_, tally)] = evaluate(model, windows, [policy_of(knob)])
        return tally.mean()
    return policy_of(find_knob(mean_k, target, low, high, policy_of(high).k_max))


def clustered_error(delta, document):
    """Standard error of the mean of `delta` (n,), tokens of one document taken as dependent.

    The larger of two: of documents, and of parts of documents, since few documents say little about how
    documents differ. `document`, n in all: the number of each token's document, one document behind another.
    """
    document = np.ravel(document)                              # (n,)
    place = np.arange(len(delta)) - document.searchsorted(document)        # of a token in its document
    part = place * BLOCKS // len(delta)                        # 0..BLOCKS-1
    return max(jackknife(delta, document), jackknife(delta, document * BLOCKS + part))


def jackknife(delta, cluster):
    """Standard error of the mean of `delta` (n,): how it moves as one cluster after the other is left out.

    The last factor is about that of Student's distribution: with m = 2 or 5 clusters, too, plus or minus two
    errors are to hold the truth as often as with many.
    """
    _, number, sizes = np.unique(cluster, return_inverse=True, return_counts=True)      # (n,) and (m,)
    m = len(sizes)
    if m == 1:
        return 0.0
    sums = np.bincount(number, weights=delta - delta.mean())                # (m,)
    moves = sums / (len(delta) - sizes)
    return math.sqrt((m - 1) / m * (moves ** 2).sum()) * (m + 1) / (m - 1)


def effective_documents(document):
    """As how many documents of equal length these count: (sum of lengths)^2 / sum of their squares."""
    sizes = np.bincount(np.ravel(document))
    return sizes.sum() ** 2 / (sizes ** 2).sum()


def bits_per_byte(loss, targets, tokenizer):
    """Of the text in targets (n,T), whose tokens lose `loss` nats in the mean; bos and eos are no bytes."""
    n_bytes = sum(
        len(tokenizer.bytes_of_id[i])
        for i in targets.flatten().tolist()
        if i not in tokenizer.marks
    )
    return loss * targets.numel() / math.log(2) / n_bytes
