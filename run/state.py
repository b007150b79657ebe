"""run/state.py: a run that can be stopped anywhere and goes on to the same bits."""
import json
import math
import signal
from dataclasses import asdict

import torch

from hub.files import InputError
from hub.safetensors import read_safetensors, write_safetensors

# what may differ between an interrupted run and the one that resumes it
NOT_IN_STATE = 'out', 'fresh', 'resume', 'save_every', 'heldout_tokens', 'stream'


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
    try:
        tensors, metadata = read_safetensors(path)
    except OSError as e:
        raise InputError(f'--resume: {path}: {e.strerror}; start without --resume') from None
    state, settings = json.loads(metadata['state']), in_state(s)
    for name, old in state['settings'].items():
        if old != settings.get(name):
            mine = settings.get(name)
            raise InputError(f'--resume: {path} is of a run with {name} {old}, this one has {mine}')
    for name, new in facts.items():
        if not math.isclose(state[name], new, rel_tol=1e-3):
            raise InputError(f'--resume: {path} is of another base model or text: '
                             f'{name} was {state[name]}, now it is {new}')

    def part(prefix):
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    allocators.load_state_dict(part('allocators.'))
    averages = {}
    for name, t in part('adam.').items():
        i, name = name.split('.', 1)
        averages.setdefault(int(i), {})[name] = t.clone()
    optimizer.load_state_dict({'state': averages, 'param_groups': optimizer.state_dict()['param_groups']})
    generator.set_state(tensors['generator'].clone())
    return state['log']
