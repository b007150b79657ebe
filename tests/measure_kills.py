"""Kills a small run 50 times with SIGKILL at random moments and resumes it each time: does it end with the
bits of an undisturbed run?

    python tests/measure_kills.py        eight minutes on two cores -> assets/kills.json

The run learns its base too; where the kills fell is in the result. After each kill every file in the run
folder is read: none may be damaged, whatever the kill interrupted.
"""

import collections
import csv
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from hub.files import read_json, write_json  # noqa: E402
from hub.safetensors import read_safetensors  # noqa: E402

KILLS, STEPS = 50, 1500
COMMAND = [
    sys.executable,
    ROOT / 'train.py',
    '--preset',
    'smoke',
    '--ppo-steps',
    str(STEPS),
    '--save-every',
    '5',
]


def readable(out):
    """Read every finished file of a run folder; a damaged one raises. Unfinished ones have other names."""
    for path in out.rglob('*'):
        if path.is_file() and not path.name.endswith('.new') and 'base.new' not in path.parts:
            if path.suffix == '.safetensors':
                for t in read_safetensors(path)[0].values():
                    t.sum()
            elif path.suffix == '.json':
                read_json(path)
            elif path.suffix == '.csv':
                assert len(list(csv.DictReader(open(path)))) == STEPS


def stage(out):
    """Where the kill found the run, as its files say."""
    if not (out / 'base' / 'recipe.json').exists():
        return 'base'
    if not (out / 'state.safetensors').exists():
        return 'ppo, before the first state'
    return (
        'ppo'
        if len(json.loads(read_safetensors(out / 'state.safetensors')[1]['state'])['log']) < STEPS
        else 'evaluation'
    )


def main(folder):
    draw, start, found = random.Random(0), time.time(), collections.Counter()
    out = folder / 'killed'
    while True:
        resume = ['--resume'] if (out / 'state.safetensors').exists() else []
        run = subprocess.Popen(
            [*COMMAND, '--out', out, *resume], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            kills = sum(found.values())  # the first few early enough to find the base being learnt
            run.communicate(timeout=draw.uniform(1, 5 if kills < 5 else 9) if kills < KILLS else None)
            break
        except subprocess.TimeoutExpired:
            run.kill()
            run.communicate()
            out.mkdir(exist_ok=True)                           # a kill may come before it is made
            readable(out)
            found[stage(out)] += 1
    assert run.returncode == 0 and sum(found.values()) == KILLS, (
        'the resumed run failed, or ended before all kills'
    )
    whole = folder / 'whole'
    subprocess.run(
        [*COMMAND, '--out', whole], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    same = (out / 'allocator.safetensors').read_bytes() == (whole / 'allocator.safetensors').read_bytes()
    results = {
        'kills': sum(found.values()),
        'found_in': dict(found),
        'same_bits': same,
        'seconds': time.time() - start,
    }
    print(results)
    write_json(ROOT / 'assets/kills.json', results)


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
