"""hub/checkpoint.py: a `Transformer` from a folder in the hub's format, and back.

Such a folder has config.json and model.safetensors, or shards of it with an index. The headers of all files
are compared with what config.json promises before any memory of the model's size is taken; then every tensor
is read once, from its file to its place in the stacked weights.
"""
import hashlib
from pathlib import Path

import torch
import torch.distributed as dist

from hub.config import read_config, to_hf
from hub.files import InputError, read_json, reading, write_json
from hub.safetensors import raw_bytes, read_header, read_into, write_safetensors
from model import Transformer

HEAD = 'lm_head.weight'
PUBLISHED = Path(__file__).with_name('published')       # NAME/config.json of the short names
# short names of the hub's
CHECKPOINTS = {
    'mixtral-8x7b': 'mistralai/Mixtral-8x7B-v0.1',
    'mixtral-8x22b': 'mistralai/Mixtral-8x22B-v0.1',
    'qwen1.5-moe': 'Qwen/Qwen1.5-MoE-A2.7B',
    'deepseek-moe-16b': 'deepseek-ai/deepseek-moe-16b-base',
    'olmoe-1b-7b': 'allenai/OLMoE-1B-7B-0924',
    'qwen3-30b-a3b': 'Qwen/Qwen3-30B-A3B',
}


# ================================================================ which folder, which files, which base

def find_checkpoint(name, wanted='model*.safetensors'):
    """The folder of --ckpt: itself, checkpoints/NAME, or a snapshot in the Hugging Face cache.

    InputError says how to get what is not there. wanted: the file that the folder must hold. For config.json
    that of hub/published will do, which has the sizes.
    """
    if Path(name).is_dir():
        return Path(name)
    if name not in CHECKPOINTS:
        raise InputError(f'--ckpt {name}: no such folder, and not one of {", ".join(CHECKPOINTS)}')
    hub_id = CHECKPOINTS[name]
    here = Path('checkpoints') / name
    for folder in here, cached(hub_id), PUBLISHED / name:
        if any(folder.glob(wanted)):
            return folder
    raise InputError(f'--ckpt {name}: neither in {here} nor in the Hugging Face cache; get it with: '
                     f"hf download {hub_id} --include '*.json' '{wanted}' --local-dir {here}")


def cached(hub_id):
    """The snapshot of a model in the Hugging Face cache; no folder without huggingface_hub."""
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(hub_id, local_files_only=True))
    except (ImportError, OSError):
        return Path('not-there')


def read_layout(folder):
    """The layout of `read_header` for all weight files: those in the index, or one model.safetensors."""
    names = ['model.safetensors']
    index = folder / 'model.safetensors.index.json'
    if index.exists():
        with reading(index):
            names = sorted(set(read_json(index)['weight_map'].values()))
            if any(Path(name).name != name for name in names):
                raise ValueError('a file outside of this folder')
    layout = {}
    for name in names:
        of_file, _ = read_header(folder / name)
        if layout.keys() & of_file.keys():
            raise InputError(f'{folder / name}: some tensor of it is in another weight file too')
        layout |= of_file
    return layout


def weight_dtype(folder):
    """The dtype of a checkpoint: that of its largest tensor; fp32 for wider ones.

    What config.json says is often missing or wrong. Without weights: bfloat16, as all families are published.
    """
    if not any(folder.glob('*.safetensors')):
        return torch.bfloat16
    tensors = [t for t, _, _ in read_layout(folder).values()]
    dtype = max(tensors, key=lambda t: t.nbytes, default=torch.empty(0)).dtype
    return dtype if dtype.itemsize == 2 else torch.float32


def weights_digest(tensors):
    """Which base model is this? The sha256 of some of its weights, as hexadecimal digits.

    tensors: of every MoE layer in order the router (N,C), then the first rows of all experts' output matrices
    (N,F), or one of them after the other. In bfloat16, so that a model that is loaded wider or narrower than
    it was saved is the same.
    """
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(raw_bytes(t.bfloat16()))
    return digest.hexdigest()


def base_digest(folder):
    """`weights_digest` of the files of a checkpoint, of which only these weights are read."""
    c = read_config(folder)
    views = {}
    for layer in c.moe_layers:
        block = hub_name(f'layers.{layer}.mlp.', c)
        views[f'{block}gate.weight'] = torch.zeros(c.n_experts, c.dim)
        for n in range(c.n_experts):
            views[expert_names(block, n, c)[2]] = torch.zeros(c.expert_dim)
    read_into(read_layout(folder), views)
    return weights_digest(views.values())


# ================================================================ the hub's names for our weights

def hub_name(name, config):
    """The hub's name of one of our parameters."""
    # of one expert or several, and of their gate
    shared = '.shared_experts' if config.model_type == 'deepseek' else '.shared_expert'
    name = name.replace('.mlp.router.', '.mlp.gate.').replace('.shared', shared)
    if config.model_type == 'mixtral':
        name = name.replace('.mlp.', '.block_sparse_moe.')
    return name if name == HEAD else f'model.{name}'


def expert_names(block, n, config):
    """The hub's names of gate, up and output matrix of expert n; block: the hub's name of the MoE block."""
    parts = ('w1', 'w3', 'w2') if config.model_type == 'mixtral' else ('gate_proj', 'up_proj', 'down_proj')
    return [f'{block}experts.{n}.{part}.weight' for part in parts]


def hub_tensors(model):
    """{the hub's name of a tensor: a view of our parameter}; stacked experts are one tensor each there.

    Of a sharded model (scale/shard.py) what this rank keeps: some experts, some rows of other tensors.
    """
    c = model.config
    views = {}
    for name, p in model.named_parameters():                   # a tied head is listed once, as the embedding
        first = 0
        if hasattr(p, 'to_local'):
            first = first_row(len(p))
            p = p.to_local()
        name = hub_name(name, c)
        block, stacked, last = name.rpartition('w_')
        if not stacked:
            views[name] = p
            continue
        for n, expert in enumerate(p, first):
            gate, up, down = expert_names(block, n, c)
            if last == 'in':
                views[gate], views[up] = expert.chunk(2)
            else:
                views[down] = expert
    return views


def first_row(n):
    """Where this rank's part of n rows begins: FSDP gives ceil(n / ranks) to each, while there are any."""
    return dist.get_rank() * -(-n // dist.get_world_size())


# ================================================================ load and save

def open_checkpoint(folder, dtype, kind):
    """(model of class `kind` on the meta device, layout) of a folder whose weights are all there.

    Each tensor has the shape that config.json promises: InputError names what is wrong. Nothing but headers
    has been read. The layout is that of `read_layout`.
    """
    config = read_config(folder)
    with torch.device('meta'):
        model = kind(config).to(dtype).requires_grad_(False)
    layout = read_layout(folder)
    if config.tie:
        layout.pop(HEAD, None)                                 # it is the embedding
    left = hub_tensors(model)
    for name, (t, path, _) in layout.items():
        shape = list(t.shape)
        wanted = list(left.pop(name).shape) if name in left else 'none'
        if shape != wanted or not t.is_floating_point():
            raise InputError(f'{path}: {name!r:.100} has shape {shape} and {t.dtype}; config.json says '
                             f'{wanted}, and quantised weights are not supported')
    if left:
        raise InputError(f'{folder}: tensor {min(left)} is missing from the weight files')
    return model, layout


def load(folder, dtype=torch.float32, device='cpu', progress=None):
    """The frozen Transformer in a folder, in the wanted dtype and on the device.

    `progress(tensors so far, of all)` is called after each. InputError names the file or tensor that is
    wrong.
    """
    model, layout = open_checkpoint(folder, dtype, Transformer)
    return fill(model, layout, device, progress)


def fill(model, layout, device, progress):
    """Give what `open_checkpoint` returned memory on the device, and the weights in its files."""
    model = model.to_empty(device=device)
    model.tie()
    read_into(layout, hub_tensors(model), progress)
    return model


def save(model, folder):
    """Write config.json and model.safetensors in the model's dtype: transformers opens the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / 'model.safetensors', hub_tensors(model))
    # last: a folder with a config is complete
    write_json(folder / 'config.json', to_hf(model.config))
