"""One command for the day a GPU is there: everything about CUDA that could not be tried without one.

    python tests/measure_gpu.py                  at most nine minutes on one H100 -> assets/gpu/
    python tests/measure_gpu.py decode stream    some of the parts

Each part is a process of its own with a time limit and a result file of its own, the most important first, so
that one failure costs one part. assets/gpu/NAME.json says what became of it: device, seconds, exit status
(124: out of time), the end of what it printed, and its numbers. Needs the repository and requirements.txt.
"""
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from bench import fewer, random_model  # noqa: E402
from hub.files import write_json  # noqa: E402
from model import Cache, Decoder  # noqa: E402
from run.timing import interleaved  # noqa: E402

OUT = ROOT / 'assets' / 'gpu'
HERE = [sys.executable, __file__]
# name: (command, seconds it may take, where its numbers are)
PARTS = {
    'tests': ([sys.executable, '-m', 'pytest', '-q', 'tests/test_dispatch.py', 'tests/test_model.py',
               'tests/test_stream.py', 'tests/test_fake_cuda.py', '-k', 'cuda'], 60, None),
    'decode': ([*HERE, '--run', 'decode'], 50, 'decode.numbers.json'),
    'bench': ([sys.executable, 'bench.py', '--device', 'cuda', '--out', str(OUT)], 170, 'bench.json'),
    'stream': ([sys.executable, 'tests/measure_stream.py', 'FOLDER', '--device', 'cuda'], 150,
               '../stream-cuda.json'),
    'preset': ([*HERE, '--run', 'preset'], 110, 'preset/results.json')}


@torch.no_grad()
def decode():
    """Milliseconds of a decoding step at Mixtral's width: eager, and in a CUDA graph; Top-K and 0.7 K."""
    device, rows = torch.device('cuda'), []
    model, tokens = random_model(device, False)
    for name, policy in (('top-k', None), ('ada-k at 0.7 K', fewer(model, tokens, 0.7))):
        for B in (1, 8):
            prompt, new = tokens.expand(B, -1)[:, :16], tokens.new_ones(B, 1)
            steps = {}
            for way in ('eager', 'graph'):
                cache = Cache(model.config, B, 512, device, model.dtype)
                model(prompt, policy, cache)
                steps[way] = Decoder(model, policy, cache)
                steps[way].capture &= way == 'graph'
            for _ in range(4):                                 # the third step of a graph is its capture
                outs = {way: step(new) for way, step in steps.items()}
            worst = (outs['eager'] - outs['graph']).abs().max().item()
            times = interleaved({way: lambda step=step: step(new) for way, step in steps.items()}, 50, device)
            rows += [{'policy': name, 'B': B, 'way': way, 'ms': 1000 * statistics.median(t),
                      'difference': worst} for way, t in times.items()]
    write_json(OUT / 'decode.numbers.json', {'rows': rows})
    print(*rows, sep='\n')


def preset():
    """The `gpu` preset from start to end at a tenth of its steps."""
    gpu = train.PRESETS['gpu']
    gpu.update(base_steps=gpu['base_steps'] // 10, ppo_steps=gpu['ppo_steps'] // 10)
    train.main(['--preset', 'gpu', '--out', str(OUT / 'preset')])


def run_part(name):
    """Run one part in a process of its own, and say in NAME.json what became of it."""
    command, limit, numbers = PARTS[name]
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        command = [folder if word == 'FOLDER' else word for word in command]
        try:
            done = subprocess.run(command, cwd=ROOT, timeout=limit, text=True, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT)
            status, text = done.returncode, done.stdout
        except subprocess.TimeoutExpired as e:
            status, text = 124, (e.stdout or b'').decode(errors='replace')
    result = {'part': name, 'device': torch.cuda.get_device_name(), 'torch': torch.__version__,
              'seconds': time.time() - start, 'status': status, 'tail': text.splitlines()[-12:]}
    if numbers and status == 0:
        result['numbers'] = json.loads((OUT / numbers).read_text())
    write_json(OUT / f'{name}.json', result)
    print(f'{name}: status {status} after {result["seconds"]:.0f} s; {result["tail"][-1:]}', flush=True)
    return status == 0


def main():
    if sys.argv[1:2] == ['--run']:
        return {'decode': decode, 'preset': preset}[sys.argv[2]]()
    if unknown := set(sys.argv[1:]) - PARTS.keys():
        sys.exit(f'no such part: {", ".join(unknown)}; use some of {", ".join(PARTS)}')
    if not torch.cuda.is_available():
        sys.exit('measure_gpu.py: torch finds no CUDA device here')
    OUT.mkdir(parents=True, exist_ok=True)
    good = [run_part(name) for name in sys.argv[1:] or PARTS]
    sys.exit(0 if all(good) else 1)


if __name__ == '__main__':
    main()
