"""scale/plan.py: what a run needs, memory, FLOPs, hours, from the config of --ckpt alone; nothing is loaded.

    python -m scale.plan --ckpt mixtral-8x7b                the flags are those of train.py
    python -m scale.plan --ckpt mixtral-8x7b --paper --seq 2048

Memory is counted (scale/memory.py). Hours are FLOPs over a matmul rate, or bytes over a copy rate where that
takes longer: of GPUs what real code reaches of the published rates, of this machine one measured layer.
"""
import time
from dataclasses import replace

import torch

from allocator import bisect
from base.pretrain import new_model
from hub.checkpoint import find_checkpoint, weight_dtype
from hub.config import read_config
from hub.files import InputError
from moe_dispatch import flops
from run.console import one_line_errors
from run.report import markdown
from run.rules import LEVELS, SEARCH_TOKENS, neighbourhood
from scale.memory import allocator_sizes, free_memory, state_bytes, weight_bytes, weight_counts, working_bytes
from scale.stream import Streamed
from train import PROBES, PROBE_TOKENS, check_budget, parse

# name: bf16 matmul FLOP/s, host-to-device bytes/s, bytes of memory, as published
GPUS = {'A800-80GB': (312e12, 32e9, 80e9), 'H100-80GB': (989e12, 64e9, 80e9), 'H200': (989e12, 64e9, 141e9)}
REACHED = 0.5, 0.8              # of the first two by real code
RANKS = {'plain': 1, 'stream': 1, 'shard': 8}
NAMES = {'plain': 'plain', 'stream': '--stream', 'shard': 'each of 8 ranks'}


def published_rates():
    """{GPU: (FLOP/s, bytes/s, bytes of memory)} that real code may count on."""
    flop_share, copy_share = REACHED
    return {gpu: (flop * flop_share, copy * copy_share, memory) for gpu, (flop, copy, memory) in GPUS.items()}


@torch.no_grad()
def measured_rates(s, config, dtype):
    """(FLOP/s of one MoE layer with random weights on 2,048 tokens, bytes/s of a copy) on s.device."""
    device, T = torch.device(s.device), min(s.seq, 2048)
    one = replace(config, n_layers=1, dense_layers=(), n_vocab=1)
    model = new_model(one, 0).to(dtype).to(device)
    tokens = torch.zeros(2048 // T, T, dtype=torch.long, device=device)
    model.embed_tokens.weight.data = torch.randn(1, config.dim).to(dtype).to(device)
    work = flops(one, config.top_k, T)['total'] * tokens.numel()
    n = 2 ** 28
    source = torch.ones(n, dtype=torch.uint8, pin_memory=device.type == 'cuda')
    target = torch.empty(n, dtype=torch.uint8, device=device)

    def best(run):
        times = []
        for _ in range(4):
            start = time.perf_counter()
            run()
            if device.type == 'cuda':
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times[1:])
    return work / best(lambda: model.hidden(tokens)), n / best(lambda: target.copy_(source))


def run_flops(s, config):
    """{stage: (FLOPs, visits of the whole model)} of a run with --ckpt; a calibration is 8 evaluations."""
    c, tokens, batch = config, s.ppo_batch * s.seq, 32 * s.seq
    k_max, n_in = allocator_sizes(s, c)
    mean_k = c.top_k * (s.budget if s.lam is None else 1)

    def forward(k):
        return flops(c, k, s.seq)['total']
    update = s.epochs * s.group * 6 * k_max * n_in * len(c.moe_layers)
    together = max(batch, Streamed.tokens_per_visit)

    def visits(n):
        return -(-n // together)
    looks, L = (s.warm_steps if s.start == 'p-warm' else 2), len(c.moe_layers)
    # run/rules.py: the tails, the search of shares, the best family, what an expert is worth
    search = SEARCH_TOKENS * L * (1 + len(LEVELS))
    first = search + 8 * SEARCH_TOKENS
    again = len(neighbourhoods(mean_k, c.top_k)) - 1           # searches on the way of the last calibration
    probes = PROBES + 2
    calibrated, compared = 3 * 8 + 1, 5
    return {
        'start': ((looks * tokens + first) * forward(c.top_k), looks + 3 + L * visits(SEARCH_TOKENS)),
        'ppo': (s.ppo_steps * tokens * (forward(c.top_k) + s.group * forward(mean_k) + update)
                + probes * PROBE_TOKENS * forward(mean_k), s.ppo_steps + probes * visits(PROBE_TOKENS)),
        'evaluation': ((calibrated * s.calibration_tokens + compared * s.heldout_tokens + again * search)
                       * forward(mean_k), calibrated * visits(s.calibration_tokens)
                       + compared * visits(s.heldout_tokens) + again * L * visits(SEARCH_TOKENS))}


def neighbourhoods(mean_k, K):
    """All that `SkipFamilies.greedy_shares` searches at mean_k and on the way of a calibration to it."""
    seen = {neighbourhood(mean_k, K)}

    def visit(k):
        seen.add(neighbourhood(k, K))
        return k
    bisect(visit, mean_k, 1, K)
    return seen


def plan(s, rates=None):
    """A dict of what this run needs. rates: as `published_rates`, by default these and this machine's."""
    folder = find_checkpoint(s.ckpt, config_only=True)
    config, dtype = read_config(folder), weight_dtype(folder)
    check_budget(s, config.top_k)
    layer, layers, rest = (dtype.itemsize * n for n in weight_counts(config))
    k_max, n_in = allocator_sizes(s, config)
    params = len(config.moe_layers) * k_max * (n_in + s.extended)
    working, work = working_bytes(s, config, dtype.itemsize), run_flops(s, config)
    memory = {}                                                # how: (bytes on a device, on the host)
    for how, size in RANKS.items():
        device, host = weight_bytes(config, dtype.itemsize, how, size)
        memory[how] = device + working // size, host
    if rates is None:
        rates = {**this_machine(s, config, dtype, layer), **published_rates()}
    per_token = flops(config, config.top_k, s.seq)['total'] - 2 * config.dim * config.n_vocab
    machines = []
    for name, (rate, copy, has) in rates.items():
        fits = {how: memory[how][0] < has for how in RANKS if how != 'shard' or 'cpu' not in name}
        hours = {how: run_hours(work, how, rate, copy, layers, 'cpu' in name) if ok else None
                 for how, ok in fits.items()}
        machines.append({'machine': name, 'flops': rate, 'copy': copy, 'memory': has, 'hours': hours,
                         'compute_bound': layers / copy * rate / per_token})
    return {'ckpt': s.ckpt, 'weights': (layers + rest) // dtype.itemsize,
            'dtype': str(dtype).removeprefix('torch.'), 'bytes': layers + rest, 'layer_bytes': layer,
            'allocators': params, 'optimizer_bytes': 16 * params,
            'state_bytes': state_bytes(s, config), 'working_bytes': working, 'steps': s.ppo_steps,
            'passes': 1 + s.group, 'tokens': s.ppo_batch * s.seq,
            'flops': {stage: flop for stage, (flop, _) in work.items()}, 'machines': machines,
            'memory': memory}


def this_machine(s, config, dtype, layer_bytes):
    """The rates of s.device in the form of `published_rates`; {} if a layer in fp32 does not fit twice."""
    free = free_memory(torch.device(s.device))
    if 2 * 4 * layer_bytes // dtype.itemsize >= free:
        return {}
    return {f'here ({s.device})': (*measured_rates(s, config, dtype), free)}


def run_hours(work, how, rate, copy, layers_bytes, on_cpu):
    """Hours of all stages: computing, or bringing the layers where that takes longer; a CPU does both."""
    seconds = 0
    for flop, visits in work.values():
        compute = flop / rate / RANKS[how]
        way = visits * layers_bytes / copy if how == 'stream' else 0
        seconds += compute + way if on_cpu else max(compute, way)
    return seconds / 3600


def plan_table(p):
    """A plan as text."""
    def gb(n):
        return f'{n / 1e9:.3g}'

    def hours(m, how):
        h = m['hours'].get(how, '')
        return 'does not fit' if h is None else h and f'{h:.2g}'
    stages = ', '.join(f'{stage} {flop:.2e}' for stage, flop in p['flops'].items())
    needs = [[NAMES[how], gb(device), gb(host)] for how, (device, host) in p['memory'].items()]
    machines = [[m['machine'], f'{m["flops"] / 1e12:.3g}', gb(m['copy']), f'{m["compute_bound"]:,.0f}',
                 *(hours(m, how) for how in RANKS)] for m in p['machines']]
    return '\n'.join([
        f'{p["ckpt"]}: {p["weights"] / 1e9:.2f}B weights in {p["dtype"]}, {gb(p["bytes"])} GB, '
        f'the largest layer {gb(p["layer_bytes"])} GB; allocators of {p["allocators"]:,} weights, '
        f'{p["optimizer_bytes"] / 1e6:.0f} MB with gradients and optimizer',
        f'{p["steps"]} PPO steps of {p["passes"]} x {p["tokens"]:,} tokens: {stages} FLOPs; '
        f'a rollout keeps {gb(p["state_bytes"])} GB of states', '',
        markdown(['', 'GB on the device', 'GB on the host or in files'], needs), '',
        markdown(['machine', 'TFLOP/s', 'copy GB/s', 'compute-bound from (tokens)', 'hours plain', '--stream',
                  '8 ranks'], machines), '',
        f'GPUs: {REACHED[0]:.0%} of the published matmul rate and {REACHED[1]:.0%} of the published copy '
        f'rate; here: one layer measured. 8 ranks: without the time that gathering the layers takes.'])


def main(argv=None):
    s = parse(argv, __doc__)
    if not s.ckpt:
        raise InputError('give the checkpoint with --ckpt, a folder that holds at least its config.json')
    print(plan_table(plan(s)))


if __name__ == '__main__':
    one_line_errors('scale.plan', main)
