"""bench.py: is fewer experts less time? And text from a trained model.

    python bench.py                                                    all tables, three minutes on two cores -> out/bench.json
    python bench.py --device cuda                                      the same at the published sizes, bf16
    python bench.py --run out/tiny                                     a trained run on its own held-out text -> out/tiny/bench.json
    python bench.py --run out/tiny --prompt "def main(" --show         text by the trained allocators, coloured by k
    python bench.py --ckpt olmoe-1b-7b --policy k=4 --prompt "Once"    any static k, no training needed
    python bench.py --run out/tiny --tasks arc_easy,hellaswag          tasks of lm-evaluation-harness -> out/tiny/tasks.json

--stream and torchrun work as for train.py, with --run, --prompt, --tasks and --frontier.

Tables: *dispatch* (every path and transformers' own, where it is installed, on the same weights and ids), *roofline* (its bytes and
FLOPs against what this machine reaches) and *model* (a whole model, Top-K against allocators that run fewer experts, allocator
time included). Every number is a median over rounds in which all candidates run in turn, in one process, on random data; a ratio is
a ratio of medians. Smaller is not always faster: read the spread.
"""
import argparse
import contextlib
import difflib
import functools
import io
import itertools
import keyword
import logging
import math
import os
import platform
import random
import re
import statistics
import sys
import time
import tokenize
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import moe_dispatch
from allocator import AdaK, Allocators, Counted, EntropyBands, PerLayer, RandomMix, Skip, TopK, TopP, bisect, sample_k
from hub.checkpoint import fingerprint
from hub.config import read_config
from hub.files import InputError, read_json, write_json
from hub.safetensors import read_safetensors, write_safetensors
from hub.tokenizer import Tokenizer
from model import Config, Transformer, generate, generate_steps
from moe_dispatch import flops
from train import (PAPER, PRESETS, OneLineParser, Progress, Settings, Text, base_folder, base_model, calibrate, check_budget, check_ranks,
                   clustered_error, default_device, evaluate, gathered, join, load_model, new_allocators, new_model, one_line_errors, open_device,
                   open_out, plt, ranks, read_documents, run_settings, save_figure, split_documents, train_ppo, train_soft)


# ================================================================ timing

def interleaved(cases, rounds, device):
    """{name: [seconds, ..]} of callables, all of them in turn in every round; the first round warms up and is dropped."""
    times = {name: [] for name in cases}
    for r in range(rounds + 1):
        for name, run in cases.items():
            if device.type == 'cuda':
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device.type == 'cuda':
                torch.cuda.synchronize()
            if r:
                times[name].append(time.perf_counter() - start)
    return times


def summary(times):
    """Median and quartiles in milliseconds."""
    low, middle, high = statistics.quantiles([1000 * t for t in times], n=4) if len(times) > 1 else [1000 * times[0]] * 3
    return {'ms': middle, 'low': low, 'high': high}


def machine(device):
    """What this machine reaches: copy bandwidth (bytes read plus written) and matmul rate, in bytes/s and FLOP/s."""
    n = 2 ** 27 if device.type == 'cpu' else 2 ** 30
    a, b = torch.randint(9, (n,), dtype=torch.uint8, device=device), torch.empty(n, dtype=torch.uint8, device=device)
    reached = {'copy': 2 * n / min(interleaved({'copy': lambda: b.copy_(a)}, 7, device)['copy'])}
    m = 1536 if device.type == 'cpu' else 8192
    for dtype in (torch.float32, torch.bfloat16):
        x, y = (torch.randn(m, m, device=device, dtype=dtype) for _ in range(2))
        reached[str(dtype).removeprefix('torch.')] = 2 * m ** 3 / min(interleaved({'mm': lambda: x @ y}, 7, device)['mm'])
    return reached


# ================================================================ table 1: dispatch

# how often k = 1, 2, .. in the variable case: mean 0.75 K, spread as trained allocators have it
SPREAD_2 = .58, .36, .04, .02
SPREAD_4 = .07, .19, .44, .27, .03
# name: C, F, N, K, T of prefill, spread. The last of CUDA is half a Mixtral, one of two GPUs' share under tensor parallelism
SHAPES = {
    'cpu': {'mixtral-like': (512, 1792, 8, 2, 2048, SPREAD_2), 'qwen-like': (512, 352, 60, 4, 2048, SPREAD_4)},
    'cuda': {'mixtral-8x7b': (4096, 14336, 8, 2, 4096, SPREAD_2), 'qwen1.5-moe': (2048, 1408, 60, 4, 16384, SPREAD_4),
             'mixtral-8x7b/2': (4096, 7168, 8, 2, 1536, SPREAD_2)},
    'quick': {'quick': (64, 32, 8, 2, 64, SPREAD_2)}}


class Experts:
    """Random experts of one layer and a random router: real routing on random tokens."""

    def __init__(self, shape, dtype, device):
        self.C, self.F, self.N, self.K, self.T, self.spread = shape
        make = lambda *size: (torch.randn(*size, device=device) * size[-1] ** -0.5).to(dtype)
        self.router, self.w_in, self.w_out = make(self.N, self.C), make(self.N, 2 * self.F, self.C), make(self.N, self.C, self.F)
        self.device, self.dtype = device, dtype

    def tokens(self, T, variable):
        """x (T,C), ids and weights (T,k_max), k (T,): everyone K, or k drawn from the spread."""
        x = torch.randn(T, self.C, device=self.device).to(self.dtype)
        probs = F.softmax((x @ self.router.T).float(), -1)
        share = torch.tensor(self.spread if variable else [0] * (self.K - 1) + [1], device=self.device, dtype=torch.float)
        # drawn without luck: each k as often as its share says
        steps = (torch.arange(T, device=self.device) + 0.5) / T
        k = 1 + torch.searchsorted(share.cumsum(0), steps).clamp_max(len(share) - 1)[torch.randperm(T, device=self.device)]
        return x, *moe_dispatch.select(probs, k, len(share), True), k


def dense_pair(e, rows):
    """The same FLOPs as one batched matmul pair without any routing: rows/N tokens for every expert."""
    x = torch.randn(e.N, max(1, rows // e.N), e.C, device=e.device).to(e.dtype)

    def run():
        gate, up = torch.bmm(x, e.w_in.mT).chunk(2, -1)
        return torch.bmm(F.silu(gate).mul_(up), e.w_out.mT)
    return run


def transformers_experts(e):
    """{name: callable(x, ids, weights)} of transformers' implementations on our weights; empty where it is not installed."""
    try:
        from transformers import MixtralConfig, __version__
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    except ImportError:
        return {}
    found = {}
    for name in ('eager', 'grouped_mm', 'batched_mm'):
        config = MixtralConfig(hidden_size=e.C, intermediate_size=e.F, num_local_experts=e.N, num_experts_per_tok=e.K)
        config._experts_implementation = name
        with torch.device('meta'):
            module = MixtralExperts(config)
        module.gate_up_proj, module.down_proj = nn.Parameter(e.w_in, False), nn.Parameter(e.w_out, False)
        found[f'transformers {__version__} {name}'] = module
    return found


def graphed(run):
    """The same as one CUDA graph, without what Python and the launches cost."""
    for _ in range(3):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def dispatch_cases(e, T, variable):
    """{name: callable} for T tokens, and the plan's numbers of rows and of experts hit."""
    x, ids, weights, k = e.tokens(T, variable)
    args = x, ids, weights, k, e.w_in, e.w_out
    rows = k.sum().item()
    used = torch.arange(ids.shape[1], device=e.device) < k[:, None]
    cases = {'loop': lambda: moe_dispatch.moe_loop(*args), 'exact': lambda: moe_dispatch.moe_exact(*args),
             'static': lambda: moe_dispatch.moe_static(*args), 'dense pair': dense_pair(e, rows)}
    if moe_dispatch.native(x) and T <= moe_dispatch.STATIC_TOKENS:
        cases['static in a graph'] = graphed(cases['static'])
    if not variable:                                           # transformers has no variable k
        for name, module in transformers_experts(e).items():
            if 'batched' not in name or T * e.K * e.w_in[0].numel() * e.w_in.element_size() < 2e9:      # it copies the weights of every choice
                cases[name] = lambda module=module: module(x, ids, weights.to(x.dtype))
    return cases, rows, len(ids[used].unique())


def backward_cases(e, T, variable):
    """Forward plus backward with gradients of x and all experts, in the form of `dispatch_cases`."""
    x, ids, weights, k = e.tokens(T, variable)
    leaves = [t.detach().clone().requires_grad_() for t in (x, e.w_in, e.w_out)]
    direction = torch.randn_like(x)
    ours = lambda path: lambda: torch.autograd.grad(path(leaves[0], ids, weights, k, *leaves[1:]), leaves, direction)
    cases = {'exact': ours(moe_dispatch.moe_exact)}
    if e.N <= 16:                                              # indexing one expert of 60 makes a gradient of all 60, 60 times
        cases['loop'] = ours(moe_dispatch.moe_loop)
    if not variable:
        for name, module in transformers_experts(e).items():
            if 'batched' not in name and ('eager' not in name or e.N <= 16):
                module.gate_up_proj, module.down_proj = (nn.Parameter(w) for w in (e.w_in, e.w_out))
                learnt = [leaves[0], module.gate_up_proj, module.down_proj]
                cases[name] = lambda module=module, learnt=learnt: torch.autograd.grad(
                    module(learnt[0], ids, weights.to(x.dtype)), learnt, direction)
    return cases, k.sum().item(), None


def dispatch_table(shapes, device, rounds, reached):
    """One dict per shape, dtype, stage, path and plan; where FLOPs and bytes are counted, the share of the machine's limit too."""
    on_cpu = device.type == 'cpu'
    table = []
    for (shape_name, shape), dtype in itertools.product(shapes.items(), (torch.float32, torch.bfloat16) if on_cpu else (torch.bfloat16,)):
        e = Experts(shape, dtype, device)
        decode = [('decode', T) for T in ((8, 1) if on_cpu else (64, 8, 1))]
        for stage, T in (('prefill', e.T), *decode, ('forward + backward', e.T // 2)):
            learn = stage == 'forward + backward'
            with torch.set_grad_enabled(learn):
                plans = {variable: (backward_cases if learn else dispatch_cases)(e, T, variable) for variable in (False, True)}
                # Top-K and variable k in the same rounds, so that their ratio means something
                cases = {(variable, name): run for variable, plan in plans.items() for name, run in plan[0].items()}
                times = interleaved(cases, {'prefill': rounds, 'decode': 3 * rounds}.get(stage, (rounds + 1) // 2), device)
            default = 'exact' if on_cpu or stage != 'decode' else 'static in a graph'           # as moe and Decoder choose
            for (variable, name), t in times.items():
                _, n_rows, hit = plans[variable]
                row = {'shape': shape_name, 'C': e.C, 'F': e.F, 'N': e.N, 'K': e.K, 'dtype': str(dtype).removeprefix('torch.'),
                       'stage': stage, 'T': T, 'variable': variable, 'mean_k': n_rows / T, 'path': name, 'default': name == default,
                       **summary(t)}
                if not learn:                                  # bytes: the experts hit once, and each row in and out
                    row['flops'] = 6 * e.C * e.F * n_rows
                    row['bytes'] = (hit * 3 * e.C * e.F + n_rows * (2 * e.C + 3 * e.F) + 2 * T * e.C) * dtype.itemsize
                    compute, copy = row['flops'] / reached[row['dtype']], row['bytes'] / reached['copy']
                    row.update(bound='compute' if compute > copy else 'memory', limit_ms=1000 * max(compute, copy))
                    row['of_limit'] = row['limit_ms'] / row['ms']
                table.append(row)
    return table


# ================================================================ table 2: a whole model

class Timed:
    """Adds up the seconds that functions or modules take, by part."""

    def __init__(self, device):
        self.seconds, self.device = {}, device

    def wrap(self, part, function):
        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            if self.device.type == 'cuda':
                torch.cuda.synchronize()
            self.seconds[part] = self.seconds.get(part, 0) + time.perf_counter() - start
            return result
        return timed


def shares(model, tokens, policy, device):
    """Share of a forward pass's time by part; the rest is norms, embedding, selection of experts and Python."""
    timed = Timed(device)
    undo = []

    def replace(owner, name, part):
        old = getattr(owner, name)
        undo.append((owner, name, old))
        setattr(owner, name, timed.wrap(part, old))
    for layer in model.layers:
        replace(layer.self_attn, 'forward', 'attention')
        if not layer.dense:
            replace(layer.mlp.router, 'forward', 'router')
    replace(model.lm_head, 'forward', 'head')
    replace(moe_dispatch, 'moe', 'experts')
    allocate = timed.wrap('allocator', policy)
    allocate.k_max = policy.k_max
    whole = timed.wrap('all', model)
    for i in range(4):
        if i == 1:
            timed.seconds.clear()                              # the first pass warms up
        whole(tokens, allocate)
    for owner, name, old in reversed(undo):
        setattr(owner, name, old)
    total = timed.seconds.pop('all')
    parts = {part: seconds / total for part, seconds in timed.seconds.items()}
    return {**parts, 'rest': 1 - sum(parts.values())}


@torch.no_grad()
def fewer(model, tokens, share):
    """Random allocators whose mean k is `share` of K on these tokens: the cost of deciding is that of trained ones."""
    c = model.config
    allocators = Allocators(c, min(2 * c.top_k, c.n_experts), True).to(model.device)
    allocators.weight.data.normal_(0, 0.1)
    allocators.bias.data.copy_(-(torch.arange(1, allocators.k_max + 1) - share * c.top_k) ** 2)

    def mean_k(price):
        tally = Counted(AdaK(allocators, price=price), len(c.moe_layers), model.device)
        model.hidden(tokens, tally)
        return tally.mean()
    return AdaK(allocators, price=bisect(mean_k, share * c.top_k, 9, -9))


@torch.no_grad()
def model_table(model, tokens, policy, n_new, rounds):
    """Prefill of tokens (B,T) and decoding behind the first 16 of them, in tokens per second: Top-K against `policy`.

    Decoding samples at temperature 1: the most probable token of random weights is soon the same token for ever.
    """
    c, device = model.config, model.device
    sampled = lambda policy: generate(model, prompt, n_new, policy, 1.0, torch.Generator(device).manual_seed(0))
    policies = {'top-k': None, 'ada-k': policy}
    prompt = tokens[:1, :16]
    prefill = interleaved({name: lambda p=p: model(tokens, p) for name, p in policies.items()}, rounds, device)
    decode = interleaved({name: lambda p=p: sampled(p) for name, p in policies.items()}, rounds, device)
    rows = []
    for name, policy in policies.items():
        policy = policy or TopK(c.top_k)
        tallies = [Counted(policy, len(c.moe_layers), device) for _ in range(2)]
        model.hidden(tokens, tallies[0])
        sampled(tallies[1])
        rows.append({'policy': name, 'prefill_mean_k': tallies[0].mean(), 'decode_mean_k': tallies[1].mean(),
                     'prefill_tokens_per_s': tokens.numel() / statistics.median(prefill[name]),
                     'decode_tokens_per_s': n_new / statistics.median(decode[name]),
                     'prefill': summary(prefill[name]), 'decode': summary(decode[name]),
                     'share_of_prefill': shares(model, tokens, policy, device)})
    return {'C': c.dim, 'F': c.expert_dim, 'N': c.n_experts, 'K': c.top_k, 'layers': c.n_layers, 'V': c.n_vocab,
            'B': tokens.shape[0], 'T': tokens.shape[1], 'new': n_new, 'dtype': str(model.dtype).removeprefix('torch.'), 'rows': rows}


# ================================================================ tables and figures

def by_case(rows):
    """{(shape, dtype, stage, T): ({path: row at top-K}, {path: row at about 0.75 K})}."""
    cases = {}
    for r in rows:
        cases.setdefault((r['shape'], r['dtype'], r['stage'], r['T']), ({}, {}))[r['variable']][r['path']] = r
    return cases


def best_peer(paths):
    """The fastest of transformers' rows in {path: row}, None where there is none."""
    return min((r for path, r in paths.items() if path.startswith('transformers')), key=lambda r: r['ms'], default=None)


def default_path(paths):
    """The row of the path that a model takes in this case."""
    return next(r for r in paths.values() if r['default'])


def markdown(head, lines):
    """A Markdown table of strings."""
    return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in (head, ['---'] * len(head), *lines))


def claims(rows):
    """What the dispatch rows say, one line a case: ours against itself, the same-FLOPs matmuls, and transformers."""
    over = lambda a, b: f'{a["ms"] / b["ms"]:.2f}' if a and b else ''
    lines = []
    for case, (top, less) in by_case(rows).items():
        ours, fewer_k, peer = default_path(top), default_path(less), best_peer(top)
        lines.append([*map(str, case), f'{fewer_k["mean_k"]:.3g} / {ours["mean_k"]:.3g}', over(fewer_k, ours), over(top.get('dense pair'), ours), over(ours, peer), over(fewer_k, peer)])
    return markdown(['shape', 'dtype', 'stage', 'T', 'mean k / K', 'our time / ours at K', 'dense pair / ours, K',
                     'ours / best of transformers, both K', 'ours at mean k / its K'], lines)


def milliseconds(rows):
    """Every path of the dispatch table with its quartiles."""
    ms = lambda r: f'{r["ms"]:.2f} ({r["low"]:.2f}-{r["high"]:.2f})' if r else ''
    return markdown(['shape', 'dtype', 'stage', 'T', 'path', 'top-K ms', '0.75 K ms'],
                    [[*map(str, case), path, ms(r), ms(less.get(path))] for case, (top, less) in by_case(rows).items() for path, r in top.items()])


def roofline(rows):
    """Bytes and FLOPs of each case, the time that this machine's own matmul rate and copy bandwidth allow, and the share reached."""
    lines = []
    for case, plans in by_case(rows).items():
        for paths in plans:
            if 'flops' in (r := default_path(paths)):
                lines.append([*map(str, case), f'{r["mean_k"]:g}', f'{r["flops"] / 1e9:.3g}', f'{r["bytes"] / 1e6:.3g}', r['bound'],
                              f'{r["limit_ms"]:.2f}', f'{r["ms"]:.2f}', f'{r["of_limit"]:.0%}'])
    return markdown(['shape', 'dtype', 'stage', 'T', 'mean k', 'GFLOP', 'MB', 'bound', 'limit ms', 'ours ms', 'of limit'], lines)


PARTS = 'experts', 'attention', 'head', 'router', 'allocator', 'rest'


def model_lines(table):
    """The model table, with the speed-up of each row over the first."""
    top, lines = table['rows'][0], []
    for r in table['rows']:
        speed = lambda name: f'{r[name]:.1f} ({r[name] / top[name]:.2f}x)'
        lines.append([r['policy'], f'{r["prefill_mean_k"]:.2f}, {r["decode_mean_k"]:.2f}', speed('prefill_tokens_per_s'),
                      speed('decode_tokens_per_s'), *(f'{r["share_of_prefill"].get(part, 0):.1%}' for part in PARTS)])
    return markdown(['policy', 'mean k in prefill, decode', 'prefill tokens/s', 'decode tokens/s', *PARTS], lines)


def dispatch_figure(path, rows, machine_name):
    """One panel per shape and dtype: every path's prefill time at top-K (hollow) and at 0.75 K (filled), quartiles as bars."""
    cases = {case: plans for case, plans in by_case(rows).items() if case[2] == 'prefill'}
    fig, axes = plt.subplots(1, len(cases), figsize=(1.5 + 3 * len(cases), 3.2), layout='constrained', sharey=True, squeeze=False)
    names = list(dict.fromkeys(name for plans in cases.values() for name in plans[0]))[::-1]
    for ax, (case, plans) in zip(axes[0], cases.items()):
        for paths, label, color, fill in zip(plans, ('top-K', 'mean k 0.75 K'), ('black', '#0072B2'), ('white', '#0072B2')):
            r = [paths[name] for name in names if name in paths]
            ms, low, high = ([row[key] for row in r] for key in ('ms', 'low', 'high'))
            ax.errorbar(ms, [names.index(row['path']) for row in r], xerr=[[m - x for m, x in zip(ms, low)], [x - m for m, x in zip(ms, high)]],
                        fmt='o', color=color, mfc=fill, label=label)
        ax.set(title=f'{case[0]}, {case[1]}, T = {case[3]}', xlabel='ms', xlim=(0, None), yticks=range(len(names)), yticklabels=names)
        ax.grid(axis='x', alpha=0.3)
    axes[0][0].legend(fontsize=8)
    fig.suptitle(f'experts of one layer, forward: {machine_name}', fontsize=10)
    save_figure(fig, path)


def roofline_figure(path, rows, reached):
    """Reached FLOP/s against FLOPs per byte, under the machine's own matmul rate and copy bandwidth."""
    fig, ax = plt.subplots(figsize=(6, 3.8), layout='constrained')
    looks = {'float32': ('#0072B2', '-'), 'bfloat16': ('#D55E00', '--')}
    counted = [r for plans in by_case(rows).values() for paths in plans if 'flops' in (r := default_path(paths))]
    for dtype in dict.fromkeys(r['dtype'] for r in counted):
        color, line = looks[dtype]
        x = [0.1, reached[dtype] / reached['copy'], 1000]
        ax.plot(x, [min(reached['copy'] * i, reached[dtype]) / 1e9 for i in x], color=color, linestyle=line, label=f'limit, {dtype}')
        for stage, marker in (('prefill', 'o'), ('decode', '^')):
            r = [r for r in counted if r['dtype'] == dtype and r['stage'] == stage]
            ax.plot([i['flops'] / i['bytes'] for i in r], [i['flops'] / i['ms'] / 1e6 for i in r], marker, color=color,
                    mfc=color if stage == 'prefill' else 'white', label=f'{stage}, {dtype}')
    ax.set(xscale='log', yscale='log', xlabel='FLOPs per byte', ylabel='GFLOP/s', title='experts of one layer against the machine')
    ax.legend(fontsize=8)
    save_figure(fig, path)


def model_figure(path, table):
    """Where the time of a prefill goes, and the speed-up."""
    looks = dict(zip(PARTS, (('#0072B2', ''), ('#E69F00', '//'), ('#56B4E9', '..'), ('#009E73', 'xx'), ('#D55E00', ''), ('#CCCCCC', ''))))
    fig, ax = plt.subplots(figsize=(7, 2.4), layout='constrained')
    for y, r in enumerate(table['rows'][::-1]):
        left = 0
        for part, (color, hatch) in looks.items():
            width = r['share_of_prefill'].get(part, 0) * r['prefill']['ms']
            ax.barh(y, width, left=left, color=color, hatch=hatch, edgecolor='white', label=part if y == 0 else None)
            left += width
    names = [f'{r["policy"]}, mean k {r["prefill_mean_k"]:.2f}' for r in table['rows'][::-1]]
    ax.set(yticks=range(len(names)), yticklabels=names, xlabel=f'ms of a prefill of {table["B"]} x {table["T"]} tokens',
           title='where the time of a whole model goes')
    ax.legend(fontsize=8, ncols=len(PARTS), loc='upper center', bbox_to_anchor=(0.5, -0.35))
    save_figure(fig, path)


# ================================================================ the two speed benches

def bench(a):
    """All tables on random weights, printed and written to OUT/bench.json with three figures."""
    device, start = torch.device(a.device), time.time()
    torch.manual_seed(a.seed)
    out = open_out(a.out or 'out')
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{platform.machine()} CPU, {torch.get_num_threads()} threads'
    reached = machine(device)
    print(f'{name}, torch {torch.__version__}: copy {reached["copy"] / 1e9:.0f} GB/s, matmul {reached["float32"] / 1e12:.2f} TFLOP/s in '
          f'float32, {reached["bfloat16"] / 1e12:.2f} in bfloat16', flush=True)
    rounds = 3 if a.quick else 9
    rows = dispatch_table(SHAPES['quick' if a.quick else device.type], device, rounds, reached)
    print(milliseconds(rows), roofline(rows), claims(rows), sep='\n\n', flush=True)
    sizes = dict(dim=64, head_dim=16, expert_dim=32, n_vocab=64) if a.quick else dict(dim=1024, head_dim=64, expert_dim=3584, n_vocab=8192)
    if device.type == 'cuda' and not a.quick:
        sizes = dict(dim=4096, head_dim=128, expert_dim=14336, n_vocab=32000)
    config = Config(**sizes, n_layers=4, n_heads=sizes['dim'] // sizes['head_dim'], n_kv_heads=4, n_experts=8, top_k=2)
    model = new_model(config, 0).to(torch.bfloat16 if device.type == 'cuda' else torch.float32).to(device).requires_grad_(False)
    tokens = torch.randint(config.n_vocab, (1, 64 if a.quick else 1024 if device.type == 'cpu' else 4096), device=device)
    table = model_table(model, tokens, fewer(model, tokens, 0.7), 8 if a.quick else 32, 3 if a.quick else 7)
    print(f'\n{model_lines(table)}')
    write_json(out / 'bench.json', {'machine': name, 'torch': torch.__version__, 'reached': reached, 'seed': a.seed,
                                    'seconds': time.time() - start, 'dispatch': rows, 'model': table})
    dispatch_figure(out / 'dispatch.png', rows, name)
    roofline_figure(out / 'roofline.png', rows, reached)
    model_figure(out / 'model.png', table)
    print(f'{time.time() - start:.0f} s; wrote bench.json, dispatch.png, roofline.png and model.png in {out}')


def opened_settings(a, finished=True, **others):
    """The Settings of --run, or with `others` where there is no run, on the device and the checkpoint of the command line.

    `finished`: InputError unless the run is. An interrupted one has a base and allocators too.
    """
    known = a.run and (finished or (Path(a.run) / 'results.json').exists())
    s = run_settings(a.run) if known else Settings(**others)
    return replace(s, device=a.device, stream=a.stream, ckpt=a.ckpt or s.ckpt)


def bench_run(a):
    """The model of a run, or of --ckpt, on held-out text: Top-K against its allocators (without a run: random ones at 0.7 K)."""
    s = opened_settings(a, seq=512)
    out = open_out(a.out or a.run or f'out/{Path(a.ckpt).name}')
    model, _, texts = base_model(s, Path(a.run or out))
    tokens = texts[2].windows(s.seq, max(s.seq, 2048))[0].to(s.device)          # (n,seq)
    policy = AdaK(Allocators.load(Path(a.run) / 'allocator.safetensors', model.config).to(s.device)) if a.run else fewer(model, tokens, 0.7)
    table = model_table(model, tokens, policy, a.tokens, 3 if a.quick else 15)
    print(model_lines(table))
    write_json(out / 'bench.json', {'run': a.run, 'ckpt': a.ckpt, 'torch': torch.__version__, 'model': table})
    model_figure(out / 'model.png', table)
    print(f'wrote bench.json and model.png in {out}')


# ================================================================ the frontier: every policy at every budget

BUDGETS = 0.9, 0.75, 0.6, 0.5


@dataclass
class Study:
    """A frozen base model and everything measured on it: `folder` keeps one file per row, so a second run goes on where the first stopped."""
    s: Settings
    model: Transformer
    tokenizer: Tokenizer
    text: Text                      # to train allocators on
    calibration: Text
    heldout: Text
    folder: Path

    def __post_init__(self):
        self.calibration_windows = self.calibration.windows(self.s.seq, self.s.calibration_tokens)
        self.windows = self.heldout.windows(self.s.seq, self.s.heldout_tokens)
        self.K, self.L = self.model.config.top_k, len(self.model.config.moe_layers)

    def measured(self, name, policy_of):
        """(loss (n,), counts (L,k_max+1)) of policy_of() on the held-out windows, from the folder if it is there."""
        path = self.folder / f'{plain(name)}.row'
        if there(path):
            tensors, _ = read_safetensors(path)
        else:
            torch.manual_seed(self.s.seed)                     # for the policies that draw
            loss, tally = evaluate(self.model, self.windows, policy_of())
            tensors = {'loss': loss.float(), 'counts': tally.counts.cpu()}
            write_safetensors(path, tensors)
            print(f'{name}: {loss.mean():.4f} nats at mean k {tally.mean():.3f}', flush=True)
        return tensors['loss'].double(), tensors['counts']

    def calibrated(self, policy_of, budget, low, high):
        """policy_of(knob) with the knob that gives mean k = budget * K on the calibration windows."""
        return lambda: policy_of(calibrate(self.model, self.calibration_windows, policy_of, budget * self.K, low, high))

    def allocators(self, kind, budget, seed, prepare=None, **changes):
        """Trained allocators from the folder, or trained now: kind 'ada-k', 'no-rl', 'p-warm', 'paper' or an ablation's name.

        `changes` are to the run's Settings; prepare(allocators) may change the start.
        """
        path = self.folder / f'{plain(kind)}-{budget}-seed{seed}.safetensors'
        if not there(path):
            s = replace(self.s, **{'budget': budget, 'seed': seed, 'lam': None, **changes})
            print(f'training {path.stem}', flush=True)
            allocators = new_allocators(s, self.model, self.text)
            if prepare:
                prepare(allocators)
            if kind == 'no-rl':
                train_soft(s, self.model, allocators, self.text)
            elif kind != 'p-warm':
                train_ppo(s, self.model, allocators, self.text, self.calibration, [])
            allocators.save(path)
            gathered('saved')
        return Allocators.load(path, self.model.config).to(self.s.device)


def plain(name):
    """A file name of letters, digits, dots and dashes. Example: 'price 2e-3, 1/4 of the layers' -> 'price-2e-3-1-4-of-the-layers'."""
    return re.sub(r'[^a-z0-9.]+', '-', name.lower())


def there(path):
    """Is the file there? Rank 0's answer for all ranks, which must then do the same."""
    return gathered(path.exists())[0]


def open_study(a, name):
    """The Study of --run or --ckpt; its folder belongs to one base model, one text and one recipe, InputError names what differs."""
    s = opened_settings(a, **PRESETS['smoke' if a.quick else 'tiny'])
    out = Path(a.run or open_out(a.out or f'out/{Path(a.ckpt).name}'))
    model, tokenizer, texts = base_model(s, out)
    check_budget(replace(s, budget=min(BUDGETS), lam=None), model.config.top_k)
    check_ranks(s)
    study = Study(s, model, tokenizer, *texts, open_out(out / name))
    facts = {'base': fingerprint(base_folder(s, out)), 'text': [len(t.tokens) for t in texts],
             **{field: value for field, value in asdict(s).items() if field not in ('out', 'fresh', 'budget', 'lam', 'seed', 'device', 'ckpt', 'stream')}}
    old = study.folder / 'study.json'
    if old.exists() and (other := [name for name, value in read_json(old).items() if facts.get(name) != value]):
        raise InputError(f'{study.folder} was measured with another {other[0]}: move it away to measure again')
    write_json(old, facts)
    # the run's own allocators are one of those wanted
    if a.run and name == 'frontier' and s.lam is None and not s.paper:
        mine = study.folder / f'ada-k-{s.budget}-seed{s.seed}.safetensors'
        if not mine.exists() and (Path(a.run) / 'allocator.safetensors').exists():
            Allocators.load(Path(a.run) / 'allocator.safetensors', model.config).save(mine)
    return study


def greedy_layers(study, tokens=8192):
    """{total: mean k of each layer} for totals from L*K down: each time the layer that costs the least gives up one expert."""
    windows = study.calibration.windows(study.s.seq, tokens)
    k = [study.K] * study.L
    path = {sum(k): k}
    while sum(k) > max(study.L, int(min(BUDGETS) * study.K * study.L)):
        lower = [[n - (i == layer) for i, n in enumerate(k)] for layer in range(study.L) if k[layer] > 1]
        k = min(lower, key=lambda plan: evaluate(study.model, windows, PerLayer(plan))[0].mean().item())
        path[sum(k)] = k
    return path


def between(path, total):
    """The plan of a fractional total: the two neighbours of `greedy_layers`, mixed."""
    low = max(min(path), math.floor(total))
    high = min(low + 1, max(path))
    return [a + (b - a) * (total - low) for a, b in zip(path[low], path[high])]


def oracle(losses, price):
    """Hindsight, after Duo-LLM: losses (A,n) of every static k, the label known -> (loss (n,), k (n,)) of the plan that minimises loss + price * k."""
    k = torch.arange(1, len(losses) + 1)
    best = (losses + price * k[:, None]).argmin(0)
    return losses.gather(0, best[None])[0], k[best]


def row(study, method, budget, measurements, reference, params=0):
    """One row: the mean over seeds of [(loss, counts), ..], the paired difference to Top-K, and its standard error.

    The error has two parts: tokens of one document are dependent (clustered), and seeds differ.
    """
    c = study.model.config
    losses = torch.stack([loss for loss, _ in measurements]).numpy()            # (seeds,n)
    counts = sum(counts / counts.sum() for _, counts in measurements) / len(measurements)
    mean_k = (counts.sum(0) * torch.arange(counts.shape[1])).sum().item()
    delta = losses - reference.numpy()
    seeds = delta.mean(1).std(ddof=1) if len(losses) > 1 else 0.0
    base, cost = flops(c, c.top_k, study.s.seq), flops(c, mean_k, study.s.seq, params)
    return {'method': method, 'budget': budget, 'seeds': len(losses), 'delta': delta.mean(), 'seed_std': float(seeds),
            'delta_se': math.hypot(clustered_error(delta.mean(0), study.windows[2].flatten()), seeds / len(losses) ** 0.5),
            'mean_k': mean_k, 'expert_flops': cost['experts'] / base['experts'], 'total_flops': cost['total'] / base['total']}


def frontier(a):
    """Every policy at every budget on one frozen base -> frontier.json, frontier.png and the table."""
    start, study = time.time(), open_study(a, 'frontier')
    s, K, model = study.s, study.K, study.model
    k_max, n_experts = min(2 * K, model.config.n_experts), model.config.n_experts
    published = {'paper': True, **{name: value for name, value in PAPER.items() if name != 'lam'}}
    seeds, budgets = range(s.seed, s.seed + (1 if a.quick else 3)), BUDGETS[1::2] if a.quick else BUDGETS
    spent = 0.0
    if (study.folder / 'frontier.json').exists():
        spent = read_json(study.folder / 'frontier.json')['seconds']
    static = {k: study.measured(f'static-{k}', lambda k=k: TopK(k)) for k in range(1, k_max + 1)}
    topk, rows, paired, greedy = static[K][0], [], [], None

    def add(method, budget, measurements, params=0):
        rows.append(row(study, method, budget, measurements, topk, params))
        paired.append(torch.stack([loss for loss, _ in measurements]))          # (seeds,n)
        write_json(study.folder / 'frontier.json', {
            'rows': rows, 'K': K, 'seconds': spent + time.time() - start, 'tokens': len(topk), 'seeds': len(seeds),
            'documents': len(np.unique(study.windows[2])), 'threads': torch.get_num_threads(), 'torch': torch.__version__})

    for k, measurement in static.items():
        add('static k', k / K, [measurement])
    for b in budgets:
        at = f'{b}'
        if not there(study.folder / f'per-layer-{at}.row'):
            greedy = greedy or greedy_layers(study)
        add('random mix', b, [study.measured(f'random-mix-{at}', lambda: RandomMix(b * K))])
        add('per-layer static k', b, [study.measured(f'per-layer-{at}', lambda: PerLayer(between(greedy, b * K * study.L)))])
        add('Top-P', b, [study.measured(f'top-p-{at}', study.calibrated(lambda p: TopP(p, n_experts), b, 0, 1))])
        add('expert skipping', b, [study.measured(f'skip-{at}', study.calibrated(lambda beta: Skip(beta, K), b, 4, 0))])
        add('entropy bands', b, [study.measured(f'bands-{at}', study.calibrated(lambda scale: EntropyBands(scale, k_max), b, 0, 4))])

        def dialled(name, make, n=1):
            """Rows of trained allocators at this budget, their price dial set on the calibration split; make(seed) trains or loads."""
            done = []
            for seed in list(seeds)[:n]:
                allocators = make(seed)
                done.append(study.measured(f'{name}-{at}-seed{seed}', study.calibrated(lambda price: AdaK(allocators, price=price), b, 20, -20)))
            add(name, b, done, allocators.weight.numel())
        dialled('P-Warm only', lambda seed: study.allocators('p-warm', BUDGETS[1], seed, **published))
        dialled('published recipe, dialled', lambda seed: study.allocators('paper', BUDGETS[1], seed, **published))
        if type(model) is Transformer:                         # a backward pass needs all weights at once
            dialled('learnt without RL', lambda seed: study.allocators('no-rl', b, seed), 3)
        dialled('Ada-K, dialled', lambda seed: study.allocators('ada-k', BUDGETS[1], seed), 3)
        dialled('Ada-K', lambda seed: study.allocators('ada-k', b, seed), 3)
        lead(study, rows, paired, b)

        losses = torch.stack([loss for loss, _ in static.values()])
        price = bisect(lambda price: oracle(losses, price)[1].double().mean().item(), b * K, 5, 0, 30)      # hindsight all the way
        loss, k = oracle(losses, price)
        add('oracle (hindsight)', b, [(loss, torch.bincount(k, minlength=k_max + 1)[None])])
    print(frontier_table(rows))
    frontier_figure(study.folder / 'frontier.png', rows)
    print(f'{spent + time.time() - start:.0f} s in all; wrote frontier.json and frontier.png in {study.folder}')


TRAINING_FREE = 'static k', 'random mix', 'per-layer static k', 'Top-P', 'expert skipping', 'entropy bands'


def lead(study, rows, paired, budget):
    """Adds to the Ada-K row of a budget its paired differences: to the best row without training there, and to the one without RL.

    Mean k is set on other text, so it differs a little between rows; the difference is corrected to equal mean k by the slope of
    the static-k curve there: an Ada-K that ran more experts is charged for them.
    """
    here = [i for i, r in enumerate(rows) if abs(r['budget'] - budget) < 1e-9]
    ada = next(i for i in here if rows[i]['method'] == 'Ada-K')
    free = min((i for i in here if rows[i]['method'] in TRAINING_FREE), key=lambda i: rows[i]['delta'])
    no_rl = [i for i in here if rows[i]['method'] == 'learnt without RL']
    static = {round(r['mean_k']): r['delta'] for r in rows if r['method'] == 'static k'}
    below = min(math.floor(budget * study.K), study.K - 1)
    slope = static[below + 1] - static[below]                                   # nats per expert, below 0
    for name, other in [('best_free', free), *(('no_rl', i) for i in no_rl)]:
        difference = (paired[ada].mean(0) - paired[other].mean(0)).numpy()
        seeds = math.hypot(*(rows[i]['seed_std'] / rows[i]['seeds'] ** 0.5 for i in (ada, other)))
        rows[ada][name] = {'method': rows[other]['method'], 'difference': difference.mean(),
                           'at_equal_k': difference.mean() - slope * (rows[ada]['mean_k'] - rows[other]['mean_k']),
                           'se': math.hypot(clustered_error(difference, study.windows[2].flatten()), seeds)}


def frontier_table(rows):
    """Loss minus Top-K in thousandths of a nat per token at every budget; under it the lead of Ada-K, paired."""
    budgets = sorted({r['budget'] for r in rows if r['method'] == 'Ada-K'}, reverse=True)
    show = lambda r: f'{1000 * r["delta"]:+.1f} ± {1000 * r["delta_se"]:.1f}' + (f' (k {r["mean_k"]:.2f})' if r['method'] == 'Ada-K' else '')
    lines = []
    for method in dict.fromkeys(r['method'] for r in rows):
        mine = {r['budget']: r for r in rows if r['method'] == method}
        lines.append([method, str(max(r['seeds'] for r in mine.values())), *(show(mine[b]) if b in mine else '' for b in budgets)])
    ada = {r['budget']: r for r in rows if r['method'] == 'Ada-K'}
    for name, title in (('best_free', 'Ada-K minus the best row without training'), ('no_rl', 'Ada-K minus learnt without RL')):
        if name not in ada[budgets[0]]:
            continue
        lines.append([f'*{title}, at equal mean k*', '', *(f'*{1000 * ada[b][name]["at_equal_k"]:+.1f} ± {1000 * ada[b][name]["se"]:.1f}*' for b in budgets)])
    return markdown(['10⁻³ nats/token, minus Top-K', 'seeds', *(f'{b:g} K' for b in budgets)], lines)


LOOKS = {'static k': ('black', 'x', ':'), 'random mix': ('#999999', 'v', '--'), 'per-layer static k': ('#999999', 's', ':'),
         'Top-P': ('#E69F00', 's', '-'), 'expert skipping': ('#009E73', '^', '-'), 'entropy bands': ('#CC79A7', 'D', '--'),
         'P-Warm only': ('#56B4E9', '<', ':'), 'published recipe, dialled': ('#56B4E9', '>', '--'), 'learnt without RL': ('#D55E00', 'P', '-'),
         'Ada-K, dialled': ('#0072B2', 'o', ':'), 'Ada-K': ('#0072B2', 'o', '-'), 'oracle (hindsight)': ('black', '*', '-.')}


def frontier_figure(path, rows):
    """Left: loss minus Top-K against the share of expert FLOPs. Right: the same, minus expert skipping, where the rows lie close."""
    fig, (a, b) = plt.subplots(1, 2, figsize=(11, 4.8), layout='constrained')
    skip = {r['budget']: r['delta'] for r in rows if r['method'] == 'expert skipping'}
    for method, (color, marker, line) in LOOKS.items():
        mine = sorted((r for r in rows if r['method'] == method and r['expert_flops'] < 1), key=lambda r: r['expert_flops'])
        if not mine:
            continue
        if method != 'oracle (hindsight)':
            a.errorbar([r['expert_flops'] for r in mine], [r['delta'] for r in mine], [r['delta_se'] for r in mine], color=color, marker=marker,
                       linestyle=line, label=method, markersize=5)
        if method in ('expert skipping', 'learnt without RL', 'Ada-K, dialled', 'Ada-K'):
            b.errorbar([r['expert_flops'] for r in mine], [r['delta'] - skip[r['budget']] for r in mine], [r['delta_se'] for r in mine],
                       color=color, marker=marker, linestyle=line, markersize=5)
    worst = max(r['delta'] for r in rows if r['budget'] in skip and r['method'] in TRAINING_FREE[1:])
    a.set(xlabel='share of expert FLOPs', ylabel='loss minus Top-K (nats/token)', title='every policy (lower is better)',
          xlim=(0.45, 1), ylim=(-0.002, 1.1 * worst))
    a.axhline(0, color='black', linewidth=0.8)
    fig.legend(loc='outside lower center', ncols=6, fontsize=8)
    b.set(xlabel='share of expert FLOPs', ylabel='loss minus expert skipping (nats/token)', title='close up (bars: error against Top-K)')
    save_figure(fig, path)


# ================================================================ the published ablations, in kind

def some_layers(share):
    """Allocators in every (1/share)-th layer only: the others always run K, by a bias that no training moves."""
    def prepare(allocators):
        for layer in range(len(allocators.bias)):
            if (layer + 1) % round(1 / share):
                allocators.weight.data[layer] = 0
                allocators.bias.data[layer] = 0
                allocators.bias.data[layer, allocators.top_k - 1] = 1000
    return prepare


class Sampled(AdaK):
    """k drawn from the allocators as in training, instead of the most probable."""

    @torch.no_grad()
    def __call__(self, layer, x, probs):
        logits = self.allocators.logits(layer, self.allocators.inputs(layer, x, probs))
        return sample_k(F.log_softmax(logits, -1), torch.rand(len(x), device=x.device))


def ablations(a):
    """One change of the recipe at a time, few PPO steps, one seed -> ablations.json and the table."""
    start, study = time.time(), open_study(a, 'ablations')
    s, K = study.s, study.K
    steps = 6 if a.quick else 60
    many = dict(group=1, ppo_batch=s.group * s.ppo_batch)      # as many rollouts, of more texts
    cases = [('default', {}), ('cost as reward instead of loss', dict(cost='reward')),
             ('start: random', dict(start='random')), ('start: always K', dict(start='always-k')), ('start: P-Warm', dict(start='p-warm')),
             ('reward of the text\'s own token', dict(reward='sampled')),
             ('baseline: Top-K', many), ('baseline: Top-K, reward of the text\'s own token (published)', dict(reward='sampled', **many)),
             ('allocator reads x only, start: P-Warm', dict(extended=False, start='p-warm', ppo_lr=1e-3)),
             ('1 PPO epoch', dict(epochs=1)), ('2 PPO epochs', dict(epochs=2))]
    reference, _ = study.measured('top-k', lambda: TopK(K))
    rows = []

    def add(what, allocators, policy_of):
        measurement = study.measured(what, policy_of)
        rows.append({'what': what, **row(study, 'Ada-K', BUDGETS[1], [measurement], reference, allocators.weight.numel())})
        write_json(study.folder / 'ablations.json', {'rows': rows, 'steps': steps, 'K': K, 'budget': BUDGETS[1], 'seconds': time.time() - start})

    def dial(allocators):
        return study.calibrated(lambda price: AdaK(allocators, price=price), BUDGETS[1], 20, -20)
    for what, changes in cases:
        allocators = study.allocators(what, BUDGETS[1], s.seed, ppo_steps=steps, **changes)
        add(what, allocators, dial(allocators))
        if what == 'default':
            add('sampled k at evaluation, no dial', allocators, lambda: Sampled(allocators))
    for share in (1, 1 / 2, 1 / 4, 1 / 8):
        if study.L * share >= 1:
            what = f'price 2e-3, allocators in {"all" if share == 1 else f"1/{round(1 / share)} of the"} layers'
            allocators = study.allocators(what, BUDGETS[1], s.seed, some_layers(share), ppo_steps=steps, lam=2e-3)
            add(what, allocators, lambda: AdaK(allocators, price=0.0))
    print(ablation_table({'rows': rows}))
    print(f'{time.time() - start:.0f} s; wrote ablations.json in {study.folder}')


def ablation_table(results):
    return markdown(['what', 'minus Top-K (10⁻³ nats/token)', 'mean k', 'expert FLOPs'],
                    [[r['what'], f'{1000 * r["delta"]:+.1f} ± {1000 * r["delta_se"]:.1f}', f'{r["mean_k"]:.2f}', f'{r["expert_flops"]:.2f}']
                     for r in results['rows']])


# ================================================================ what the allocators learnt

PYTHON_CLASSES = 'identifier', 'keyword', 'number', 'operator, punctuation', 'string', 'comment, docstring', 'white space'
PROSE_CLASSES = 'content word', 'function word', 'number', 'operator, punctuation', 'white space'
FUNCTION_WORDS = frozenset('a an the and or but nor so yet if then than that this these those of to in on at by for from with without as is are '
                           'was were be been being it its he she they we you i him her them us me my your his our their not no do does '
                           'did has have had will would can could may might must shall should there which who whom what when where'.split())


def python_classes(text):
    """The class of every character of Python source, by the standard library's tokenizer; what it cannot read is a comment.

    A string that is a statement of its own is a docstring. Example: 'x = 1' -> identifier, white space, operator, white space, number.
    """
    classes = ['white space'] * len(text)
    starts = list(itertools.accumulate((len(line) for line in text.splitlines(True)), initial=0))
    statement_starts, end = True, 0
    try:
        for t in tokenize.generate_tokens(io.StringIO(text).readline):
            name = tokenize.tok_name[t.type]
            kind = {'NUMBER': 'number', 'OP': 'operator, punctuation', 'COMMENT': 'comment, docstring',
                    'NAME': 'keyword' if keyword.iskeyword(t.string) else 'identifier',
                    'STRING': 'comment, docstring' if statement_starts else 'string'}.get(name, 'string' if name.startswith('FSTRING') else None)
            if kind:
                begin, end = (starts[line - 1] + column for line, column in (t.start, t.end))
                classes[begin:end] = [kind] * (end - begin)
            if name not in ('NL', 'COMMENT'):
                statement_starts = name in ('NEWLINE', 'INDENT', 'DEDENT')
    except (tokenize.TokenError, SyntaxError, IndexError):
        classes[end:] = ['comment, docstring'] * (len(text) - end)
    return classes


def prose_classes(text):
    """The class of every character of any other text: a word is a function word if it is in the short list above, else a content word."""
    classes = []
    for piece in re.findall(r'[^\W\d_]+|\d+|\s+|(?:[^\s\w]|_)+', text):
        kind = 'white space' if piece.isspace() else 'number' if piece[0].isdigit() else 'operator, punctuation' if not piece[0].isalpha() \
            else 'function word' if piece.lower() in FUNCTION_WORDS else 'content word'
        classes += [kind] * len(piece)
    return classes


def token_classes(tokenizer, ids, text, classes):
    """The class of each token: that of its first character that is not white space. ids: tokens of `text` alone.

    text and classes have one item per character, tokens are bytes; a token without a visible start is white space.
    """
    byte_class = np.repeat(np.array(classes, dtype=object), [len(c.encode('utf-8', 'surrogatepass')) for c in text])
    raw, at, result = text.encode('utf-8', 'surrogatepass'), 0, []
    for i in ids:
        piece = tokenizer.bytes_of_id[i]
        skip = len(piece) - len(piece.lstrip())
        assert raw[at:at + len(piece)] == piece, 'tokens do not spell the text'
        result.append('white space' if skip == len(piece) else byte_class[at + skip])
        at += len(piece)
    return result


def held_out_classes(study):
    """(class of every input token of the held-out windows (n,), names of the classes). Prose rules where nothing is Python."""
    documents = read_documents(study.s.data, study.s.documents)
    python = any(name.endswith('.py') for name in documents)
    if not python:
        print('no Python files in the text: token classes by the rule for prose (prose_classes)', file=sys.stderr)
    names, tokenizer = PYTHON_CLASSES if python else PROSE_CLASSES, study.tokenizer
    stream = []
    for text in split_documents(documents)[2]:
        ids = tokenizer.encode(text)
        inner = token_classes(tokenizer, ids, text, (python_classes if python else prose_classes)(text))
        stream += ['white space'] * (tokenizer.bos is not None) + inner + ['white space'] * (tokenizer.eos is not None)
    number = torch.tensor([names.index(kind) for kind in stream])
    return Text(number, study.heldout.document).windows(study.s.seq, study.s.heldout_tokens)[0].flatten(), names


class Watched(Counted):
    """A policy with a tally that also keeps every k: `k` (L,n) of the n tokens so far, on the CPU."""

    def __init__(self, policy, n_layers, device):
        super().__init__(policy, n_layers, device)
        self.kept = [[] for _ in range(n_layers)]

    def __call__(self, layer, x, probs):
        k = super().__call__(layer, x, probs)
        self.kept[layer].append(k.cpu())
        return k

    @property
    def k(self):
        return torch.stack([torch.cat(parts) for parts in self.kept])


class Loads(Watched):
    """A watched policy that also counts how often each expert ran, `load` (L,N)."""

    def __init__(self, policy, n_layers, n_experts, device):
        super().__init__(policy, n_layers, device)
        self.load = torch.zeros(n_layers, n_experts, device=device)

    def __call__(self, layer, x, probs):
        k = super().__call__(layer, x, probs)
        ids = probs.topk(self.k_max, dim=-1).indices
        used = torch.arange(self.k_max, device=k.device) < k[:, None]
        self.load[layer] += torch.bincount(ids[used], minlength=probs.shape[1])
        return k


def analysis(a):
    """Where the trained allocators spend experts on held-out text -> analysis.json, analysis.png and one line a finding."""
    study = open_study(a, 'analysis')
    s, c = study.s, study.model.config
    policy = AdaK(Allocators.load(Path(a.run) / 'allocator.safetensors', c).to(s.device))
    loss, _ = evaluate(study.model, study.windows, topk := Loads(TopK(c.top_k), study.L, c.n_experts, s.device))
    evaluate(study.model, study.windows, ada := Loads(policy, study.L, c.n_experts, s.device))
    k = ada.k.float()                                                           # (L,n)
    kind, names = held_out_classes(study)
    harder = torch.searchsorted(torch.quantile(loss[::max(1, len(loss) // 10 ** 6)], torch.linspace(0.1, 0.9, 9).double()), loss)     # decile of each token
    group = lambda of, n: [k[:, of == i].mean().item() if (of == i).any() else None for i in range(n)]
    results = {'K': c.top_k, 'mean_k': k.mean().item(), 'above_k': (k > c.top_k).float().mean().item(),
               'histogram': [(k == i).float().mean().item() for i in range(1, policy.k_max + 1)], 'by_layer': k.mean(1).tolist(),
               'classes': names, 'by_class': group(kind, len(names)), 'class_share': [(kind == i).float().mean().item() for i in range(len(names))],
               'by_difficulty': group(harder, 10),
               'load': {name: (t.load / t.load.sum(1, keepdim=True)).sort(1, descending=True).values.cpu().tolist()
                        for name, t in (('Top-K', topk), ('Ada-K', ada))}}
    write_json(study.folder / 'analysis.json', results)
    analysis_figure(study.folder / 'analysis.png', results)
    print(findings(results))
    print(f'wrote analysis.json and analysis.png in {study.folder}')


def findings(r):
    """The analysis in sentences, each published claim with whether it holds here."""
    layers, by_class = r['by_layer'], dict(zip(r['classes'], r['by_class']))
    middle, ends = layers[1:-1] or layers, (layers[0] + layers[-1]) / 2
    middle = sum(middle) / len(middle)
    words = 'identifier' if 'identifier' in by_class else 'content word'
    symbols = by_class['operator, punctuation']
    tenths, load = r['by_difficulty'], {name: sum(layer[0] for layer in layers) / len(layers) for name, layers in r['load'].items()}
    seen = [(name, k) for name, k in sorted(by_class.items(), key=lambda item: -(item[1] or 0)) if k is not None]
    rising = np.corrcoef(range(10), tenths)[0, 1]
    verdict = lambda holds: 'holds here' if holds else 'does not hold here'
    return '\n'.join([
        f'- **How many.** Mean k {r["mean_k"]:.2f} of K = {r["K"]}; k = ' + ', '.join(f'{i} for {share:.0%}' for i, share in enumerate(r['histogram'], 1) if share >= 0.005)
        + f' of the decisions; {r["above_k"]:.1%} use more than K (published: about 10% of tokens).',
        f'- **Middle layers use more** {verdict(middle > max(layers[0], layers[-1]))}: mean k by layer '
        + ', '.join(f'{k:.2f}' for k in layers) + f' (middle {middle:.2f}, first and last {ends:.2f}).',
        f'- **Content words use more** {verdict(by_class[words] > symbols)}: ' + ', '.join(f'{name} {k:.2f}' for name, k in seen) + '.',
        f'- **Harder tokens use more** {verdict(rising > 0.5)}: mean k by tenth of the loss under Top-K, easiest first, '
        + ', '.join(f'{k:.2f}' for k in tenths) + f' (correlation of tenth and mean k {rising:+.2f}).',
        f'- **Expert load.** The busiest expert of a layer takes {load["Top-K"]:.1%} of the rows under Top-K and {load["Ada-K"]:.1%} under Ada-K '
        f'(even: {1 / len(r["load"]["Top-K"][0]):.1%}).'])


def analysis_figure(path, r):
    blue, grey = '#0072B2', '#999999'
    fig, axes = plt.subplots(2, 3, figsize=(12, 6.4), layout='constrained')
    (a, b, c), (d, e, f) = axes
    a.bar(range(1, len(r['histogram']) + 1), r['histogram'], color=blue)
    a.axvline(r['K'], color='black', linestyle=':', label='Top-K')
    a.set(xlabel='k (experts)', ylabel='share of decisions', title='how many experts')
    a.legend(fontsize=8)
    b.plot(range(1, len(r['by_layer']) + 1), r['by_layer'], color=blue, marker='o')
    b.set(xlabel='MoE layer', ylabel='mean k', title='by layer', xticks=range(1, len(r['by_layer']) + 1))
    seen = [(name, k, share) for name, k, share in zip(r['classes'], r['by_class'], r['class_share']) if k is not None]
    c.barh([f'{name} ({share:.0%})' for name, _, share in seen][::-1], [k for _, k, _ in seen][::-1], color=blue)
    c.axvline(r['mean_k'], color='black', linestyle='--', label='mean')
    c.set(xlabel='mean k', title='by class of the token (share)', xlim=(0.9 * min(k for _, k, _ in seen), None))
    c.legend(fontsize=8, loc='lower right')
    d.plot(range(1, 11), r['by_difficulty'], color=blue, marker='o')
    d.set(xlabel='tenth of the loss under Top-K (10: hardest)', ylabel='mean k', title='by difficulty', xticks=range(1, 11))
    for name, color, line in (('Top-K', grey, '--'), ('Ada-K', blue, '-')):
        mean = [sum(layer[i] for layer in r['load'][name]) / len(r['load'][name]) for i in range(len(r['load'][name][0]))]
        e.plot(range(1, len(mean) + 1), mean, color=color, linestyle=line, label=name)
    e.set(xlabel='expert, busiest first', ylabel='share of rows, mean over layers', title='expert load', ylim=(0, None))
    e.legend(fontsize=8)
    f.set_axis_off()
    save_figure(fig, path)


# ================================================================ text with a chosen policy

# 256-colour backgrounds from few experts (dark blue) to many (yellow); they differ in lightness too, so greyscale works
COLOURS = 17, 24, 66, 144, 221


def make_policy(name, config, run, device):
    """The policy that `--policy` names; InputError says what is wrong with it."""
    kind, _, knob = name.partition('=')
    if kind == 'ada-k':
        if not run:
            raise InputError('--policy ada-k: give the trained run with --run FOLDER')
        return AdaK(Allocators.load(Path(run) / 'allocator.safetensors', config).to(device))
    if name == 'top-k':
        return TopK(config.top_k)
    try:
        value = float(knob)
        if kind == 'k' and value == int(value) and 1 <= value <= config.n_experts:
            return TopK(int(value))
        if kind == 'mix' and 1 <= value <= config.n_experts:
            return RandomMix(value)
        if kind == 'top-p' and 0 < value <= 1:
            return TopP(value, config.n_experts)
        if kind == 'skip' and value >= 0:
            return Skip(value, config.top_k)
    except ValueError:
        pass
    raise InputError(f'--policy {name}: use ada-k, top-k, k=1..{config.n_experts}, mix=1..{config.n_experts}, top-p=0..1, or skip=0..')


@torch.no_grad()
def coloured(model, tokenizer, tokens, policy):
    """The text of tokens (1,T), each on a background by the mean k it ran over the layers, and a legend."""
    watched = Watched(policy, len(model.config.moe_layers), tokens.device)
    model.hidden(tokens, watched)
    k = watched.k.float().mean(0)                                               # (T,)
    low, high = k.min().item(), k.max().item()
    width = (high - low) / len(COLOURS) or 1
    paint = lambda i, text: f'\x1b[48;5;{COLOURS[i]}m\x1b[38;5;{231 if i < 3 else 16}m{text}\x1b[0m'
    pieces = tokenizer.stream(tokens[0].tolist())
    body = ''.join(paint(min(int((k_t - low) / width), len(COLOURS) - 1), piece).replace('\n', '\x1b[0m\n')
                   for k_t, piece in zip(k.tolist(), pieces))
    legend = ' '.join(paint(i, f' {low + i * width:.2f}-{low + (i + 1) * width:.2f} ') for i in range(len(COLOURS)))
    return f'{body}\nmean k over the layers: {legend}'


def generation(a):
    """Continue the prompt, printing text as it comes, then speed and mean k."""
    s = opened_settings(a, finished=False)
    folder = base_folder(s, Path(a.run or ''))
    tokenizer, c = Tokenizer(folder), read_config(folder)
    policy = make_policy(a.policy or ('ada-k' if a.run else 'top-k'), c, a.run, a.device)
    ids = [tokenizer.bos] * (tokenizer.bos is not None) + tokenizer.encode(a.prompt)
    if not ids:
        raise InputError('--prompt: is empty')
    model = load_model(s, folder)
    tokens = torch.tensor([ids], device=a.device)
    tally = Counted(policy, len(c.moe_layers), a.device)
    generator = torch.Generator(a.device).manual_seed(a.seed)
    new, times = [], [time.perf_counter()]

    def ids_as_they_come():
        for token in generate_steps(model, tokens, a.tokens, tally, a.temperature, generator):
            times.append(time.perf_counter())
            if token.item() == tokenizer.eos:
                return
            new.append(token.item())
            yield token.item()

    print(a.prompt, end='', flush=True)
    for piece in tokenizer.stream(ids_as_they_come(), first=False):
        print(piece, end='', flush=True)
    print()
    rate = f'{(len(times) - 2) / (times[-1] - times[1]):.1f} tokens/s after the first' if len(times) > 2 else 'one token only'
    print(f'--- {len(new)} tokens, prompt of {len(ids)} in {times[1] - times[0]:.2f} s, {rate}, '
          f'mean k {tally.mean():.3f} of K = {c.top_k} ({type(policy).__name__})')
    if a.show:
        print(coloured(model, tokenizer, torch.tensor([ids + new], device=a.device), policy))


# ================================================================ tasks of lm-evaluation-harness

class Tally(Counted):
    """A policy with a tally of real tokens; `lengths` has the number of them in each sequence that ran."""

    def __init__(self, policy, n_layers, device):
        super().__init__(policy, n_layers, device)
        self.lengths = []


class RealOnly:
    """A tally's policy for one batch: padding, and rows that have ended, run one expert and do not count.

    real (B*T,) bool, or (B,) for all tokens of a row; it may change in place between passes.
    """

    def __init__(self, tally, real):
        self.tally, self.real, self.k_max = tally, real, tally.k_max

    def __call__(self, layer, x, probs):
        real, k = self.real.repeat_interleave(len(x) // len(self.real)), self.tally.policy(layer, x, probs)
        self.tally.counts[layer].scatter_add_(0, k, real.long())
        return torch.where(real, k, 1)


def hidden_states(model, batches, tally):
    """The hidden states (B,T,C) of each batch, a list of B tuples of ids, the longest first; shorter ones are padded on the right."""
    passes = []
    for inputs in batches:
        lengths = [len(ids) for ids in inputs]
        tokens = torch.tensor([ids + (0,) * (lengths[0] - len(ids)) for ids in inputs])         # (B,T)
        real = torch.arange(lengths[0]) < torch.tensor(lengths)[:, None]                        # (B,T)
        tally.lengths += lengths
        passes.append((tokens.to(model.device), RealOnly(tally, real.flatten().to(model.device))))
    return model.hidden_of(passes)


@torch.no_grad()
def score(model, requests, tally, batch=8192, stage='score'):
    """[(log p of the continuation in nats, is it what greedy decoding gives?), ..] of requests [(context ids, continuation ids), ..].

    Neither may be empty. Too long a context loses its left end, down to one token. A pass has at most `batch` tokens with
    padding, or one sequence; requests with the same input, such as choices of one token, share its pass. Ranks share the inputs.
    """
    (rank, size), own = ranks(), Tally(tally.policy, len(tally.counts), model.device)
    askers, longest, visits = {}, model.config.max_len, []     # askers: input -> the requests that read it
    for i, (context, continuation) in enumerate(requests):
        askers.setdefault(tuple((context + continuation)[:-1][-max(longest, len(continuation)):]), []).append(i)
    order = sorted(askers, key=len, reverse=True)[rank::size]  # neighbours in length, so little is padding
    while order:
        inputs, order = order[:(n := max(1, batch // len(order[0])))], order[n:]
        if not visits or sum(len(batch) * len(batch[0]) for batch in visits[-1]) >= model.tokens_per_visit:
            visits.append([])
        visits[-1].append(inputs)
    logp, greedy = torch.zeros(len(requests), dtype=torch.double), torch.ones(len(requests), dtype=torch.bool)
    done, progress = 0, Progress(stage, len(requests))
    for batches in visits:
        for inputs, hidden in zip(batches, hidden_states(model, batches, own)):
            # every token to predict: its row, the place that predicts it, its id, its request
            wanted = [(b, len(ids) - len(requests[i][1]) + j, token, i)
                      for b, ids in enumerate(inputs) for i in askers[ids] for j, token in enumerate(requests[i][1])]
            for part in torch.tensor(wanted).split(max(1, 2 ** 28 // model.config.n_vocab)):    # logits of 1 GB at most
                (b, place, y), i = part[:, :3].T.to(model.device), part[:, 3]                   # (n,) each
                logits = model.lm_head(hidden[b, place]).float()                                # (n,V)
                logp.index_add_(0, i, -F.cross_entropy(logits, y, reduction='none').cpu().double())
                greedy[i[(logits.argmax(-1) != y).cpu()]] = False
            done += size * sum(len(askers[ids]) for ids in inputs)
            progress(min(done, len(requests)), size * sum(own.lengths), mean_k=own.mean())
    for _ in range(max(gathered(len(visits))) - len(visits)):  # every rank visits the layers as often
        model.hidden(torch.zeros(1, 1, dtype=torch.long, device=model.device))
    for their_logp, their_greedy, counts, lengths in (parts := gathered((logp, greedy, own.counts.cpu(), own.lengths))):
        tally.counts += counts.to(model.device)
        tally.lengths += lengths
    logp, greedy = sum(part[0] for part in parts), torch.stack([part[1] for part in parts]).all(0)
    return list(zip(logp.tolist(), greedy.tolist()))


@torch.no_grad()
def write_until(model, tokenizer, prompts, stops, n, temperature, tally, generator):
    """The texts behind B prompts of one length, at most n tokens each, up to eos or the first of its stop strings; stops: B lists.

    A stop string is looked for in the bytes of the text so far, so it may begin and end inside tokens.
    """
    raw, steps, going = [b''] * len(prompts), [0] * len(prompts), [True] * len(prompts)
    running = torch.ones(len(prompts), dtype=torch.bool, device=model.device)
    for new in generate_steps(model, torch.tensor(prompts, device=model.device), n, RealOnly(tally, running), temperature, generator):
        for b, token in enumerate(new.flatten().tolist()):
            if going[b]:
                raw[b] += tokenizer.bytes_of_id.get(token, b'') if token != tokenizer.eos else b''
                ends = [at for stop in stops[b] if (at := raw[b].find(stop.encode())) >= 0]
                raw[b], steps[b], going[b] = raw[b][:min(ends, default=None)], steps[b] + 1, token != tokenizer.eos and not ends
        running.copy_(torch.tensor(going))                     # in place: a CUDA graph may hold it
        if not any(going):
            break
    tally.lengths += [len(ids) + m - 1 for ids, m in zip(prompts, steps)]       # the last token of a text is not run
    return [text.decode('utf-8', errors='replace').removeprefix(' ' if tokenizer.spm else '') for text in raw]     # as Tokenizer.decode


class Answers:
    """What lm-eval asks of a model: requests with texts as `args` in, one answer each out. One object per task and policy.

    Texts become tokens as with the harness's own models, so that numbers compare: a bos in front where the family's tokenizer
    puts one (Qwen's does not, though config.json names one), and bos, or else eos, for an empty context.
    """

    def __init__(self, model, tokenizer, policy, stage, seed=0):
        super().__init__()
        self.model, self.tokenizer, self.stage, self.max_len = model, tokenizer, stage, model.config.max_len
        self.tally = Tally(policy, len(model.config.moe_layers), model.device)
        self.generator = torch.Generator(model.device).manual_seed(seed)
        self.first = [tokenizer.bos] * (tokenizer.bos is not None and not model.config.model_type.startswith('qwen'))
        self.empty = [i for i in (tokenizer.bos, tokenizer.eos) if i is not None][:1]
        if not self.empty:
            raise InputError('--tasks: config.json names neither bos nor eos, and an empty context needs one')

    def pair(self, context, continuation):
        """(context ids, continuation ids): encoded as one text, cut behind the context; white space between them is the continuation's."""
        text, stem = self.tokenizer.encode(context + continuation), self.tokenizer.encode(context.rstrip())
        if not stem:
            return self.empty, text
        ids, n = self.first + text, len(self.first) + min(len(stem), len(text) - 1)     # a token across the cut is the continuation's
        return ids[:n] or self.empty, ids[n:]

    def loglikelihood(self, requests):
        return score(self.model, [self.pair(*r.args) for r in requests], self.tally, stage=self.stage)

    def loglikelihood_rolling(self, requests):
        """log p of whole texts, a long one in windows of max_len: every token predicted once, the last window full of context."""
        pairs, owner, logp = [], [], [0.0] * len(requests)
        for i, r in enumerate(requests):
            ids = self.empty + self.tokenizer.encode(r.args[0])
            for at in range(1, len(ids), self.max_len):
                pairs.append((ids[max(0, at - self.max_len):at], ids[at:at + self.max_len]))
                owner.append(i)
        for i, (nats, _) in zip(owner, score(self.model, pairs, self.tally, stage=self.stage)):
            logp[i] += nats
        return logp

    def generate_until(self, requests, batch=8192):
        groups, texts, done, progress = {}, [''] * len(requests), 0, Progress(self.stage, len(requests))
        for i, r in enumerate(requests):                       # prompts of one length need no padding
            context, how = r.args
            n, until = how.get('max_gen_toks', how.get('max_new_tokens', 256)), how.get('until') or []
            temperature = 0.0 if how.get('do_sample') is False else how.get('temperature', 1.0 if how.get('do_sample') else 0.0)
            if temperature and how.keys() & {'top_p', 'top_k'}:
                raise InputError(f'--tasks: {self.stage}: samples with top_p or top_k, which is not supported')
            if n >= self.max_len:
                raise InputError(f'--tasks: {self.stage}: {n} new tokens leave no room for a prompt, the model\'s length is {self.max_len}')
            ids = (self.first + self.tokenizer.encode(context) or self.empty)[n - self.max_len:]
            stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
            groups.setdefault((len(ids), n, temperature), []).append((i, ids, stops))
        for (T, n, temperature), group in groups.items():
            size = max(1, batch // (T + n))
            for at in range(0, len(group), size):
                where, prompts, stops = zip(*group[at:at + size])
                for i, text in zip(where, write_until(self.model, self.tokenizer, prompts, stops, n, temperature, self.tally, self.generator)):
                    texts[i] = text
                done += len(prompts)
                progress(done, sum(self.tally.lengths), mean_k=self.tally.mean())
        return texts


def open_harness():
    """The package lm_eval, made quiet; InputError where it is not installed."""
    try:
        import lm_eval.api.model
        import lm_eval.evaluator
        import lm_eval.tasks
        import tqdm
    except ImportError as e:
        raise InputError(f'--tasks: {e}; it needs the harness: pip install lm-eval') from None
    os.environ.setdefault('DISABLE_MULTIPROC', '1')            # its bootstrap would fork this process
    tqdm.tqdm.__init__ = functools.partialmethod(tqdm.tqdm.__init__, disable=True)
    for name in ('lm_eval', 'datasets', 'huggingface_hub', 'evaluate'):
        logging.getLogger(name).setLevel(logging.ERROR)
    return lm_eval


def find_tasks(lm_eval, names, shots):
    """{name: what lm_eval's evaluate takes} of names of tasks and groups and paths of .yaml files; a tag becomes its tasks. Fetches the data."""
    manager = lm_eval.tasks.TaskManager(include_defaults=not all(name.endswith('.yaml') for name in names))      # reads 14,000 files
    if missing := [name for name in names if name not in manager.all_tasks and not Path(name).is_file()]:
        close = difflib.get_close_matches(missing[0], manager.all_tasks, 1)
        raise InputError(f'--tasks {missing[0]}: no such task, and no such .yaml file' + (f'; is it {close[0]}?' if close else ''))
    found = {}
    for name in names:
        try:
            loaded = manager.load([name])
            for task in loaded['tasks'].values():
                if shots is not None and task.get_config('num_fewshot') != 0:                   # a 0 is part of the task
                    task.set_config('num_fewshot', shots)
                task.build_all_requests(limit=1)               # so that what is wrong is known now
        except Exception as e:                                 # no network, a broken .yaml, a package that the task wants
            raise InputError(f'--tasks {name}: {type(e).__name__}: {" ".join(str(e).split())[:300]}') from None
        if any(getattr(task, what, False) for task in loaded['tasks'].values() for what in ('UNSAFE_CODE', 'MULTIMODAL')):
            raise InputError(f'--tasks {name}: runs code that the model writes, or needs more than text; neither is supported')
        found.update({name: loaded} if loaded.get('groups') else {task: {'tasks': {task: loaded['tasks'][task]}} for task in loaded['tasks']})
    return found


def task_rows(results, tally, c):
    """One dict per metric of each task, or group of tasks, in lm_eval's results; mean k and FLOPs, over Top-K's, are of all that ran together."""
    T = sum(n * n for n in tally.lengths) / sum(tally.lengths)                  # the length of a token's sequence, mean over tokens
    params = tally.policy.allocators.weight.numel() if isinstance(tally.policy, AdaK) else 0
    cost, topk, rows = flops(c, tally.mean(), T, params), flops(c, c.top_k, T), []
    for task, metrics in results['results'].items():
        for key, value in metrics.items():
            metric, _, kept = key.partition(',')               # 'acc,none': accuracy, every answer as it came
            if kept and not metric.endswith('_stderr'):
                stderr = metrics.get(f'{metric}_stderr,{kept}')
                rows.append({'task': task, 'version': results['versions'].get(task), 'shots': results['n-shot'].get(task), 'n': metrics['sample_len'],
                             'metric': metric if kept == 'none' else f'{metric} ({kept})', 'value': float(value),
                             'stderr': stderr if isinstance(stderr, float) else None, 'mean_k': tally.mean(), 'mean_length': T,
                             'expert_flops': cost['experts'] / topk['experts'], 'total_flops': cost['total'] / topk['total']})
    return rows


def task_lines(rows, policies):
    """The table: one line per task and metric, policies side by side; FLOPs are those of the last."""
    score = lambda r: f'{r["value"]:.4f}' + (f' ± {r["stderr"]:.4f}' if r['stderr'] is not None else '')
    cases = {}
    for r in rows:
        cases.setdefault((r['unit'], r['task'], r['metric']), []).append(r)
    return markdown(['task', 'shots', 'n', 'metric', *policies, *(f'mean k, {name}' for name in policies), 'expert FLOPs', 'total FLOPs'],
                    [[task, str(r[-1]['shots']), str(r[-1]['n']), metric, *map(score, r), *(f'{one["mean_k"]:.3f}' for one in r),
                      f'{r[-1]["expert_flops"]:.3f}', f'{r[-1]["total_flops"]:.3f}'] for (_, task, metric), r in cases.items()])


def bench_tasks(a):
    """Tasks of lm-evaluation-harness under Top-K and, beside it, the run's allocators or --policy -> tasks.json, written after every task."""
    s = opened_settings(a, finished=False)
    folder = base_folder(s, Path(a.run or ''))
    tokenizer, c = Tokenizer(folder), read_config(folder)
    names = dict.fromkeys(['top-k', a.policy or ('ada-k' if a.run else 'top-k')])
    policies = {name: make_policy(name, c, a.run, a.device) for name in names}
    lm_eval, out = open_harness(), open_out(a.out or a.run or f'out/{Path(a.ckpt).name}')
    units = find_tasks(lm_eval, list(dict.fromkeys(a.tasks.split(','))), a.shots)
    Model = type('Model', (Answers, lm_eval.api.model.LM), {})
    model, rows = load_model(s, folder), []
    for unit, tasks in units.items():
        for name, policy in policies.items():
            start, lm = time.time(), Model(model, tokenizer, policy, f'{unit} {name}', a.seed)
            random.seed(0)                                     # the harness's own seeds: its prompts, and the same ones for both policies
            for seed in (np.random.seed, torch.manual_seed, *(task.set_fewshot_seed for task in tasks['tasks'].values())):
                seed(1234)
            with contextlib.redirect_stdout(io.StringIO()):    # lm_eval prints
                results = lm_eval.evaluator.evaluate(lm, tasks, limit=a.limit, bootstrap_iters=1000, log_samples=False)
            rows += [{'unit': unit, 'policy': name, **r, 'seconds': time.time() - start} for r in task_rows(results, lm.tally, c)]
        write_json(out / 'tasks.json', {'lm_eval': lm_eval.__version__, 'torch': torch.__version__, 'ckpt': str(folder), 'run': a.run,
                                        'limit': a.limit, 'seed': a.seed, 'K': c.top_k, 'rows': rows})
    print(task_lines(rows, policies))
    print(f'lm-eval {lm_eval.__version__}; wrote tasks.json in {out}')


# ================================================================ command line

def parse(argv):
    p = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--ckpt', metavar='NAME_OR_FOLDER', help='the base model (default: RUN/base)')
    p.add_argument('--run', metavar='FOLDER', help='a finished run of train.py: its allocator.safetensors')
    p.add_argument('--frontier', metavar='RUN', nargs='?', const='', help='every policy at every budget on the base of RUN or --ckpt')
    p.add_argument('--ablations', metavar='RUN', nargs='?', const='', help='one change of the recipe at a time, few steps')
    p.add_argument('--analysis', metavar='RUN', help='what the allocators of RUN learnt: figures and findings')
    p.add_argument('--tasks', metavar='NAME[,NAME]', help='tasks of lm-evaluation-harness, or paths of its .yaml files; needs pip install lm-eval')
    p.add_argument('--limit', type=int, help='of --tasks: the first so many examples of each task')
    p.add_argument('--shots', type=int, help='of --tasks: examples in the prompt (default: as the task says)')
    p.add_argument('--prompt', help='continue this text instead of timing the model')
    p.add_argument('--quick', action='store_true', help='tiny sizes and few rounds, for tests')
    p.add_argument('--out', help='folder of bench.json and figures (default: the run folder, or out)')
    p.add_argument('--tokens', type=int, default=100, help='how many tokens to generate (default 100)')
    p.add_argument('--policy', help='ada-k (default with --run), top-k (default without), k=2, mix=1.5, top-p=0.4, skip=0.5')
    p.add_argument('--temperature', type=float, default=0.0, help='0: the most probable token (default)')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--device', help='cpu, cuda, .. (default: cuda for --ckpt where there is one, else cpu)')
    p.add_argument('--stream', action='store_true', help='two layers\' weights on the device, the others in host memory or in their files')
    p.add_argument('--show', action='store_true', help='print the text once more, each token coloured by its k')
    a = p.parse_args(argv)
    a.run = a.frontier or a.ablations or a.analysis or a.run
    if any(given is not None for given in (a.prompt, a.tasks, a.frontier, a.ablations)) and not a.ckpt and not a.run:
        raise InputError('give --ckpt NAME_OR_FOLDER, --run FOLDER, or both')
    if a.tokens < 1 or not 0 <= a.temperature < float('inf'):
        raise InputError('--tokens must be 1 or more, --temperature 0 or more')
    a.device = open_device(a.device or (default_device() if a.ckpt else 'cpu'))
    if (a.limit is not None and a.limit < 1) or (a.shots is not None and a.shots < 0):
        raise InputError('--limit must be 1 or more, --shots 0 or more')
    return a


def main(argv=None):
    a = parse(argv)
    join(a.device)
    if ranks()[1] > 1 and (a.analysis or not (a.run or a.ckpt)):
        raise InputError('--analysis and the tables of random weights are for one process: run them without torchrun')
    if a.frontier is not None:
        frontier(a)
    elif a.ablations is not None:
        ablations(a)
    elif a.analysis:
        analysis(a)
    elif a.tasks is not None:
        bench_tasks(a)
    elif a.prompt is not None:
        generation(a)
    elif a.run or a.ckpt:
        bench_run(a)
    else:
        bench(a)


def command_line(argv=None):
    one_line_errors('bench.py', main, argv)


if __name__ == '__main__':
    command_line()
