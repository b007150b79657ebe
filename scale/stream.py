"""scale/stream.py: a model larger than its device, one layer after another.

A training step is forward passes over many tokens, so the weights need not all be there: the layer at work
is, and the next one is on its way. All passes of a step share each layer's visit
(model.py:Transformer.hidden_of), so with enough tokens the way of the weights costs nothing. The logits are
those of the loaded model to the last bit.
"""
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from hub.checkpoint import hub_tensors, open_checkpoint
from hub.safetensors import read_into
from model import Transformer


class Streamed(Transformer):
    """The same model with two layers' worth of memory. `stream` makes one.

    The layers' weights stay on the host: in page-locked memory if they fit there and the device is a GPU,
    else in their files. One thread fetches layer i + 1 while layer i computes, on a GPU over a side stream.
    The parameters of layer i are views into buffer i % 2, so they hold its weights only while `visit` is at
    layer i. A pass brings every weight over once, so a visit should be worth it: see `hidden_of` and
    `tokens_per_visit`.
    """
    tokens_per_visit = 2 ** 16     # of Mixtral-8x7B: an H100 computes on them longer than a layer's way takes

    def prepare(self, source, dtype, device, pinned, progress):
        """Take the buffers and read what is not streamed.

        source({hub name: view}) reads those tensors from the files. pinned: keep all layers in page-locked
        memory.
        """
        def take(numbers, **where):
            return torch.empty(numbers, dtype=dtype, **where)
        sizes = [flat_size(layer) for layer in self.layers]
        self.buffers = [take(max(sizes), device=device) for _ in range(2)]
        self.host = self.buffers                               # on a CPU the files are read into the buffers
        self.side = torch.cuda.Stream(device) if device.type == 'cuda' else None
        if self.side:
            self.host = [take(size, pin_memory=True) for size in (sizes if pinned else 2 * [max(sizes)])]
        for i, layer in enumerate(self.layers):
            lay_out(layer, self.host[i % len(self.host)])
        views = hub_tensors(self)                              # of the layers: in host memory
        self.places = []                                       # of each layer, {hub name: view}
        for i in range(len(sizes)):
            prefix = f'model.layers.{i}.'
            self.places.append({name: view for name, view in views.items() if name.startswith(prefix)})
        for i, layer in enumerate(self.layers):
            lay_out(layer, self.buffers[i % 2])
        for module in (self.embed_tokens, self.norm, self.lm_head):
            module.to_empty(device=device)
        self.tie()
        in_layers = set().union(*self.places)
        source({name: view for name, view in hub_tensors(self).items() if name not in in_layers})
        self.pinned, self.source, self.copied = pinned, source, [None, None]
        self.thread = ThreadPoolExecutor(1)
        for i, place in enumerate(self.places if pinned else []):
            source(place)
            progress(sum(sizes[:i + 1]) * dtype.itemsize, sum(sizes) * dtype.itemsize)

    def fetch(self, i, free):
        """In the reading thread: bring layer i into its buffer. Returns the CUDA event of its arrival.

        free: the CUDA event behind which the buffer may be overwritten.
        """
        if not self.pinned:
            if self.copied[i % 2]:
                self.copied[i % 2].synchronize()    # the host buffer has been copied, it may be written again
            self.source(self.places[i])
        if self.side:
            with torch.cuda.stream(self.side):
                self.side.wait_event(free)
                n = flat_size(self.layers[i])
                self.buffers[i % 2][:n].copy_(self.host[i % len(self.host)][:n], non_blocking=True)
                self.copied[i % 2] = self.side.record_event()
        return self.copied[i % 2]

    def ask_for(self, i):
        """The future of `fetch`: layer i may come once the device has done what it was asked to do so far."""
        free = torch.cuda.current_stream(self.side.device).record_event() if self.side else None
        return self.thread.submit(self.fetch, i, free)

    def visit(self):
        assert not torch.is_grad_enabled(), 'a backward pass would find other weights in the buffers'
        coming = self.ask_for(0)
        for i, layer in enumerate(self.layers):
            copied = coming.result()
            if self.side:
                torch.cuda.current_stream(self.side.device).wait_event(copied)
            if i + 1 < len(self.layers):        # layer i has not been asked to run: this waits for i - 1 only
                coming = self.ask_for(i + 1)
            yield layer


def padded(n):
    """The next multiple of 128 numbers: every weight in a flat buffer is aligned as its kernels want it."""
    return -(-n // 128) * 128


def flat_size(layer):
    """How many numbers a layer's weights take in a flat buffer."""
    return sum(padded(p.numel()) for p in layer.parameters())


def lay_out(layer, flat):
    """Let a layer's parameters be views into a flat buffer, one behind the other."""
    views, at = {}, 0
    for name, p in layer.named_parameters():
        views[name] = flat[at:at + p.numel()].view(p.shape)
        at += padded(p.numel())
    layer.load_state_dict(views, assign=True)
    layer.requires_grad_(False)


def stream(folder, dtype=torch.float32, device='cpu', pinned=False, progress=lambda done, total: None):
    """The frozen `Streamed` model in a folder. `pinned`: all layers in page-locked host memory, for CUDA."""
    model, layouts = open_checkpoint(Path(folder), dtype, Streamed)

    def source(views):
        for path, layout in layouts.items():
            if views.keys() & layout.keys():
                read_into(path, layout, views)
    model.prepare(source, dtype, torch.device(device), pinned, progress)
    return model
