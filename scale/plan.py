"""scale/plan.py: what a run needs, memory, FLOPs, hours, from the config of --ckpt alone; nothing is loaded.

    python -m scale.plan --ckpt mixtral-8x7b                the flags are those of train.py
    python -m scale.plan --ckpt mixtral-8x7b --paper --seq 2048

Memory is counted (scale/memory.py), and so are the FLOPs of PPO. The search for the start and the evaluation
are taken as a handful of sweeps over the held-out tokens. Hours are FLOPs over a matmul rate, or the time to
transfer the layers where that is longer. Of GPUs these rates are the shares of the published ones that real
code reaches; of this machine a matmul is timed, and transfers are taken as free.
"""
import math

import torch

from hub.checkpoint import find_checkpoint, weight_dtype
from hub.config import read_config
from hub.files import InputError
from moe_dispatch import flops
from run.console import check_budget, one_line_errors
from run.report import markdown
from run.timing import rates
from scale.memory import empty_allocators, weight_bytes, weight_counts, working_bytes
from train import parse

# bf16 matmul FLOP/s and host-to-device bytes/s, half and four fifths of the published ones
GPUS = {
    'A800': (156e12, 25.6e9),
    'H100': (494.5e12, 51.2e9),
}
# where the weights are: are they streamed, and over how many ranks?
WHERE = {
    'on one GPU': (False, 1),
    '`--stream`': (True, 1),
    'each of 8 GPUs': (False, 8),
}
SWEEPS = 32             # over the held-out tokens: search, stand-ins, calibrations, comparison


def run_flops(s, config):
    """FLOPs of a run with --ckpt: PPO, and what is looked at before and after."""
    tokens = s.ppo_batch * s.seq
    topk = flops(config, config.top_k, s.seq)['total']                      # of a token
    mean_k = config.top_k * (s.budget if s.price is None else 1)
    fewer = flops(config, mean_k, s.seq)['total']
    update = 6 * s.epochs * s.group * empty_allocators(s, config).weight.numel()
    looked_at = SWEEPS * s.heldout_tokens
    if s.start == 'p-warm':
        looked_at += s.warm_steps * tokens
    return looked_at * topk + s.ppo_steps * tokens * (topk + s.group * fewer + update)


def plan(s, machines):
    """{column: text} of what this run needs. machines: {name: (FLOP/s, transfer in bytes/s)}."""
    folder = find_checkpoint(s.ckpt, wanted='config.json')
    config = read_config(folder)
    itemsize = weight_dtype(folder).itemsize
    check_budget(s, config.top_k)
    layer, layers, rest = weight_counts(config)
    row = {
        'model': s.ckpt,
        'weights': gb(itemsize * (layers + rest)),
        'of a layer': gb(itemsize * layer),
        'allocators': f'{empty_allocators(s, config).n_params() / 1e6:.2f}M',
    }
    working = working_bytes(s, config, itemsize)
    for where, (stream, size) in WHERE.items():
        row[where] = gb(weight_bytes(config, itemsize, stream, size) + working // size)
    work = run_flops(s, config)
    row['FLOPs'] = f'{work:.1e}'
    for name, (rate, transfer) in machines.items():
        seconds = max(work / rate, (s.ppo_steps + SWEEPS) * itemsize * layers / transfer)
        row[f'hours, `--stream`, {name}'] = f'{seconds / 3600:.2g}'
    return row


def gb(n):
    return f'{n / 1e9:.3g} GB'


def plan_table(plans):
    """Plans for the same machines as a Markdown table."""
    return markdown(plans[0], [row.values() for row in plans])


def main(argv):
    s = parse(argv, __doc__)
    if not s.ckpt:
        raise InputError('give the checkpoint with --ckpt: a short name, or a folder with its config.json')
    rate = rates(torch.device(s.device))['bfloat16']
    print(plan_table([plan(s, {**GPUS, s.device: (rate, math.inf)})]))


if __name__ == '__main__':
    one_line_errors('scale.plan', main)
