"""hub/checkpoint.py: a `Transformer` from a folder in the hub's format, and back.

Such a folder has config.json and model.safetensors, or shards of it with an index. The headers of all files
are compared with what config.json promises before any memory of the model's size is taken; then every tensor
is read once, from its file to its place in the stacked weights.
"""
import hashlib
import os
from pathlib import Path

import torch

from hub.config import read_config, to_hf
from hub.files import InputError, read_json, read_object, write_json
from hub.safetensors import read_ahead, read_header, read_into, read_safetensors, write_safetensors
from model import Transformer

HEAD = 'lm_head.weight'
# short name: (the hub's id, size in GB)
CHECKPOINTS = {
    'mixtral-8x7b': ('mistralai/Mixtral-8x7B-v0.1', 93),
    'mixtral-8x22b': ('mistralai/Mixtral-8x22B-v0.1', 281),
    'qwen1.5-moe': ('Qwen/Qwen1.5-MoE-A2.7B', 29),
    'deepseek-moe-16b': ('deepseek-ai/deepseek-moe-16b-base', 33),
    'olmoe-1b-7b': ('allenai/OLMoE-1B-7B-0924', 14),
    'qwen3-30b-a3b': ('Qwen/Qwen3-30B-A3B', 61)}


# ---------------------------------------------------------------- where a checkpoint is

def find_checkpoint(name, config_only=False):
    """The folder of --ckpt: itself, checkpoints/NAME, or a snapshot in the Hugging Face cache.

    Of several the first that is complete; of snapshots the one that refs/main names, then the newest.
    InputError says how to get what is not there; `config_only`: its config.json is all that is wanted.
    """
    if Path(name).is_dir():
        return Path(name)
    if name not in CHECKPOINTS:
        raise InputError(f'--ckpt {name}: no such folder, and not one of {", ".join(CHECKPOINTS)}')
    hub_id, size = CHECKPOINTS[name]
    here, cache = Path('checkpoints') / name, hub_cache()
    places = [here] if (here / 'config.json').exists() else []
    places += snapshots(cache / f'models--{hub_id.replace("/", "--")}')
    for place in [*filter(is_complete, places), *places]:
        return place
    what, files = f'its {size} GB', "--include '*.json' 'model*.safetensors'"
    if config_only:
        what, files = 'its config', 'config.json'
    raise InputError(f'--ckpt {name}: neither in {here} nor in {cache}; '
                     f'get {what} with: hf download {hub_id} {files} --local-dir {here}')


def hub_cache():
    """The folder of the Hugging Face cache, from the same variables as huggingface_hub."""
    def path(variable, default):
        return os.path.expandvars(os.path.expanduser(os.environ.get(variable) or default))
    home = path('HF_HOME', os.path.join(path('XDG_CACHE_HOME', '~/.cache'), 'huggingface'))
    return Path(path('HF_HUB_CACHE', path('HUGGINGFACE_HUB_CACHE', os.path.join(home, 'hub'))))


def snapshots(folder):
    """The snapshots of one model in the cache: that of refs/main, then the newest first."""
    configs = sorted((folder / 'snapshots').glob('*/config.json'), key=os.path.getmtime, reverse=True)
    main = folder / 'refs' / 'main'
    wanted = main.read_text().strip() if main.is_file() else ''
    return sorted((path.parent for path in configs), key=lambda place: place.name != wanted)


def is_complete(folder):
    """Are all weight files there?"""
    try:
        return all((folder / file).exists() for file in weight_files(folder))
    except InputError:
        return False


def weight_files(folder):
    """{file name: [the tensors it should hold] or None for all}, by the index or one model.safetensors."""
    index = folder / 'model.safetensors.index.json'
    if not index.exists():
        if not (folder / 'model.safetensors').exists():
            pickles = sorted(p.name for p in folder.iterdir() if p.suffix in ('.bin', '.pt'))
            hint = f'; {pickles[0]} is a pickle, which is never read: convert it' if pickles else ''
            raise InputError(f'{folder}: no model.safetensors and no model.safetensors.index.json{hint}')
        return {'model.safetensors': None}
    places = read_json(index)
    places = places.get('weight_map') if isinstance(places, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(f, str) for f in places.values()):
        raise InputError(f'{index}: no weight_map of tensor names to file names')
    files = {}
    for name, file in places.items():
        if Path(file).name != file or '\\' in file or not file.endswith('.safetensors'):
            raise InputError(f'{index}: {name} is said to be in {file!r}, '
                             f'which is no .safetensors file of this folder')
        files.setdefault(file, []).append(name)
    return files


def fingerprint(folder):
    """A digest of a checkpoint folder: config, tokenizer, and of each weight file size, header, 64 places."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.name not in ('config.json', 'tokenizer.json') and path.suffix != '.safetensors':
            continue
        size = os.path.getsize(path)
        digest.update(f'{path.name} {size} '.encode())
        with open(path, 'rb') as f:
            for i in range(65):
                f.seek(i * max(0, size - 4096) // 64)
                digest.update(f.read(4096))
    return digest.hexdigest()


def router_digest(routers):
    """A digest of the routers' weights, [(N,C), ..] in the order of the layers: which base is this?

    In bfloat16, so that a base that is loaded wider or narrower than it was saved is the same.
    """
    digest = hashlib.sha256()
    for weight in routers:
        digest.update(weight.detach().cpu().bfloat16().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def routers_of(folder):
    """The routers' weights in the files of a checkpoint, in the order of the layers."""
    found = {}
    for file in weight_files(Path(folder)):
        tensors, _ = read_safetensors(Path(folder) / file)
        for name, t in tensors.items():
            if name.endswith(('.mlp.gate.weight', '.block_sparse_moe.gate.weight')):
                found[int(name.split('.')[2])] = t
    return [found[layer] for layer in sorted(found)]


def weight_dtype(folder):
    """The dtype of a checkpoint: that of most of its bytes; fp32 for wider ones.

    Where the weights are not there yet, what config.json says. It is often missing or wrong, so the weights
    come first.
    """
    folder, size = Path(folder), {}
    if list(folder.glob('*.safetensors')):
        for file in weight_files(folder):
            for dtype, _, begin, stop in read_header(folder / file)[0].values():
                size[dtype] = size.get(dtype, 0) + stop - begin
        dtype = max(size, key=size.get, default=torch.float32)
    else:
        says = read_object(folder / 'config.json')
        name = str(says.get('torch_dtype') or says.get('dtype')).removeprefix('torch.')
        dtype = {'bfloat16': torch.bfloat16, 'float16': torch.float16}.get(name)
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32


# ---------------------------------------------------------------- the hub's names for our weights

def hub_tensors(model):
    """{the hub's name of a tensor: a view of our parameter}; stacked experts are one tensor each there.

    Of a sharded model (scale/shard.py) what this rank keeps: some experts, some rows of other tensors.
    """
    c, views = model.config, {}
    mixtral = c.model_type == 'mixtral'
    gate, up, down = ('w1', 'w3', 'w2') if mixtral else ('gate_proj', 'up_proj', 'down_proj')
    shared = '.shared_experts.' if c.model_type == 'deepseek' else '.shared_expert.'
    spelling = [('.router.', '.gate.'), ('.shared_gate.', '.shared_expert_gate.'), ('.shared.', shared)]
    if mixtral:
        spelling.append(('.mlp.', '.block_sparse_moe.'))
    for name, p in model.named_parameters():                   # a tied head is listed once, as the embedding
        first, p = own_rows(p)
        name = name if name.startswith('lm_head') else 'model.' + name
        for ours, theirs in spelling:
            name = name.replace(ours, theirs)
        block = name.rpartition('.')[0]
        if name.endswith('.w_in'):
            for n, expert in enumerate(p, first):
                views[f'{block}.experts.{n}.{gate}.weight'] = expert[:c.expert_dim]
                views[f'{block}.experts.{n}.{up}.weight'] = expert[c.expert_dim:]
        elif name.endswith('.w_out'):
            for n, expert in enumerate(p, first):
                views[f'{block}.experts.{n}.{down}.weight'] = expert
        else:
            views[name] = p
    return views


def own_rows(p):
    """(number of the first, rows): what this rank keeps of a parameter's first dimension, or all of it."""
    if not hasattr(p, 'to_local'):
        return 0, p
    return first_row(len(p), p.device_mesh), p.to_local()


def first_row(n, mesh):
    """The first of n rows that this rank keeps: FSDP gives ceil(n / ranks) to each, the rest to the last."""
    return min(mesh.get_local_rank() * -(-n // mesh.size()), n)


def check_tensors(folder, files, layouts, expected, family):
    """InputError unless the files hold what is expected, {name: shape}: in name, shape and kind, and once."""
    left = dict(expected)
    for file, names in files.items():
        path, tensors = folder / file, layouts[file]
        wrong = sorted(set(names) ^ tensors.keys()) if names is not None else []
        if wrong:
            what = 'missing' if wrong[0] in names else 'not in the index'
            raise InputError(f'{path}: tensor {wrong[0]} is {what}')
        for name, (dtype, shape, _, _) in tensors.items():
            if name.endswith('rotary_emb.inv_freq'):      # old files carry the table that rope_table computes
                continue
            if name == HEAD and HEAD not in expected:          # tied, and in the file all the same
                check_tied(folder, layouts)
                continue
            if name not in left:
                raise InputError(f'{path}: tensor {name} is not expected in a {family} model '
                                 f'of this config.json')
            if torch.Size(shape) != left[name]:
                raise InputError(f'{path}: {name} has shape {shape}, config.json says {list(left[name])}')
            if not dtype.is_floating_point or dtype.itemsize == 1:
                raise InputError(f'{path}: {name} is {dtype}; quantised weights are not supported')
            del left[name]
    if left:
        raise InputError(f'{folder}: tensor {min(left)} is missing from the weight files')


def check_tied(folder, layouts):
    """InputError unless the head in the files is the embedding, to which config.json ties it."""
    both = {}
    for file, layout in layouts.items():
        for name in {HEAD, 'model.embed_tokens.weight'} & layout.keys():
            both[name] = read_safetensors(folder / file)[0][name]
    if len(both) == 2 and not torch.equal(*both.values()):
        raise InputError(f'{folder}: config.json ties {HEAD} to the embedding, '
                         f'but the files hold another one')


# ---------------------------------------------------------------- load and save

def open_checkpoint(folder, dtype, kind):
    """(model of class `kind` on the meta device, {path: layout}) of a folder whose weights are all there.

    InputError names what is wrong; nothing but headers has been read.
    """
    config = read_config(folder)
    files = weight_files(folder)
    for file in files:
        if not (folder / file).exists():
            raise InputError(f'{folder / file}: missing, though the index names it; fetch it again')
    with torch.device('meta'):
        model = kind(config).to(dtype).requires_grad_(False)
    layouts = {file: read_header(folder / file)[0] for file in files}
    shapes = {name: view.shape for name, view in hub_tensors(model).items()}
    check_tensors(folder, files, layouts, shapes, config.model_type)
    return model, {folder / file: layout for file, layout in layouts.items()}


def load(folder, dtype=torch.float32, device='cpu', progress=lambda done, total: None):
    """The frozen Transformer in a folder, in the wanted dtype and on the device.

    `progress(bytes so far, of all)` is called after each file. InputError names the file or tensor that is
    wrong.
    """
    model, layouts = open_checkpoint(Path(folder), dtype, Transformer)
    model = model.to_empty(device=device)
    model.tie()
    views, done, total = hub_tensors(model), 0, sum(map(os.path.getsize, layouts))
    for path, layout in layouts.items():
        read_ahead(path)
        read_into(path, layout, views)
        done += os.path.getsize(path)
        progress(done, total)
    return model


def save(model, folder):
    """Write config.json and model.safetensors in the model's dtype: transformers opens the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / 'model.safetensors', {n: t.detach() for n, t in hub_tensors(model).items()})
    dtype = str(model.dtype).removeprefix('torch.')
    # last: a folder with a config is complete
    write_json(folder / 'config.json', {**to_hf(model.config), 'torch_dtype': dtype})
