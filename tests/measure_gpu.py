"""One command for the day a GPU is there: python tests/measure_gpu.py, at most six minutes on one H100.

It runs the tests that need CUDA, then bench.py at the published sizes, each in a process of its own, and
leaves in assets/gpu what the README's rows for a GPU need: bench.json of bench.py, and in
gpu.json the device and, of both, the exit status (124: out of time), seconds and the end of what was printed.
"""
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from hub.files import write_json  # noqa: E402

OUT = ROOT / 'assets' / 'gpu'
TESTS = ['tests/test_dispatch.py', 'tests/test_model.py', 'tests/test_stream.py', 'tests/test_fake_cuda.py']
COMMANDS = {
    'tests': ['-m', 'pytest', '-q', '-k', 'cuda', *TESTS],
    'bench': ['bench.py', '--device', 'cuda', '--out', OUT],
}
LIMIT = 180         # seconds of each


def main():
    if not torch.cuda.is_available():
        sys.exit('measure_gpu.py: torch finds no CUDA device here')
    OUT.mkdir(parents=True, exist_ok=True)
    result = {'device': torch.cuda.get_device_name(), 'torch': torch.__version__}
    for name, command in COMMANDS.items():
        start = time.monotonic()
        log = OUT / f'{name}.txt'
        with open(log, 'w') as f:
            try:
                done = subprocess.run([sys.executable, *command], cwd=ROOT, timeout=LIMIT, stdout=f, stderr=f)
                status = done.returncode
            except subprocess.TimeoutExpired:
                status = 124
        end = log.read_text().splitlines()[-20:]
        result[name] = {'status': status, 'seconds': time.monotonic() - start, 'end': end}
        print(f'{name}: status {status}', *end, sep='\n', flush=True)
        write_json(OUT / 'gpu.json', result)


if __name__ == '__main__':
    main()
