"""run/timing.py: how everything is timed: all candidates in turn, in one process, medians with quartiles."""
import platform
import statistics
from functools import partial

import torch
from torch.utils.benchmark import timer         # waits until the device has done what it was given

ROUNDS = 7      # in which every case is timed once


def interleaved(cases):
    """{name: median 'ms' and quartiles 'low', 'high'} in milliseconds, of callables {name: run}.

    All run in turn in every round, behind one that warms up. Every second round runs backwards, as a case may
    profit from what another leaves in the caches.
    """
    times = {name: [] for name in cases}
    order = list(cases.items())
    for _ in range(ROUNDS + 1):
        for name, run in order:
            start = timer()
            run()
            times[name].append(1000 * (timer() - start))
        order.reverse()
    for name, ms in times.items():                             # the summary takes the place of the times
        low, middle, high = statistics.quantiles(ms[1:], n=4)               # the first one warmed up
        times[name] = {'ms': middle, 'low': low, 'high': high}
    return times


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
    return {name: 1000 * work[name] / times[name]['low'] for name in cases}
