"""run/timing.py: how everything is timed: all candidates in turn, in one process, medians with quartiles."""
import platform
import statistics
from functools import partial

import torch
from torch.utils.benchmark import timer         # waits until the device has done what it was given

ROUNDS = 7      # in which every case is timed once


def interleaved(cases):
    """{name: [seconds, ..]} of callables {name: run}, in turn in every round, behind one that warms up.

    Every second round runs backwards, as a case may profit from what another leaves in the caches.
    """
    times = {name: [] for name in cases}
    order = list(cases.items())
    for r in range(ROUNDS + 1):
        for name, run in order:
            start = timer()
            run()
            if r > 0:
                times[name].append(timer() - start)
        order.reverse()
    return times


def summary(times):
    """Median and quartiles in milliseconds of two or more times in seconds."""
    low, middle, high = statistics.quantiles([1000 * t for t in times], n=4)
    return {'ms': middle, 'low': low, 'high': high}


def machine(device):
    """What was timed, in words."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'{platform.machine()} CPU, {torch.get_num_threads()} threads'


def rates(device):
    """What this machine reaches: 'copy' in bytes/s, read plus written; matmuls in FLOP/s, by dtype."""
    m = 8192 if device.type == 'cuda' else 1536
    source = torch.ones(2 ** 28, dtype=torch.uint8, device=device)
    cases = {'copy': partial(source.clone().copy_, source)}
    work = {'copy': 2 * len(source)}
    for dtype in 'float32', 'bfloat16':
        x = torch.randn(m, m).to(device, getattr(torch, dtype))
        cases[dtype] = partial(torch.mm, x, x)
        work[dtype] = 2 * m ** 3
    times = interleaved(cases)
    return {name: work[name] / min(times[name]) for name in cases}
