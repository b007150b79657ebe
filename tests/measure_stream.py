"""Measures streaming: a stack of layers streamed against the same layers resident, and training a checkpoint
larger than the memory limit.

    python tests/measure_stream.py FOLDER                  ten minutes on two cores -> assets/stream.json
    python tests/measure_stream.py FOLDER --limit 3.5      only the training under that limit in GB
    python tests/measure_stream.py FOLDER --device cuda    -> assets/stream-cuda.json

On a GPU the layers are Mixtral-8x7B's (goal: within 1.15 at 65,536 tokens); on a CPU they are a quarter as
wide, and streaming means reading the files again at every visit. The training runs in a process of its own
under `ulimit -v`, in bf16.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from base.documents import read_documents, split_documents  # noqa: E402
from base.text import learn_bpe, tokenizer_json  # noqa: E402
from hub.checkpoint import hub_tensors, load  # noqa: E402
from hub.config import to_hf  # noqa: E402
from hub.files import read_json, write_json  # noqa: E402
from hub.safetensors import write_safetensors  # noqa: E402
from hub.tokenizer import Tokenizer  # noqa: E402
from model import Config, Transformer  # noqa: E402
from run.report import markdown  # noqa: E402
from run.timing import interleaved, summary  # noqa: E402
from scale.stream import stream  # noqa: E402

TRAIN = ['--seq', '128', '--ppo-batch', '4', '--ppo-steps', '4', '--preset', 'smoke']


def make(folder, config):
    """A checkpoint with random weights in bf16, one file per layer, and a tokenizer of the default text."""
    with torch.device('meta'):
        shapes = {name: t.shape for name, t in hub_tensors(Transformer(config)).items()}
    place = lambda name: (
        f'model-{int(name.split(".")[2]) if ".layers." in name else config.n_layers:05}.safetensors'
    )
    for file in sorted(set(map(place, shapes))):
        write_safetensors(
            folder / file,
            {
                name: (torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 1)).bfloat16()
                for name, shape in shapes.items()
                if place(name) == file
            },
        )
    write_json(
        folder / 'model.safetensors.index.json', {'weight_map': {name: place(name) for name in shapes}}
    )
    merges = learn_bpe(split_documents(read_documents('', 60))[0], config.n_vocab - 1)
    write_json(folder / 'tokenizer.json', tokenizer_json(merges))
    write_json(folder / 'config.json', {**to_hf(config), 'torch_dtype': 'bfloat16'})
    assert Tokenizer(folder).n_vocab <= config.n_vocab


@torch.no_grad()
def stack(folder, device, tokens_of, rounds):
    """One row per number of tokens: the layers streamed and resident, in turn."""
    plain, streamed = (
        load(folder, torch.bfloat16, device),
        stream(folder, torch.bfloat16, device, pinned=device.type == 'cuda'),
    )
    rows, T = [], 1024
    for n in tokens_of:
        tokens = torch.randint(plain.config.n_vocab, (n // T, T), device=device)
        passes = [(part, None) for part in tokens.split(16)]
        assert all(map(torch.equal, plain.hidden_of(passes), streamed.hidden_of(passes)))
        times = interleaved(
            {'resident': lambda: plain.hidden_of(passes), 'streamed': lambda: streamed.hidden_of(passes)},
            rounds,
            device,
        )
        rows.append({'tokens': n, **{name: summary(t) for name, t in times.items()}})
        rows[-1]['ratio'] = rows[-1]['streamed']['ms'] / rows[-1]['resident']['ms']
        print(rows[-1], flush=True)
    return rows


def limited(folder, out, limit):
    """Train allocators on a streamed checkpoint in a process that may not map more than `limit` bytes."""
    start = time.time()
    command = [
        sys.executable,
        ROOT / 'train.py',
        '--ckpt',
        folder,
        '--stream',
        '--device',
        'cpu',
        '--out',
        out,
        *TRAIN,
    ]
    # every thread's malloc arena would count with 64 MB, used or not
    done = subprocess.run(
        command,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        capture_output=True,
        text=True,
        env={**os.environ, 'MALLOC_ARENA_MAX': '1'},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((out / 'results.json').read_text())
    return {
        'limit_gb': limit / 1e9,
        'peak_gb': results['peak_gb'],
        'seconds': time.time() - start,
        'steps': results['config']['ppo_steps'],
    }


def table(r):
    ms = lambda t: f'{t["ms"]:,.0f} ({t["low"]:,.0f}-{t["high"]:,.0f})'
    return markdown(
        ['tokens in a visit', 'resident ms', 'streamed ms', 'ratio'],
        [
            [f'{row["tokens"]:,}', ms(row['resident']), ms(row['streamed']), f'{row["ratio"]:.2f}']
            for row in r['rows']
        ],
    )


def main(folder, device):
    torch.manual_seed(0)
    gpu = device.type == 'cuda'
    sizes = (
        dict(dim=4096, head_dim=128, n_heads=32, n_kv_heads=8, expert_dim=14336)
        if gpu
        else dict(dim=1024, head_dim=64, n_heads=16, n_kv_heads=4, expert_dim=3584)
    )
    config = Config(**sizes, n_layers=4 if gpu else 24, n_experts=8, top_k=2, n_vocab=1024)
    if not (folder / 'config.json').exists():
        make(folder, config)
    size = sum(p.stat().st_size for p in folder.glob('*.safetensors')) / 1e9
    name = torch.cuda.get_device_name(device) if gpu else f'CPU, {torch.get_num_threads()} threads'
    results = {
        'machine': name,
        'torch': torch.__version__,
        'gb': size,
        'layers': config.n_layers,
        'C': config.dim,
        'F': config.expert_dim,
        'rows': stack(folder, device, (16384, 65536) if gpu else (1024, 4096), 3 if gpu else 5),
    }
    print(table(results))
    write_json(ROOT / f'assets/stream{"-cuda" * gpu}.json', results)


if __name__ == '__main__':
    p = argparse.ArgumentParser()
    p.add_argument('folder', type=Path, help='of the checkpoint, made if need be')
    p.add_argument('--limit', type=float)
    p.add_argument('--device', default='cpu')
    a = p.parse_args()
    a.folder.mkdir(parents=True, exist_ok=True)
    if not a.limit:
        main(a.folder, torch.device(a.device))
    if a.device == 'cpu':
        results = read_json(ROOT / 'assets/stream.json')
        with tempfile.TemporaryDirectory() as out:
            results['run'] = limited(a.folder, Path(out) / 'run', int(1e9 * (a.limit or 3.5)))
        print(results['run'])
        write_json(ROOT / 'assets/stream.json', results)
