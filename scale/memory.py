"""scale/memory.py: does it fit? Bytes of weights and of PPO beside them, counted before anything is read."""
import math
import resource
from pathlib import Path

import torch

from hub.files import InputError
from model import Transformer

PASS_TOKENS = 2 ** 14   # of Mixtral-8x7B, so many tokens fill its matmuls and need 4 GB of activations
LOGITS = 2 ** 28        # the reward's head runs on so many logits at a time, 1 GB in fp32


def weight_counts(config):
    """(weights of the largest layer, of all layers, of embedding, last norm and head)."""
    with torch.device('meta'):
        model = Transformer(config)
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.layers]
    return max(layers), sum(layers), sum(p.numel() for p in model.parameters()) - sum(layers)


def weight_bytes(config, itemsize, how, size=1):
    """(bytes on the device, on the host) of the weights: 'plain', 'stream'ed, or 'shard'ed over `size`."""
    layer, layers, rest = (itemsize * n for n in weight_counts(config))
    return {'plain': (layers + rest, 0),
            'stream': (rest + 2 * layer, layers),
            'shard': (rest + layers // size + 2 * layer, 0)}[how]


def allocator_sizes(s, config):
    """(k_max, numbers that an allocator reads): as published N and C, by default 2K and C + N + K - 1."""
    k_max = config.n_experts if s.paper else min(2 * config.top_k, config.n_experts)
    return k_max, config.dim + (config.n_experts + config.top_k - 1 if s.extended else 0)


def state_bytes(s, config):
    """Bytes that a rollout keeps for the update, of every layer and sampled token.

    z in fp32; k, logp and noise; the logits and their gradients.
    """
    k_max, n_in = allocator_sizes(s, config)
    return len(config.moe_layers) * s.group * s.ppo_batch * s.seq * (4 * n_in + 16 + 20 * k_max)


def working_bytes(s, config, itemsize):
    """Bytes that PPO needs beside the weights at its peak.

    States, hidden states, and the larger of one pass's experts and logits.
    """
    c, tokens = config, (1 + s.group) * s.ppo_batch * s.seq
    in_pass = min(max(PASS_TOKENS, s.seq), s.group * s.ppo_batch * s.seq)
    experts = in_pass * itemsize * (c.top_k * (2 * c.dim + 3 * c.expert_dim) + 3 * c.dim)
    # a chunk of logits and what ppo.expected_gain makes of it: four copies in fp32
    logits = 4 * 4 * min(max(LOGITS, (1 + s.group) * s.seq * c.n_vocab), tokens * c.n_vocab)
    return state_bytes(s, c) + 3 * tokens * c.dim * itemsize + max(experts, logits)


def free_memory(device):
    """Bytes that this process may still take on a device; of the host what system, cgroup, ulimit leave."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    free = [math.inf]
    try:
        free.append(1024 * numbers('/proc/meminfo')['MemAvailable'])
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            free.append(limit - 1024 * numbers('/proc/self/status')['VmSize'])
        own_group = open('/proc/self/cgroup').readline().strip().rpartition(':')[2]
        group = Path('/sys/fs/cgroup') / own_group.lstrip('/')
        in_use = int((group / 'memory.current').read_text()) - numbers(group / 'memory.stat')['inactive_file']
        free.append(int((group / 'memory.max').read_text()) - in_use)
    except (OSError, ValueError, KeyError):                    # another system than Linux, or no limit
        pass
    return max(0, min(free))


def numbers(path):
    """{name: number} of a file in /proc or /sys whose lines are 'name: number ..'."""
    words = (line.split() for line in open(path))
    return {w[0].rstrip(':'): int(w[1]) for w in words if len(w) > 1 and w[1].isdigit()}


def check_memory(s, config, itemsize, size, working):
    """InputError if the weights as wanted and `working` bytes do not fit on s.device; size: ranks.

    Returns whether all layers of a streamed model can be page-locked in host memory.
    """
    device, how = torch.device(s.device), 'stream' if s.stream else 'shard' if size > 1 else 'plain'
    need, free = weight_bytes(config, itemsize, how, size)[0] + working, free_memory(device)
    streamed, on_host = weight_bytes(config, itemsize, 'stream')
    if need > free:
        smaller = 'a smaller --ppo-batch or --seq needs less'
        if streamed > free:
            hint = f'two layers and the embedding alone are {streamed / 1e9:.1f} GB'
        elif how == 'plain':
            hint = f'--stream needs {(streamed + working) / 1e9:.1f} GB'
            if streamed + working > free:
                hint += f', and with it {smaller}'
        else:
            hint = smaller
        raise InputError(f'memory: {s.device} has {free / 1e9:.1f} GB free, this run needs {need / 1e9:.1f} '
                         f'GB ({working / 1e9:.1f} of them beside the weights); {hint}')
    return s.stream and device.type == 'cuda' and on_host + 4e9 < free_memory(torch.device('cpu'))
