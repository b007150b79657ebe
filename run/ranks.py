"""run/ranks.py: one process, or several under torchrun that do the same work on parts of every batch.

Every rank runs the same script; after `join` only rank 0 prints and writes. In a lone process all of this
does nothing.
"""
import os
import sys

import torch.distributed as dist

from hub.files import InputError


def join(device):
    """Under torchrun: meet the other ranks, each on its device (run/console.py:open_device).

    InputError if they do not come. torch waits 10 minutes (nccl) or 30 (gloo) for them, then and later.
    """
    size = os.environ.get('WORLD_SIZE') or '1'
    if size == '1':
        return
    backend = dist.get_default_backend_for_device(device)
    print(f'waiting for the other ranks, {size} in all', file=sys.stderr)
    try:
        dist.init_process_group(backend)
    except (ValueError, RuntimeError) as e:
        raise InputError(f'the ranks do not meet: {str(e).splitlines()[0]}') from None
    if my_rank():
        sys.stdout = open(os.devnull, 'w')


def leave(status=0):
    """End the process with this exit status if it is one of several ranks; a lone one goes on.

    At once, without Python's own shutdown: FSDP keeps gloo's threads alive behind the end of the group, and
    one that frees its last tensor during that shutdown aborts the process (pytorch issue 190489).
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        os._exit(status)


def my_rank():
    """The number of this rank, from 0 on."""
    return dist.get_rank() if dist.is_initialized() else 0


def n_ranks():
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gathered(value):
    """[the value of every rank], in order."""
    values = [value] * n_ranks()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def averaged(numbers):
    """{name: number}, each the mean over the ranks."""
    everyone = gathered(numbers)
    return {name: sum(theirs[name] for theirs in everyone) / len(everyone) for name in numbers}


def average_gradients(parameters):
    """Replace every gradient by its mean over the ranks: that of a mean loss over all ranks' tokens."""
    for p in parameters:
        if dist.is_initialized() and p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= n_ranks()
