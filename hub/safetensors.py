"""hub/safetensors.py: the file format of the hub's weights, read and written by hand.

A file is: 8 bytes, the length n of the header; n bytes of JSON, {name: {dtype, shape, data_offsets}} and free
strings under `__metadata__`; then the bytes of the tensors. Every number of a header is checked before it is
used, and nothing is unpickled.
"""
import json
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
    """(layout, metadata); layout: {name: (a tensor without numbers, path, first byte)} in the file's order.

    The tensors must follow each other without hole or overlap and end where the file ends. InputError names
    the file, and what is wrong in it. Values are not looked at.
    """
    with reading(path), open(path, 'rb') as f:
        size = os.path.getsize(path)
        start = 8 + int.from_bytes(f.read(8), 'little')        # of the tensors
        if start > min(size, LONGEST_HEADER):
            raise ValueError(f'a header of {start} bytes in a file of {size}')
        header = json.loads(f.read(start - 8), parse_float=int)            # fails: all numbers are whole
        metadata = header.pop('__metadata__', {})
        layout = {}
        end = start
        for name, entry in sorted(header.items(), key=lambda item: item[1]['data_offsets']):
            t = torch.empty(entry['shape'], dtype=DTYPES[entry['dtype']], device='meta')
            begin = end
            end += t.nbytes
            if entry['data_offsets'] != [begin - start, end - start]:
                raise ValueError(f'{name!r:.50} does not follow byte {begin}')
            layout[name] = t, path, begin
        if end != size:
            raise ValueError(f'{size} bytes, the header describes {end}')
    return layout, metadata


def read_safetensors(path):
    """({name: tensor}, metadata) of a whole file."""
    layout, metadata = read_header(path)
    tensors = {name: torch.empty_like(t, device='cpu') for name, (t, _, _) in layout.items()}
    read_into(layout, tensors)
    return tensors, metadata


def read_into(layout, views, progress=None):
    """Read the tensors that {name: view} names, straight into place where dtype and device allow.

    layout: of `read_header`, of one file or several. Of a smaller view: what stands first in the tensor.
    `progress(tensors so far, of all)` is called after each. InputError if a file ends early.
    """
    def read(name):
        of_file, path, begin = layout[name]
        view = views[name]
        t = view
        if view.dtype != of_file.dtype or view.device.type != 'cpu':
            t = torch.empty(view.shape, dtype=of_file.dtype)
        with open(path, 'rb') as f:
            f.seek(begin)
            if f.readinto(raw_bytes(t)) < t.nbytes:
                raise InputError(f'{path}: {name} ends early; fetch the file again')
        view.copy_(t)                                          # nothing where it is the view itself

    names = [name for name in layout if name in views]
    with ThreadPoolExecutor(READERS) as readers:
        for done, _ in enumerate(readers.map(read, names), 1):
            if progress:
                progress(done, len(names))
