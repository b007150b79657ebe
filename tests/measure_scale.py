"""Measures what scale/README.md shows: the plan of the published models, and the price of streaming.

    python tests/measure_scale.py FOLDER     half an hour on two cores -> assets/plan.json, assets/stream.json

FOLDER is where a checkpoint with random weights is made. The plan is of the published workload: 10,000
sequences of 2,048 tokens, P-Warm, then PPO with one sampled pass beside the top-k pass. Streaming on a CPU
means reading the files again at every sweep; a checkpoint larger than `ulimit -v` is then trained to the end.
"""
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from base.documents import read_documents, split_documents  # noqa: E402
from base.pretrain import new_model  # noqa: E402
from base.text import learn_bpe, tokenizer_json  # noqa: E402
from hub.checkpoint import CHECKPOINTS, load, save  # noqa: E402
from hub.files import write_json  # noqa: E402
from model import Config  # noqa: E402
from run.report import markdown  # noqa: E402
from run.timing import interleaved  # noqa: E402
from scale.plan import GPUS, plan, plan_table  # noqa: E402
from scale.stream import stream  # noqa: E402

WORKLOAD = train.Settings(paper=True, **train.PAPER, seq=2048, ppo_batch=16, ppo_steps=625, warm_steps=625)
RUN = '--preset', 'smoke', '--seq', '256', '--ppo-batch', '4'


def make(folder):
    """A checkpoint with random weights and a tokenizer of the default text."""
    c = Config(
        dim=1024,
        n_layers=24,
        head_dim=64,
        n_heads=16,
        n_kv_heads=4,
        expert_dim=3584,
        n_experts=8,
        top_k=2,
    )
    save(new_model(c).to(torch.bfloat16), folder)
    merges = learn_bpe(split_documents(read_documents(train.Settings(documents=60)))[0], c.n_vocab - 1)
    write_json(folder / 'tokenizer.json', tokenizer_json(merges))


@torch.no_grad()
def measure_stream(folder):
    large = folder / 'large'
    make(large)
    resident = load(large, torch.bfloat16)
    streamed = stream(large, torch.bfloat16)
    rows = []
    for n in (1, 4):
        tokens = torch.randint(1024, (n, 1024))
        cases = {
            'resident': lambda: resident.hidden(tokens),
            'streamed': lambda: streamed.hidden(tokens),
        }
        rows.append({'tokens': tokens.numel(), **interleaved(cases)})
    limit = int(3.5e9)
    out = folder / 'limited'
    subprocess.run(
        [sys.executable, ROOT / 'train.py', '--stream', '--ckpt', large, '--out', out, *RUN],
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        env={**os.environ, 'MALLOC_ARENA_MAX': '1'},           # every thread's arena would count with 64 MB
    )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6     # kB on Linux
    return {
        'machine': f'CPU, {torch.get_num_threads()} threads',
        'torch': torch.__version__,
        'gb': (large / 'model.safetensors').stat().st_size / 1e9,
        'rows': rows,
        'run': {'limit_gb': limit / 1e9, 'peak_gb': peak},
    }


def plan_lines(r):
    """The block of scale/README.md."""
    return plan_table(r['plans'])


def stream_lines(r):
    """The block of scale/README.md."""
    lines = []
    for row in r['rows']:
        resident = row['resident']['ms']
        streamed = row['streamed']['ms']
        ratio = streamed / resident
        lines.append([f'{row["tokens"]:,}', f'{resident:,.0f}', f'{streamed:,.0f}', f'{ratio:.2f}'])
    run = r['run']
    return (f'{markdown(["tokens in a sweep", "resident ms", "streamed ms", "ratio"], lines)}\n\n'
            f'({r["machine"]}, torch {r["torch"]}; 24 layers of C 1024, F 3584 in bf16; medians.) The same '
            f'{r["gb"]:.1f} GB train to the end under `ulimit -v` of {run["limit_gb"]:.1f} GB, '
            f'with a peak of {run["peak_gb"]:.1f} GB resident.')


if __name__ == '__main__':
    folder = Path(sys.argv[1])
    plans = [plan(replace(WORKLOAD, ckpt=name), GPUS) for name in CHECKPOINTS]
    write_json(ROOT / 'assets/plan.json', {'plans': plans})
    write_json(ROOT / 'assets/stream.json', measure_stream(folder))
