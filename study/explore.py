"""study/explore.py: a passage and the experts that each of its tokens runs, as one page -> RUN/explore.html.

    python -m study.explore out/deep                                held-out text; a minute on two cores
    python -m study.explore out/deep --prompt "def main(argv):"     or --text FILE

The page needs no network and computes nothing: the passage is read here under every policy at every budget,
and the page looks up what the model did. explore.html beside this file is its template.
"""
import base64
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import ppo
import run.standins as standins
from allocator import AdaK, RandomMix, TopK, TopP, Watched, find_knob
from base.documents import read_documents, split_documents
from base.frozen import load_model
from hub.checkpoint import base_digest
from hub.files import InputError, reading, write_whole
from hub.tokenizer import Tokenizer
from model import Transformer
from moe_dispatch import flops
from run.console import one_line_errors, open_model_flags, open_out
from run.rules import SkipFamilies
from run.standins import rank_in
from study.policies import open_policy
from study.study import parser

BUDGETS = 9             # from 1 expert to K
LONGEST = 512           # tokens of a passage
PAGE_BYTES = 2_000_000  # of the largest page
SHOWN = 4               # router probabilities, and next tokens
DEAREST = 100           # price in nats at which Ada-K runs 1 expert; at its negative, all that it may


# ================================================================ what the model computes

@dataclass
class Passage:
    """The n tokens of a text as a model reads them: in windows, as long as those of its run."""
    model: Transformer
    tokenizer: Tokenizer
    windows: torch.Tensor       # (m,T) the tokens, and padding behind them
    n: int

    @torch.no_grad()
    def read(self, policy, see=lambda layer, x, probs, k: k):
        """What `see` gives of each layer and token, (L,n,..) on the CPU, and the last states (n,C).

        see(layer, x, probs, k) -> (m*T,..) looks at every decision, by default at k itself.
        """
        seen = []
        watched = Watched(policy, lambda *decision: seen.append(see(*decision).cpu()))
        torch.manual_seed(0)                                   # for the policy that draws
        states = self.model.hidden(self.windows, watched)                   # (m,T,C)
        return torch.stack(seen)[:, :self.n], states.flatten(0, 1)[:self.n]

    @torch.no_grad()
    def row(self, policy):
        """What the page shows of a policy: mean k, losses in nats, k (L,n), the most probable next tokens.

        A token's loss is that of predicting the token behind it; the last one has none.
        """
        k, states = self.read(policy)
        logits = self.model.lm_head(states).float()                         # (n,V)
        ids = self.windows.flatten()[:self.n]
        losses = -ppo.next_token_logp(logits[:-1], ids[1:])                 # (n-1,)
        best, guesses = logits.softmax(-1).topk(SHOWN)                      # (n,SHOWN) both
        config = self.model.config
        mean_k = k.float().mean().item()
        mean_left = (config.top_k - k).clamp_min(0).float().mean().item()
        ours = flops(config, mean_k, 1, 0, mean_left, rank_in(self.model))
        return {
            'mean_k': mean_k,
            'expert_flops': ours['experts'] / flops(config, config.top_k, 1)['experts'],
            'loss': losses.mean().item(),
            'k': packed(k),
            'losses': [round(loss, 4) for loss in losses.tolist()],
            'guesses': [
                [self.tokenizer.decode([i]) for i in of_token]
                for of_token in guesses.tolist()
            ],
            'sure': packed(100 * best),
        }

    def calibrated(self, mean_k, policy_of, low, high):
        """The row of policy_of(knob) with this mean k on the passage; low, high as for find_knob."""
        def measured(knob):
            return self.row(policy_of(knob))['mean_k']
        knob = find_knob(measured, mean_k, low, high, policy_of(high).k_max)
        return {'knob': knob, **self.row(policy_of(knob))}


def explore(passage, allocators):
    """The numbers of the page: rows of top-k, and of each policy by budget.

    Ada-K meets a budget by its price, the others are calibrated to its mean k. Ada-K's rows also have the
    allocators' probabilities of each k, (L,n,k_max). `router`, (L,n,SHOWN), is under top-k.
    """
    config = passage.model.config
    K = config.top_k
    N = config.n_experts
    families = SkipFamilies(passage.model, [passage.windows])
    dials = {                   # the policy of a knob, the knobs of 1 expert and of all that it may run
        'ada-k': (lambda price: AdaK(allocators, price), DEAREST, -DEAREST),
        'skip': (lambda mean_k: families.policy('per layer', mean_k), 1, K),
        'top-p': (lambda p: TopP(p, N), 0, 1),
        'random-mix': (RandomMix, 1, K),
    }
    rows = {name: [] for name in dials}
    for mean_k in np.linspace(1, K, BUDGETS):
        for name, dial in dials.items():
            row = passage.calibrated(mean_k, *dial)
            rows[name].append(row)
            mean_k = rows['ada-k'][-1]['mean_k']

    def logits_of(layer, x, probs, k):
        z = allocators.inputs(layer, x, probs)
        return allocators.logits(layer, z)
    for row in rows['ada-k']:
        price = row['knob']
        logits, _ = passage.read(AdaK(allocators, price), logits_of)        # (L,n,k_max)
        logits -= price * torch.arange(allocators.k_max)       # from 0 on: a shift of all changes nothing
        row['choices'] = packed(100 * logits.softmax(-1))

    def routed(layer, x, probs, k):
        return probs.topk(min(SHOWN, N)).values
    router, _ = passage.read(TopK(K), routed)
    return {
        'K': K,
        'top-k': passage.row(TopK(K)),
        'router': packed(100 * router),
        'policies': rows,
    }


# ================================================================ the page

def packed(numbers):
    """A tensor of numbers from 0 to 255, row by row: one byte each, rounded, in base64."""
    return base64.b64encode(numbers.round().byte().cpu().numpy()).decode()


def html(page):
    """The template with the data in it; `<` is escaped, so that no text can end the script element."""
    data = json.dumps(page, separators=(',', ':')).replace('<', '\\u003c')
    template = Path(__file__).with_suffix('.html').read_bytes()
    return template.replace(b'@DATA@', data.encode())


# ================================================================ command line

def passage_of(a, s, tokenizer):
    """The tokens of the text that the flags name, by default the first of the longest held-out document."""
    if a.prompt is not None:
        return tokenizer.encode(a.prompt)
    if a.text:
        with reading(a.text):
            return tokenizer.encode(Path(a.text).read_text('utf-8-sig', 'replace'))
    documents = read_documents(s.data, s.documents, s.prose)
    heldout = split_documents(documents)[2]
    return tokenizer.encode(max(heldout, key=len))[:LONGEST // 2]           # fits on a screen


def main(argv=None):
    p = parser(__doc__)
    source = p.add_mutually_exclusive_group()
    source.add_argument('--text', help='a file with the passage (default: the start of a held-out document)')
    source.add_argument('--prompt', help='the passage itself')
    p.set_defaults(policy='ada-k')
    a = p.parse_args(argv)
    open_model_flags(a)
    s, folder, _, policy = open_policy(a)
    tokenizer = Tokenizer(folder)
    ids = tokenizer.front + passage_of(a, s, tokenizer)
    n = len(ids)
    if not 2 <= n <= LONGEST:
        raise InputError(f'the passage has {n} tokens: give 2 to {LONGEST}')
    out = open_out(a.run, 'explore.html')
    model = load_model(s, folder)
    standins.use(model, standins.of_run(a.run, base_digest(folder)))
    # real checkpoints read far more than LONGEST; where they want a token in front, one window has it
    T = n if tokenizer.front else min(n, s.seq)
    padded = ids + [0] * (-n % T)
    windows = torch.tensor(padded, device=model.device)
    passage = Passage(model, tokenizer, windows.view(-1, T), n)
    *shown, _ = tokenizer.stream(ids)
    page = html({
        'run': a.run,
        'tokens': shown,
        **explore(passage, policy.allocators),
    })
    if len(page) > PAGE_BYTES:
        raise InputError(f'a page of {len(page)} bytes, more than {PAGE_BYTES}: give a shorter passage')
    write_whole(out / 'explore.html', lambda f: f.write(page))
    print(f'wrote {out}/explore.html, {len(page) / 1000:.0f} kB')


if __name__ == '__main__':
    one_line_errors('study.explore', main)
