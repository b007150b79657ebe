"""bench.py: what a trained run does, side by side with the model's own top-k.

    python bench.py --run out/tiny --prompt "def main(" --show         text by the trained allocators, coloured by k
    python bench.py --ckpt mixtral-8x7b --run out/mixtral-8x7b --prompt "Once"
    python bench.py --ckpt olmoe-1b-7b --policy k=4 --prompt "Once"    any static k, no training needed

Generation prints the text as it comes, tokens per second and the mean number of experts a token ran in a layer.
"""
import argparse
import sys
import time
from pathlib import Path

import torch

from allocator import AdaK, Allocators, Counted, RandomMix, Skip, TopK, TopP
from model import InputError, Tokenizer, find_checkpoint, generate_steps, load
from train import OneLineParser, open_device, stored_dtype

# 256-colour backgrounds from few experts (dark blue) to many (yellow); they differ in lightness too, so greyscale works
COLOURS = 17, 24, 66, 144, 221


def parse(argv):
    p = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--ckpt', metavar='NAME_OR_FOLDER', help='the base model (default: RUN/base)')
    p.add_argument('--run', metavar='FOLDER', help='a finished run of train.py: its allocator.safetensors')
    p.add_argument('--prompt', required=True, help='text to continue')
    p.add_argument('--tokens', type=int, default=100, help='how many tokens to generate (default 100)')
    p.add_argument('--policy', help='ada-k (default with --run), top-k (default without), k=2, mix=1.5, top-p=0.4, skip=0.5')
    p.add_argument('--temperature', type=float, default=0.0, help='0: the most probable token (default)')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--device', default='cpu')
    p.add_argument('--show', action='store_true', help='print the text once more, each token coloured by its k')
    a = p.parse_args(argv)
    if not a.ckpt and not a.run:
        raise InputError('give --ckpt NAME_OR_FOLDER, --run FOLDER, or both')
    if a.tokens < 1 or not 0 <= a.temperature < float('inf'):
        raise InputError('--tokens must be 1 or more, --temperature 0 or more')
    open_device(a.device)
    return a


def make_policy(name, config, run):
    """The policy that `--policy` names; InputError says what is wrong with it."""
    kind, _, knob = name.partition('=')
    if kind == 'ada-k':
        if not run:
            raise InputError('--policy ada-k: give the trained run with --run FOLDER')
        return AdaK(Allocators.load(Path(run) / 'allocator.safetensors', config))
    if name == 'top-k':
        return TopK(config.top_k)
    try:
        value = float(knob)
        if kind == 'k' and value == int(value) and 1 <= value <= config.n_experts:
            return TopK(int(value))
        if kind == 'mix' and 1 <= value <= config.n_experts:
            return RandomMix(value)
        if kind == 'top-p' and 0 < value <= 1:
            return TopP(value, config.n_experts)
        if kind == 'skip' and value >= 0:
            return Skip(value, config.top_k)
    except ValueError:
        pass
    raise InputError(f'--policy {name}: use ada-k, top-k, k=1..{config.n_experts}, mix=1..{config.n_experts}, top-p=0..1, or skip=0..')


class Watched(Counted):
    """A policy with a tally that also keeps every k of the pass: `k` is a list of (P,), one per layer."""

    def __init__(self, policy, n_layers):
        super().__init__(policy, n_layers)
        self.k = []

    def __call__(self, layer, x, probs):
        self.k.append(super().__call__(layer, x, probs))
        return self.k[-1]


@torch.no_grad()
def coloured(model, tokenizer, tokens, policy):
    """The text of tokens (1,T), each on a background by the mean k it ran over the layers, and a legend."""
    watched = Watched(policy, len(model.config.moe_layers))
    model.hidden(tokens, watched)
    k = torch.stack(watched.k).float().mean(0)                                  # (T,)
    low, high = k.min().item(), k.max().item()
    width = (high - low) / len(COLOURS) or 1
    paint = lambda i, text: f'\x1b[48;5;{COLOURS[i]}m\x1b[38;5;{231 if i < 3 else 16}m{text}\x1b[0m'
    pieces = tokenizer.stream(tokens[0].tolist())
    body = ''.join(paint(min(int((k_t - low) / width), len(COLOURS) - 1), piece).replace('\n', '\x1b[0m\n')
                   for k_t, piece in zip(k.tolist(), pieces))
    legend = ' '.join(paint(i, f' {low + i * width:.2f}-{low + (i + 1) * width:.2f} ') for i in range(len(COLOURS)))
    return f'{body}\nmean k over the layers: {legend}'


def generation(a):
    """Continue the prompt, printing text as it comes, then speed and mean k."""
    folder = find_checkpoint(a.ckpt) if a.ckpt else Path(a.run) / 'base'
    tokenizer = Tokenizer(folder)
    model = load(folder, stored_dtype(folder), a.device)
    c = model.config
    policy = make_policy(a.policy or ('ada-k' if a.run else 'top-k'), c, a.run)
    ids = [tokenizer.bos] * (tokenizer.bos is not None) + tokenizer.encode(a.prompt)
    if not ids:
        raise InputError('--prompt: is empty')
    tokens = torch.tensor([ids], device=a.device)
    tally = Counted(policy, len(c.moe_layers))
    generator = torch.Generator(a.device).manual_seed(a.seed)
    new, times = [], [time.perf_counter()]

    def ids_as_they_come():
        for token in generate_steps(model, tokens, a.tokens, tally, a.temperature, generator):
            times.append(time.perf_counter())
            if token.item() == tokenizer.eos:
                return
            new.append(token.item())
            yield token.item()

    print(a.prompt, end='', flush=True)
    for piece in tokenizer.stream(ids_as_they_come(), first=False):
        print(piece, end='', flush=True)
    print()
    rate = f'{(len(times) - 2) / (times[-1] - times[1]):.1f} tokens/s after the first' if len(times) > 2 else 'one token only'
    print(f'--- {len(new)} tokens, prompt of {len(ids)} in {times[1] - times[0]:.2f} s, {rate}, '
          f'mean k {tally.mean():.3f} of K = {c.top_k} ({type(policy).__name__})')
    if a.show:
        print(coloured(model, tokenizer, torch.tensor([ids + new], device=a.device), policy))


def main(argv=None):
    generation(parse(argv))


def command_line(argv=None):
    try:
        main(argv)
    except InputError as e:
        print(f'bench.py: {e}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    command_line()
