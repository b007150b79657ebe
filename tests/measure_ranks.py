"""Measures two gloo ranks against one: the difference of the allocators after 20 steps, and the peak memory of each rank.

    python tests/measure_ranks.py [BASE]       four minutes on two cores -> assets/ranks.json; BASE (default out/tiny/base) is a base model

Memory is that of a synthetic checkpoint of 1.5 GB in bf16, less that of a process that has only imported everything.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from measure_stream import make  # noqa: E402
from model import Config, read_safetensors, write_json  # noqa: E402

IMPORTED = 'import resource, train; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)'


def train(n, out, *args):
    """results.json and the allocators of a run of n ranks."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(n), ROOT / 'train.py', '--out', out, *args]
    subprocess.run(command, check=True, capture_output=True)
    return json.loads((out / 'results.json').read_text()), read_safetensors(out / 'allocator.safetensors')[0]


def main(base, folder):
    torch.manual_seed(0)
    (folder / 'big').mkdir()
    make(folder / 'big', Config(dim=1024, head_dim=64, n_heads=16, n_kv_heads=4, expert_dim=3584, n_layers=8, n_experts=8, top_k=2, n_vocab=1024))
    gb = sum(p.stat().st_size for p in (folder / 'big').glob('*.safetensors')) / 1e9
    imported = float(subprocess.run([sys.executable, '-c', IMPORTED], capture_output=True, text=True, cwd=ROOT).stdout)
    equal = {n: train(n, folder / f'equal{n}', '--ckpt', base, '--ppo-steps', '20')[1] for n in (1, 2)}
    peak = {n: train(n, folder / f'peak{n}', '--ckpt', folder / 'big', '--preset', 'smoke', '--ppo-steps', '2', '--ppo-batch', '4')[0]['peak_gb']
            for n in (1, 2)}
    results = {'steps': 20, 'difference': max((equal[1][name] - equal[2][name]).abs().max().item() for name in ('weight', 'bias')),
               'largest_weight': equal[1]['weight'].abs().max().item(), 'gb': gb, 'imported_gb': imported, 'peak_gb': peak,
               'share': {n: (p - imported) / gb for n, p in peak.items()}}
    print(results)
    write_json(ROOT / 'assets/ranks.json', results)


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(sys.argv[1] if sys.argv[1:] else ROOT / 'out/tiny/base').resolve(), Path(temporary))
