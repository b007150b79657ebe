"""scale/memory.py: does it fit? Bytes of weights and of PPO beside them, counted before anything is read."""
import os
import re
from pathlib import Path

import torch

from allocator import Allocators
from hub.files import InputError
from model import Transformer

PASS_TOKENS = 2 ** 14   # of Mixtral-8x7B, so many tokens fill its matmuls and need 4 GB of activations
LOGITS = 2 ** 28        # the head runs on so many logits at a time, 1 GB in fp32


def sequences_of_pass(T):
    """How many sequences of T tokens go through the model at once, so that activations stay small."""
    return max(1, PASS_TOKENS // T)


def weight_counts(config):
    """(weights of the largest layer, of all layers, of embedding, last norm and head)."""
    with torch.device('meta'):
        model = Transformer(config)

    def count(module):
        return sum(p.numel() for p in module.parameters())
    layers = [count(layer) for layer in model.layers]
    return max(layers), sum(layers), count(model) - sum(layers)


def weight_bytes(config, itemsize, stream, size):
    """Bytes of the weights on a device: all of them, `stream`ed, or an equal part on each of `size` ranks."""
    layer, layers, rest = weight_counts(config)
    if stream:
        layers = 2 * layer                                     # the others are on the host
    elif size > 1:
        layers = layers // size + 2 * layer
    return itemsize * (layers + rest)


def empty_allocators(s, config):
    """Allocators of the sizes of a run, all weights 0: as published for up to N experts, by default for K.

    The expected reward cannot be better than that of its teacher, so it has no use for more experts.
    """
    k_max = config.n_experts
    if s.reward == 'expected':
        k_max = min(k_max, config.top_k + s.beyond)
    return Allocators(config, k_max, s.extended)


def working_bytes(s, config, itemsize):
    """Bytes that PPO needs beside the weights at their peak.

    What a rollout keeps for the update, hidden states, and the larger of one pass's experts and logits.
    """
    c = config
    L, k_max, n_in = empty_allocators(s, c).weight.shape
    sampled = s.group * s.ppo_batch * s.seq                    # tokens
    tokens = sampled + s.ppo_batch * s.seq
    # of every layer and token z; k, logp and noise. Of the layer that learns z in fp32, logits and gradients
    states = L * sampled * (itemsize * n_in + 16)
    states += sampled * (4 * n_in + 40 * k_max)
    hidden = 3 * tokens * c.dim * itemsize
    of_token = (c.top_k + s.beyond) * (2 * c.dim + 3 * c.expert_dim) + 3 * c.dim
    experts = min(max(PASS_TOKENS, s.seq), sampled) * of_token * itemsize
    # what ppo.expected_gain makes of a chunk of logits: four copies in fp32
    logits = 16 * min(LOGITS, tokens * c.n_vocab)
    return states + hidden + max(experts, logits)


def free_memory(device):
    """Bytes that this process may still take on a device, by its name."""
    if device.startswith('cuda'):
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path('/proc/meminfo')
    if not meminfo.exists():                                   # macOS tells only what the machine has
        return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    available = re.search(r'MemAvailable: *(\d+)', meminfo.read_text())[1]  # in KiB
    return 1024 * int(available)


def check_memory(s, config, itemsize, size, working):
    """InputError if the weights as wanted and `working` bytes do not fit on s.device; size: ranks."""
    need = working + weight_bytes(config, itemsize, s.stream, size)
    free = free_memory(s.device)
    if need > free:
        raise InputError(
            f'memory: {s.device} has {free / 1e9:.1f} GB free, this run needs {need / 1e9:.1f} GB, '
            f'{working / 1e9:.1f} of them beside the weights; '
            f'--stream, a smaller --ppo-batch or --seq need less')
