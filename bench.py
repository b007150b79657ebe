"""bench.py: is fewer experts less time?

    python bench.py                     all tables, three minutes on two cores -> out/bench.json
    python bench.py --device cuda       the same at the published sizes, bf16
    python bench.py --run out/deep      a trained run on its own held-out text -> out/deep/bench.json
    python bench.py --ckpt FOLDER       any checkpoint, with random allocators at 0.7 K

Tables: *dispatch* (every path and transformers' own, where it is installed, on the same weights and ids),
*roofline* (its bytes and FLOPs against what this machine reaches), *model* (a whole model, Top-K against
allocators that run fewer experts, allocator time included) and *beside* (whole models beside transformers').
Every number is a median over rounds in which all candidates run in turn, in one process, on random data; a
ratio is a ratio of medians. Smaller is not always faster: read the spread.
"""
import itertools
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import moe_dispatch
from allocator import AdaK, Allocators, Counted, TopK, bisect
from base.frozen import base_model
from base.pretrain import new_model
from hub.files import InputError, write_json
from model import Config, generate
from run.beside import beside, beside_lines, transformers_experts
from run.console import OneLineParser, model_flags, one_line_errors, open_model_flags, open_out
from run.ranks import ranks
from run.speed import (claims, dispatch_figure, milliseconds, model_figure, model_lines, roofline,
                       roofline_figure)
from run.timing import graphed, interleaved, rates, summary, synchronize
from train import Settings, settings_of


# ================================================================ table 1: dispatch

# how often k = 1, 2, .. in the variable case: mean 0.75 K, spread as trained allocators have it
SPREAD_2 = .58, .36, .04, .02
SPREAD_4 = .07, .19, .44, .27, .03
# name: C, F, N, K, T of prefill, spread, and how uneven the experts' loads are: the spread of a constant of
# theirs beside router logits of spread 1. The last of CUDA is half a Mixtral, one of two GPUs' share
SHAPES = {
    'cpu': {'mixtral-like': (512, 1792, 8, 2, 2048, SPREAD_2, 0),
            'qwen-like': (512, 352, 60, 4, 2048, SPREAD_4, 0),
            'qwen-like, uneven': (512, 352, 60, 4, 2048, SPREAD_4, 0.5)},
    'cuda': {'mixtral-8x7b': (4096, 14336, 8, 2, 4096, SPREAD_2, 0),
             'qwen1.5-moe': (2048, 1408, 60, 4, 16384, SPREAD_4, 0),
             'mixtral-8x7b/2': (4096, 7168, 8, 2, 1536, SPREAD_2, 0)},
    'quick': {'quick': (64, 32, 8, 2, 64, SPREAD_2, 0)}}
DTYPES = {'cpu': (torch.float32, torch.bfloat16), 'cuda': (torch.bfloat16,)}
DECODE = {'cpu': (8, 1), 'cuda': (64, 8, 1)}        # tokens of a step


class Experts:
    """Random experts of one layer and a random router: real routing on random tokens."""

    def __init__(self, shape, dtype, device):
        self.C, self.F, self.N, self.K, self.T, self.spread, uneven = shape
        self.device, self.dtype = device, dtype

        def make(*size):
            return (torch.randn(*size, device=device) * size[-1] ** -0.5).to(dtype)
        self.router, self.favour = make(self.N, self.C), uneven * torch.randn(self.N, device=device)
        self.w_in, self.w_out = make(self.N, 2 * self.F, self.C), make(self.N, self.C, self.F)

    def tokens(self, T, variable):
        """x (T,C), ids and weights (T,k_max), k (T,): everyone K, or k drawn from the spread."""
        x = torch.randn(T, self.C, device=self.device).to(self.dtype)
        probs = F.softmax((x @ self.router.T).float() + self.favour, -1)    # (T,N)
        share = self.spread if variable else [0] * (self.K - 1) + [1]
        share = torch.tensor(share, device=self.device, dtype=torch.float)  # (k_max,)
        # drawn without luck: each k as often as its share says
        steps = (torch.arange(T, device=self.device) + 0.5) / T
        k = 1 + torch.searchsorted(share.cumsum(0), steps).clamp_max(len(share) - 1)
        k = k[torch.randperm(T, device=self.device)]
        return x, *moe_dispatch.select(probs, k, len(share), True), k


def dense_pair(e, rows):
    """The same FLOPs as one batched matmul pair without any routing: rows/N tokens for every expert."""
    x = torch.randn(e.N, max(1, rows // e.N), e.C, device=e.device).to(e.dtype)

    def run():
        gate, up = torch.bmm(x, e.w_in.mT).chunk(2, -1)
        return torch.bmm(F.silu(gate).mul_(up), e.w_out.mT)
    return run


def dispatch_cases(e, T, variable):
    """{name: callable} for T tokens, and the plan's numbers of rows and of experts hit."""
    x, ids, weights, k = e.tokens(T, variable)
    args = x, ids, weights, k, e.w_in, e.w_out
    rows = k.sum().item()
    hit = len(ids[moe_dispatch.used(k, ids.shape[1])].unique())
    cases = {'loop': lambda: moe_dispatch.moe_loop(*args), 'exact': lambda: moe_dispatch.moe_exact(*args),
             'static': lambda: moe_dispatch.moe_static(*args), 'dense pair': dense_pair(e, rows)}
    if not x.is_cuda and T <= moe_dispatch.FEW_TOKENS:
        cases['few'] = lambda: moe_dispatch.moe_few(*args)
    if moe_dispatch.native(x) and T <= moe_dispatch.STATIC_TOKENS:
        cases['static in a graph'] = graphed(cases['static'])
    copies = T * e.K * e.w_in[0].numel() * e.w_in.element_size()    # batched_mm copies every choice's weights
    for name, module in ({} if variable else transformers_experts(e)).items():          # it has no variable k
        if 'batched' not in name or copies < 2e9:
            cases[name] = lambda module=module: module(x, ids, weights.to(x.dtype))
    return cases, rows, hit


def backward_cases(e, T, variable):
    """Forward plus backward with gradients of x and all experts, in the form of `dispatch_cases`."""
    x, ids, weights, k = e.tokens(T, variable)
    leaves = [t.detach().clone().requires_grad_() for t in (x, e.w_in, e.w_out)]
    direction = torch.randn_like(x)

    def ours(path):
        return lambda: torch.autograd.grad(path(leaves[0], ids, weights, k, *leaves[1:]), leaves, direction)

    def theirs(module):
        module.gate_up_proj, module.down_proj = (nn.Parameter(w) for w in (e.w_in, e.w_out))
        learnt = [leaves[0], module.gate_up_proj, module.down_proj]
        return lambda: torch.autograd.grad(module(learnt[0], ids, weights.to(x.dtype)), learnt, direction)
    cases = {'exact': ours(moe_dispatch.moe_exact)}
    few = e.N <= 16                                    # indexing one of 60 experts makes a gradient of all 60
    if few:
        cases['loop'] = ours(moe_dispatch.moe_loop)
    for name, module in ({} if variable else transformers_experts(e)).items():
        if 'batched' not in name and (few or 'eager' not in name):
            cases[name] = theirs(module)
    return cases, k.sum().item(), None


def dispatch_table(shapes, device, rounds, reached):
    """One dict per shape, dtype, stage, path and plan, with the share of the machine's limit if counted."""
    table = []
    for (shape_name, shape), dtype in itertools.product(shapes.items(), DTYPES[device.type]):
        e = Experts(shape, dtype, device)
        stages = [('prefill', e.T, rounds), *(('decode', T, 3 * rounds) for T in DECODE[device.type]),
                  ('forward + backward', e.T // 2, (rounds + 1) // 2)]
        for stage, T, n in stages:
            learn = stage == 'forward + backward'
            with torch.set_grad_enabled(learn):
                make = backward_cases if learn else dispatch_cases
                plans = {variable: make(e, T, variable) for variable in (False, True)}
                # Top-K and variable k in the same rounds, so that their ratio means something
                cases = {(variable, name): run
                         for variable, (runs, _, _) in plans.items() for name, run in runs.items()}
                times = interleaved(cases, n, device)
            with torch.set_grad_enabled(learn):
                default = moe_dispatch.path_of(T, e.w_in).__name__.removeprefix('moe_')
            default += ' in a graph' * (default == 'static')
            for (variable, name), t in times.items():
                _, n_rows, hit = plans[variable]
                row = {'shape': shape_name, 'C': e.C, 'F': e.F, 'N': e.N, 'K': e.K,
                       'dtype': str(dtype).removeprefix('torch.'), 'stage': stage, 'T': T,
                       'variable': variable, 'mean_k': n_rows / T, 'path': name, 'default': name == default,
                       **summary(t)}
                if not learn:
                    row.update(limit(e, T, n_rows, hit, row, reached))
                table.append(row)
    return table


def limit(e, T, n_rows, hit, row, reached):
    """FLOPs and bytes of a case (the experts hit once, each row in and out), and the machine's limit."""
    work = 6 * e.C * e.F * n_rows
    moved = (hit * 3 * e.C * e.F + n_rows * (2 * e.C + 3 * e.F) + 2 * T * e.C) * e.dtype.itemsize
    compute, copy = work / reached[row['dtype']], moved / reached['copy']
    limit_ms = 1000 * max(compute, copy)
    return {'flops': work, 'bytes': moved, 'bound': 'compute' if compute > copy else 'memory',
            'limit_ms': limit_ms,
            'of_limit': limit_ms / row['ms']}


# ================================================================ table 2: a whole model

def shares(model, tokens, policy, device):
    """Share of a forward pass's time by part; the rest is norms, embedding, selection and Python."""
    seconds, undo = {}, []

    def timed(part, function):
        def run(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize(device)
            seconds[part] = seconds.get(part, 0) + time.perf_counter() - start
            return result
        return run

    def replace(owner, name, part):
        undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, timed(part, getattr(owner, name)))
    for layer in model.layers:
        replace(layer.self_attn, 'forward', 'attention')
        if not layer.dense:
            replace(layer.mlp.router, 'forward', 'router')
    replace(model.lm_head, 'forward', 'head')
    replace(moe_dispatch, 'moe', 'experts')
    allocate, whole = timed('allocator', policy), timed('all', model)
    allocate.k_max = policy.k_max
    for i in range(4):
        if i == 1:
            seconds.clear()                                    # the first pass warms up
        whole(tokens, allocate)
    for owner, name, old in reversed(undo):
        setattr(owner, name, old)
    total = seconds.pop('all')
    parts = {part: spent / total for part, spent in seconds.items()}
    return {**parts, 'rest': 1 - sum(parts.values())}


@torch.no_grad()
def fewer(model, tokens, share):
    """Random allocators whose mean k is `share` of K on these tokens: they cost what trained ones cost."""
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
    """Tokens per second of a prefill of tokens (B,T) and of decoding behind its first 16: Top-K and `policy`.

    Decoding samples at temperature 1: the most probable token of random weights is soon the same token for
    ever.
    """
    c, device, prompt = model.config, model.device, tokens[:1, :16]

    def decode(policy):
        return generate(model, prompt, n_new, policy, 1.0, torch.Generator(device).manual_seed(0))
    policies = {'top-k': None, 'ada-k': policy}
    cases = {
        'prefill': {name: lambda p=p: model(tokens, p) for name, p in policies.items()},
        'decode': {name: lambda p=p: decode(p) for name, p in policies.items()}}
    times = {stage: interleaved(runs, rounds, device) for stage, runs in cases.items()}
    rows = []
    for name, p in policies.items():
        p = p or TopK(c.top_k)
        tallies = {stage: Counted(p, len(c.moe_layers), device) for stage in times}
        model.hidden(tokens, tallies['prefill'])
        decode(tallies['decode'])
        row = {'policy': name, 'share_of_prefill': shares(model, tokens, p, device)}
        for stage, n in (('prefill', tokens.numel()), ('decode', n_new)):
            t = times[stage][name]
            row.update({f'{stage}_mean_k': tallies[stage].mean(), stage: summary(t),
                        f'{stage}_tokens_per_s': n / statistics.median(t)})
        rows.append(row)
    return {'C': c.dim, 'F': c.expert_dim, 'N': c.n_experts, 'K': c.top_k, 'layers': c.n_layers,
            'V': c.n_vocab, 'B': tokens.shape[0], 'T': tokens.shape[1], 'new': n_new,
            'dtype': str(model.dtype).removeprefix('torch.'),
            'rows': rows}


# ================================================================ the two benches

def random_model(device, quick):
    """A model of Mixtral's proportions with random weights, and tokens (1,T) to read."""
    on_gpu = device.type == 'cuda'
    sizes, T = dict(dim=1024, head_dim=64, expert_dim=3584, n_vocab=8192), 1024
    if on_gpu:
        sizes, T = dict(dim=4096, head_dim=128, expert_dim=14336, n_vocab=32000), 4096
    if quick:
        sizes, T = dict(dim=64, head_dim=16, expert_dim=32, n_vocab=64), 64
    n_heads = sizes['dim'] // sizes['head_dim']
    config = Config(**sizes, n_layers=4, n_heads=n_heads, n_kv_heads=4, n_experts=8, top_k=2)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = new_model(config, 0).to(dtype).to(device).requires_grad_(False)
    return model, torch.randint(config.n_vocab, (1, T), device=device)


def whole_models(device, quick):
    """(name, model, tokens (1,T)) of each model that is timed beside transformers."""
    model, tokens = random_model(device, quick)
    name = 'Mixtral\'s proportions'
    if device.type == 'cpu':
        yield name, model.float(), tokens
    yield name, model.bfloat16(), tokens
    s = Settings()
    names = 'n_vocab', 'dim', 'n_layers', 'n_heads', 'n_kv_heads', 'n_experts', 'top_k', 'expert_dim'
    config = Config(head_dim=s.dim // s.n_heads, **{name: getattr(s, name) for name in names})
    model = new_model(config, 0).to(device).requires_grad_(False)
    yield 'the default base\'s size', model, torch.randint(config.n_vocab, tokens.shape, device=device)


def bench_machine(a):
    """All tables on random weights, printed and written to OUT/bench.json with three figures."""
    device, start = torch.device(a.device), time.time()
    torch.manual_seed(a.seed)
    out = open_out(a.out or 'out', 'bench.json')
    name = f'{platform.machine()} CPU, {torch.get_num_threads()} threads'
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    reached = rates(device)
    print(f'{name}, torch {torch.__version__}: copy {reached["copy"] / 1e9:.0f} GB/s, matmul '
          f'{reached["float32"] / 1e12:.2f} TFLOP/s in float32, {reached["bfloat16"] / 1e12:.2f} in bfloat16',
          flush=True)
    rows = dispatch_table(SHAPES['quick' if a.quick else device.type], device, 3 if a.quick else 9, reached)
    print(milliseconds(rows), roofline(rows), claims(rows), sep='\n\n', flush=True)
    model, tokens = random_model(device, a.quick)
    table = model_table(model, tokens, fewer(model, tokens, 0.7), 8 if a.quick else 32, 3)
    print(f'\n{model_lines(table)}', flush=True)
    whole = []
    for what, model, tokens in whole_models(device, a.quick):
        new = 4 if a.quick else 16
        whole += beside(model, tokens, fewer(model, tokens, 0.7), new, 3, what)
    print(f'\n{beside_lines(whole)}', flush=True)
    write_json(out / 'bench.json', {'machine': name, 'torch': torch.__version__, 'reached': reached,
                                    'seed': a.seed,
                                    'seconds': time.time() - start, 'dispatch': rows, 'model': table,
                                    'beside': whole})
    dispatch_figure(out / 'dispatch.png', rows, name)
    roofline_figure(out / 'roofline.png', rows, reached)
    model_figure(out / 'model.png', table)
    print(f'{time.time() - start:.0f} s; wrote bench.json, dispatch.png, roofline.png and model.png in {out}')


def bench_run(a):
    """A run's model, or --ckpt's, on held-out text: Top-K against its allocators, or random ones at 0.7 K."""
    s = settings_of(a, seq=512)
    out = open_out(a.out or a.run or f'out/{Path(a.ckpt).name}', 'bench.json')
    model, _, texts = base_model(s, Path(a.run or out))
    tokens = texts[2].windows(s.seq, max(s.seq, 2048))[0].to(s.device)      # (n,seq)
    if a.run:
        policy = AdaK.of_run(a.run, model.config, s.device)
    else:
        policy = fewer(model, tokens, 0.7)
    table = model_table(model, tokens, policy, 8 if a.quick else 100, 3 if a.quick else 15)
    print(model_lines(table))
    write_json(out / 'bench.json', {'run': a.run, 'ckpt': a.ckpt, 'torch': torch.__version__, 'model': table})
    model_figure(out / 'model.png', table)
    print(f'wrote bench.json and model.png in {out}')


# ================================================================ command line

MOVED = {'--frontier': 'python -m study.frontier RUN', '--ablations': 'python -m study.ablations RUN',
         '--analysis': 'python -m study.analysis RUN', '--tasks': 'python -m study.tasks NAME,.. --run RUN',
         '--prompt': 'python -m study.sample --run RUN --prompt TEXT'}


def main(argv=None):
    p = OneLineParser(__doc__, MOVED)
    p.add_argument('--run', help='a finished run of train.py, and its allocators')
    model_flags(p)
    p.add_argument('--quick', action='store_true', help='tiny sizes and few rounds, for tests')
    p.add_argument('--out', help='folder of bench.json and figures (default: RUN, or out)')
    p.add_argument('--seed', type=int, default=0, help='of random weights and tokens (default 0)')
    a = p.parse_args(argv)
    open_model_flags(a)
    if a.run or a.ckpt:
        return bench_run(a)
    if ranks()[1] > 1:
        raise InputError('the tables of random weights are for one process: run them without torchrun')
    bench_machine(a)


if __name__ == '__main__':
    one_line_errors('bench.py', main)
