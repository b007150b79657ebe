"""run/ranks.py: one process, or several under torchrun that do the same work on parts of every batch.

Every rank runs the same script; after `join` only rank 0 prints and writes. In a lone process all of this
does nothing.
"""
import os
import socket
import sys
import time
from datetime import timedelta

import torch.distributed as dist

from hub.files import InputError

RENDEZVOUS = 60         # seconds are enough for rank 0 to be there


def join(device):
    """Under torchrun: meet the other ranks, each on its device (run/console.py:open_device).

    InputError if they do not come.
    """
    if os.environ.get('WORLD_SIZE', '1') == '1':
        return
    host, port = os.environ.get('MASTER_ADDR'), os.environ.get('MASTER_PORT')
    try:
        if os.environ['RANK'] != '0':
            wait_for(host, int(port))
        backend = 'nccl' if device.startswith('cuda') else 'gloo'
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    except (KeyError, ValueError, TypeError, OSError, RuntimeError) as e:
        cause = str(e).splitlines()[0][:200]
        raise InputError(f'no rendezvous of the ranks at {host}:{port}: {cause}') from None
    if dist.get_rank():
        sys.stdout = open(os.devnull, 'w')


def wait_for(host, port):
    """Until rank 0, or torchrun for it, listens there; OSError if it does not within RENDEZVOUS seconds."""
    end = time.time() + RENDEZVOUS
    while True:
        try:
            return socket.create_connection((host, port), timeout=5).close()
        except OSError:
            if time.time() > end:
                raise
        time.sleep(0.2)


def leave(status=0):
    """End the process with this exit status if it is one of several ranks; a lone one goes on.

    At once, without Python's own shutdown: FSDP keeps gloo's threads alive behind the end of the group, and
    one that frees its last tensor during that shutdown aborts the process (pytorch issue 190489).
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ranks():
    """(number of this rank, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gathered(value):
    """[the value of every rank], in order."""
    size = ranks()[1]
    if size == 1:
        return [value]
    values = [None] * size
    dist.all_gather_object(values, value)
    return values


def same_everywhere(what, value):
    """InputError unless all ranks have this value."""
    for i, theirs in enumerate(gathered(value)):
        if theirs != value:
            raise InputError(f'{what} is another one on rank {i} than on rank {ranks()[0]}')


def check_ranks(s):
    """InputError unless the ranks can share a batch evenly."""
    size = ranks()[1]
    if s.ppo_batch % size:
        raise InputError(f'--ppo-batch {s.ppo_batch}: {size} ranks cannot take the same number of '
                         f'sequences each')


def averaged(numbers):
    """{name: number}, each the mean over the ranks."""
    everyone = gathered(numbers)
    return {name: sum(theirs[name] for theirs in everyone) / len(everyone) for name in numbers}


def average_gradients(parameters):
    """Replace every gradient by its mean over the ranks: that of a mean loss over all ranks' tokens."""
    size = ranks()[1]
    if size > 1:
        for p in parameters:
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= size
