"""run/state.py: the folder of a run, and the state from which a stopped run goes on to the same bits."""
import fcntl
import os
import shutil
import signal
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch

from allocator import AdaK, Allocators
from hub.files import InputError, read_json, reading, write_whole
from run.console import MARK, open_out
from run.ranks import my_rank

# what may differ between an interrupted run and the one that resumes it
NOT_IN_STATE = 'out', 'fresh', 'resume', 'save_every', 'heldout_tokens', 'stream', 'device'

# what a run writes into its folder, beside base/
WRITTEN = 'allocator.safetensors', 'state.pt', 'log.csv', 'results.json', 'training.png'


@contextmanager
def open_run(out):
    """Within `with`: the folder of a run, made if need be, for this process and its ranks alone.

    What a killed run had begun to write there goes. InputError if another process works there, or if there is
    a file that a run would write over and that no run has written.
    """
    out = open_out(out, *WRITTEN)
    with open(out / MARK, 'r+') as mark:
        if my_rank() == 0:
            try:
                fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)           # until the file is closed
            except BlockingIOError:
                raise InputError(f'--out {out}: process {mark.read()} works there: '
                                 f'wait for it, or choose another --out') from None
            (out / MARK).write_text(str(os.getpid()))
            for name in WRITTEN:
                for path in out.glob(f'{name}.[0-9]*.new'):
                    path.unlink()
            for path in out.glob('base.[0-9]*.new'):
                shutil.rmtree(path)
        yield out


@contextmanager
def stop_signals():
    """Within `with`: a list that holds the first Ctrl-C or SIGTERM, the step can end; a second stops at once.

    In a thread of a larger program, where Python takes no signals, it stays empty.
    """
    asked = []

    def note(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
    with ExitStack() as undoing:
        with suppress(ValueError):                             # Python's, in such a thread
            for number in signal.SIGINT, signal.SIGTERM:
                before = signal.signal(number, note)
                undoing.callback(signal.signal, number, before)
        yield asked


def in_state(s):
    """The settings that a run and its continuation share."""
    return {name: value for name, value in vars(s).items() if name not in NOT_IN_STATE}


def save_state(path, facts, allocators, optimizer, generator, log):
    """All that PPO needs to go on: weights, Adam's averages, random state; the price is in the log.

    facts: {name: value} of the settings (`in_state`), the base model and the text. The file is written whole
    or not at all.
    """
    state = {
        'settings': facts,
        'log': log,
        'allocators': allocators.state_dict(),
        'optimizer': optimizer.state_dict(),
        'generator': generator.get_state(),
    }
    write_whole(path, lambda f: torch.save(state, f))


def load_state(path, facts, allocators, optimizer, generator):
    """The log of the run that `save_state` wrote, everything else put back in place.

    InputError names the fact that differs, or the file if it is damaged.
    """
    with reading(path):
        state = torch.load(path, map_location='cpu', weights_only=True)
        for name, ours in facts.items():
            theirs = state['settings'][name]
            if theirs != ours:
                raise InputError(f'--resume: {path} is of a run with {name} {theirs}, this one has {ours}')
        allocators.load_state_dict(state['allocators'])
        optimizer.load_state_dict(state['optimizer'])
        generator.set_state(state['generator'])
        return state['log']


def trained_policy(run, config, base):
    """The policy that a finished run has learnt for the base model with this Config and digest.

    InputError if the allocators are not those that the run's results.json reports.
    """
    path = Path(run) / 'allocator.safetensors'
    allocators = Allocators.load(path, config, base)
    results = Path(run) / 'results.json'
    with reading(results):
        reported = read_json(results)['config']
        for name, value in allocators.run.items():
            if reported[name] != value:
                raise InputError(f'{path}: trained with {name} {value}, {results} has {reported[name]}')
    return AdaK(allocators)
