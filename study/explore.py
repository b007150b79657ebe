"""study/explore.py: a passage and the experts that each of its tokens runs, as one page -> RUN/explore.html.

    python -m study.explore out/deep                                held-out text; a minute on two cores
    python -m study.explore out/deep --prompt "def main(argv):"     or --text FILE

The page needs no network and computes nothing: the passage is read here under every policy at every budget,
and the page looks up what the model did. explore.html beside this file is its template.
"""
import base64
import collections
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import ppo
from allocator import AdaK, Counted, RandomMix, TopK, TopP, Watched, find_knob
from base.documents import read_documents, split_documents
from base.frozen import load_model
from hub.files import InputError, write_text
from hub.tokenizer import Tokenizer
from run import standins
from run.compare import flops_shares
from run.console import one_line_errors, open_out
from run.rules import SkipFamilies
from study.policies import open_policy
from study.study import DEAREST, parser

BUDGETS = 9             # from 1 expert to K
LONGEST = 512           # tokens of a passage
PAGE_BYTES = 2_000_000  # of the largest page
SHOWN = 4               # router probabilities, and next tokens


# ================================================================ what the model computes

@torch.no_grad()
def explore(model, tokenizer, ids, T, allocators):
    """The numbers of the page: rows of top-k, and of each policy by budget.

    ids: the n tokens of the passage, read in windows of T. Ada-K meets a budget by its price, the others are
    calibrated to its mean k. Ada-K's rows also have the allocators' probabilities of each k, (L,n,k_max), and
    top-k's the largest of the router, (L,n,SHOWN).
    """
    config = model.config
    K = config.top_k
    n = len(ids)
    ids = torch.tensor(ids, device=model.device)
    windows = F.pad(ids, (0, -n % T)).view(-1, T)                           # padding is behind all tokens

    def row(policy):
        """What the page shows of a policy: mean k, losses in nats, k (L,n), the most probable next tokens.

        A token's loss is that of predicting the token behind it; the last one has none.
        """
        tally = Counted(policy, model)
        by_layer = collections.defaultdict(list)               # {what is shown: [a tensor of each layer]}

        def look(layer, *seen):
            x, probs, k = [t[:n] for t in seen]                # without the padding
            tally.count(layer, x, probs, k)
            by_layer['k'].append(k)                                         # (n,)
            if isinstance(policy, AdaK):
                choices = F.linear(allocators.raw(x, probs), *policy.maps[layer]).softmax(-1)
                by_layer['choices'].append(100 * choices)                   # (n,k_max)
            if isinstance(policy, TopK):
                largest = probs.topk(min(SHOWN, config.n_experts)).values
                by_layer['router'].append(100 * largest)                    # (n,SHOWN)
        torch.manual_seed(0)                                   # for the policy that draws
        states = model.hidden(windows, Watched(policy, look)).flatten(0, 1)[:n]             # (n,C)
        logits = model.lm_head(states).float()                              # (n,V)
        losses = -ppo.next_token_logp(logits[:-1], ids[1:])                 # (n-1,)
        best, guesses = logits.softmax(-1).topk(SHOWN)                      # (n,SHOWN) both
        return {
            **flops_shares(model, tally, T),
            'loss': losses.mean().item(),
            'losses': [round(loss, 4) for loss in losses.tolist()],
            'guesses': [
                [tokenizer.decode([i]) for i in of_token]
                for of_token in guesses.tolist()
            ],
            'sure': packed(100 * best),
            **{what: packed(torch.stack(of_layers)) for what, of_layers in by_layer.items()},
        }

    families = SkipFamilies(model, [windows])
    dials = {                   # the policy of a knob, the knobs of 1 expert and of all that it may run
        'ada-k': (allocators.at_price, DEAREST, -DEAREST),
        'skip': (partial(families.policy, 'per layer'), 1, K),
        'top-p': (partial(TopP, n_experts=config.n_experts), 0, 1),
        'random-mix': (RandomMix, 1, K),
    }
    mean_ks = np.linspace(1, K, BUDGETS)
    rows = {}
    for name, (policy_of, low, high) in dials.items():
        def measured(knob):
            return row(policy_of(knob))['mean_k']
        most = policy_of(high).k_max
        knobs = [find_knob(measured, mean_k, low, high, most) for mean_k in mean_ks]
        rows[name] = [{'knob': knob, **row(policy_of(knob))} for knob in knobs]
        mean_ks = [of_budget['mean_k'] for of_budget in rows['ada-k']]      # of all others
    return {
        'K': K,
        'top-k': row(TopK(K)),
        'policies': rows,
    }


def packed(numbers):
    """A tensor of numbers from 0 to 255, row by row: one byte each, rounded, in base64."""
    return base64.b64encode(numbers.round().byte().cpu().numpy()).decode()


# ================================================================ the page

def passage_of(a, s, tokenizer):
    """The tokens of the text that the flags name, by default the first of the longest held-out document."""
    if a.prompt is not None:
        return tokenizer.encode(a.prompt)
    if a.text:
        return tokenizer.encode(Path(a.text).read_text('utf-8-sig', 'replace'))
    _, _, heldout = split_documents(read_documents(s))
    return tokenizer.encode(max(heldout, key=len))[:LONGEST // 2]           # fits on a screen


def main(argv):
    p = parser(__doc__)
    p.add_argument('--text', help='a file with the passage (default: the start of a held-out document)')
    p.add_argument('--prompt', help='the passage itself')
    p.set_defaults(policy='ada-k')
    a = p.parse_args(argv)
    s, folder, _, policy = open_policy(a)
    tokenizer = Tokenizer(folder)
    ids = tokenizer.front + passage_of(a, s, tokenizer)
    n = len(ids)
    if not 2 <= n <= LONGEST:
        raise InputError(f'the passage has {n} tokens: give 2 to {LONGEST}')
    out = open_out(a.run, 'explore.html')
    model = load_model(s, folder)
    standins.use(model, policy.fitted)
    # real checkpoints read far more than LONGEST; where they want a token in front, one window has it
    T = n if tokenizer.front else min(n, s.seq)
    *shown, _ = tokenizer.stream(ids)
    data = json.dumps({
        'run': a.run,
        'tokens': shown,
        **explore(model, tokenizer, ids, T, policy.allocators),
    }, separators=(',', ':'))
    data = data.replace('<', '\\u003c')                        # so no text can end the script element
    template = Path(__file__).with_suffix('.html').read_text('utf-8')
    page = template.replace('@DATA@', data)
    if len(page) > PAGE_BYTES:
        raise InputError(f'a page of {len(page)} bytes, more than {PAGE_BYTES}: give a shorter passage')
    write_text(out / 'explore.html', page)
    print(f'wrote {out}/explore.html, {len(page) / 1000:.0f} kB')


if __name__ == '__main__':
    one_line_errors('study.explore', main)
