"""scale/stream.py: a model larger than its device, one layer after another.

A training step is forward passes over many tokens, so the weights need not all be there: the layer at work
is, and the next one is being transferred. All passes of a step share one sweep over the layers (`hidden_of`),
so with enough tokens the transfer takes no longer than computing. The logits are those of the loaded model to
the last bit.
"""
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import torch

from hub.checkpoint import hub_tensors, open_checkpoint
from hub.safetensors import read_into
from model import Transformer


class LayerByLayer(Transformer):
    """A Transformer whose layers come and go, each on its way while the one before computes.

    A sweep over all layers transfers all weights, so all passes share one, of many tokens if possible.
    """

    def begin(self, i):
        """Start to bring the weights of layer i; returns a function that waits until they are there."""
        raise NotImplementedError

    def end(self, layer):
        """The layer has been asked to do all it has to in this sweep."""

    def visit(self):
        """Yield one layer after the other, each with its weights until the next is asked for."""
        assert not torch.is_grad_enabled(), 'a backward pass would not find these weights again'
        wait = self.begin(0)
        for i, layer in enumerate(self.layers):
            wait()
            if i + 1 < len(self.layers):
                wait = self.begin(i + 1)
            yield layer
            self.end(layer)

    def hidden_of(self, passes):
        xs = [self.embed_tokens(tokens) for tokens, _ in passes]            # (B,T,C) each
        positions = [self.positions(tokens.shape[1]) for tokens, _ in passes]
        for layer in self.visit():
            for i, (_, choose_k) in enumerate(passes):
                xs[i] = layer(xs[i], *positions[i], None, choose_k)
        return [self.norm(x) for x in xs]


class Streamed(LayerByLayer):
    """The same model with two layers' worth of memory. `stream` makes one.

    The layers' weights stay on the host: in page-locked memory if they fit there and the device is a GPU,
    else in their files. One thread fetches layer i + 1 while layer i computes, on a GPU over a side stream.
    The parameters of layer i are views into buffer i % 2, so they hold its weights only while `visit` is at
    layer i.
    """
    tokens_per_visit = 2 ** 16     # of Mixtral-8x7B: an H100 computes on them longer than a layer's transfer

    def prepare(self, layouts, dtype, device, pinned, progress):
        """Take the buffers and read what is not streamed.

        layouts: as hub/checkpoint.py:open_checkpoint. pinned: keep all layers in page-locked memory.
        """
        self.layouts = layouts
        self.pinned = pinned
        self.thread = ThreadPoolExecutor(1)
        n = len(self.layers)
        size = max(map(flat_size, self.layers))
        self.buffers = torch.empty(2, size, dtype=dtype, device=device)
        self.host = self.buffers                               # on a CPU the files are read into the buffers
        self.side = None
        if device.type == 'cuda':
            buffers = range(n if pinned else 2)
            self.host = [torch.empty(size, dtype=dtype, pin_memory=True) for _ in buffers]
            self.side = torch.cuda.Stream(device)
        for module in self.embed_tokens, self.norm, self.lm_head:
            module.to_empty(device=device)
        self.tie()
        # where the files' tensors go: {layer, or None: {hub name: view}}
        lay_out(self.layers, self.host)
        self.views = defaultdict(dict)
        for name, view in hub_tensors(self).items():
            layer = int(name.split('.')[2]) if name.startswith('model.layers.') else None
            self.views[layer][name] = view
        lay_out(self.layers, self.buffers)
        self.read(None)
        if pinned:
            for i in range(n):
                self.read(i)
                progress(i + 1, n)

    def read(self, layer):
        """Fill the views of a layer, or with None what is not streamed, from the files."""
        views = self.views[layer]
        for path, layout in self.layouts.items():
            if views.keys() & layout.keys():
                read_into(path, layout, views)

    def fetch(self, i):
        """In the reading thread: bring layer i into its buffer."""
        if not self.pinned:
            if self.side:
                self.side.synchronize()         # the host buffer has been copied, it may be written again
            self.read(i)
        if self.side:
            host = self.host[i % len(self.host)]
            with torch.cuda.stream(self.side):
                self.buffers[i % 2].copy_(host, non_blocking=True)

    def begin(self, i):
        """As LayerByLayer's; layer i may come once the device has done what it was asked to do so far.

        That includes layer i - 2, whose buffer it takes; layer i - 1 has not been asked to run yet.
        """
        side = self.side
        if side:
            side.wait_stream(torch.cuda.current_stream(side.device))
        coming = self.thread.submit(self.fetch, i)

        def wait():
            coming.result()
            if side:
                torch.cuda.current_stream(side.device).wait_stream(side)
        return wait


def padded(n):
    """The next multiple of 128 numbers: every weight in a flat buffer is aligned as its kernels want it."""
    return -(-n // 128) * 128


def flat_size(layer):
    """How many numbers a layer's weights take in a flat buffer."""
    return sum(padded(p.numel()) for p in layer.parameters())


def lay_out(layers, buffers):
    """Let the parameters of layer i be views into flat buffer i, modulo their number, one behind another."""
    for i, layer in enumerate(layers):
        flat = buffers[i % len(buffers)]
        views = {}
        at = 0
        for name, p in layer.named_parameters():
            views[name] = flat[at:at + p.numel()].view(p.shape)
            at += padded(p.numel())
        layer.load_state_dict(views, assign=True)


def stream(folder, dtype=torch.float32, device='cpu', pinned=False, progress=lambda done, total: None):
    """The frozen `Streamed` model in a folder. `pinned`: all layers in page-locked host memory, for CUDA."""
    model, layouts = open_checkpoint(folder, dtype, Streamed)
    model.prepare(layouts, dtype, torch.device(device), pinned, progress)
    return model
