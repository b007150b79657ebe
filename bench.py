"""bench.py: is fewer experts less time?

    python bench.py                     five minutes on two cores -> out/bench.json
    python bench.py --device cuda       the same at the published sizes, bf16
    python bench.py --run out/deep      a trained run's model and allocators on its own held-out text, C = 64
    python bench.py --ckpt FOLDER       any checkpoint, with random allocators at 0.7 K

First the experts of one layer: every path of moe_dispatch.py on the same weights and choices, at top-k and
with 0.75 K experts a token. Behind each time stands its share of what this machine allows: the FLOPs at its
own matmul rate or the bytes at its own copy rate, whichever takes longer.
Then whole models, ours and transformers' over the same weights in memory, at top-k and with fewer experts:
`prefill` reads a text up to the first new token, `batch 1` and `batch 8` write behind so many short prompts.

Everything is timed in one process, all candidates in turn in every round, on random data with real routing.
A number is the median over the rounds, with the quartiles in brackets; a ratio is a ratio of medians.
"""
import time
from pathlib import Path

import torch

import moe_dispatch
from allocator import Allocators
from base.frozen import base_model
from base.pretrain import new_model
from hub.files import write_json
from model import Config
from run import standins
from run.console import OneLineParser, model_flags, one_line_errors, open_out
from run.evaluate import calibrate
from run.experts_cpu import FEW_TOKENS, moe_few
from run.speed import CHOICES, pairs, speed_table, whole_rows
from run.state import trained_policy
from run.timing import machine, rates
from train import settings_of

# name: C, F, N, K, tokens of a prefill
SHAPES = {
    'cpu': {
        'mixtral-like': (512, 1792, 8, 2, 2048),
        'qwen-like': (512, 352, 60, 4, 2048),
    },
    'cuda': {
        'mixtral-8x7b': (4096, 14336, 8, 2, 4096),
        'qwen1.5-moe': (2048, 1408, 60, 4, 16384),
    },
}
DTYPES = {'cpu': ['float32', 'bfloat16'], 'cuda': ['bfloat16']}
WIDTHS = {'cpu': 768, 'cuda': 4096}               # C of the whole models, and tokens of their prefill


# ================================================================ the experts of one layer

def routed(layer, T, choice):
    """Arguments of moe_dispatch.py:moe for a layer (model.py:MoE): random tokens, routed by its own router.

    choice: 'top-k', K experts for every token, or 'fewer', 1..1.5 K - 1, each as often: 0.75 K in the mean.
    """
    K = layer.weighting.top_k
    k = torch.full((T,), K)
    if choice == 'fewer':
        steps = (torch.arange(T) + 0.5) / T
        k = (steps * (1.5 * K - 1)).ceil().long()
    x = torch.randn(T, layer.router.in_features).to(layer.w_in)             # (T,C)
    k = k.to(x.device)
    probs = layer.router(x).float().softmax(-1)                             # (T,N)
    ids, weights, _ = moe_dispatch.select(probs, k, k.max().item(), layer.weighting)        # (T,width) each
    return x, ids, weights, k, layer.w_in, layer.w_out


def paths_for(x):
    """Everything that computes moe_dispatch.py:moe of so many tokens.

    On a GPU decoding replays moe_static from a CUDA graph; here it is launched kernel by kernel.
    """
    paths = [moe_dispatch.moe_loop, moe_dispatch.moe_exact, moe_dispatch.moe_static]
    if not x.is_cuda and len(x) <= FEW_TOKENS:
        paths.append(moe_few)
    return paths


def limit(x, ids, weights, k, w_in, w_out, matmul, copy):
    """Milliseconds of the FLOPs at `matmul` FLOP/s, or of the bytes at `copy` bytes/s: the longer.

    Bytes: each expert that is hit is read once. Tokens are few beside that.
    """
    hit = ids[weights > 0].unique()
    expert = w_in[0].numel() + w_out[0].numel()
    flops = 2 * expert * k.sum().item()
    n_bytes = expert * len(hit) * x.itemsize
    return 1000 * max(flops / matmul, n_bytes / copy)


@torch.no_grad()
def dispatch_table(device, reached):
    """Of every shape, dtype and number of tokens T, one row per path that runs them through the experts."""
    rows = []
    for shape, (C, width, N, K, prefill) in SHAPES[device.type].items():
        config = Config(n_layers=1, dim=C, expert_dim=width, n_experts=N, top_k=K)
        model = new_model(config)
        for dtype in DTYPES[device.type]:
            layer = model.to(device, getattr(torch, dtype)).layers[0].mlp
            for stage, T in (f'prefill {prefill}', prefill), ('batch 8', 8), ('batch 1', 1):
                batches = {choice: routed(layer, T, choice) for choice in CHOICES}
                x, _, _, k, _, _ = batches['fewer']
                about = {
                    'name': f'{shape}, {dtype}',
                    'stage': stage,
                    'default': moe_dispatch.path_of(T, layer.w_in).__name__,
                    'limit_ms': {
                        choice: limit(*batch, reached[dtype], reached['copy'])
                        for choice, batch in batches.items()
                    },
                    'k_share': k.float().mean().item() / K,
                }
                paths = {path.__name__: path for path in paths_for(x)}
                rows += pairs(about, paths, batches)
    return rows


# ================================================================ whole models

def fewer(model, tokens):
    """Random allocators whose mean k is 0.7 K on these tokens: they cost what trained ones cost."""
    c = model.config
    allocators = Allocators(c, c.top_k, extended=True).to(model.device)
    allocators.weight.data.normal_(0, 0.1)
    # mean k does not depend on the targets, so the tokens stand for them too
    return calibrate(model, (tokens, tokens), allocators.at_price, 0.7 * c.top_k, 9, -9)


def random_models(device):
    """(name, model, tokens (1,T), policy) of Mixtral's proportions, with random weights."""
    width = WIDTHS[device.type]
    config = Config(
        n_vocab=8 * width,
        dim=width,
        n_layers=4,
        n_heads=width // 64,
        n_kv_heads=width // 256,
        head_dim=64,
        n_experts=8,
        top_k=2,
        expert_dim=7 * width // 2,
    )
    for dtype in DTYPES[device.type]:
        model = new_model(config).to(device, getattr(torch, dtype))
        tokens = torch.randint(config.n_vocab, (1, width), device=device)
        yield f"Mixtral's proportions, {dtype}", model, tokens, fewer(model, tokens)


def of_run(a, s):
    """(name, model, tokens (n,T) of held-out text, policy) of a run, or of --ckpt with random allocators."""
    run = Path(a.run or '')
    model, _, texts, digest = base_model(s, run)
    tokens = texts[1].windows(2048)[0].to(s.device)
    policy = trained_policy(run, model.config, digest) if a.run else fewer(model, tokens)
    standins.use(model, policy.fitted)
    return a.run or a.ckpt, model, tokens, policy


# ================================================================ both

def main(argv):
    p = OneLineParser(__doc__)
    p.add_argument('--run', help='a finished run of train.py, and its allocators')
    model_flags(p)
    p.add_argument('--out', help='folder of bench.json (default: RUN, or out)')
    a = p.parse_args(argv)
    s = settings_of(a, seq=512)                                # refuses a run that is not one
    out = open_out(a.out or a.run or 'out', 'bench.json')
    start = time.monotonic()
    torch.manual_seed(0)
    device = torch.device(s.device)
    reached = rates(device)
    dispatch = []
    if a.run or a.ckpt:
        models = [of_run(a, s)]
    else:
        dispatch = dispatch_table(device, reached)
        print(f'{speed_table(dispatch)}\n')
        models = random_models(device)
    whole = []
    for model in models:
        whole += whole_rows(*model)
    print(speed_table(whole))
    write_json(out / 'bench.json', {
        'machine': machine(device),
        'torch': torch.__version__,
        'reached': reached,
        'seconds': time.monotonic() - start,
        'dispatch': dispatch,
        'beside': whole,
    })


if __name__ == '__main__':
    one_line_errors('bench.py', main)
