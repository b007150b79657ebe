"""study/sample.py: text under a chosen policy, as it comes; then its speed and mean k.

    python -m study.sample --run out/deep --prompt "def main(" --show        by the allocators, coloured by k
    python -m study.sample --ckpt olmoe-1b-7b --policy k=4 --prompt "Once"   any static k, no training needed
"""
import time

import torch

import run.standins as standins
from allocator import Counted, Watched
from base.frozen import load_model
from hub.checkpoint import base_digest
from hub.files import InputError
from hub.tokenizer import Tokenizer
from model import generate_steps
from run.console import OneLineParser, model_flags, one_line_errors, open_model_flags
from scale.graph import graph_decoder
from study.policies import open_policy, policy_flags

BLACK, GREYS = 232, 24          # of a terminal's 256 colours, in rising lightness


def written(steps, stops, ids):
    """The ids of the steps, (1,1) each, up to the first that ends a text; appends them to `ids`."""
    for new in steps:
        token = new.item()
        if token in stops:
            return
        ids.append(token)
        yield token


@torch.no_grad()
def coloured(model, tokenizer, tokens, policy):
    """The text of tokens (1,T) for a terminal, each on a grey that is lighter the more experts it ran."""
    seen = []
    model.hidden(tokens, Watched(policy, lambda layer, x, probs, k: seen.append(k)))
    k = torch.stack(seen).float().mean(0).tolist()                          # [T], mean over the layers
    low, high = min(k), max(k)
    shown = ''
    for k_t, piece in zip(k, tokenizer.stream(tokens[0])):
        share = (k_t - low) / max(high - low, 1e-9)
        grey = BLACK + round(share * (GREYS - 1))
        text = 231 if share < 0.5 else 16                      # white on dark, black on light
        piece = piece.replace('\n', '\x1b[0m\n')
        shown += f'\x1b[48;5;{grey};38;5;{text}m{piece}\x1b[0m'
    return f'{shown}\nexperts a layer, from black to white: {low:.2f} to {high:.2f}'


def main(argv=None):
    p = OneLineParser(__doc__)
    policy_flags(p)
    model_flags(p)
    p.add_argument('--prompt', required=True, help='the text to continue')
    p.add_argument('--tokens', type=int, default=100, help='how many tokens to write (default 100)')
    p.add_argument('--temperature', type=float, default=0.8, help='0: the most probable token (default 0.8)')
    p.add_argument('--seed', type=int, default=0, help='of what is drawn (default 0)')
    p.add_argument('--show', action='store_true', help='print the text once more, tokens coloured by their k')
    a = p.parse_args(argv)
    open_model_flags(a)
    s, folder, config, policy = open_policy(a)
    tokenizer = Tokenizer(folder)
    ids = tokenizer.prompt(a.prompt)
    n = len(ids)
    if not 0 < n < n + a.tokens <= config.max_len:
        raise InputError(f'--prompt of {n} tokens, --tokens {a.tokens}: '
                         f'give 1 or more of both, together at most {config.max_len}')
    if not (0 <= a.temperature < float('inf') and 0 <= a.seed < 2 ** 63):
        raise InputError('--temperature must be 0 or more, --seed 0 or more and below 2^63')
    if max(ids) >= config.n_vocab:
        raise InputError(f'--prompt: the tokenizer gives id {max(ids)}, '
                         f'the model has only {config.n_vocab} tokens')
    model = load_model(s, folder)
    if a.run:
        standins.use(model, standins.of_run(a.run, base_digest(folder)))
    tally = Counted(policy, len(config.moe_layers), a.device)
    start = time.perf_counter()
    tokens = torch.tensor([ids], device=a.device)
    generator = torch.Generator(a.device).manual_seed(a.seed)
    steps = generate_steps(model, tokens, a.tokens, tally, a.temperature, generator, graph_decoder)
    print(a.prompt, end='', flush=True)
    for piece in tokenizer.stream(written(steps, tokenizer.stops, ids), first=False):
        print(piece, end='', flush=True)
    new = len(ids) - n
    rate = new / (time.perf_counter() - start)
    print(f'\n--- {new} tokens behind {n}, {rate:.1f} tokens/s, '
          f'mean k {tally.mean():.3f} of K = {config.top_k}')
    if a.show:
        print(coloured(model, tokenizer, torch.tensor([ids], device=a.device), policy))


if __name__ == '__main__':
    one_line_errors('study.sample', main)
