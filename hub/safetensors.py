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

from hub.files import InputError, reading, write_whole

DTYPES = {
    'I64': torch.int64,
    'F16': torch.float16,
    'BF16': torch.bfloat16,
    'F32': torch.float32,
    'F64': torch.float64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
READERS = 4                         # threads that read a file: one does not reach what a disk can give
LONGEST_HEADER = 100_000_000        # bytes, as in the reference implementation


def write_safetensors(path, tensors, metadata={}):
    """Write {name: tensor}, and a {str: str} that the header keeps."""
    header = {'__metadata__': {'format': 'pt', **metadata}}
    end = 0
    for name, t in tensors.items():
        begin = end
        end += t.nbytes
        header[name] = {
            'dtype': NAMES[t.dtype],
            'shape': t.shape,
            'data_offsets': [begin, end],
        }
    head = json.dumps(header).encode()
    head += b' ' * (-len(head) % 8)                            # the tensors begin aligned

    def write(f):
        f.write(len(head).to_bytes(8, 'little') + head)
        f.writelines(map(raw_bytes, tensors.values()))         # one after the other
    write_whole(path, write)


def raw_bytes(t):
    """The bytes of a tensor; of a contiguous one on the CPU its own memory, to be read and written."""
    return t.detach().cpu().ravel().view(torch.uint8).numpy()


def read_header(path):
    """({name: (dtype, shape, first byte, byte behind the last)} in the order of the file, metadata).

    The tensors must follow each other without hole or overlap and end where the file ends. InputError names
    the file, and what is wrong in it. Values are not looked at.
    """
    with reading(path), open(path, 'rb') as f:
        size = os.path.getsize(path)
        start = 8 + int.from_bytes(f.read(8), 'little')        # of the tensors
        if start > min(size, LONGEST_HEADER):
            raise ValueError(f'a header of {start} bytes in a file of {size}')
        header = json.loads(f.read(start - 8))
        metadata = header.pop('__metadata__', {})
        layout = {}
        end = 0
        for name, t in sorted(header.items(), key=lambda item: item[1]['data_offsets']):
            dtype = DTYPES[t['dtype']]
            shape = t['shape']
            begin, stop = t['data_offsets']
            whole = all(type(i) is int and i >= 0 for i in [*shape, begin, stop])
            if not whole or begin != end or stop - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f'{name!r:.50} does not follow byte {end}')
            layout[name] = dtype, shape, start + begin, start + stop
            end = stop
        if start + end != size:
            raise ValueError(f'{size} bytes, the header describes {start + end}')
    return layout, metadata


def read_safetensors(path):
    """({name: tensor}, metadata) of a whole file."""
    layout, metadata = read_header(path)
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape, _, _) in layout.items()}
    read_into(path, layout, tensors)
    return tensors, metadata


def read_into(path, layout, views):
    """Read the tensors of a file that {name: view} names, straight into place where dtype and device allow.

    layout: of `read_header`. Of a smaller view: what stands first in the tensor. InputError if the file ends
    early.
    """
    def read(name):
        dtype, _, begin, _ = layout[name]
        view = views[name]
        t = view
        if view.dtype != dtype or view.device.type != 'cpu':
            t = torch.empty(view.shape, dtype=dtype)
        with open(path, 'rb') as f:
            f.seek(begin)
            if f.readinto(raw_bytes(t)) < t.nbytes:
                raise InputError(f'{path}: {name} ends early; fetch the file again')
        if t is not view:
            view.copy_(t)

    with ThreadPoolExecutor(READERS) as readers:
        list(readers.map(read, layout.keys() & views.keys()))
