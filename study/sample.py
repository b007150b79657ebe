"""study/sample.py: text under a chosen policy, as it comes; then its speed and mean k.

    python -m study.sample --run out/deep --prompt "def main(" --show        by the allocators, coloured by k
    python -m study.sample --ckpt olmoe-1b-7b --policy k=4 --prompt "Once"   any static k, no training needed
"""
import time
from pathlib import Path

import torch

from allocator import Counted
from base.frozen import base_folder, load_model
from hub.config import read_config
from hub.files import InputError
from hub.tokenizer import Tokenizer
from model import generate_steps
from run.console import OneLineParser, model_flags, one_line_errors, open_model_flags
from study.passage import coloured
from study.policies import POLICIES, make_policy
from train import settings_of


def parser(doc):
    """The flags of a program that runs a model under a policy by name."""
    p = OneLineParser(doc)
    p.add_argument('--run', default='', help='a run of train.py: its base and its allocators')
    model_flags(p)
    p.add_argument('--policy', help=f'{POLICIES} (default: ada-k with --run, else top-k)')
    p.add_argument('--seed', type=int, default=0, help='of what is drawn (default 0)')
    return p


def opened(a):
    """(settings, folder of the base, its tokenizer, its Config, the name of the policy); joins the ranks."""
    if not a.run and not a.ckpt:
        raise InputError('give --ckpt NAME_OR_FOLDER, --run FOLDER, or both')
    open_model_flags(a)
    s = settings_of(a, finished=False)
    folder = base_folder(s, Path(a.run))
    return s, folder, Tokenizer(folder), read_config(folder), a.policy or ('ada-k' if a.run else 'top-k')


def sample(a):
    """Continue the prompt."""
    s, folder, tokenizer, c, name = opened(a)
    policy = make_policy(name, c, a.run, a.device)
    ids = tokenizer.prompt(a.prompt)
    if not ids:
        raise InputError('--prompt: is empty')
    if max(ids) >= c.n_vocab:
        raise InputError(f'--prompt: the tokenizer gives id {max(ids)}, '
                         f'the model has only {c.n_vocab} tokens')
    if len(ids) + a.tokens > c.max_len:
        raise InputError(f'--prompt of {len(ids)} tokens and --tokens {a.tokens}: '
                         f'the model reads at most {c.max_len}')
    model = load_model(s, folder)
    tokens = torch.tensor([ids], device=a.device)
    tally = Counted(policy, len(c.moe_layers), a.device)
    generator = torch.Generator(a.device).manual_seed(a.seed)
    new, times = [], [time.perf_counter()]

    def ids_as_they_come():
        for token in generate_steps(model, tokens, a.tokens, tally, a.temperature, generator):
            times.append(time.perf_counter())
            if token.item() in tokenizer.stops:
                return
            new.append(token.item())
            yield token.item()

    print(a.prompt, end='', flush=True)
    for piece in tokenizer.stream(ids_as_they_come(), first=False):
        print(piece, end='', flush=True)
    print()
    rate = 'one token only'
    if len(times) > 2:
        rate = f'{(len(times) - 2) / (times[-1] - times[1]):.1f} tokens/s after the first'
    print(f'--- {len(new)} tokens, prompt of {len(ids)} in {times[1] - times[0]:.2f} s, {rate}, '
          f'mean k {tally.mean():.3f} of K = {c.top_k} ({type(policy).__name__})')
    if a.show:
        print(coloured(model, tokenizer, torch.tensor([ids + new], device=a.device), policy))


def main(argv=None):
    p = parser(__doc__)
    p.add_argument('--prompt', required=True, help='the text to continue')
    p.add_argument('--tokens', type=int, default=100, help='how many tokens to write (default 100)')
    p.add_argument('--temperature', type=float, default=0.0, help='0: the most probable token (default)')
    p.add_argument('--show', action='store_true', help='print the text once more, tokens coloured by their k')
    a = p.parse_args(argv)
    if a.tokens < 1 or not 0 <= a.temperature < float('inf'):
        raise InputError('--tokens must be 1 or more, --temperature 0 or more')
    sample(a)


if __name__ == '__main__':
    one_line_errors('study.sample', main)
