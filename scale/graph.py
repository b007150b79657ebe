"""scale/graph.py: decoding token by token from a CUDA graph, one launch a step instead of hundreds."""
import torch

import moe_dispatch
from model import Cache, Transformer, eager_decoder


class StaticCache(Cache):
    """A filled Cache taken over for decoding, its length a number on the device.

    Every step is the same kernels over the same memory (attention over all max_len places, the empty ones
    masked), so a CUDA graph can hold one: each adds 1 to the length in place. T is always 1.
    """

    def __init__(self, cache):
        self.kv = cache.kv
        self.table = cache.table
        device = cache.kv.device
        self.length = torch.tensor([cache.length], device=device)           # (1,)
        self.places = torch.arange(cache.kv.shape[4], device=device)        # (max_len,)

    def positions(self, T):
        rope = [table[self.length] for table in self.table]                 # (1,D) each
        return rope, self.places[None] <= self.length                       # (1,max_len)

    def extend(self, layer, k, v):
        return self.kv[layer].index_copy_(3, self.length, torch.stack([k, v]))


def graph_decoder(model, choose_k, cache):
    """step(new (B,1)) -> the next logits (B,V) fp32, as model.py:eager_decoder's.

    Captured in a CUDA graph where torch has a grouped matmul without host sync. `choose_k` must then be free
    of host syncs too, as all of allocator.py are.
    """
    stays = type(model) is Transformer                         # all layers are where they are
    few = cache.kv.shape[2] <= moe_dispatch.STATIC_TOKENS
    if stays and few and moe_dispatch.native(cache.kv):
        return Captured(eager_decoder(model, choose_k, StaticCache(cache)))
    return eager_decoder(model, choose_k, cache)


class Captured:
    """Decoding steps of which the third is captured: the first two start what must not start in a capture."""

    def __init__(self, eager):
        self.eager = eager
        self.steps = 0

    def __call__(self, new):
        self.steps += 1
        if self.steps < 3:
            return self.eager(new)
        if self.steps == 3:
            self.new = new.clone()                             # what the graph reads
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):                 # records, does not run
                self.logits = self.eager(self.new)
        self.new.copy_(new)
        self.graph.replay()
        return self.logits
