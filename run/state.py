"""run/state.py: the folder of a run, and the state from which a stopped run goes on to the same bits."""
import json
import math
import re
import shutil
import signal
from dataclasses import asdict

import torch

from hub.files import InputError, checked, read_object
from hub.safetensors import read_header, read_noted, write_safetensors
from run.console import open_out

# what may differ between an interrupted run and the one that resumes it
NOT_IN_STATE = 'out', 'fresh', 'resume', 'save_every', 'heldout_tokens', 'stream'


# what a run writes into its folder, beside base/
WRITTEN = ('allocator.safetensors', 'state.safetensors', 'log.csv', 'results.json', 'training.png',
           'layers.png')


def open_run(out):
    """The folder of a run, made if need be; what a killed run had begun to write there goes.

    InputError if it has a file that a run would write over and that no run has written.
    """
    out = open_out(out)
    found = [out / name for name in WRITTEN if (out / name).exists()]
    ours = [path for path in found if is_ours(path)]
    for path in found:
        if path.suffix in ('.json', '.safetensors') and path not in ours or not ours:
            raise InputError(f'{path} was not written by a run of train.py: choose another --out')
    begun = re.compile(rf'({"|".join(map(re.escape, WRITTEN))}|base)\.\d+\.new')
    for path in [path for path in out.iterdir() if begun.fullmatch(path.name)]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)                       # another rank may have been here
    return out


def is_ours(path):
    """Does the file say that a run has written it?"""
    try:
        if path.suffix == '.safetensors':
            return bool({'allocators', 'state'} & read_header(path)[1].keys())
        return path.suffix == '.json' and {'config', 'rows', 'seed'} <= read_object(path).keys()
    except InputError:
        return False


class Interrupt:
    """Within `with`: the first Ctrl-C or SIGTERM sets `asked`, the step can end; a second stops at once."""

    def __enter__(self):
        self.asked = False
        self.old = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)


def in_state(s):
    """The settings that a run and its continuation share; of the device the kind, each rank has its own."""
    settings = {name: value for name, value in asdict(s).items() if name not in NOT_IN_STATE}
    return {**settings, 'device': torch.device(s.device).type}


def save_state(path, s, facts, allocators, optimizer, generator, log):
    """All that PPO needs to go on: weights, Adam's averages, random state; the price is in the log.

    facts: {name: number} that tell the base model and the text. The file is written whole or not at all.
    """
    tensors = {f'allocators.{name}': t for name, t in allocators.state_dict().items()}
    for i, averages in optimizer.state_dict()['state'].items():
        tensors.update({f'adam.{i}.{name}': t for name, t in averages.items()})
    state = {'settings': in_state(s), 'log': log, **facts}
    write_safetensors(path, {**tensors, 'generator': generator.get_state()}, {'state': json.dumps(state)})


def load_state(path, s, facts, allocators, optimizer, generator):
    """The log of the run that `save_state` wrote, everything else put back in place.

    InputError names the setting or fact that differs.
    """
    if not path.exists():
        raise InputError(f'--resume: {path}: no such file; start without --resume')
    tensors, state = read_noted(path, 'state')
    where, settings = f'--resume: {path}', in_state(s)
    theirs, log = checked(state, 'settings', where, dict), checked(state, 'log', where, list)
    for name in settings.keys() | theirs.keys():
        if theirs.get(name) != settings.get(name):
            raise InputError(f'{where} is of a run with {name} {theirs.get(name)}, '
                             f'this one has {settings.get(name)}')
    for name, new in facts.items():
        if not math.isclose(checked(state, name, where, float), new, rel_tol=1e-3):
            raise InputError(f'{where} is of another base model or text: '
                             f'{name} was {state[name]}, now it is {new}')
    for row in log:
        checked({'step': row}, 'step', where, dict)
        checked(row, 'price', where, float)
    if not 0 < len(log) <= s.ppo_steps:
        raise InputError(f'{where}: has {len(log)} steps of {s.ppo_steps}')
    try:
        put_back(tensors, allocators, optimizer, generator)
    except (KeyError, ValueError, RuntimeError) as e:
        cause = str(e).splitlines()[0][:100]
        raise InputError(f'{where}: does not fit this run ({cause}); start without --resume') from None
    return log


def put_back(tensors, allocators, optimizer, generator):
    """The tensors of a saved state to where they came from; raises where one is missing or misshapen."""
    def part(prefix):
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    allocators.load_state_dict(part('allocators.'))
    averages = {}
    for name, t in part('adam.').items():
        i, name = name.split('.', 1)
        averages.setdefault(int(i), {})[name] = t.clone()
    optimizer.load_state_dict({'state': averages, 'param_groups': optimizer.state_dict()['param_groups']})
    generator.set_state(tensors['generator'].clone())
