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

    Every second round runs backwards, as a case may profit from what another leaves in the caches.
    around(name): a context in which the case runs; entering and leaving it are not timed.
    """
    times = {name: [] for name in cases}
    for r in range(rounds + 1):
        for name in list(cases)[::1 if r % 2 else -1]:
            with around(name):
                synchronize(device)
                start = time.perf_counter()
                cases[name]()
                synchronize(device)
                spent = time.perf_counter() - start
            if r:
                times[name].append(spent)
    return times


def summary(times):
    """Median and quartiles in milliseconds of two or more times in seconds."""
    low, middle, high = statistics.quantiles([1000 * t for t in times], n=4)
    return {'ms': middle, 'low': low, 'high': high}


def graphed(run):
    """The same as one CUDA graph, without what Python and the launches cost."""
    for _ in range(3):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def rates(device):
    """What this machine reaches: copy (bytes read plus written) in bytes/s, matmuls in FLOP/s by dtype."""
    def best(run):
        return min(interleaved({'run': run}, 7, device)['run'])
    n = 2 ** 27 if device.type == 'cpu' else 2 ** 30
    a = torch.randint(9, (n,), dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    reached = {'copy': 2 * n / best(lambda: b.copy_(a))}
    m = 1536 if device.type == 'cpu' else 8192
    for dtype in (torch.float32, torch.bfloat16):
        x, y = (torch.randn(m, m, device=device, dtype=dtype) for _ in range(2))
        reached[str(dtype).removeprefix('torch.')] = 2 * m ** 3 / best(lambda: x @ y)
    return reached
