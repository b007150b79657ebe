"""hub/safetensors.py: the file format of the hub's weights, read and written by hand.

A file is: 8 bytes, the length n of the header; n bytes of JSON, {name: {dtype, shape, data_offsets}} and free
strings under `__metadata__`; then the bytes of the tensors. Every number of a header is checked before it is
used, and nothing is unpickled.
"""
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor

import torch

from hub.files import InputError, write_whole

DTYPES = dict(BOOL=torch.bool, U8=torch.uint8, I8=torch.int8, I16=torch.int16, I32=torch.int32,
              I64=torch.int64, F16=torch.float16, BF16=torch.bfloat16, F32=torch.float32,
              F64=torch.float64, F8_E4M3=torch.float8_e4m3fn, F8_E5M2=torch.float8_e5m2)
LONGEST_HEADER = 100_000_000        # bytes, as in the reference implementation
READERS = 4                         # threads that read a file: one does not reach what a disk can give


def write_safetensors(path, tensors, metadata=None):
    """Write {name: tensor}, and a {str: str} that the header keeps.

    Largest items first, so that every tensor is aligned to its item size.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header, end = {'__metadata__': {'format': 'pt', **(metadata or {})}}, 0
    for name in order:
        t = tensors[name]
        begin, end = end, end + t.numel() * t.dtype.itemsize
        header[name] = {'dtype': names[t.dtype], 'shape': list(t.shape), 'data_offsets': [begin, end]}
    head = json.dumps(header).encode()
    head += b' ' * (-len(head) % 8)

    def write(f):
        f.write(len(head).to_bytes(8, 'little') + head)
        for name in order:
            f.write(tensors[name].detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    write_whole(path, write)


def read_header(path):
    """({name: (dtype, shape, first byte, byte behind the last)} in the order of the file, metadata).

    The tensors must follow each other without hole or overlap and end where the file ends. InputError names
    the file and the tensor. Values are not looked at.
    """
    size = os.path.getsize(path)
    with open(path, 'rb') as f:
        n = int.from_bytes(f.read(8), 'little')
        if size < 8 or n > min(size - 8, LONGEST_HEADER):
            raise InputError(f'{path}: says its header has {n:,} bytes, but the file has {size:,}; '
                             f'fetch it again')
        raw = f.read(n)
    try:
        header = json.loads(raw.decode(), object_pairs_hook=unique_keys)
        metadata = header.pop('__metadata__', {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError('__metadata__ holds other things than strings')
        layout, end = {}, 0
        for name, t in sorted(header.items(), key=lambda item: item[1]['data_offsets']):
            if t['dtype'] not in DTYPES:
                raise ValueError(f'{name}: dtype {t["dtype"]!r} is not supported')
            dtype, shape, (begin, stop) = DTYPES[t['dtype']], t['shape'], t['data_offsets']
            whole = all(type(i) is int and i >= 0 for i in (*shape, begin, stop))
            if not whole or begin != end or stop - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f'{name}: {t} does not follow byte {end}')
            layout[name] = dtype, shape, 8 + n + begin, 8 + n + stop
            end = stop
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise InputError(f'{path}: the header is damaged ({str(e)[:200]}); fetch it again') from None
    if 8 + n + end != size:
        raise InputError(f'{path}: the header describes {8 + n + end:,} bytes, the file has {size:,}; '
                         f'fetch it again')
    return layout, metadata


def unique_keys(pairs):
    """A dict of (key, value) pairs; ValueError where json would silently keep the last of two."""
    if len(d := dict(pairs)) != len(pairs):
        raise ValueError('a key appears twice')
    return d


def read_safetensors(path):
    """({name: tensor}, metadata) over a private map of the file: pages are read when first used."""
    layout, metadata = read_header(path)
    data = torch.from_file(str(path), shared=False, size=os.path.getsize(path), dtype=torch.uint8)
    tensors = {}
    for name, (dtype, shape, begin, stop) in layout.items():
        part = data[begin:stop]
        if begin % dtype.itemsize:                             # a writer need not align; view() must
            part = part.clone()
        tensors[name] = part.view(dtype).reshape(shape)
    return tensors, metadata


def read_noted(path, note):
    """({name: tensor}, the JSON object that the metadata holds under `note`) of a file of this project.

    InputError if there is none, and names a tensor that holds NaN or infinity.
    """
    try:
        tensors, metadata = read_safetensors(path)
    except OSError as e:
        raise InputError(f'{path}: {e.strerror or e}') from None
    try:
        values = json.loads(metadata[note])
        if not isinstance(values, dict):
            raise ValueError
    except (KeyError, ValueError, RecursionError):
        raise InputError(f'{path}: not a file with {note} of this project') from None
    for name, t in tensors.items():
        if t.is_floating_point() and not t.float().isfinite().all():
            raise InputError(f'{path}: {name} holds NaN or infinity')
    return tensors, values


def read_into(path, layout, views):
    """Read the tensors of a file that {name: view} names, straight into place where dtype and device allow.

    layout: of `read_header`. InputError if the file ends early.
    """
    def read(name):
        (dtype, shape, begin, stop), view = layout[name], views[name]
        in_place = view.dtype == dtype and view.device.type == 'cpu'
        t = view if in_place else torch.empty(shape, dtype=dtype)
        place = memoryview(t.reshape(-1).view(torch.uint8).numpy())
        while begin < stop:                                    # the system reads at most 2 GB at once
            n = os.preadv(f.fileno(), [place[begin - stop:]], begin)
            if n == 0:
                raise InputError(f'{path}: {name} could not be read to its end; fetch the file again')
            begin += n
        if not in_place:
            view.copy_(t)

    with open(path, 'rb') as f, ThreadPoolExecutor(READERS) as readers:
        list(readers.map(read, (name for name in layout if name in views)))


def read_ahead(path):
    """Ask the system to fetch the whole file while its first tensors are being copied."""
    if hasattr(os, 'posix_fadvise'):
        with open(path, 'rb') as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
