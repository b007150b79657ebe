"""Measures two gloo ranks against one: the difference of the allocators after 20 steps, and the peak memory
of each rank.

    python tests/measure_ranks.py [BASE]     four minutes on two cores -> assets/ranks.json

BASE (default out/deep/base) is a base model.

Memory is that of a process that loads a synthetic checkpoint of 4.4 GB in bf16 and runs two passes of 64
tokens, less that of a process that has only imported everything.
"""

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from measure_stream import make  # noqa: E402
from hub.files import write_json  # noqa: E402
from hub.safetensors import read_safetensors  # noqa: E402
from model import Config  # noqa: E402
from base.frozen import load_model  # noqa: E402
from run.ranks import gathered, join, leave  # noqa: E402


def ranks(n, *command):
    """What n ranks print; one thread each, one rank or two."""
    command = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc-per-node',
        str(n),
        *map(str, command),
    ]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}
    ).stdout


def allocators(n, out, base):
    """The allocators that n ranks train in 20 steps."""
    ranks(n, ROOT / 'train.py', '--out', out, '--ckpt', base, '--ppo-steps', '20')
    return read_safetensors(out / 'allocator.safetensors')[0]


@torch.no_grad()
def child(folder):
    """Print the largest peak memory of the ranks in GB; without a folder of processes that only meet."""
    join('cpu')
    if folder:
        model = load_model(train.Settings(), Path(folder))
        for _ in range(2):
            model.hidden_of([(torch.zeros(2, 32, dtype=torch.long), None)])
    print(max(gathered(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)))
    leave()


def main(base, folder):
    torch.manual_seed(0)
    (folder / 'big').mkdir()
    make(
        folder / 'big',
        Config(
            dim=1024,
            head_dim=64,
            n_heads=16,
            n_kv_heads=4,
            expert_dim=3584,
            n_layers=24,
            n_experts=8,
            top_k=2,
            n_vocab=1024,
        ),
    )
    gb = sum(p.stat().st_size for p in (folder / 'big').glob('*.safetensors')) / 1e9
    imported = float(ranks(2, __file__, '--child'))
    peak = {n: float(ranks(n, __file__, '--child', folder / 'big')) for n in (1, 2)}
    equal = {n: allocators(n, folder / f'{n}', base) for n in (1, 2)}
    results = {
        'steps': 20,
        'difference': max(
            (equal[1][name] - equal[2][name]).abs().max().item() for name in ('weight', 'bias')
        ),
        'largest_weight': equal[1]['weight'].abs().max().item(),
        'gb': gb,
        'imported_gb': imported,
        'peak_gb': peak,
        'share': {n: (p - imported) / gb for n, p in peak.items()},
    }
    print(results)
    write_json(ROOT / 'assets/ranks.json', results)


if __name__ == '__main__':
    if sys.argv[1:2] == ['--child']:
        sys.exit(child(*sys.argv[2:] or [None]))
    base = Path(sys.argv[1] if sys.argv[1:] else ROOT / 'out/deep/base').resolve()
    if not base.is_dir():
        sys.exit(f'{base} is not there; python train.py learns it')
    with tempfile.TemporaryDirectory() as temporary:
        main(base, Path(temporary))
