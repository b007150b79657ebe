"""bench.py: is fewer experts less time? And text from a trained model.

    python bench.py                                                    all tables, three minutes on two cores -> out/bench.json
    python bench.py --device cuda                                      the same at the published sizes, bf16
    python bench.py --run out/tiny                                     a trained run on its own held-out text -> out/tiny/bench.json
    python bench.py --run out/tiny --prompt "def main(" --show         text by the trained allocators, coloured by k
    python bench.py --ckpt olmoe-1b-7b --policy k=4 --prompt "Once"    any static k, no training needed

Tables: *dispatch* (every path and transformers' own, where it is installed, on the same weights and ids), *roofline* (its bytes and
FLOPs against what this machine reaches) and *model* (a whole model, Top-K against allocators that run fewer experts, allocator
time included). Every number is a median over rounds in which all candidates run in turn, in one process, on random data; a ratio is
a ratio of medians. Smaller is not always faster: read the spread.
"""
import argparse
import itertools
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import moe_dispatch
from allocator import AdaK, Allocators, Counted, RandomMix, Skip, TopK, TopP, bisect
from model import Config, InputError, Tokenizer, find_checkpoint, generate, generate_steps, read_config, write_json
from train import (OneLineParser, Settings, base_model, load_model, new_model, open_device, open_out, plt, run_settings, save_figure)


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


def bench_run(a):
    """The model of a run, or of --ckpt, on held-out text: Top-K against its allocators (without a run: random ones at 0.7 K)."""
    s = run_settings(a.run) if a.run else Settings(seq=512)
    s.device, s.ckpt = a.device, a.ckpt or s.ckpt
    out = open_out(a.out or a.run or 'out')
    model, _, texts = base_model(s, Path(a.run or out))
    tokens = texts[2].windows(s.seq, max(s.seq, 2048))[0].to(s.device)          # (n,seq)
    policy = AdaK(Allocators.load(Path(a.run) / 'allocator.safetensors', model.config).to(s.device)) if a.run else fewer(model, tokens, 0.7)
    table = model_table(model, tokens, policy, a.tokens, 3 if a.quick else 15)
    print(model_lines(table))
    write_json(out / 'bench.json', {'run': a.run, 'ckpt': a.ckpt, 'torch': torch.__version__, 'model': table})
    model_figure(out / 'model.png', table)
    print(f'wrote bench.json and model.png in {out}')


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


class Watched(Counted):
    """A policy with a tally that also keeps every k of the pass: `k` is a list of (P,), one per layer."""

    def __init__(self, policy, n_layers, device):
        super().__init__(policy, n_layers, device)
        self.k = []

    def __call__(self, layer, x, probs):
        self.k.append(super().__call__(layer, x, probs))
        return self.k[-1]


@torch.no_grad()
def coloured(model, tokenizer, tokens, policy):
    """The text of tokens (1,T), each on a background by the mean k it ran over the layers, and a legend."""
    watched = Watched(policy, len(model.config.moe_layers), tokens.device)
    model.hidden(tokens, watched)
    k = torch.stack(watched.k).float().mean(0)                                  # (T,)
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
    folder = find_checkpoint(a.ckpt) if a.ckpt else Path(a.run) / 'base'
    tokenizer, c = Tokenizer(folder), read_config(folder)
    policy = make_policy(a.policy or ('ada-k' if a.run else 'top-k'), c, a.run, a.device)
    ids = [tokenizer.bos] * (tokenizer.bos is not None) + tokenizer.encode(a.prompt)
    if not ids:
        raise InputError('--prompt: is empty')
    model = load_model(folder, a.device)
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


# ================================================================ command line

def parse(argv):
    p = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--ckpt', metavar='NAME_OR_FOLDER', help='the base model (default: RUN/base)')
    p.add_argument('--run', metavar='FOLDER', help='a finished run of train.py: its allocator.safetensors')
    p.add_argument('--prompt', help='continue this text instead of timing the model')
    p.add_argument('--quick', action='store_true', help='tiny sizes and few rounds, for tests')
    p.add_argument('--out', help='folder of bench.json and figures (default: the run folder, or out)')
    p.add_argument('--tokens', type=int, default=100, help='how many tokens to generate (default 100)')
    p.add_argument('--policy', help='ada-k (default with --run), top-k (default without), k=2, mix=1.5, top-p=0.4, skip=0.5')
    p.add_argument('--temperature', type=float, default=0.0, help='0: the most probable token (default)')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--device', default='cpu')
    p.add_argument('--show', action='store_true', help='print the text once more, each token coloured by its k')
    a = p.parse_args(argv)
    if a.prompt is not None and not a.ckpt and not a.run:
        raise InputError('give --ckpt NAME_OR_FOLDER, --run FOLDER, or both')
    if a.tokens < 1 or not 0 <= a.temperature < float('inf'):
        raise InputError('--tokens must be 1 or more, --temperature 0 or more')
    open_device(a.device)
    return a


def main(argv=None):
    a = parse(argv)
    if a.prompt is not None:
        generation(a)
    elif a.run or a.ckpt:
        bench_run(a)
    else:
        bench(a)


def command_line(argv=None):
    try:
        main(argv)
    except InputError as e:
        print(f'bench.py: {e}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    command_line()
