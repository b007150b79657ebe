"""hub/files.py: a wrong input is one line, a file is there whole or not at all.

The lowest floor: whoever reads or writes a file of this project does it through here or through
hub/safetensors.py.
"""
import json
import math
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


def read_object(path):
    """The object in a JSON file, a dict."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise InputError(f'{path}: not a JSON object')
    return values


REQUIRED = object()     # a field without a default


def checked(values, name, where, kind, default=REQUIRED, least=None, most=None):
    """values[name] of a JSON object, checked; the default where it is missing or null.

    kind: bool, int, float (a whole number will do, NaN and infinity will not), str, list, dict, or a tuple of
    all values that make sense. least, most: bounds of a number. InputError says where, what, and what was
    expected.
    """
    value = values.get(name)
    if value is None and default is not REQUIRED:
        return default
    if value is None:
        raise InputError(f'{where}: the field {name!r} is missing')
    if isinstance(kind, tuple):
        good, wanted = any(type(value) is type(k) and value == k for k in kind), f'one of {kind}'
    elif kind in (int, float):
        good = type(value) in {int: (int,), float: (int, float)}[kind] and math.isfinite(value)
        good = good and (least is None or value >= least) and (most is None or value <= most)
        wanted = 'a whole number' if kind is int else 'a number'
        wanted += f' of at least {least}' if least is not None else ''
        wanted += f' and at most {most}' if most is not None else ''
    else:
        good = type(value) is kind
        wanted = {bool: 'true or false', str: 'a string', list: 'a list', dict: 'an object'}[kind]
    if not good:
        raise InputError(f'{where}: {name} is {json.dumps(value)[:80]}, it must be {wanted}')
    return value
