"""scale/stream.py: a model larger than its device, one layer after another.

A training step is forward passes over many tokens, so the weights need not all be there: the layer at work
is, and the next one is being transferred. All passes of a step share one sweep over the layers (`hidden_of`),
so with enough tokens the transfer takes no longer than computing. The logits are those of the loaded model to
the last bit.
"""
import itertools
from concurrent.futures import ThreadPoolExecutor

import torch

from hub.checkpoint import hub_tensors, open_checkpoint
from hub.safetensors import read_into
from model import Transformer
from scale.memory import free_memory

ALIGNED = 128   # numbers: every weight in a flat buffer begins where its kernels want it


class LayerByLayer(Transformer):
    """A Transformer whose layers come and go, each on its way while the one before computes.

    A sweep over all layers transfers all weights, so all passes share one, of many tokens if possible. A
    subclass has begin(layer), which starts to bring its weights and returns a function that waits for them.
    """

    def visit(self):
        """Yield one layer after the other, each with its weights until the next is asked for."""
        assert not torch.is_grad_enabled(), 'a backward pass would not find these weights again'
        waits = map(self.begin, self.layers)                   # a layer begins when its wait is asked for
        wait = next(waits)
        for layer in self.layers:
            wait()
            wait = next(waits, None)
            yield layer


class Streamed(LayerByLayer):
    """The same model with two layers' worth of memory. `stream` makes one.

    The layers' weights stay on the host: in page-locked memory if they fit there and the device is a GPU,
    else in their files. One thread fetches layer i + 1 while layer i computes, on a GPU over a side stream.
    The parameters of layer i are views into buffer i % 2, so they hold its weights only while `visit` is at
    layer i.
    """
    tokens_per_visit = 2 ** 16     # of Mixtral-8x7B: an H100 computes on them longer than a layer's transfer
    pinned = False                 # are all layers in page-locked memory?
    side = None                    # the stream on which a GPU gets them

    def read(self, *starts):
        """Fill the views whose hub names start so from the files."""
        views = {name: view for name, view in self.views.items() if name.startswith(starts)}
        read_into(self.layout, views)

    def fetch(self, i):
        """In the reading thread: bring layer i into its buffer."""
        if not self.pinned:
            self.read(f'model.layers.{i}.')
        if self.side:
            host = self.host[i % len(self.host)]
            with torch.cuda.stream(self.side):
                self.buffers[i % 2].copy_(host)                # this thread waits for its end

    def begin(self, layer):
        """As LayerByLayer's; layer i may come once the device has done what it was asked to do so far.

        That includes layer i - 2, whose buffer it takes; layer i - 1 has not been asked to run yet.
        """
        if self.side:
            self.side.wait_stream(torch.cuda.current_stream(self.device))
        return self.thread.submit(self.fetch, layer.i).result


def flat_size(layer):
    """How many numbers a layer's weights take in a flat buffer, at most."""
    return sum(p.numel() + ALIGNED for p in layer.parameters())


def lay_out(layers, buffers):
    """Let the parameters of each layer be views into one of the flat buffers in turn, one behind another."""
    for layer, flat in zip(layers, itertools.cycle(buffers)):
        views = {}
        for name, p in layer.named_parameters():
            n = p.numel()
            views[name] = flat[:n].view(p.shape)
            flat = flat[n + -n % ALIGNED:]                     # the next begins aligned
        layer.load_state_dict(views, assign=True)


def stream(folder, dtype=torch.float32, device='cpu', progress=None):
    """The frozen `Streamed` model in a folder: its layers in page-locked host memory, or in their files."""
    model, layout = open_checkpoint(folder, dtype, Streamed)
    layers = model.layers
    size = max(map(flat_size, layers))
    buffers = torch.empty(2, size, dtype=dtype, device=device)
    host = buffers                                             # on a CPU the files are read into the buffers
    if buffers.is_cuda:
        model.pinned = len(layers) * buffers[0].nbytes + 4e9 < free_memory('cpu')
        n = len(layers) if model.pinned else 1
        host = [torch.empty(size, dtype=dtype, pin_memory=True) for _ in range(n)]
        model.side = torch.cuda.Stream(device)
    for module in model.embed_tokens, model.norm, model.lm_head:
        module.to_empty(device=device)
    model.tie()
    # where the files' tensors go: {hub name: view}
    lay_out(layers, host)
    model.views = hub_tensors(model)
    lay_out(layers, buffers)
    model.buffers = buffers
    model.host = host
    model.layout = layout
    model.thread = ThreadPoolExecutor(1)
    if model.pinned:
        read_into(layout, model.views, progress)
    else:
        model.read('model.embed_tokens.', 'model.norm.', 'lm_head.')
    return model
