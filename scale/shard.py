"""scale/shard.py: one model over the ranks of torch.distributed, each with a part of every layer (FSDP2)."""
import torch
import torch.distributed as dist

from hub.checkpoint import fill, first_row, hub_tensors, open_checkpoint
from scale.stream import LayerByLayer


class Sharded(LayerByLayer):
    """The same model, each layer gathered from all ranks and freed afterwards.

    Embedding, last norm and head are on every rank. All ranks must sweep together: the same number of calls
    of `hidden_of`, whatever is in them. `shard` makes one.
    """
    tokens_per_visit = 2 ** 14

    def begin(self, layer):
        return layer.unshard(async_op=True).wait

    def visit(self):
        for layer in super().visit():
            yield layer
            layer.reshard()


def shard(folder, dtype, device, progress=None):
    """The frozen `Sharded` model in a hub-format folder; each rank reads only its part of the files."""
    from torch.distributed.fsdp import fully_shard         # half a second that one process need not wait
    model, layout = open_checkpoint(folder, dtype, Sharded)
    mesh = dist.init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=False)             # `visit` does
    for name, view in hub_tensors(model).items():
        t, path, begin = layout[name]
        if len(view) < len(t):                                 # this rank's rows begin further behind
            begin += t[0].nbytes * first_row(len(t))
            layout[name] = t, path, begin
    return fill(model, layout, device, progress)
