"""base/frozen.py: the frozen base of a run, its tokenizer and text: from --ckpt, or learnt in OUT/base."""
import os
import shutil
import time

import torch

from base.documents import read_documents, split_documents
from base.pretrain import RECIPE, base_recipe, learn_base
from base.text import SEPARATOR, learn_bpe, tokenize, tokenizer_json
from hub.checkpoint import (find_checkpoint, fingerprint, hub_tensors, load, router_digest, routers_of, save,
                            weight_dtype)
from hub.config import read_config, to_hf
from hub.files import InputError, read_object, write_json
from hub.tokenizer import Tokenizer
from model import Config
from run.console import Progress
from run.ranks import ranks, same_everywhere
from scale.memory import check_memory, working_bytes
from scale.shard import shard
from scale.stream import stream

BPE_CHARACTERS = 2 ** 24        # are enough to learn merges from
BASE_FILES = {'config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json', 'recipe.json'}
RECIPE_FACTS = {'text', *RECIPE}


def base_model(s, out):
    """(model, tokenizer, texts): the frozen base of --ckpt or of OUT/base, learnt first if need be.

    texts: the three splits as Text. InputError if a base is there that was learnt with other settings or
    text.
    """
    documents = read_documents(s.data, s.documents, s.prose)
    parts, recipe = split_documents(documents), base_recipe(s, documents)
    folder = base_folder(s, out)
    learn = not s.ckpt and (s.fresh or not is_there(folder, recipe))
    if learn and folder.exists():
        check_ours(folder)
    place = begin_base(folder, s, parts) if learn else folder
    tokenizer = Tokenizer(place)
    sizes = {'train': max(s.ppo_batch, s.base_batch * learn), 'calibration': 0, 'held-out': 0}
    texts = [tokenize(part, tokenizer, s.seq, name, B) for part, (name, B) in zip(parts, sizes.items())]
    if learn:
        finish_base(place, folder, s, texts[0], recipe)
    if ranks()[1] > 1:
        same_everywhere(f'the checkpoint {folder}', fingerprint(folder))
        same_everywhere('the text of --data', recipe['text'])
    model = load_model(s, folder, learns=True)
    if s.seq > model.config.max_len:
        raise InputError(f'--seq {s.seq}: the model in {folder} reads at most {model.config.max_len} tokens')
    largest = max(int(text.tokens.max()) for text in texts)
    if largest >= model.config.n_vocab:
        raise InputError(f'{folder}: the tokenizer gives id {largest}, '
                         f'the model has only {model.config.n_vocab} tokens')
    check_forward(model, texts[0].tokens[:s.seq][None])
    return model, tokenizer, texts


def base_folder(s, out):
    """Where the base model of a run is."""
    return find_checkpoint(s.ckpt) if s.ckpt else out / 'base'


def base_digest(s, out):
    """A digest of the base's routers, which its allocators are for."""
    return router_digest(routers_of(base_folder(s, out)))


def is_there(folder, recipe):
    """Has this base been learnt already? InputError if another one has."""
    if not (folder / 'recipe.json').exists():
        return False
    old = read_object(folder / 'recipe.json')
    for name in recipe:
        if old.get(name) != recipe[name]:
            raise InputError(f'{folder} was learnt with another {name}: '
                             f'choose another --out, or --fresh to learn it again')
    print(f'base: {folder} is there, used again')
    return True


def check_ours(folder):
    """InputError unless a base that is to be replaced was made here, and holds nothing else."""
    names = {path.name for path in folder.iterdir()}
    if 'recipe.json' not in names or not RECIPE_FACTS <= read_object(folder / 'recipe.json').keys():
        raise InputError(f'{folder} was not made by this program (no recipe.json of its own): '
                         f'choose another --out')
    if others := sorted(names - BASE_FILES):
        raise InputError(f'{folder} holds {others[0]}, which this program did not make: move it away, '
                         f'or choose another --out')


def begin_base(folder, s, parts):
    """A new folder beside `folder` with config and tokenizer of a base to learn, the latter from parts[0]."""
    if ranks()[1] > 1:
        raise InputError(f'{folder}: no base model there, and several ranks cannot learn one; '
                         f'run this once without torchrun')
    start, new = time.time(), folder.with_name(f'{folder.name}.{os.getpid()}.new')
    new.mkdir()
    every = 1 + sum(map(len, parts[0])) // BPE_CHARACTERS
    merges = learn_bpe(parts[0][::every], s.n_vocab - 1)
    n_vocab = 256 + len(merges) + 1
    config = Config(
        n_vocab=n_vocab, dim=s.dim, n_layers=s.n_layers, n_heads=s.n_heads, n_kv_heads=s.n_kv_heads,
        head_dim=s.dim // s.n_heads, n_experts=s.n_experts, top_k=s.top_k, expert_dim=s.expert_dim,
        eos=n_vocab - 1, max_len=max(s.seq, Config.max_len))
    write_json(new / 'tokenizer.json', tokenizer_json(merges))
    write_json(new / 'tokenizer_config.json', {'eos_token': SEPARATOR, 'pad_token': SEPARATOR})
    write_json(new / 'config.json', to_hf(config))
    documents = [text for part in parts for text in part]
    print(f'text: {sum(map(len, documents)) / 1e6:.1f}M characters in {len(documents)} documents, '
          f'{n_vocab} tokens learnt in {time.time() - start:.0f} s', flush=True)
    return new


def finish_base(new, folder, s, text, recipe):
    """Learn the model of `new` on `text`; complete, it takes the place of `folder`."""
    model = learn_base(s, read_config(new), text)
    save(model.to(torch.bfloat16 if s.bf16 else torch.float32), new)
    write_json(new / 'recipe.json', recipe)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def load_model(s, folder, learns=False):
    """The model of a folder in the dtype that its config names: whole, streamed, or this rank's part.

    InputError if memory is too small for it, and for PPO beside it where it `learns`.
    """
    config, dtype, size = read_config(folder), weight_dtype(folder), ranks()[1]
    if s.stream and size > 1:
        raise InputError('--stream under torchrun: several ranks share the weights anyway; leave it out')
    working = working_bytes(s, config, dtype.itemsize) // size if learns else 0
    pinned = check_memory(s, config, dtype.itemsize, size, working)
    # oneDNN keeps the buffers of 1,024 shapes of bf16 matmuls, and experts meet a new shape in every batch:
    # gigabytes
    os.environ.setdefault('ONEDNN_PRIMITIVE_CACHE_CAPACITY', '64')
    progress = Progress('load %', 100)

    def show(done, total):
        progress(max(1, 100 * done // total), None)
    if size > 1:
        return shard(folder, dtype, s.device, show)
    if s.stream:
        return stream(folder, dtype, s.device, pinned, show)
    return load(folder, dtype, s.device, show)


@torch.no_grad()
def check_forward(model, inputs):
    """One forward pass of inputs (1,T); InputError names the first weight that is not finite if need be."""
    if model(inputs[:1].to(model.device)).isfinite().all():
        return
    views = hub_tensors(model)

    def broken(belongs):
        return [name for name, t in views.items() if belongs(name) and not t.isfinite().all()]
    found = broken(lambda name: '.layers.' not in name)
    for i, _ in enumerate(model.visit()):                      # a streamed layer is there while it is visited
        found += broken(lambda name: f'.layers.{i}.' in name)
    if found:
        raise InputError(f'the base model gives NaN: {found[0]} holds NaN or infinity')
    raise InputError('the base model gives NaN on ordinary text, though all its weights are finite: '
                     'is its dtype too narrow?')
