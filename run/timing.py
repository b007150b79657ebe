"""run/timing.py: how everything is timed: all candidates in turn, in one process, medians with quartiles."""
import contextlib
import statistics
import time

import torch


def synchronize(device):
    if device.type == 'cuda':
        torch.cuda.synchronize()


def interleaved(cases, rounds, device, around=lambda name: contextlib.nullcontext()):
    """{name: [seconds, ..]} of callables, in turn in every round; the first round warms up and is dropped.

    around(name): a context in which the case runs; entering and leaving it are not timed.
    """
    times = {name: [] for name in cases}
    for r in range(rounds + 1):
        for name, run in cases.items():
            with around(name):
                synchronize(device)
                start = time.perf_counter()
                run()
                synchronize(device)
                spent = time.perf_counter() - start
            if r:
                times[name].append(spent)
    return times


def summary(times):
    """Median and quartiles in milliseconds of two or more times in seconds."""
    low, middle, high = statistics.quantiles([1000 * t for t in times], n=4)
    return {'ms': middle, 'low': low, 'high': high}
