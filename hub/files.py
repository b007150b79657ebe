"""hub/files.py: a wrong input is one line, a file is there whole or not at all.

The lowest floor: whoever reads or writes a file of this project does it through here or through
hub/safetensors.py.
"""
import json
import os
from pathlib import Path

import torch.distributed as dist


class InputError(ValueError):
    """A wrong input, told in one line: what, where, what to do. Scripts print it and exit with status 2."""


def write_whole(path, write):
    """Call write(f) on a new binary file, then rename it to `path`: a reader sees the old file or the new.

    Of several ranks only rank 0 writes. OSError if the disk is full; the old file is then untouched.
    """
    if dist.is_initialized() and dist.get_rank():
        return
    path = Path(path)
    new = path.with_name(f'{path.name}.{os.getpid()}.new')
    try:
        with open(new, 'wb') as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def write_json(path, value):
    """`value` as an indented JSON file, UTF-8."""
    write_whole(path, lambda f: f.write(json.dumps(value, indent=1, ensure_ascii=False).encode()))


def read_json(path):
    """What a JSON file holds; InputError names the file if it is missing or is no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding='utf-8'))
    except OSError as e:
        raise InputError(f'{path}: {e.strerror or e}') from None
    except (ValueError, RecursionError) as e:
        raise InputError(f'{path}: not JSON ({str(e)[:100]})') from None
