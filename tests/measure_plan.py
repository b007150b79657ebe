"""The table of `python -m scale.plan` for the six published models, and its prediction against measured runs
of two synthetic ones.

    python tests/measure_plan.py        ten minutes on two cores -> assets/plan.json

The workload is the published one: 10,000 sequences of 2,048 tokens, P-Warm and then PPO with one sampled pass
beside the Top-K pass. What the paper trained with 64 sequences a step is taken as 16, so that a rollout's
states fit one GPU.
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
import train  # noqa: E402
from measure_stream import make  # noqa: E402
from hub.config import to_hf  # noqa: E402
from hub.files import write_json  # noqa: E402
from model import Config  # noqa: E402
from test_published import HUB  # noqa: E402
from run.report import markdown  # noqa: E402
from scale.plan import plan, published_rates  # noqa: E402

PUBLISHED = train.Settings(paper=True, **train.PAPER, seq=2048, ppo_batch=16, ppo_steps=625, warm_steps=625)
# training hours times GPUs (8, for the largest 16 A800), as published
HOURS = {
    'mixtral-8x22b': 7.92 * 16,
    'mixtral-8x7b': 4.96 * 8,
    'qwen1.5-moe': 1.58 * 8,
    'deepseek-moe-16b': 1.79 * 8,
}
SIZES = {
    '1024 x 3584, 8 experts, top-2': dict(
        dim=1024, head_dim=64, n_heads=16, n_kv_heads=4, expert_dim=3584, n_layers=3, n_experts=8, top_k=2
    ),
    '512 x 1024, 16 experts, top-4': dict(
        dim=512, head_dim=64, n_heads=8, n_kv_heads=2, expert_dim=1024, n_layers=6, n_experts=16, top_k=4
    ),
}
RUN = dict(preset='smoke', seq=256, ppo_batch=4, ppo_steps=12)


def published(folder):
    """One plan per published model, from its config.json alone."""
    plans = []
    for name, hub in HUB.items():
        (folder / name).mkdir()
        write_json(folder / name / 'config.json', {**hub, 'torch_dtype': 'bfloat16'})
        plans.append(
            {
                **plan(replace(PUBLISHED, ckpt=str(folder / name)), published_rates()),
                'ckpt': name,
                'published_hours': HOURS.get(name),
            }
        )
    return plans


def predicted(folder):
    """[{size, predicted and measured seconds}]: a run with a checkpoint that is in memory."""
    rows = []
    for name, sizes in SIZES.items():
        ckpt = folder / f'{len(rows)}'
        ckpt.mkdir()
        make(ckpt, Config(**sizes, n_vocab=1024))
        write_json(ckpt / 'config.json', {**to_hf(Config(**sizes, n_vocab=1024)), 'torch_dtype': 'float32'})
        args = [
            f'--{key.replace("_", "-")}={value}'
            for key, value in {**RUN, 'ckpt': ckpt, 'out': folder / 'run'}.items()
        ]
        p = plan(train.parse(args))
        hours = p['machines'][0]['hours']['plain']
        train.main(args)
        seconds = json.loads((folder / 'run' / 'results.json').read_text())['seconds']
        rows.append({'size': name, 'tflops': p['machines'][0]['flops'] / 1e12, 'predicted': 3600 * hours,
                     'measured': seconds['warm'] + seconds['ppo'] + seconds['evaluation']})
        print(rows[-1], flush=True)
    return rows


def table(r):
    gb = lambda n: f'{n / 1e9:.3g}'
    of = lambda p, machine: next(m for m in p['machines'] if m['machine'] == machine)
    hours = lambda h: 'does not fit' if h is None else f'{h:.2g}'
    return markdown(
        [
            'model',
            'weights GB (a layer)',
            'allocators',
            'GB on the GPU: plain / `--stream` / each of 8',
            'compute-bound from so many tokens: A800 / H100',
            'A800-hours, `--stream`',
            'H100-hours, `--stream`',
            'published A800-hours',
        ],
        [
            [
                p['ckpt'],
                f'{gb(p["bytes"])} ({gb(p["layer_bytes"])})',
                f'{p["allocators"] / 1e6:.2f}M',
                ' / '.join(gb(p['memory'][how][0]) for how in ('plain', 'stream', 'shard')),
                f'{of(p, "A800-80GB")["compute_bound"]:,.0f} / {of(p, "H100-80GB")["compute_bound"]:,.0f}',
                hours(of(p, 'A800-80GB')['hours']['stream']),
                hours(of(p, 'H100-80GB')['hours']['stream']),
                f'{p["published_hours"]:.0f}' if p['published_hours'] else '',
            ]
            for p in r['plans']
        ],
    )


if __name__ == '__main__':
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        results = {
            'threads': torch.get_num_threads(),
            'torch': torch.__version__,
            'plans': published(Path(temporary)),
            'runs': predicted(Path(temporary)),
        }
    write_json(ROOT / 'assets/plan.json', results)
    print(table(results))
