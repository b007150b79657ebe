"""bench.py: is fewer experts less time? And text from a trained model.

    python bench.py                                                    all tables, a few minutes on two cores -> out/bench.json
    python bench.py --device cuda                                      the same at the published sizes, bf16
    python bench.py --run out/tiny --prompt "def main(" --show         text by the trained allocators, coloured by k
    python bench.py --ckpt olmoe-1b-7b --policy k=4 --prompt "Once"    any static k, no training needed

Tables: *dispatch* (every path and transformers' own, where it is installed, on the same weights and ids), *model* (a whole model, Top-K
against allocators that run 30% fewer experts, allocator time included) and *roofline* (bytes and FLOPs against what this machine reaches).
Every number is a median over rounds in which all candidates run in turn, in one process, on random data; a ratio is a ratio of
medians. Smaller is not always faster: read the spread.
"""
import argparse
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
from train import OneLineParser, load_model, new_model, open_device, open_out


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

# name: C, F, N, K, T of prefill, and how often k = 1, 2, .. in the variable case (mean 0.75 K, spread as trained allocators have it)
SPREAD_2 = .58, .36, .04, .02
SPREAD_4 = .07, .19, .44, .27, .03
SHAPES = {
    'cpu': {'mixtral-like': (512, 1792, 8, 2, 2048, SPREAD_2), 'qwen-like': (512, 352, 60, 4, 2048, SPREAD_4)},
    'cuda': {'mixtral-8x7b': (4096, 14336, 8, 2, 4096, SPREAD_2), 'qwen1.5-moe': (2048, 1408, 60, 4, 16384, SPREAD_4)},
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


def dispatch_cases(e, T, variable):
    """{name: callable} for T tokens, and the plan's numbers of rows and of experts hit."""
    x, ids, weights, k = e.tokens(T, variable)
    args = x, ids, weights, k, e.w_in, e.w_out
    rows = k.sum().item()
    used = torch.arange(ids.shape[1], device=e.device) < k[:, None]
    cases = {'loop': lambda: moe_dispatch.moe_loop(*args), 'exact': lambda: moe_dispatch.moe_exact(*args),
             'static': lambda: moe_dispatch.moe_static(*args), 'dense pair': dense_pair(e, rows)}
    if not variable:                                           # transformers has no variable k
        for name, module in transformers_experts(e).items():
            if 'batched' not in name or T * e.K * e.w_in[0].numel() * e.w_in.element_size() < 2e9:      # it copies the weights of every choice
                cases[name] = lambda module=module: module(x, ids, weights.to(x.dtype))
    return cases, rows, len(ids[used].unique())


def backward_cases(e, T, variable):
    """Forward plus backward with gradients of x and all experts."""
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
    return cases


def dispatch_table(shapes, device, rounds, reached):
    rows = []
    for shape_name, shape in shapes.items():
        for dtype in (torch.float32, torch.bfloat16):
            e = Experts(shape, dtype, device)
            for stage, T in (('prefill', e.T), ('decode', 8), ('decode', 1), ('forward + backward', e.T // 2)):
                plans = {}
                for variable in (False, True):
                    if stage == 'forward + backward':
                        plans[variable] = backward_cases(e, T, variable), None, None
                    else:
                        with torch.no_grad():
                            plans[variable] = dispatch_cases(e, T, variable)
                # Top-K and variable k in the same rounds, so that their ratio means something
                cases = {(variable, name): run for variable, plan in plans.items() for name, run in plan[0].items()}
                with torch.set_grad_enabled(stage == 'forward + backward'):
                    times = interleaved(cases, rounds if stage == 'prefill' else 3 * rounds if stage == 'decode' else (rounds + 1) // 2, device)
                for (variable, name), t in times.items():
                    row = {'shape': shape_name, 'C': e.C, 'F': e.F, 'N': e.N, 'K': e.K, 'dtype': str(dtype).removeprefix('torch.'),
                           'stage': stage, 'T': T, 'mean_k': 0.75 * e.K if variable else e.K, 'path': name, **summary(t)}
                    _, n_rows, hit = plans[variable]
                    if n_rows:                                 # bytes: the experts hit once, and each row in and out
                        row['flops'] = 6 * e.C * e.F * n_rows
                        row['bytes'] = (hit * 3 * e.C * e.F + n_rows * (2 * e.C + 3 * e.F) + 2 * T * e.C) * dtype.itemsize
                        limit = max(row['flops'] / reached[row['dtype']], row['bytes'] / reached['copy'])
                        row['of_limit'] = limit / (row['ms'] / 1000)
                    rows.append(row)
    return rows


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


def fewer(model, tokens, share):
    """Random allocators whose mean k is `share` of K on these tokens: the cost of deciding is that of trained ones."""
    c = model.config
    allocators = Allocators(c, min(2 * c.top_k, c.n_experts), True).to(model.device)
    allocators.weight.data.normal_(0, 0.1)
    allocators.bias.data.copy_(-(torch.arange(1, allocators.k_max + 1) - share * c.top_k) ** 2)

    def mean_k(price):
        tally = Counted(AdaK(allocators, price=price), len(c.moe_layers))
        model.hidden(tokens, tally)
        return tally.mean()
    return AdaK(allocators, price=bisect(mean_k, share * c.top_k, 9, -9)), mean_k


@torch.no_grad()
def model_table(config, device, dtype, T, n_new, rounds):
    """Prefill and generated tokens per second of Top-K and of 30% fewer experts on the same random weights."""
    torch.manual_seed(0)
    model = new_model(config, 0).to(dtype).to(device).requires_grad_(False)
    tokens = torch.randint(config.n_vocab, (1, T), device=device)
    ada, mean_k = fewer(model, tokens, 0.7)
    policies = {'top-k': None, 'ada-k': ada}
    prefill = interleaved({name: lambda p=p: model(tokens, p) for name, p in policies.items()}, rounds, device)
    prompt = tokens[:, :16]
    decode = interleaved({name: lambda p=p: generate(model, prompt, n_new, p) for name, p in policies.items()}, rounds, device)
    rows = []
    for name, policy in policies.items():
        tally = Counted(policy or TopK(config.top_k), config.n_layers)
        generate(model, prompt, n_new, tally)
        rows.append({'policy': name, 'prefill_mean_k': mean_k(ada.shift[0].item()) if policy else config.top_k,
                     'decode_mean_k': tally.mean(), 'prefill_tokens_per_s': T / statistics.median(prefill[name]),
                     'decode_tokens_per_s': n_new / statistics.median(decode[name]),
                     'prefill': summary(prefill[name]), 'decode': summary(decode[name]),
                     'share_of_prefill': shares(model, tokens, policy or TopK(config.top_k), device)})
    return {'C': config.dim, 'F': config.expert_dim, 'N': config.n_experts, 'K': config.top_k, 'layers': config.n_layers,
            'V': config.n_vocab, 'T': T, 'new': n_new, 'dtype': str(dtype).removeprefix('torch.'), 'rows': rows}


# ================================================================ printing

def ratios(rows):
    """The dispatch table as Markdown: milliseconds with quartiles, and ratios to the best of transformers at top-K."""
    lines = ['| shape | dtype | stage | T | path | top-K ms | 0.75 K ms | own ratio | top-K / best peer | 0.75 K / best peer | of limit |',
             '|---|---|---|---|---|---|---|---|---|---|---|']
    key = lambda r: (r['shape'], r['dtype'], r['stage'], r['T'])
    for group in dict.fromkeys(map(key, rows)):
        top = {r['path']: r for r in rows if key(r) == group and r['mean_k'] == r['K']}
        less = {r['path']: r for r in rows if key(r) == group and r['mean_k'] != r['K']}
        peers = [r['ms'] for path, r in top.items() if path.startswith('transformers')]
        best = min(peers, default=None)
        for path, r in top.items():
            ms = lambda r: f'{r["ms"]:.2f} ({r["low"]:.2f}-{r["high"]:.2f})'
            over = lambda r: f'{r["ms"] / best:.2f}' if best else ''
            other = less.get(path)
            limit = f'{r["of_limit"]:.0%}' if 'of_limit' in r else ''
            lines.append(f'| {group[0]} | {group[1]} | {group[2]} | {group[3]} | {path} | {ms(r)} | {ms(other) if other else ""} | '
                         f'{other["ms"] / r["ms"] if other else float("nan"):.2f} | {over(r)} | {over(other) if other else ""} | {limit} |')
    return '\n'.join(lines).replace('| nan |', '|  |')


def model_lines(table):
    """The model table as Markdown, with the speed-up of the second row over the first."""
    lines = ['| policy | mean k in prefill, decode | prefill tokens/s | decode tokens/s | attention | router | allocator | experts | head | rest |',
             '|---|---|---|---|---|---|---|---|---|---|']
    top = table['rows'][0]
    for r in table['rows']:
        part = lambda name: f'{r["share_of_prefill"].get(name, 0):.1%}'
        speed = lambda name: f'{r[name]:.1f} ({r[name] / top[name]:.2f}x)'
        lines.append(f'| {r["policy"]} | {r["prefill_mean_k"]:.2f}, {r["decode_mean_k"]:.2f} | {speed("prefill_tokens_per_s")} | '
                     f'{speed("decode_tokens_per_s")} | ' + ' | '.join(map(part, ('attention', 'router', 'allocator', 'experts', 'head', 'rest'))) + ' |')
    return '\n'.join(lines)


def bench(a):
    """All tables, printed and written to OUT/bench.json."""
    device, start = torch.device(a.device), time.time()
    torch.manual_seed(a.seed)
    out = open_out(a.out)
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{platform.machine()} CPU, {torch.get_num_threads()} threads'
    reached = machine(device)
    print(f'{name}, torch {torch.__version__}: copy {reached["copy"] / 1e9:.0f} GB/s, matmul {reached["float32"] / 1e12:.2f} TFLOP/s in '
          f'float32, {reached["bfloat16"] / 1e12:.2f} in bfloat16', flush=True)
    rounds = 3 if a.quick else 9
    rows = dispatch_table(SHAPES['quick' if a.quick else device.type], device, rounds, reached)
    print(ratios(rows), flush=True)
    sizes = dict(dim=64, head_dim=16, expert_dim=32, n_vocab=64) if a.quick else dict(dim=1024, head_dim=64, expert_dim=3584, n_vocab=8192)
    if device.type == 'cuda' and not a.quick:
        sizes = dict(dim=4096, head_dim=128, expert_dim=14336, n_vocab=32000)
    config = Config(**sizes, n_layers=4, n_heads=sizes['dim'] // sizes['head_dim'], n_kv_heads=4, n_experts=8, top_k=2)
    model = model_table(config, device, torch.bfloat16 if device.type == 'cuda' else torch.float32, 64 if a.quick else 512,
                        8 if a.quick else 32, rounds)
    print(model_lines(model))
    write_json(out / 'bench.json', {'machine': name, 'torch': torch.__version__, 'reached': reached, 'seed': a.seed,
                                    'seconds': time.time() - start, 'dispatch': rows, 'model': model})
    print(f'{time.time() - start:.0f} s; wrote {out / "bench.json"}')


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

    def __init__(self, policy, n_layers):
        super().__init__(policy, n_layers)
        self.k = []

    def __call__(self, layer, x, probs):
        self.k.append(super().__call__(layer, x, probs))
        return self.k[-1]


@torch.no_grad()
def coloured(model, tokenizer, tokens, policy):
    """The text of tokens (1,T), each on a background by the mean k it ran over the layers, and a legend."""
    watched = Watched(policy, len(model.config.moe_layers))
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
    tally = Counted(policy, len(c.moe_layers))
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
    p.add_argument('--prompt', help='continue this text instead of timing')
    p.add_argument('--quick', action='store_true', help='tiny sizes and few rounds, for tests')
    p.add_argument('--out', default='out', help='folder of bench.json (default out)')
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
    generation(a) if a.prompt is not None else bench(a)


def command_line(argv=None):
    try:
        main(argv)
    except InputError as e:
        print(f'bench.py: {e}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    command_line()
