"""study/sample.py: text under a chosen policy, as it comes; then its speed and mean k.

    python -m study.sample --run out/deep --prompt "def main("               by the allocators
    python -m study.sample --ckpt olmoe-1b-7b --policy k=4 --prompt "Once"   any static k, no training needed
"""
import time
from itertools import takewhile

import torch

from allocator import Counted
from base.frozen import load_model
from hub.files import InputError
from hub.tokenizer import Tokenizer
from model import generate_steps
from run import standins
from run.console import OneLineParser, model_flags, one_line_errors
from scale.graph import graph_decoder
from study.policies import open_policy, policy_flags


def main(argv):
    p = OneLineParser(__doc__)
    policy_flags(p)
    model_flags(p)
    p.add_argument('--prompt', required=True, help='the text to continue')
    p.add_argument('--tokens', type=int, default=100, help='how many tokens to write (default 100)')
    p.add_argument('--temperature', type=float, default=0.8, help='0: the most probable token (default 0.8)')
    p.add_argument('--seed', type=int, default=0, help='of what is drawn (default 0)')
    a = p.parse_args(argv)
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
    standins.use(model, policy.fitted)
    tally = Counted(policy, model)
    start = time.perf_counter()
    tokens = torch.tensor([ids], device=s.device)
    torch.manual_seed(a.seed)
    steps = generate_steps(model, tokens, a.tokens, tally, a.temperature, decoder=graph_decoder)
    written = takewhile(lambda token: token not in tokenizer.stops, map(int, steps))    # steps are (1,1) each
    print(a.prompt, end='', flush=True)
    for new, piece in enumerate(tokenizer.stream(written)):    # a piece of each token, and one behind them
        print(piece, end='', flush=True)
    seconds = time.perf_counter() - start
    print(f'\n--- {new} tokens behind {n}, {new / seconds:.1f} tokens/s, '
          f'mean k {tally.mean():.3f} of K = {config.top_k}')


if __name__ == '__main__':
    one_line_errors('study.sample', main)
