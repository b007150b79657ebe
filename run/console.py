"""run/console.py: between a script and its user: parser, device, folder, progress, errors in one line."""
import argparse
import os
import re
import sys
import time
from pathlib import Path

import torch

from hub.files import InputError
from run.ranks import join, leave, my_rank, n_ranks

MARK = '.ada-k'         # a file in every folder that holds files of this program


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are one line, and whose --help shows the script's own docstring."""

    def __init__(self, doc, **how):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, **how)

    def error(self, message):
        raise InputError(f'{message} (see --help)')


def model_flags(p):
    """Add the flags of every program that runs a model."""
    p.add_argument('--ckpt', help="the base: a folder as on the hub, or a short name (default: the run's)")
    p.add_argument('--device', help='cpu, cuda, cuda:1 (default: cuda for --ckpt if there is one, else cpu)')
    p.add_argument('--stream', action='store_true', help='two layers on the device, the others on the host')


def open_device(a):
    """Open a.device, the device of this process, under torchrun its own GPU, and meet the other ranks.

    None: where real weights go. Small models are as fast on a CPU, and the same everywhere. InputError unless
    torch can compute there.
    """
    name = a.device
    if name is None:
        name = 'cuda' if a.ckpt and torch.cuda.is_available() else 'cpu'
    if name.startswith('cuda') and 'LOCAL_RANK' in os.environ:
        name = f'cuda:{os.environ["LOCAL_RANK"]}'
    try:
        if name.startswith('cuda:'):
            torch.cuda.set_device(name)
        torch.ones(1, device=name).item()
    except Exception as e:                                     # torch raises many kinds here
        raise InputError(f'--device {name}: {str(e).splitlines()[0]}') from None
    a.device = name
    join(name)


def open_out(name, *files):
    """The folder of --out as a Path, made if need be and marked as this program's.

    files: names that the program will write. InputError if one of them is there without the mark, so that
    nothing of the user's is overwritten; OSError if the folder cannot be written.
    """
    out = Path(name)
    for file in files:
        if (out / file).exists() and not (out / MARK).exists():
            raise InputError(f'{out / file} was not written by this program: choose another --out')
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()
    return out


def check_settings(s):
    """InputError names the first setting that makes no sense."""
    counts = s.save_every, s.seq, s.ppo_steps, s.ppo_batch
    checks = {
        '--seed: must be 0 or more and below 2^63': 0 <= s.seed < 2 ** 63,
        f'--budget {s.budget}: must be above 0 and at most 1': 0 < s.budget <= 1,
        '--price: must be nats, 0 or more': s.price is None or 0 <= s.price < float('inf'),
        '--rank: must be 1 or more': s.rank is None or s.rank > 0,
        '--beyond: must be 0 or more': s.beyond >= 0,
        '--fresh learns a base: not with --ckpt or --resume': not (s.fresh and (s.ckpt or s.resume)),
        '--save-every, --seq, --ppo-steps, --ppo-batch: must be 1 or more': min(counts) > 0,
    }
    for line, good in checks.items():
        if not good:
            raise InputError(line)
    if not s.ckpt:
        check_budget(s, s.top_k)


def check_budget(s, top_k):
    """InputError if the budget is below one expert a token."""
    if s.price is None and s.budget * top_k < 1:
        raise InputError(f'--budget {s.budget}: every token runs at least 1 of K = {top_k} experts, '
                         f'so at least {1 / top_k:g}')


class Progress:
    """Step, numbers, tokens per second and time left, on stderr.

    On a terminal one line that is updated, elsewhere a line every ten seconds. `done`: steps of an earlier
    process.
    """

    def __init__(self, stage, done=0):
        self.stage = stage
        self.done = done
        self.start = time.monotonic()
        self.next = 0.0                                        # when to show a line again

    def __call__(self, step, steps, tokens=0, **numbers):
        """So many of the steps are done; tokens: of one step, where there are some to count."""
        now = time.monotonic()
        if my_rank() or (now < self.next and step < steps):
            return
        terminal = sys.stderr.isatty()
        self.next = now + (0.2 if terminal else 10)
        seconds = (now - self.start) / (step - self.done)                  # of a step
        left = seconds * (steps - step)
        line = f'{self.stage} {step}/{steps}'
        for name, value in numbers.items():
            line += f'  {name} {value:.4g}'
        if tokens:
            line += f'  {tokens / seconds:,.0f} tok/s'
        line += f'  {left // 60:.0f}:{left % 60:02.0f} left'
        if terminal:
            line = f'\r\x1b[K{line}'                           # over the line before; \r shows it at once
        end = '' if terminal and step < steps else '\n'
        print(line, end=end, file=sys.stderr)


def one_line_errors(script, main, argv=None):
    """main(argv), and what goes wrong in one line on stderr: exit status 2, after Ctrl-C 130.

    A wrong input, a failing disk, memory that runs out and a lost rank are said so; anything else is a bug,
    with its traceback.
    """
    status = 2
    # every line is shown at once; a console may not know how to spell ±
    sys.stdout.reconfigure(errors='backslashreplace', line_buffering=True)
    try:
        main(argv)
        return leave()
    except (InputError, OSError) as e:
        line = str(e)
    except KeyboardInterrupt:
        line = 'interrupted; files that were complete before still are, and train.py goes on with --resume'
        status = 130
    except (MemoryError, RuntimeError) as e:
        if re.search('MemoryError|out of memory|allocate memory', repr(e)):
            line = 'memory ran out: --stream, a smaller --ppo-batch or --seq need less'
        elif n_ranks() > 1 and re.search('(?i)connection|nccl|timed out', str(e)):
            line = 'another rank is gone; train.py --resume goes on from the last saved state'
        else:
            raise
    if my_rank():
        line = f'rank {my_rank()}: {line}'
    print(f'{script}: {line}', file=sys.stderr)
    if n_ranks() > 1:
        os._exit(status)                                # a shutdown would wait for a rank that is gone
    sys.exit(status)
