"""run/console.py: between a script and its user: parser, device, folder, progress, errors in one line."""
import argparse
import os
import re
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from hub.files import InputError, read_object, write_whole
from run.ranks import join, leave, ranks


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are one line, and whose --help shows the script's own docstring.

    moved {flag: command}: flags of an earlier version, answered by the name of what does that now.
    """

    def __init__(self, doc, moved=None, **how):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, **how)
        self.moved = moved or {}

    def parse_known_args(self, args=None, namespace=None):
        for arg in sys.argv[1:] if args is None else args:
            flag = arg.partition('=')[0]
            if flag in self.moved:
                raise InputError(f'{flag} is a program of its own now: {self.moved[flag]}')
        return super().parse_known_args(args, namespace)

    def error(self, message):
        raise InputError(f'{message} (see --help)')


def model_flags(p):
    """The flags of every program that runs a model which is there."""
    p.add_argument('--ckpt', help='the base model: folder or short name (default: RUN/base)')
    p.add_argument('--device', help='cpu, cuda, .. (default: cuda for --ckpt where there is one, else cpu)')
    p.add_argument('--stream', action='store_true', help='two layers at a time, as for train.py')


def open_model_flags(a):
    """Open the device that they name, a.device, and meet the other ranks."""
    a.device = open_device(a.device or default_device(a.ckpt))
    join(a.device)


def default_device(ckpt):
    """Where real weights go. Small models are as fast on a CPU, and the same everywhere."""
    return 'cuda' if ckpt and torch.cuda.is_available() else 'cpu'


def open_device(name):
    """The device of this process, under torchrun its own GPU; InputError unless torch can compute there."""
    if name.startswith('cuda') and 'LOCAL_RANK' in os.environ:
        name = f'cuda:{os.environ["LOCAL_RANK"]}'
    try:
        if name.startswith('cuda:'):
            torch.cuda.set_device(name)
        assert torch.device(name).type != 'meta', 'holds no numbers'
        torch.empty(1, device=name)
    except Exception as e:                                     # torch raises many kinds here
        raise InputError(f'--device {name}: {str(e).splitlines()[0]}') from None
    return name


def open_out(name, report=''):
    """The folder of --out, made if need be; InputError unless files can be written there.

    report: the .json file that will be; InputError where one is that this program did not write.
    """
    out = Path(name)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / '.writable', lambda f: None)
        (out / '.writable').unlink(missing_ok=True)            # several ranks look at once
    except OSError as e:
        raise InputError(f'--out {out}: cannot write there ({e.strerror})') from None
    if report and (out / report).exists() and 'torch' not in read_object(out / report):
        raise InputError(f'{out / report} was not written by this program: choose another --out')
    return out


class Unfailing:
    """stdout or stderr that never raises: what cannot be spelt is escaped, and nobody need be listening."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, act):
        try:
            act()
        except (OSError, ValueError):                          # a pipe that is closed: from now on to nowhere
            nowhere = open(os.devnull, 'w')
            try:
                os.dup2(nowhere.fileno(), self.stream.fileno())
            except (OSError, ValueError):
                self.stream = nowhere


class Progress:
    """One updating line on stderr if that is a terminal, else a plain line every ten seconds.

    Shows step, numbers, tokens per second and time left. `done`: steps of an earlier process.
    """

    def __init__(self, stage, steps, done=0):
        self.stage, self.steps, self.done = stage, steps, done
        self.start, self.shown = time.time(), 0.0
        self.terminal, self.silent = sys.stderr.isatty(), ranks()[0] > 0

    def __call__(self, step, tokens, **numbers):
        """tokens: of all steps so far, None where there are none to count."""
        now, last = time.time(), step == self.steps
        pause = 0.2 if self.terminal else 10
        if self.silent or (now - self.shown < pause and not last):
            return
        self.shown, spent = now, now - self.start
        share = (step - self.done) / step                      # of these steps and tokens, in this process
        left = spent / (step * share) * (self.steps - step)
        shown = [f'{self.stage} {step}/{self.steps}']
        shown += [f'{name} {value:.4g}' for name, value in numbers.items()]
        if tokens:
            shown.append(f'{tokens * share / spent:,.0f} tok/s')
        line = '  '.join([*shown, f'{left // 60:.0f}:{left % 60:02.0f} left'])
        if self.terminal:
            print(f'\r\x1b[K{line}', end='\n' if last else '', flush=True, file=sys.stderr)
        else:
            print(line, flush=True, file=sys.stderr)


def one_line_errors(script, main, argv=None):
    """main(argv), and what goes wrong in one line on stderr: exit status 2, after Ctrl-C 130.

    A wrong input, a failing disk, memory that runs out and a lost rank are said so; anything else is a bug,
    with its traceback.
    """
    status = 2
    sys.stdout, sys.stderr = (stream and Unfailing(stream) for stream in (sys.stdout, sys.stderr))
    try:
        main(argv)
        sys.stdout and sys.stdout.flush()
        return leave()
    except InputError as e:
        line = str(e)
    except KeyboardInterrupt:
        print()                                                # below the progress line
        line, status = 'interrupted; files that were complete before still are', 130
    except OSError as e:
        line = f'{e.filename or "writing"}: {e.strerror or e}; files that were complete before still are'
    except (MemoryError, RuntimeError) as e:
        line = plain_cause(e)
        if not line:
            raise
    if ranks()[0]:
        time.sleep(3)                                   # most errors are every rank's: rank 0 says them first
        line = f'rank {ranks()[0]}: {line}'
    print(f'{script}: {line}', file=sys.stderr, flush=True)
    if dist.is_initialized():
        os._exit(status)                                      # what waits for a lost rank would not let us go
    sys.exit(status)


def plain_cause(e):
    """One line on a MemoryError or RuntimeError that is not a bug; '' for others."""
    cause = str(e).splitlines()[0][:200] if str(e) else 'out of memory'
    out_of_memory = isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in cause
    if out_of_memory:
        return (f'memory ran out ({cause}): python -m scale.plan says what is needed; '
                f'--stream, a smaller --ppo-batch or --seq need less')
    if dist.is_initialized() and re.search('(?i)connection|nccl|gloo|timed out', cause):
        return f'another rank is gone ({cause}); train.py --resume goes on from the last saved state'
    return ''
