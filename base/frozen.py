"""base/frozen.py: the frozen base of a run, its tokenizer and text: from --ckpt, or learnt in OUT/base."""
import os
import shutil

import torch

from base.documents import read_documents, split_documents, text_digest
from base.pretrain import BATCH, SIZES, learn_base
from base.text import SEPARATOR, learn_bpe, tokenize, tokenizer_json
from hub.checkpoint import base_digest, find_checkpoint, load, save, weight_dtype
from hub.config import read_config
from hub.files import InputError, read_json, write_json
from hub.tokenizer import Tokenizer
from run.console import Progress
from run.ranks import n_ranks
from scale.memory import check_memory, working_bytes
from scale.shard import shard
from scale.stream import stream

BASE_FILES = {'config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json', 'recipe.json'}


def base_model(s, out):
    """(model, tokenizer, texts, digest): the frozen base of --ckpt or of OUT/base, learnt first if need be.

    texts: the train and the held-out split as Text; digest: of hub/checkpoint.py:base_digest. InputError if
    the base that is there was learnt with other settings or text, is not this program's, or does not fit the
    text, or if several ranks cannot share a batch of it evenly.
    """
    size = n_ranks()
    if s.ppo_batch % size:
        raise InputError(f'--ppo-batch {s.ppo_batch}: {size} ranks cannot take as many sequences each')
    documents = read_documents(s)
    train, _, heldout = split_documents(documents)
    recipe = {'text': text_digest(documents)}                  # what a base depends on
    for name in *SIZES, 'n_vocab', 'seq', 'base_steps':
        recipe[name] = getattr(s, name)
    folder = base_folder(s, out)
    learn = not s.ckpt and not is_there(folder, recipe, s.fresh)
    place = learn_tokenizer(folder, train, s.n_vocab) if learn else folder
    tokenizer = Tokenizer(place)
    train = tokenize(train, tokenizer, s.seq, 'train', max(s.ppo_batch, BATCH * learn))
    heldout = tokenize(heldout, tokenizer, s.seq, 'held-out')
    if learn:
        model = learn_base(s, len(tokenizer.ids), train)
        save(model, place)
        write_json(place / 'recipe.json', recipe)
        shutil.rmtree(folder, ignore_errors=True)
        place.rename(folder)                                   # complete, it takes the name
    model = load_model(s, folder, learns=True)
    if s.seq > model.config.max_len:
        raise InputError(f'--seq {s.seq}: the model in {folder} reads at most {model.config.max_len} tokens')
    largest = max(train.tokens.max(), heldout.tokens.max())
    if largest >= model.config.n_vocab:
        raise InputError(f'{folder}: the tokenizer gives id {largest}, '
                         f'the model has only {model.config.n_vocab} tokens')
    with torch.no_grad():
        inputs = train.windows(limit=1)[0]                                  # (1,T)
        logits = model(inputs.to(model.device))                             # (1,T,V)
    if not logits.isfinite().all():
        raise InputError(f'{folder}: the base model gives NaN on ordinary text')
    return model, tokenizer, (train, heldout), base_digest(folder)


def base_folder(s, out):
    """Where the base model of a run is."""
    return find_checkpoint(s.ckpt) if s.ckpt else out / 'base'


def is_there(folder, recipe, fresh=False):
    """Has this base been learnt already? False with `fresh`, for it is to be learnt again.

    InputError if another base is there, or one would be replaced that is not this program's alone.
    """
    if not folder.exists():
        return False
    old = read_json(folder / 'recipe.json', {})
    files = set(os.listdir(folder))
    if (fresh and files - BASE_FILES) or not recipe.keys() <= old.keys():
        raise InputError(f'{folder} holds files that are no base of this program: '
                         f'move it away, or choose another --out')
    if fresh:
        return False
    for name, value in recipe.items():
        if old[name] != value:
            raise InputError(f'{folder} was learnt with another {name}: '
                             f'choose another --out, or --fresh to learn it again')
    if BASE_FILES - files:
        raise InputError(f'{folder} is not complete: --fresh learns it again')
    print(f'base: {folder} is there, used again')
    return True


def learn_tokenizer(folder, texts, n_vocab):
    """A new folder beside `folder`, with a tokenizer that was learnt on the texts."""
    if n_ranks() > 1:
        raise InputError(f'{folder}: no base model there, and several ranks cannot learn one; '
                         f'run this once without torchrun')
    if folder.is_symlink():
        raise InputError(f'{folder} is a link, and no base can be learnt into it: '
                         f'remove it, or choose another --out')
    merges = learn_bpe(texts, n_vocab - 1)
    new = folder.with_name(f'{folder.name}.{os.getpid()}.new')
    new.mkdir()
    write_json(new / 'tokenizer.json', tokenizer_json(merges))
    write_json(new / 'tokenizer_config.json', {'eos_token': SEPARATOR, 'pad_token': SEPARATOR})
    return new


def load_model(s, folder, learns=False):
    """The model of a folder in the dtype that its config names: whole, streamed, or this rank's part.

    InputError if memory is too small for it, and for PPO beside it where it `learns`.
    """
    config = read_config(folder)
    dtype = weight_dtype(folder)
    size = n_ranks()
    how = stream if s.stream else load
    if size > 1:
        how = shard
        if s.stream:
            raise InputError('--stream under torchrun: several ranks share the weights anyway; leave it out')
    working = working_bytes(s, config, dtype.itemsize) // size if learns else 0
    check_memory(s, config, dtype.itemsize, size, working)
    # oneDNN keeps the buffers of 1,024 shapes of bf16 matmuls, and experts meet a new shape in every batch:
    # gigabytes
    os.environ.setdefault('ONEDNN_PRIMITIVE_CACHE_CAPACITY', '64')
    return how(folder, dtype, s.device, Progress('load'))
