"""Measures loading: time against one cold read of the files, and peak memory, on a synthetic 2 GB Mixtral in
bf16 and five shards.

    python tests/measure_load.py [FOLDER]      a minute; the checkpoint goes to FOLDER (default temporary)

Each figure comes from a fresh process; the files are dropped from the page cache before each read
(posix_fadvise).
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from hub.checkpoint import hub_tensors, load  # noqa: E402
from hub.config import to_hf  # noqa: E402
from hub.files import write_json  # noqa: E402
from hub.safetensors import write_safetensors  # noqa: E402
from model import Config, Transformer  # noqa: E402

SHARDS = 5


def make(folder):
    """Random weights; tensors are dealt to the shards in turn: one layer's experts lie in all of them."""
    config = Config(
        n_vocab=8192,
        dim=1024,
        n_layers=11,
        n_heads=16,
        n_kv_heads=4,
        head_dim=64,
        n_experts=8,
        top_k=2,
        expert_dim=3584,
    )
    with torch.device('meta'):
        shapes = {name: t.shape for name, t in hub_tensors(Transformer(config)).items()}
    places = {name: f'model-{i % SHARDS + 1:05}-of-{SHARDS:05}.safetensors' for i, name in enumerate(shapes)}
    for file in sorted(set(places.values())):
        write_safetensors(
            folder / file,
            {name: torch.randn(shapes[name]).bfloat16() for name in shapes if places[name] == file},
        )
    write_json(folder / 'model.safetensors.index.json', {'weight_map': places})
    write_json(folder / 'config.json', to_hf(config))


def cold(folder):
    for path in folder.glob('*.safetensors'):
        with open(path, 'rb') as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def child(what, folder):
    """One measurement in this process: {'seconds', 'peak_gb'}."""
    cold(folder)
    start = time.perf_counter()
    if what == 'read':
        buffer = bytearray(1 << 24)
        for path in sorted(folder.glob('*.safetensors')):
            with open(path, 'rb', buffering=0) as f:
                while f.readinto(buffer):
                    pass
    else:
        model = load(folder, torch.bfloat16)
        assert len(model.layers) == 11
    print(
        json.dumps(
            {
                'seconds': time.perf_counter() - start,
                'peak_gb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
            }
        )
    )


def main(folder):
    if not (folder / 'config.json').exists():
        make(folder)
    size = sum(p.stat().st_size for p in folder.glob('*.safetensors')) / 1e9
    runs = {'read': [], 'load': []}
    for _ in range(5):
        for what in runs:
            out = subprocess.run(
                [sys.executable, __file__, '--child', what, folder],
                capture_output=True,
                text=True,
                check=True,
            )
            runs[what].append(json.loads(out.stdout))
    middle = lambda what, key: sorted(run[key] for run in runs[what])[2]
    print(f'{size:.2f} GB in {SHARDS} shards, medians of 5')
    print(f'cold read {middle("read", "seconds"):.2f} s, load {middle("load", "seconds"):.2f} s, '
          f'ratio {middle("load", "seconds") / middle("read", "seconds"):.2f} (goal 2.5)')
    peak, goal = max(run['peak_gb'] for run in runs['load']), size + size / SHARDS + 1
    print(f'peak memory {peak:.2f} GB, goal {goal:.2f} GB (the model, one shard, and 1 GB)')


if __name__ == '__main__':
    if '--child' in sys.argv:
        child(sys.argv[2], Path(sys.argv[3]))
    elif len(sys.argv) > 1:
        Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
