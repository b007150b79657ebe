"""hub/files.py: a wrong input is one line, a file is there whole or not at all.

The lowest floor: whoever reads or writes a file of this project does it through here or through
hub/safetensors.py.
"""
import contextlib
import json
import os

import torch.distributed as dist


class InputError(ValueError):
    """A wrong input, told in one line: what, where, what to do. Scripts print it and exit with status 2."""


@contextlib.contextmanager
def reading(path):
    """Within `with`: whatever goes wrong while the file is read and understood is one line that names it."""
    try:
        yield
    except InputError:
        raise
    except OSError as e:
        raise InputError(f'{path}: {e.strerror or e}') from None
    except Exception as e:
        cause = ' '.join(f'{type(e).__name__} {e}'.split())[:100]
        raise InputError(f'{path}: damaged, or of another version ({cause})') from None


def read_json(path, absent=None):
    """The object in a JSON file, a dict; `absent`, where that is given, if there is no such file."""
    if absent is not None and not path.exists():
        return absent
    with reading(path):
        return {**json.loads(path.read_bytes())}               # an error of a list, a number, ..


def write_whole(path, write):
    """Call write(f) on a new binary file, then rename it to `path`: a reader sees the old file or the new.

    Of several ranks only rank 0 writes. OSError if the disk is full; the old file is then untouched.
    """
    if dist.is_initialized() and dist.get_rank():
        return
    new = path.with_name(f'{path.name}.{os.getpid()}.new')
    try:
        with open(new, 'wb') as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def write_text(path, text):
    """`text` as a file, UTF-8."""
    write_whole(path, lambda f: f.write(text.encode()))


def write_json(path, value):
    """`value` as an indented JSON file."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))
