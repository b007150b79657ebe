"""train.py: learn a small Mixtral, freeze it, and train Ada-K allocators on it.

    python train.py                          the whole story on the sources of Python's standard library, in ten minutes
    python train.py --budget 0.6             a smaller budget: mean k at most 0.6 K
    python train.py --ckpt mixtral-8x7b      allocators for real weights
    python train.py --paper                  the published recipe throughout
    python train.py --ckpt X --stream        weights stay in host memory or files, two layers of them on the device
    torchrun --nproc-per-node 8 train.py --ckpt mixtral-8x22b          each GPU keeps an eighth of the weights
    python train.py --ckpt X --plan          what that needs: memory, FLOPs, hours; nothing is loaded
    python train.py --preset smoke           the same path in seconds, for tests

Stages, in order: text -> base model -> start of the allocators -> PPO -> evaluation. Everything lands in `--out`:
    base/                    config.json, model.safetensors, tokenizer.json: transformers opens this folder
    allocator.safetensors    the trained allocators
    log.csv, results.json    every PPO step; the table
    training.png, layers.png the figures

The default recipe differs from the paper's (`--paper`) where that measured better; the README has the list and the numbers.
"""
import argparse
import collections
import csv
import hashlib
import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import ppo
from allocator import (AdaK, Allocators, Counted, RandomMix, Rollout, Skip, TopK, TopP, SoftMixture, bisect, mass_labels)
from hub.checkpoint import CHECKPOINTS, find_checkpoint, fingerprint, hub_tensors, load, save
from hub.config import read_config, to_hf, weight_dtype
from hub.files import InputError, read_json, write_json, write_whole
from hub.safetensors import read_safetensors, write_safetensors
from hub.tokenizer import Tokenizer, byte_characters
from model import Config, Transformer
from scale.shard import shard
from scale.stream import Streamed, stream
from moe_dispatch import flops

matplotlib.use('Agg')           # figures go to files, a screen is not needed


# ================================================================ settings

@dataclass
class Settings:
    """Every number of a run. The command line sets the first block and a few more; the presets below set the rest."""
    preset: str = 'tiny'
    out: str = ''                   # run folder; empty: out/<preset>
    ckpt: str = ''                  # a base model in the hub's format, folder or short name; empty: learn one
    data: str = ''                  # text file or folder; empty: the standard library's sources
    budget: float = 0.75            # mean k as a share of K; the controller finds the price
    lam: float | None = None        # a fixed price in nats per expert and layer instead of a budget
    paper: bool = False             # the published recipe
    seed: int = 0                   # of everything after the base model
    device: str = 'cpu'
    stream: bool = False            # keep two layers' weights on the device, the others in host memory or in their files
    fresh: bool = False             # learn the base model again
    resume: bool = False            # go on from OUT/state.safetensors
    save_every: int = 50            # PPO steps between two saved states
    # text
    n_vocab: int = 1024             # tokens of the byte-level BPE
    seq: int = 128                  # T
    documents: int = 10 ** 9        # at most so many documents
    # base model
    n_layers: int = 4
    dim: int = 128
    n_heads: int = 4
    n_kv_heads: int = 2
    n_experts: int = 16
    top_k: int = 4
    expert_dim: int = 96
    base_steps: int = 1200
    base_batch: int = 16            # sequences
    muon_lr: float = 0.02           # for the matrices
    adam_lr: float = 3e-3           # for embedding, head, router, norms
    bf16: bool = False              # matmuls in bfloat16 over fp32 weights, which are saved as bfloat16
    balance: float = 0.01           # weight of the load-balancing loss
    # allocators
    k_max: int = 0                  # A, actions 1..A; 0: 2K, at most N (--paper: N)
    extended: bool = True           # allocators see the router's sorted probabilities too
    x_scale: float = 2.0            # divides the extended inputs' x: the larger, the slower x is learnt from
    sharpness: float = 2.0          # of the start, logits per unit of Skip's log ratio
    warm_steps: int = 200           # of P-Warm, --paper only
    warm_lr: float = 1e-3
    start: str = 'skip'             # 'skip', 'p-warm', 'always-k', 'random': see new_allocators
    ppo_steps: int = 300
    ppo_batch: int = 16             # sequences a rollout
    reward: str = 'expected'        # log p of the next token, 'expected' under the Top-K prediction or 'sampled': the text's own
    cost: str = 'loss'              # the price of experts as an exact expectation in the 'loss' (eq. 10) or in the 'reward'
    group: int = 4                  # G, rollouts of the same tokens; 1: the Top-K counterfactual as baseline
    ppo_lr: float = 5e-2            # decays linearly to 0; constant with --paper
    epochs: int = 3                 # PPO epochs a rollout
    clip: float = 0.2
    entropy: float = 5e-4           # bonus, nats of reward per nat of entropy
    price: float = 2e-3             # lambda at the start, nats per expert and layer
    price_rate: float = 0.1         # relative change of the price per step and unit of (mean k - target) / K
    weight_decay: float = 0.0
    soft_steps: int = 200           # of the comparison without RL, `bench.py --frontier`
    soft_lr: float = 3e-2
    decisive: float = 3e-4          # price of entropy there, nats: a mixture must become a choice
    # evaluation
    calibration_tokens: int = 32768
    heldout_tokens: int = 131072


PRESETS = {
    'tiny': {},
    # 0.45B parameters, 0.1B of them active, on the text of the whole Python installation; for one H100. Not run yet
    'gpu': dict(device='cuda', bf16=True, data=sysconfig.get_paths()['stdlib'], n_vocab=4096, seq=512, n_layers=8, dim=1024, n_heads=16, n_kv_heads=4,
                n_experts=64, top_k=8, expert_dim=256, base_steps=5000, base_batch=64, ppo_steps=1500, ppo_batch=64, heldout_tokens=1048576,
                calibration_tokens=131072),
    'smoke': dict(n_vocab=320, seq=64, documents=60, n_layers=2, dim=32, n_heads=2, n_kv_heads=1, n_experts=8, expert_dim=16,
                  base_steps=30, base_batch=8, warm_steps=10, ppo_steps=12, soft_steps=12, calibration_tokens=2048, heldout_tokens=4096),
}
# the published settings; clip and mini-batching are not published, so ours stay
PAPER = dict(extended=False, start='p-warm', reward='sampled', group=1, ppo_lr=1e-3, epochs=2, entropy=0.0, lam=3e-3, weight_decay=0.1)


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message):
        raise InputError(f'{message} (see --help)')


def parse(argv):
    """Command line -> (Settings: the preset's values, then --paper's, then what was given; is only the plan asked for?)."""
    p = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    p.add_argument('--preset', choices=PRESETS, help='sizes and steps (default tiny)')
    p.add_argument('--out', help='run folder (default out/PRESET)')
    p.add_argument('--ckpt', metavar='NAME_OR_FOLDER', help='a base model in the hub\'s format: a folder, or one of '
                   f'{", ".join(CHECKPOINTS)} (default: learn one in OUT/base)')
    p.add_argument('--seq', type=int, help='tokens of a sequence; documents are packed (default 128)')
    p.add_argument('--ppo-steps', type=int, help='PPO steps (default 300)')
    p.add_argument('--ppo-batch', type=int, help='sequences of a rollout, before they are repeated (default 16)')
    p.add_argument('--data', metavar='FILE_OR_FOLDER', help='.txt, .jsonl and .py files (default: the standard library\'s sources)')
    p.add_argument('--budget', type=float, help='mean k as a share of K, in (0, 1] (default 0.75)')
    p.add_argument('--lam', type=float, help='a fixed price in nats per expert and layer instead of a budget')
    p.add_argument('--paper', action='store_true', help='the published recipe throughout (price 3e-3)')
    p.add_argument('--seed', type=int, help='of everything after the base model (default 0)')
    p.add_argument('--device', help='cpu, cuda, cuda:1, .. (default: cuda for --ckpt where there is one, else cpu)')
    p.add_argument('--stream', action='store_true', help='two layers\' weights on the device, the others in host memory or in their files')
    p.add_argument('--plan', action='store_true', help='print the memory, FLOPs and hours of this run, from the config of --ckpt alone')
    p.add_argument('--fresh', action='store_true', help='learn the base model again')
    p.add_argument('--resume', action='store_true', help='go on with an interrupted PPO where its last saved state left it')
    p.add_argument('--save-every', type=int, help='PPO steps between two saved states (default 50)')
    given = vars(p.parse_args(argv))
    planned = given.pop('plan', False)
    if {'budget', 'lam'} <= set(given):
        raise InputError('--budget and --lam: give one, not both')
    paper = PAPER if given.get('paper') else {}
    if 'budget' in given:
        paper = {**paper, 'lam': None}                         # the published recipe at a wanted budget
    s = Settings(**{**PRESETS[given.get('preset', 'tiny')], **paper, **given})
    if not 0 <= s.seed < 2 ** 63:
        raise InputError(f'--seed {s.seed}: must be 0 or more and below 2^63')
    if s.resume and s.fresh:
        raise InputError('--fresh learns a new base model, --resume goes on with the old one: give one of them')
    if s.ckpt and s.fresh:
        raise InputError('--fresh learns a base model, --ckpt brings one: give one of them')
    if not 0 < s.budget <= 1:
        raise InputError(f'--budget {s.budget}: must be above 0 and at most 1')
    if not s.ckpt:
        check_budget(s, s.top_k)
    if s.lam is not None and not (0 <= s.lam < math.inf):
        raise InputError(f'--lam {s.lam}: must be a number of nats, 0 or more')
    for flag in ('seq', 'ppo_steps', 'ppo_batch', 'save_every'):
        if getattr(s, flag) < 1:
            raise InputError(f'--{flag.replace("_", "-")} {getattr(s, flag)}: must be 1 or more')
    if planned and not s.ckpt:
        raise InputError('--plan: give the checkpoint with --ckpt, a folder that holds at least its config.json')
    if s.stream and not s.ckpt:
        raise InputError('--stream: give the checkpoint with --ckpt; a model that is learnt here is in memory anyway')
    if s.ckpt and 'device' not in given:
        s.device = default_device()
    if s.stream and s.device != 'cpu' and 'ppo_batch' not in given:            # as many tokens as hide the way of the weights
        s.ppo_batch = max(1, Streamed.tokens_per_visit // ((1 + s.group) * s.seq))
    s.device = open_device(s.device)
    s.out = s.out or f'out/{Path(s.ckpt).name if s.ckpt else s.preset}'
    return s, planned


def default_device():
    """Where real weights go; the small models of the default run are as fast on a CPU, and the same everywhere."""
    return 'cuda' if torch.cuda.is_available() else 'cpu'


def run_settings(run):
    """The Settings of a finished run, whose base is there to be used; InputError if it is not, or of another version."""
    results = read_json(Path(run) / 'results.json')
    names = {field.name for field in fields(Settings)}
    if set(results.get('config', {})) != names:
        odd = sorted(names ^ set(results.get('config', {})))
        raise InputError(f'{run}/results.json: written by another version of train.py (setting {odd[0]}); train it again')
    if not results['config']['ckpt'] and not (Path(run) / 'base' / 'recipe.json').exists():
        raise InputError(f'{run}: the run is not complete, its base model is missing; run train.py --out {run} again')
    return Settings(**{**results['config'], 'fresh': False, 'resume': False})   # how it was started is over


def open_device(name):
    """The device of this process, under torchrun each rank its own GPU; InputError unless torch can compute there."""
    if name.startswith('cuda') and 'LOCAL_RANK' in os.environ:
        name = f'cuda:{os.environ["LOCAL_RANK"]}'
    try:
        if name.startswith('cuda:'):
            torch.cuda.set_device(name)
        assert torch.device(name).type != 'meta', 'holds no numbers'
        torch.empty(1, device=name)
    except Exception as e:                                     # torch raises many kinds here
        raise InputError(f'--device {name}: {str(e).splitlines()[0]}') from None
    return name


def open_out(name):
    """The folder of --out, made if need be; InputError unless files can be written there."""
    out = Path(name)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / '.writable', lambda f: None)
        (out / '.writable').unlink(missing_ok=True)            # several ranks look at once
    except OSError as e:
        raise InputError(f'--out {out}: cannot write there ({e.strerror})') from None
    return out


def check_budget(s, top_k):
    """InputError if the budget is below one expert a token."""
    if s.lam is None and s.budget * top_k < 1:
        raise InputError(f'--budget {s.budget}: every token runs at least 1 of K = {top_k} experts, so at least {1 / top_k:g}')


class Progress:
    """One updating line on stderr if that is a terminal, else a plain line every ten seconds: step, numbers, speed, time left."""

    def __init__(self, stage, steps, done=0):
        self.stage, self.steps, self.done, self.start, self.shown = stage, steps, done, time.time(), 0.0
        self.terminal, self.silent = sys.stderr.isatty(), ranks()[0] > 0

    def __call__(self, step, tokens, **numbers):
        now, last = time.time(), step == self.steps
        if self.silent or now - self.shown < (0.2 if self.terminal else 10) and not last:
            return
        self.shown, spent = now, now - self.start
        text = '  '.join(f'{name} {value:.4g}' for name, value in numbers.items())
        share = (step - self.done) / step                      # of these steps and tokens, in this process
        left = spent / (step * share) * (self.steps - step)
        speed = f'  {tokens * share / spent:,.0f} tok/s' if tokens else ''
        line = f'{self.stage} {step}/{self.steps}  {text}{speed}  {left // 60:.0f}:{left % 60:02.0f} left'
        if self.terminal:
            print(f'\r\x1b[K{line}', end='\n' if last else '', flush=True, file=sys.stderr)
        else:
            print(line, flush=True, file=sys.stderr)


# ================================================================ ranks: one process, or several under torchrun

RENDEZVOUS = 60         # seconds are enough for rank 0 to be there


def join(device):
    """Under torchrun: meet the other ranks, each on its device (`open_device`). InputError if they do not come.

    From here on only rank 0 prints and writes. Every rank runs the same script on its part of each batch.
    """
    if os.environ.get('WORLD_SIZE', '1') == '1':
        return
    host, port = os.environ.get('MASTER_ADDR'), os.environ.get('MASTER_PORT')
    try:
        end = time.time() + RENDEZVOUS
        while os.environ['RANK'] != '0':                       # which listens there, or torchrun for it
            try:
                socket.create_connection((host, int(port)), timeout=5).close()
                break
            except OSError:
                if time.time() > end:
                    raise
            time.sleep(0.2)
        dist.init_process_group('nccl' if device.startswith('cuda') else 'gloo', timeout=timedelta(minutes=10))
    except (KeyError, ValueError, TypeError, OSError, RuntimeError) as e:
        raise InputError(f'no rendezvous of the ranks at {host}:{port}: {str(e).splitlines()[0][:200]}') from None
    if dist.get_rank():
        sys.stdout = open(os.devnull, 'w')


def leave(status=0):
    """End the process with this exit status if it is one of several ranks; a lone one goes on.

    At once, without Python's own shutdown: FSDP keeps gloo's threads alive behind the end of the group, and one that frees its last tensor
    during that shutdown aborts the process (pytorch issue 190489).
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ranks():
    """(number of this rank, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gathered(value):
    """[the value of every rank], in order."""
    rank, size = ranks()
    if size == 1:
        return [value]
    values = [None] * size
    dist.all_gather_object(values, value)
    return values


def same_everywhere(what, value):
    """InputError unless all ranks have this value."""
    if other := [i for i, theirs in enumerate(gathered(value)) if theirs != value]:
        raise InputError(f'{what} is another one on rank {other[0]} than on rank {ranks()[0]}')


def check_ranks(s):
    """InputError unless the ranks can share a batch evenly."""
    if s.ppo_batch % ranks()[1]:
        raise InputError(f'--ppo-batch {s.ppo_batch}: {ranks()[1]} ranks cannot take the same number of sequences each')


def averaged(numbers):
    """{name: number}, each the mean over the ranks."""
    everyone = gathered(numbers)
    return {name: sum(theirs[name] for theirs in everyone) / len(everyone) for name in numbers}


def average_gradients(parameters):
    """Replace every gradient by its mean over the ranks: that of a loss that is a mean over all ranks' tokens."""
    if ranks()[1] > 1:
        for p in parameters:
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= ranks()[1]


# ================================================================ text

@dataclass
class Text:
    """A split of the text as one stream of tokens, a separator behind every document."""
    tokens: torch.Tensor            # (n,) int64
    document: np.ndarray            # (n,) the number of the document each token belongs to

    def windows(self, T, limit=None):
        """(inputs, targets, documents), each (n,T), of consecutive windows; at most `limit` tokens, evenly spread."""
        n = (len(self.tokens) - 1) // T
        chosen = np.arange(n) if limit is None or n * T <= limit else np.linspace(0, n - 1, limit // T).astype(int)
        at = torch.from_numpy(chosen)[:, None] * T + torch.arange(T)            # (n,T)
        return self.tokens[at], self.tokens[at + 1], self.document[at + 1]

    def batches(self, B, T, generator):
        """Endless random batches (inputs, targets), (B,T) each; every token once before any token twice."""
        while True:
            offset = torch.randint(T, (1,), generator=generator).item()
            n = (len(self.tokens) - offset - 1) // T
            for chosen in torch.randperm(n, generator=generator).split(B):
                if len(chosen) == B:
                    at = offset + chosen[:, None] * T + torch.arange(T)         # (B,T)
                    yield self.tokens[at], self.tokens[at + 1]


def jsonl_documents(path, text):
    """{path:line: text} of a .jsonl file: objects with a `text`, or with `messages` of role and content."""
    documents = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
                documents[f'{path}:{number}'] = row['text'] if 'text' in row else '\n\n'.join(
                    f'{m["role"]}: {m["content"]}' for m in row['messages'])
                if not isinstance(documents[f'{path}:{number}'], str):
                    raise TypeError
            except (ValueError, TypeError, KeyError, RecursionError):
                raise InputError(f'--data {path}:{number}: no JSON object with a `text` or with `messages`') from None
    return documents


def read_documents(source, most):
    """{name: text} of a file or a folder of .txt, .jsonl and .py files, at most so many; '' is the standard library without its tests."""
    root = Path(source or sysconfig.get_paths()['stdlib'])
    if not root.exists():
        raise InputError(f'--data {source}: no such file or folder')
    # pydoc_data is one generated page, as long as all other files of a split together
    leave = {'test', 'tests', 'idle_test', 'site-packages', '__pycache__', 'pydoc_data'} if not source else set()
    kinds = ('.txt', '.jsonl', '.py') if source else ('.py',)
    paths = [root] if root.is_file() else sorted(
        p for p in root.rglob('*') if p.suffix in kinds and p.is_file() and not leave & set(p.relative_to(root).parts))
    documents = {}
    for path in paths:
        name = path.relative_to(root).as_posix() if path != root else path.name
        try:
            text = path.read_text(encoding='utf-8', errors='replace')
        except OSError as e:
            raise InputError(f'--data {path}: {e.strerror}') from None
        documents.update(jsonl_documents(name, text) if path.suffix == '.jsonl' else {name: text})
    if not any(text.strip() for text in documents.values()):
        raise InputError(f'--data {root}: no text in .txt, .jsonl or .py files there')
    return dict(itertools.islice(documents.items(), most))


def split_documents(documents):
    """[train, calibration, held-out], lists of texts: 80, 10, 10 % of the documents by a hash of their names.

    A single document is cut into 64 KiB pieces first, so that one long file can be split too.
    """
    if len(documents) < 20:
        documents = {f'{name}:{i}': text[i:i + 65536] for name, text in documents.items() for i in range(0, len(text), 65536)}
    ranked = sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest())
    tenth = max(1, len(ranked) // 10)
    return [[documents[name] for name in part] for part in (ranked[2 * tenth:], ranked[:tenth], ranked[tenth:2 * tenth])]


# words with the space before them, digits, symbols with the line end after them, line ends, indentation
PATTERN = r' ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
PATTERN_RE = r' ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'     # the same for `re`, to learn from


def learn_bpe(texts, n_tokens):
    """Byte-pair encoding: the n_tokens - 256 merges, as pairs of ids (id = 256 + place in the list), most frequent first.

    Example: 'aaabdaaabac' -> (97,97), then (256,97) .. as in Sennrich et al. 2016, on bytes.
    """
    chunks = collections.Counter()
    for text in texts:
        chunks.update(re.findall(PATTERN_RE, text))
    words = [list(chunk.encode()) for chunk in chunks]
    times = list(chunks.values())
    count, where = collections.Counter(), collections.defaultdict(set)         # pair -> how often, in which words
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            count[pair] += times[i]
            where[pair].add(i)
    merges = []
    while len(merges) < n_tokens - 256 and count:
        best = max(count, key=lambda pair: (count[pair], pair))
        for i in where.pop(best):
            old, new, at = words[i], [], 0
            while at < len(old):
                both = tuple(old[at:at + 2]) == best
                new.append(256 + len(merges) if both else old[at])
                at += 2 if both else 1
            for pair in zip(old, old[1:]):
                count[pair] -= times[i]
            for pair in zip(new, new[1:]):
                count[pair] += times[i]
                where[pair].add(i)
            words[i] = new
        del count[best]
        merges.append(best)
    return merges


def tokenizer_json(merges):
    """The hub's tokenizer.json of a byte-level BPE: bytes 0-255, the merges, then <|endoftext|>."""
    pieces = byte_characters()
    for a, b in merges:
        pieces.append(pieces[a] + pieces[b])
    level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': False, 'use_regex': False}
    return {
        'version': '1.0', 'truncation': None, 'padding': None,
        'added_tokens': [{'id': len(pieces), 'content': '<|endoftext|>', 'single_word': False, 'lstrip': False,
                          'rstrip': False, 'normalized': False, 'special': True}],
        'normalizer': None,
        'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [
            {'type': 'Split', 'pattern': {'Regex': PATTERN}, 'behavior': 'Isolated', 'invert': False}, level]},
        'post_processor': None, 'decoder': level,
        'model': {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None,
                  'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': False,
                  'vocab': {piece: i for i, piece in enumerate(pieces)},
                  'merges': [[pieces[a], pieces[b]] for a, b in merges]}}


def tokenize(texts, tokenizer, T, name):
    """A Text of the documents, bos before and eos behind each where the model has them. InputError if T tokens are not there."""
    ids = [[tokenizer.bos] * (tokenizer.bos is not None) + tokenizer.encode(text) + [tokenizer.eos] * (tokenizer.eos is not None)
           for text in texts]
    tokens = torch.tensor([i for document in ids for i in document])
    if len(tokens) <= T:
        raise InputError(f'--data: the {name} split has {len(tokens)} tokens, too short for one sequence of {T + 1}')
    return Text(tokens, np.repeat(np.arange(len(ids)), [len(document) for document in ids]))


# ================================================================ base model

def orthogonalise(G):
    """Newton-Schulz iteration on a stack of matrices (..,m,n): nearly U V^T of each G = U S V^T (Jordan 2024, Muon)."""
    X = G.mT if G.shape[-2] > G.shape[-1] else G
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(3):              # five are usual; three cost less and measured the same here
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.mT if G.shape[-2] > G.shape[-1] else X


class Muon:
    """Momentum orthogonalised by Newton-Schulz. torch's own takes single matrices only; the experts are stacks of them."""

    def __init__(self, params, lr, momentum=0.95):
        self.params, self.lr, self.momentum = params, lr, momentum
        self.averages = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self, scale):
        for p, average in zip(self.params, self.averages):
            average.lerp_(p.grad, 1 - self.momentum)
            update = orthogonalise(p.grad.lerp(average, self.momentum))
            p.add_(update, alpha=-scale * self.lr * max(1, p.shape[-2] / p.shape[-1]) ** 0.5)


class Balance(TopK):
    """The model's own top-k, keeping the router's probabilities of the pass for the load-balancing loss."""

    def __init__(self, k):
        super().__init__(k)
        self.probs = []

    def __call__(self, layer, x, probs):
        self.probs.append(probs)
        return super().__call__(layer, x, probs)

    def loss(self):
        """N * sum_n share of choices that go to n * mean probability of n, mean over layers; 1 when balanced (Switch)."""
        total = 0
        for probs in self.probs:                                                # (P,N)
            chosen = torch.zeros_like(probs).scatter_(1, probs.topk(self.k_max).indices, 1 / self.k_max)
            total = total + probs.shape[1] * (chosen.mean(0) * probs.mean(0)).sum()
        return total / len(self.probs)


def new_model(config, seed):
    """A Transformer with fresh weights: embedding 0.02, matrices 1/sqrt(fan-in), what ends in the residual smaller."""
    model, generator = Transformer(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(0, 0.02 if name.startswith(('embed', 'lm_head')) else p.shape[-1] ** -0.5, generator=generator)
            if name.endswith(('o_proj.weight', 'w_out')):
                p.mul_((2 * config.n_layers) ** -0.5)
    return model


def learn_base(s, config, text):
    """The base model, learnt in s.base_steps on `text`: cross-entropy plus the load-balancing loss."""
    model = new_model(config, seed=0).to(s.device)
    matrices = {name: p for name, p in model.named_parameters()
                if p.dim() > 1 and not name.startswith(('embed', 'lm_head')) and 'router' not in name}
    others = [p for name, p in model.named_parameters() if name not in matrices]
    muon = Muon(list(matrices.values()), s.muon_lr)
    adam = torch.optim.AdamW(others, s.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    batches = text.batches(s.base_batch, s.seq, torch.Generator().manual_seed(0))
    progress = Progress('base', s.base_steps)
    for step in range(1, s.base_steps + 1):
        inputs, targets = (z.to(s.device) for z in next(batches))
        balance = Balance(s.top_k)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=s.bf16):
            logits = model(inputs, balance)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        (loss + s.balance * balance.loss()).backward()
        scale = min(step / 10, (s.base_steps - step + 1) / (0.5 * s.base_steps), 1)    # warm up, hold, linear to 0
        muon.step(scale)
        adam.param_groups[0]['lr'] = s.adam_lr * scale
        adam.step()
        for p in model.parameters():
            p.grad = None
        progress(step, step * inputs.numel(), loss=loss.item())
    return model


def base_recipe(s, documents):
    """What the base model depends on: settings, and a digest of the text."""
    digest = hashlib.sha256()
    for name in sorted(documents):
        digest.update(f'{name}\0{documents[name]}\0'.encode())
    return {'text': digest.hexdigest(), **{name: getattr(s, name) for name in (
        'n_vocab', 'seq', 'n_layers', 'dim', 'n_heads', 'n_kv_heads', 'n_experts', 'top_k', 'expert_dim', 'base_steps',
        'base_batch', 'muon_lr', 'adam_lr', 'balance', 'bf16')}}


def base_model(s, out):
    """(model, tokenizer, texts): the frozen base of --ckpt or of out/base, learnt first if need be; texts = the three splits."""
    documents = read_documents(s.data, s.documents)
    parts = split_documents(documents)
    splits = lambda tokenizer: [tokenize(part, tokenizer, s.seq, name)
                                for part, name in zip(parts, ('train', 'calibration', 'held-out'))]
    folder, recipe = base_folder(s, out), base_recipe(s, documents)
    if not s.ckpt and not s.fresh and (folder / 'recipe.json').exists():
        old = read_json(folder / 'recipe.json')
        if changed := [name for name in recipe if old.get(name) != recipe[name]]:
            raise InputError(f'{folder} was learnt with another {changed[0]}: choose another --out, or --fresh to learn it again')
        print(f'base: {folder} is there, used again')
    elif not s.ckpt and ranks()[1] > 1:
        raise InputError(f'{folder}: no base model there, and several ranks cannot learn one; run this once without torchrun')
    elif not s.ckpt:
        start, new = time.time(), out / 'base.new'             # complete, it takes the place of base/
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        every = 1 + sum(map(len, parts[0])) // 2 ** 24         # 16M characters are enough to learn merges from
        merges = learn_bpe(parts[0][::every], s.n_vocab - 1)
        n_vocab = 256 + len(merges) + 1
        config = Config(n_vocab=n_vocab, dim=s.dim, n_layers=s.n_layers, n_heads=s.n_heads, n_kv_heads=s.n_kv_heads,
                        head_dim=s.dim // s.n_heads, n_experts=s.n_experts, top_k=s.top_k, expert_dim=s.expert_dim,
                        eos=n_vocab - 1)
        write_json(new / 'tokenizer.json', tokenizer_json(merges))
        write_json(new / 'config.json', to_hf(config))
        print(f'text: {sum(map(len, documents.values())) / 1e6:.1f}M characters in {len(documents)} documents, '
              f'{n_vocab} tokens learnt in {time.time() - start:.0f} s', flush=True)
        tokenizer = Tokenizer(new)
        texts = splits(tokenizer)
        save(learn_base(s, config, texts[0]).to(torch.bfloat16 if s.bf16 else torch.float32), new)
        write_json(new / 'recipe.json', recipe)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
        return load_model(s, folder), tokenizer, texts
    tokenizer = Tokenizer(folder)
    texts = splits(tokenizer)
    if ranks()[1] > 1:
        same_everywhere(f'the checkpoint {folder}', fingerprint(folder))
        same_everywhere('the text of --data', recipe['text'])
    model = load_model(s, folder, learns=True)
    if (used := max(int(t.tokens.max()) for t in texts)) >= model.config.n_vocab:
        raise InputError(f'{folder}: the tokenizer gives id {used}, the model has only {model.config.n_vocab} tokens')
    check_forward(model, texts[0].tokens[:s.seq][None])
    return model, tokenizer, texts


@torch.no_grad()
def check_forward(model, inputs):
    """One forward pass; InputError names the first weight that is not finite if the logits are not."""
    if model(inputs[:1].to(model.device)).isfinite().all():
        return
    views = hub_tensors(model)
    broken = [name for name, t in views.items() if '.layers.' not in name and not t.isfinite().all()]
    for i, _ in enumerate(model.visit()):
        broken += [name for name, t in views.items() if f'.layers.{i}.' in name and not t.isfinite().all()]
    raise InputError(f'the base model gives NaN: {broken[0]} holds NaN or infinity' if broken else
                     'the base model gives NaN on ordinary text, though all its weights are finite: is its dtype too narrow?')


def base_folder(s, out):
    """Where the base model of a run is."""
    return find_checkpoint(s.ckpt) if s.ckpt else out / 'base'


def load_model(s, folder, learns=False):
    """The model of a checkpoint folder in the dtype that its config names: whole, streamed, or this rank's part.

    InputError if memory is too small for it, and for PPO beside it where it `learns`.
    """
    config, dtype, (_, size) = read_config(folder), weight_dtype(folder), ranks()
    if s.stream and size > 1:
        raise InputError('--stream under torchrun: several ranks share the weights anyway; leave it out')
    working = working_bytes(s, config, dtype.itemsize) // size if learns else 0
    pinned = check_memory(s, config, dtype.itemsize, size, working)
    # oneDNN keeps the buffers of 1,024 shapes of bf16 matmuls, and experts meet a new shape with every batch: gigabytes on a CPU
    os.environ.setdefault('ONEDNN_PRIMITIVE_CACHE_CAPACITY', '64')
    progress = Progress('load %', 100)
    show = lambda done, total: progress(max(1, 100 * done // total), None)
    if size > 1:
        return shard(folder, dtype, s.device, show)
    if s.stream:
        return stream(folder, dtype, s.device, pinned, show)
    return load(folder, dtype, s.device, show)


# ================================================================ evaluation

def token_logp(model, hidden, targets):
    """log p(target) in nats, (B,T) fp32, from the last hidden states (B,T,C) and targets (B,T); the head in chunks of 1 GB of logits."""
    rows = max(1, 2 ** 28 // (model.config.n_vocab * targets.shape[1]))
    return torch.cat([ppo.next_token_logp(model.lm_head(h), y) for h, y in zip(hidden.split(rows), targets.split(rows))])


@torch.no_grad()
def evaluate(model, windows, choose_k, batch=32):
    """Loss in nats of every target token under a policy, and the policy's tally: ((n*T,) float64 on CPU, Counted)."""
    (rank, size), device = ranks(), model.device
    tally = Counted(choose_k, len(model.config.moe_layers), device)
    inputs, targets = (z.tensor_split(size)[rank] for z in windows[:2])         # this rank's windows
    together = batch * max(1, model.tokens_per_visit // (batch * inputs.shape[1]))      # windows that share the visit of a layer
    losses = []
    for at in range(0, -(-len(windows[0]) // size), together):                  # as many visits on every rank
        x, y = inputs[at:at + together], targets[at:at + together]
        passes = [(part.to(device), tally) for part in x.split(batch)] if len(x) else [(windows[0][:1].to(device), None)]
        losses += [-token_logp(model, hidden, part.to(device)).flatten().cpu().double()
                   for hidden, part in zip(model.hidden_of(passes), y.split(batch)) if len(part)]
    parts = gathered((torch.cat(losses) if losses else torch.zeros(0).double(), tally.counts.cpu()))
    tally.counts = sum(counts for _, counts in parts).to(device)
    return torch.cat([loss for loss, _ in parts]), tally


def calibrate(model, windows, policy_of, target, low, high):
    """The knob at which policy_of(knob) has mean k = target on `windows`, by bisection with real forward passes."""
    return bisect(lambda knob: evaluate(model, windows, policy_of(knob))[1].mean(), target, low, high)


def clustered_error(delta, document):
    """Standard error of the mean of `delta` (n,), tokens of one document taken as dependent."""
    _, number = np.unique(document, return_inverse=True)
    sums = np.bincount(number, weights=delta - delta.mean())                    # one per document
    m = len(sums)
    return math.sqrt((sums ** 2).sum() * m / max(m - 1, 1)) / len(delta)


def compare(s, model, allocators, calibration, heldout):
    """The rows of results.json: Top-K, Ada-K, and the rules without training at Ada-K's mean k."""
    c = model.config
    windows = heldout.windows(s.seq, s.heldout_tokens)
    calibration = calibration.windows(s.seq, s.calibration_tokens)
    ada = AdaK(allocators)
    mean_k = evaluate(model, calibration, ada)[1].mean()
    policies = {
        'top-k': TopK(c.top_k), 'ada-k': ada, 'random-mix': RandomMix(mean_k),
        'top-p': TopP(calibrate(model, calibration, lambda p: TopP(p, c.n_experts), mean_k, 0, 1), c.n_experts),
        'skip': Skip(calibrate(model, calibration, lambda beta: Skip(beta, c.top_k), mean_k, 2, 0), c.top_k)}
    base_flops, rows, reference = flops(c, c.top_k, s.seq), [], None
    progress = Progress('evaluation', len(policies))
    for i, (method, policy) in enumerate(policies.items()):
        torch.manual_seed(s.seed)                              # for RandomMix
        loss, tally = evaluate(model, windows, policy)
        reference = loss if reference is None else reference
        delta = (loss - reference).numpy()
        cost = flops(c, tally.mean(), s.seq, allocators.weight.numel() if policy is ada else 0)
        rows.append({
            'method': method, 'loss': loss.mean().item(), 'delta': delta.mean(),
            'delta_se': clustered_error(delta, windows[2].flatten()), 'mean_k': tally.mean(),
            'mean_k_by_layer': tally.mean_by_layer().tolist(),
            'k_histogram': (tally.counts.sum(0) / tally.counts.sum()).tolist(),
            'expert_flops': cost['experts'] / base_flops['experts'], 'total_flops': cost['total'] / base_flops['total']})
        progress(i + 1, (i + 1) * len(loss), loss=rows[-1]['loss'])
    return rows


def bits_per_byte(nats, windows, tokenizer):
    """Mean bits per byte of the target text; `nats` is the loss of its tokens or their sum, a separator counts as no byte."""
    n_bytes = torch.tensor([0 if i == tokenizer.eos else len(tokenizer.bytes_of_id.get(i, b'')) for i in range(int(windows[1].max()) + 1)])
    return (nats.sum() / math.log(2) / n_bytes[windows[1]].sum()).item()


# ================================================================ allocators: warm start, then PPO

class Record(TopK):
    """The model's own top-k, keeping what allocators would see: x and probs of every layer of one pass."""

    def __init__(self, k):
        super().__init__(k)
        self.seen = []

    def __call__(self, layer, x, probs):
        self.seen.append((x, probs))
        return super().__call__(layer, x, probs)


@torch.no_grad()
def look(s, model, inputs):
    """[(x (P,C), probs (P,N)) of each layer] of one pass under the model's own top-k."""
    record = Record(model.config.top_k)
    model.hidden(inputs.to(s.device), record)
    return record.seen


def new_allocators(s, model, text):
    """Allocators as PPO starts with them.

    'skip' imitates expert skipping at the budget, exactly; 'p-warm' a Top-P rule at K, by supervised learning (eq. 12, 13);
    'always-k' is K for every token with some exploration; 'random' knows nothing: every k alike.
    """
    c = model.config
    allocators = Allocators(c, allocator_sizes(s, c)[0], s.extended).to(s.device)
    batches = text.batches(s.ppo_batch, s.seq, torch.Generator().manual_seed(s.seed))
    if s.extended:
        standardise(s, model, allocators, next(batches)[0])
    if s.start == 'skip':
        start_at_skip(s, model, allocators, next(batches)[0])
    elif s.start == 'p-warm':
        p_warm(s, model, allocators, batches)
    elif s.start == 'always-k':
        allocators.bias.data.copy_(-2.0 * (torch.arange(1, allocators.k_max + 1) - c.top_k).abs())
    return allocators


@torch.no_grad()
def standardise(s, model, allocators, inputs):
    """Mean and standard deviation of the allocators' inputs on a first batch.

    subtle: Adam moves every weight by about the same step, so C unit channels of x would move a logit sqrt(C) times as far
    as one input and drown the few router probabilities in noise; as a whole x gets variance 1 / x_scale^2.
    """
    z = torch.stack([allocators.inputs(layer, x, probs) for layer, (x, probs) in enumerate(look(s, model, inputs))])
    allocators.mean.copy_(z.mean(1))                                            # z (L,P,n_in)
    allocators.std.copy_(z.std(1) + 1e-3)
    allocators.std[:, :model.config.dim] *= s.x_scale * model.config.dim ** 0.5


@torch.no_grad()
def start_at_skip(s, model, allocators, inputs):
    """The default start: weights that are expert skipping (`Skip`) at the budget, the best rule that needs no training.

    Skip is linear in its log ratios r_k: the scores sharpness * sum_{i<k} (r_i - log beta) are largest at the least k with
    r_k <= log beta. More than K experts start as unlikely.
    """
    c = model.config
    probs = torch.cat([probs for _, probs in look(s, model, inputs)])                                       # (L*P,N)
    target = c.top_k * (s.budget if s.lam is None else 0.9)
    beta = bisect(lambda beta: Skip(beta, c.top_k)(0, None, probs).float().mean().item(), target, 4, 0)
    k, ratio = torch.arange(1, allocators.k_max + 1, device=probs.device), slice(allocators.mean.shape[1] - (c.top_k - 1), None)
    passed = (k[:c.top_k - 1] < k[:, None]).float() * s.sharpness                                           # (A,K-1): is i < k?
    allocators.weight[:, :, ratio] = passed * allocators.std[:, None, ratio]
    allocators.bias.copy_((allocators.mean[:, ratio] - math.log(beta + 1e-6)) @ passed.T - s.sharpness * (k - c.top_k).clamp_min(0))


def p_warm(s, model, allocators, batches):
    """The published start, P-Warm (eq. 12, 13): imitate "the fewest experts whose router mass reaches p".

    p is chosen on the first batch so that the mean of these labels is the model's own K.
    """
    p = ppo.find_mass(torch.cat([probs for _, probs in look(s, model, next(batches)[0])]), model.config.top_k)
    optimizer = torch.optim.AdamW(allocators.parameters(), s.warm_lr, weight_decay=s.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s.warm_steps)
    progress = Progress('warm start', s.warm_steps)
    for step in range(1, s.warm_steps + 1):
        inputs, _ = next(batches)
        seen = look(s, model, inputs)
        z = torch.stack([allocators.inputs(layer, x, probs) for layer, (x, probs) in enumerate(seen)])      # (L,P,n_in)
        labels = torch.stack([mass_labels(probs, p).clamp_max(allocators.k_max) for _, probs in seen])      # (L,P)
        loss = ppo.warm_loss(allocators.logits(slice(None), z), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(step, step * inputs.numel(), loss=loss.item())


PASS_TOKENS = 2 ** 14   # of Mixtral-8x7B, so many tokens fill its matmuls and need 4 GB of activations


def rollout_reward(s, model, inputs, targets, rollout):
    """(reward (G,P), reward under Top-K (P,)) in nats: G times inputs (B,T) with sampled k, and once with the model's own.

    P = B*T. Passes of at most PASS_TOKENS tokens keep the experts' activations small; the head runs on a few sequences at a
    time, to keep the logits below 1 GB.
    """
    (B, T), G = inputs.shape, s.group
    few = max(1, PASS_TOKENS // T)
    passes = [(part, None) for part in inputs.split(few)] + [(part, rollout) for part in inputs.repeat(G, 1).split(few)]
    hidden = torch.cat(model.hidden_of(passes)).view(1 + G, B, T, -1)           # (1+G,B,T,C), Top-K first
    few = max(1, 2 ** 28 // (model.config.n_vocab * T * (1 + G)))
    rewards = []
    for h, y in zip(hidden.split(few, 1), targets.split(few)):
        logits = model.lm_head(h)                                               # (1+G,few,T,V)
        rewards.append(ppo.expected_gain(logits, logits[0]) if s.reward == 'expected' else
                       torch.stack([ppo.next_token_logp(rollout_logits, y) for rollout_logits in logits]))
    reward = torch.cat(rewards, 1).flatten(1)                                   # (1+G,P)
    return reward[1:], reward[0]


class Interrupt:
    """Within `with`: the first Ctrl-C or SIGTERM sets `asked`, so that the step in progress can end; a second one stops at once."""

    def __enter__(self):
        self.asked = False
        self.old = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)


# what may differ between an interrupted run and the one that resumes it
NOT_IN_STATE = 'out', 'fresh', 'resume', 'save_every', 'heldout_tokens', 'stream'


def in_state(s):
    """The settings that a run and its continuation share; of the device the kind, each rank has its own."""
    settings = {name: value for name, value in asdict(s).items() if name not in NOT_IN_STATE}
    return {**settings, 'device': torch.device(s.device).type}


def save_state(path, s, facts, allocators, optimizer, generator, log):
    """All that PPO needs to go on to the same bits: weights, Adam's averages, random state, price, log. Written whole or not at all."""
    tensors = {f'allocators.{name}': t for name, t in allocators.state_dict().items()}
    for i, averages in optimizer.state_dict()['state'].items():
        tensors.update({f'adam.{i}.{name}': t for name, t in averages.items()})
    write_safetensors(path, {**tensors, 'generator': generator.get_state()}, {'state': json.dumps({'settings': in_state(s), 'log': log, **facts})})


def load_state(path, s, facts, allocators, optimizer, generator):
    """The log of the run that `save_state` wrote, everything else put back in place; InputError names a difference of settings or base."""
    try:
        tensors, metadata = read_safetensors(path)
    except OSError as e:
        raise InputError(f'--resume: {path}: {e.strerror}; start without --resume') from None
    state = json.loads(metadata['state'])
    for name, old in state['settings'].items():
        if old != (mine := in_state(s).get(name)):
            raise InputError(f'--resume: {path} is of a run with {name} {old}, this one has {mine}')
    for name, new in facts.items():
        if not math.isclose(state[name], new, rel_tol=1e-3):
            raise InputError(f'--resume: {path} is of another base model or text: {name} was {state[name]}, now it is {new}')
    part = lambda prefix: {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    allocators.load_state_dict(part('allocators.'))
    averages = {}
    for name, t in part('adam.').items():
        i, name = name.split('.', 1)
        averages.setdefault(int(i), {})[name] = t.clone()
    optimizer.load_state_dict({'state': averages, 'param_groups': optimizer.state_dict()['param_groups']})
    generator.set_state(tensors['generator'].clone())
    return state['log']


def train_ppo(s, model, allocators, text, calibration, log, state=None):
    """PPO (eq. 4-11). Appends one dict per step to `log`; changes `allocators` in place.

    `state`: a file that holds the run's state after every s.save_every steps and on an interrupt, and that --resume starts from.
    """
    c, (rank, size) = model.config, ranks()
    target = s.budget * c.top_k
    mine = slice(rank * s.ppo_batch // size, (rank + 1) * s.ppo_batch // size)  # this rank's sequences of every batch
    batches = text.batches(s.ppo_batch, s.seq, torch.Generator().manual_seed(s.seed + 1))
    generator = torch.Generator(s.device).manual_seed(s.seed)
    optimizer = torch.optim.AdamW(allocators.parameters(), s.ppo_lr, weight_decay=s.weight_decay)
    price = s.price if s.lam is None else s.lam
    probe = calibration.windows(s.seq, s.calibration_tokens // 4)
    probe_topk, _ = evaluate(model, probe, TopK(c.top_k))
    facts = {'base_loss': probe_topk.mean().item()}            # tells another base model or text by its numbers
    if s.resume:
        log += load_state(state, s, facts, allocators, optimizer, generator)
        price = log[-1]['price']
        for _ in log:                                          # these batches are done
            next(batches)
        print(f'resumed after step {len(log)} of {s.ppo_steps}')
    progress, numbers = Progress('ppo', s.ppo_steps, done=len(log)), {}
    with Interrupt() as interrupt:
        for step in range(len(log) + 1, s.ppo_steps + 1):
            inputs, targets = (z[mine].to(s.device) for z in next(batches))     # (B,T) both, B = ppo_batch / ranks

            # rollout: G passes over the same tokens
            # the noise of all ranks' tokens, so that a token's draw does not depend on how many ranks there are
            noise = torch.rand(len(c.moe_layers), s.group, s.ppo_batch, s.seq, generator=generator, device=s.device)
            rollout = Rollout(allocators, noise[:, :, mine].flatten(1))
            with torch.no_grad():
                reward, reward_topk = rollout_reward(s, model, inputs, targets, rollout)                    # (G,P), (P,)
            z, k, logp_old = rollout.z, rollout.k, rollout.logp                 # (L,G*P,n_in), (L,G*P), (L,G*P)
            if s.cost == 'reward':                                              # one reward per layer then
                reward = reward - price * k.view(-1, s.group, len(reward_topk))                             # (L,G,P)
                reward_topk = reward_topk - price * c.top_k
            adv = ppo.group_advantage(reward) if s.group > 1 else ppo.topk_advantage(reward, reward_topk)   # (..,G,P)
            adv = adv.reshape(-1, k.shape[1])                                                               # (1 or L,G*P)

            # update: the language model is not run again
            if not s.paper:
                optimizer.param_groups[0]['lr'] = s.ppo_lr * (1 - (step - 1) / s.ppo_steps)
            for _ in range(s.epochs):
                logits = allocators.logits(slice(None), z)                                                  # (L,G*P,A)
                loss, stats = ppo.ppo_loss(logits, k, logp_old, adv, price if s.cost == 'loss' else 0, s.clip, s.entropy)
                stats = averaged(stats)
                if not math.isfinite(stats['loss']):
                    raise InputError(f'ppo: the loss is {stats["loss"]} at step {step}; is there a NaN in the base model?')
                optimizer.zero_grad()
                loss.backward()
                average_gradients(allocators.parameters())
                optimizer.step()

            # price: up while the argmax policy runs too many experts, down while too few
            stats.update(averaged({'argmax_k': (1 + logits.argmax(-1)).float().mean().item(), 'reward': reward.mean().item(),
                                   'adv_std': adv.std().item(), 'stop': float(interrupt.asked)}))
            argmax_k, stop = stats['argmax_k'], stats.pop('stop') > 0           # all ranks stop, or none
            if s.lam is None:
                price *= math.exp(s.price_rate * (argmax_k - target) / c.top_k)
            probed = {}
            if step % 20 == 0 or step == s.ppo_steps:
                nats, tally = evaluate(model, probe, AdaK(allocators))
                numbers = probed = {'delta': (nats - probe_topk).mean().item(), 'probe_k': tally.mean()}
            log.append({'step': step, 'price': price, **stats, **probed})
            progress(step, step * s.group * s.ppo_batch * s.seq, loss=stats['loss'], argmax_k=argmax_k, price=price, **numbers)

            if state and (step % s.save_every == 0 or step == s.ppo_steps or stop):
                save_state(state, s, facts, allocators, optimizer, generator, log)
            if stop:
                raise KeyboardInterrupt


def train_soft(s, model, allocators, text):
    """The comparison without RL: the same allocators, start, objective and price, learnt through `SoftMixture`."""
    c = model.config
    batches = text.batches(s.ppo_batch, s.seq, torch.Generator().manual_seed(s.seed + 1))
    optimizer = torch.optim.AdamW(allocators.parameters(), s.soft_lr)
    price, L, progress = s.price, len(c.moe_layers), Progress('soft mixture', s.soft_steps)
    for step in range(1, s.soft_steps + 1):
        inputs, targets = (z.to(s.device) for z in next(batches))
        with torch.no_grad():
            logits_topk = model(inputs)
        mixture = SoftMixture(allocators)
        logits = model(inputs, mixture)
        reward = ppo.expected_gain(logits, logits_topk) if s.reward == 'expected' else ppo.next_token_logp(logits, targets)
        pi = mixture.pi                                                                                     # (L,P,A)
        mean_k = (pi @ torch.arange(1.0, allocators.k_max + 1, device=pi.device)).mean()
        entropy = torch.special.entr(pi).sum(-1).mean()
        loss = -reward.mean() + L * (price * mean_k + s.decisive * min(1, 2 * step / s.soft_steps) * entropy)
        optimizer.param_groups[0]['lr'] = s.soft_lr * (1 - (step - 1) / s.soft_steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        argmax_k = (1 + pi.argmax(-1)).float().mean().item()
        price *= math.exp(s.price_rate * (argmax_k - s.budget * c.top_k) / c.top_k)
        progress(step, step * inputs.numel(), loss=loss.item(), argmax_k=argmax_k, price=price)


# ================================================================ what a run writes

def table(rows):
    """The rows as a Markdown table."""
    lines = ['| method | loss (nats/token) | minus Top-K | mean k | expert FLOPs | total FLOPs |', '|---|---|---|---|---|---|']
    for r in rows:
        delta = '' if r['method'] == 'top-k' else f'{r["delta"]:+.4f} ± {r["delta_se"]:.4f}'
        lines.append(f'| {r["method"]} | {r["loss"]:.4f} | {delta} | {r["mean_k"]:.3f} | {r["expert_flops"]:.3f} | {r["total_flops"]:.3f} |')
    return '\n'.join(lines)


def write_log(path, log):
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=sorted({name for row in log for name in row}, key=lambda name: (name != 'step', name)))
    writer.writeheader()
    writer.writerows(log)
    write_whole(path, lambda f: f.write(text.getvalue().encode()))


def save_figure(fig, path):
    write_whole(path, lambda f: fig.savefig(f, format='png', dpi=130))
    plt.close(fig)


def figures(out, log, rows, top_k, target):
    """training.png: loss and mean k while PPO runs. layers.png: mean k by layer of every method."""
    fig, (a, b) = plt.subplots(1, 2, figsize=(9, 3.4), layout='constrained')
    probed = [row for row in log if 'delta' in row]
    a.plot([row['step'] for row in probed], [row['delta'] for row in probed], color='#0072B2', marker='.')
    a.axhline(0, color='black', linewidth=0.8, linestyle=':')
    a.set(xlabel='PPO step', ylabel='loss minus Top-K (nats/token)', title='argmax policy on calibration text')
    b.plot([row['step'] for row in log], [row['mean_k'] for row in log], color='#E69F00', linestyle='--', label='sampled k')
    b.plot([row['step'] for row in log], [row['argmax_k'] for row in log], color='#0072B2', label='argmax k')
    b.axhline(top_k, color='black', linewidth=0.8, linestyle=':', label='Top-K')
    if target:
        b.axhline(target, color='black', linewidth=0.8, linestyle='-.', label='budget')
    b.set(xlabel='PPO step', ylabel='mean k (experts per token and layer)', title='experts in the rollouts')
    b.legend(fontsize=8)
    save_figure(fig, out / 'training.png')

    fig, ax = plt.subplots(figsize=(5.6, 3.6), layout='constrained')
    styles = {'top-k': ('black', ':', ''), 'ada-k': ('#0072B2', '-', 'o'), 'random-mix': ('#999999', '--', ''),
              'top-p': ('#E69F00', '-', 's'), 'skip': ('#009E73', '-', '^')}
    for row in rows:
        color, line, marker = styles[row['method']]
        ax.plot(range(1, 1 + len(row['mean_k_by_layer'])), row['mean_k_by_layer'], color=color, linestyle=line, marker=marker,
                label=row['method'])
    ax.set(xlabel='MoE layer', ylabel='mean k (experts per token)', xticks=range(1, 1 + len(rows[0]['mean_k_by_layer'])))
    ax.legend(fontsize=8)
    save_figure(fig, out / 'layers.png')


# ================================================================ what a run needs: bytes, FLOPs, hours

def weight_counts(config):
    """(weights of the largest layer, of all layers, of embedding, last norm and head)."""
    with torch.device('meta'):
        model = Transformer(config)
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.layers]
    return max(layers), sum(layers), sum(p.numel() for p in model.parameters()) - sum(layers)


def allocator_sizes(s, config):
    """(k_max, numbers that an allocator reads)."""
    k_max = config.n_experts if s.paper else s.k_max or min(2 * config.top_k, config.n_experts)
    return k_max, config.dim + (config.n_experts + config.top_k - 1 if s.extended else 0)


def state_bytes(s, config):
    """Bytes of what a rollout keeps for the update: z in fp32, k, logp, noise of every layer and sampled token; logits and their gradients."""
    k_max, n_in = allocator_sizes(s, config)
    return len(config.moe_layers) * s.group * s.ppo_batch * s.seq * (4 * n_in + 16 + 20 * k_max)


def working_bytes(s, config, itemsize):
    """Bytes that PPO needs beside the weights, at its peak: states, hidden states, and the larger of one pass's experts and logits."""
    c, tokens = config, (1 + s.group) * s.ppo_batch * s.seq
    in_pass = min(max(PASS_TOKENS, s.seq), s.group * s.ppo_batch * s.seq)
    experts = in_pass * itemsize * (c.top_k * (2 * c.dim + 3 * c.expert_dim) + 3 * c.dim)
    # the reward's chunk of logits and what `expected_gain` makes of it: four copies in fp32
    logits = 4 * 4 * min(max(2 ** 28, (1 + s.group) * s.seq * c.n_vocab), tokens * c.n_vocab)
    return state_bytes(s, c) + 3 * tokens * c.dim * itemsize + max(experts, logits)


def weight_bytes(config, itemsize, how, size=1):
    """(bytes on the device, on the host) of the weights: 'plain', 'stream'ed, or 'shard'ed over `size` ranks."""
    layer, layers, rest = (itemsize * n for n in weight_counts(config))
    return {'plain': (layers + rest, 0), 'stream': (rest + 2 * layer, layers), 'shard': (rest + layers // size + 2 * layer, 0)}[how]


def free_memory(device):
    """Bytes that this process may still take on a device; of the host the least that the system, a control group and ulimit leave."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    numbers = lambda path: {line.split()[0].rstrip(':'): int(line.split()[1]) for line in open(path) if line.split()[1:2] and line.split()[1].isdigit()}
    free = [math.inf]
    try:
        free.append(1024 * numbers('/proc/meminfo')['MemAvailable'])
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            free.append(limit - 1024 * numbers('/proc/self/status')['VmSize'])
        group = Path('/sys/fs/cgroup') / open('/proc/self/cgroup').readline().strip().rpartition(':')[2].lstrip('/')
        free.append(int((group / 'memory.max').read_text()) - int((group / 'memory.current').read_text())
                    + numbers(group / 'memory.stat')['inactive_file'])
    except (OSError, ValueError, KeyError):                    # another system than Linux, or no limit
        pass
    return min(free)


def check_memory(s, config, itemsize, size, working):
    """InputError if the weights as wanted and `working` bytes do not fit. Returns whether a streamed model's layers can be page-locked."""
    device, how = torch.device(s.device), 'stream' if s.stream else 'shard' if size > 1 else 'plain'
    need = weight_bytes(config, itemsize, how, size)[0] + working
    if need > (free := free_memory(device)):
        streamed = weight_bytes(config, itemsize, 'stream')[0]
        smaller = 'a smaller --ppo-batch or --seq needs less'
        hint = f'two layers and the embedding alone are {streamed / 1e9:.1f} GB' if streamed > free else smaller
        if how == 'plain' and streamed < free:
            hint = f'--stream needs {(streamed + working) / 1e9:.1f} GB' + f', and with it {smaller}' * (streamed + working > free)
        raise InputError(f'memory: {s.device} has {free / 1e9:.1f} GB free, this run needs {need / 1e9:.1f} GB '
                         f'({working / 1e9:.1f} of them beside the weights); {hint}')
    return s.stream and device.type == 'cuda' and weight_bytes(config, itemsize, 'stream')[1] + 4e9 < free_memory(torch.device('cpu'))


# name: bf16 matmul FLOP/s, host-to-device bytes/s, bytes of memory, as published; what real code reaches of the first two
GPUS = {'A800-80GB': (312e12, 32e9, 80e9), 'H100-80GB': (989e12, 64e9, 80e9), 'H200': (989e12, 64e9, 141e9)}
REACHED = 0.5, 0.8


@torch.no_grad()
def measured_rates(s, config, dtype):
    """(FLOP/s of one MoE layer of this model with random weights on 2,048 tokens, bytes/s of a copy from the host) on s.device."""
    device, T = torch.device(s.device), min(s.seq, 2048)
    one = replace(config, n_layers=1, dense_layers=(), n_vocab=1)
    model = new_model(one, 0).to(dtype).to(device)
    tokens = torch.zeros(2048 // T, T, dtype=torch.long, device=device)
    model.embed_tokens.weight.data = torch.randn(1, config.dim).to(dtype).to(device)
    work = flops(one, config.top_k, T)['total'] * tokens.numel()
    source = torch.ones(2 ** 28, dtype=torch.uint8, pin_memory=device.type == 'cuda')
    target = torch.empty(2 ** 28, dtype=torch.uint8, device=device)

    def best(run):
        times = []
        for _ in range(4):
            start = time.perf_counter()
            run()
            if device.type == 'cuda':
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times[1:])
    return work / best(lambda: model.hidden(tokens)), 2 ** 28 / best(lambda: target.copy_(source))


def published_rates():
    """{GPU: (FLOP/s, bytes/s, bytes of memory)} that real code may count on."""
    return {name: (flop * REACHED[0], copy * REACHED[1], memory) for name, (flop, copy, memory) in GPUS.items()}


def run_flops(s, config):
    """{stage: (FLOPs, visits of the whole model)} of a run with --ckpt; each of the three calibrations taken as 8 evaluations."""
    c, tokens, batch = config, s.ppo_batch * s.seq, 32 * s.seq
    k_max, n_in = allocator_sizes(s, c)
    forward = lambda k: flops(c, k, s.seq)['total']
    mean_k = c.top_k * (s.budget if s.lam is None else 1)
    update = s.epochs * s.group * 6 * k_max * n_in * len(c.moe_layers)
    probes = s.ppo_steps // 20 * s.calibration_tokens // 4 * forward(mean_k)
    calibrated, compared = 3 * 8 + 1, 5
    together = max(batch, Streamed.tokens_per_visit)
    return {'start': ((s.warm_steps if s.start == 'p-warm' else 2) * tokens * forward(c.top_k), s.warm_steps if s.start == 'p-warm' else 2),
            'ppo': (s.ppo_steps * tokens * (forward(c.top_k) + s.group * forward(mean_k) + update) + probes, s.ppo_steps + s.ppo_steps // 20),
            'evaluation': ((calibrated * s.calibration_tokens + compared * s.heldout_tokens) * forward(mean_k),
                           calibrated * -(-s.calibration_tokens // together) + compared * -(-s.heldout_tokens // together))}


def plan(s, rates=None):
    """What this run needs, from the config of --ckpt alone. rates: as `published_rates`, by default these and this machine's."""
    folder = find_checkpoint(s.ckpt, config_only=True)
    config, dtype = read_config(folder), weight_dtype(folder)
    check_budget(s, config.top_k)
    layer, layers, rest = weight_counts(config)
    k_max, n_in = allocator_sizes(s, config)
    params = len(config.moe_layers) * k_max * (n_in + s.extended)
    working, work = working_bytes(s, config, dtype.itemsize), run_flops(s, config)
    sizes = {'plain': 1, 'stream': 1, 'shard': 8}              # ranks
    weights = {how: weight_bytes(config, dtype.itemsize, how, size) for how, size in sizes.items()}
    memory = {how: (device + working // sizes[how], host) for how, (device, host) in weights.items()}
    if rates is None:
        rates = published_rates()
        free = free_memory(torch.device(s.device))
        if 2 * layer * 4 < free:
            rates = {f'here ({s.device})': (*measured_rates(s, config, dtype), free), **rates}
    per_token = flops(config, config.top_k, s.seq)['total'] - 2 * config.dim * config.n_vocab
    machines = []
    for name, (rate, copy, has) in rates.items():
        on_cpu, hours = 'cpu' in name, {}
        for how, size in sizes.items():
            if on_cpu and size > 1:
                continue
            seconds = 0
            for flop, visits in work.values():
                compute, way = flop / rate / size, visits * layers * dtype.itemsize / copy * (how == 'stream')
                seconds += compute + way if on_cpu else max(compute, way)      # a CPU copies with the cores that compute
            hours[how] = seconds / 3600 if memory[how][0] < has else None
        machines.append({'machine': name, 'flops': rate, 'copy': copy, 'memory': has, 'hours': hours,
                         'compute_bound': layers * dtype.itemsize / copy * rate / per_token})
    return {'ckpt': s.ckpt, 'weights': layers + rest, 'dtype': str(dtype).removeprefix('torch.'), 'bytes': dtype.itemsize * (layers + rest),
            'layer_bytes': dtype.itemsize * layer, 'allocators': params, 'optimizer_bytes': 16 * params, 'state_bytes': state_bytes(s, config),
            'working_bytes': working, 'steps': s.ppo_steps, 'passes': 1 + s.group, 'tokens': s.ppo_batch * s.seq,
            'flops': {stage: flop for stage, (flop, _) in work.items()}, 'machines': machines, 'memory': memory}


def plan_table(p):
    """A plan as text."""
    gb = lambda n: f'{n / 1e9:.3g}'
    hours = lambda h: 'does not fit' if h is None else f'{h:.2g}'
    lines = [f'{p["ckpt"]}: {p["weights"] / 1e9:.2f}B weights in {p["dtype"]}, {gb(p["bytes"])} GB, the largest layer {gb(p["layer_bytes"])} GB; '
             f'allocators of {p["allocators"]:,} weights, {p["optimizer_bytes"] / 1e6:.0f} MB with gradients and optimizer',
             f'{p["steps"]} PPO steps of {p["passes"]} x {p["tokens"]:,} tokens: ' + ', '.join(f'{stage} {flop:.2e}' for stage, flop in p['flops'].items())
             + f' FLOPs; a rollout keeps {gb(p["state_bytes"])} GB of states', '',
             '| | GB on the device | GB on the host or in files |', '|---|---|---|']
    names = {'plain': 'plain', 'stream': '--stream', 'shard': 'each of 8 ranks'}
    lines += [f'| {names[how]} | {gb(device)} | {gb(host)} |' for how, (device, host) in p['memory'].items()]
    lines += ['', '| machine | TFLOP/s | copy GB/s | compute-bound from (tokens) | hours plain | --stream | 8 ranks |', '|---|---|---|---|---|---|---|']
    lines += [f'| {m["machine"]} | {m["flops"] / 1e12:.3g} | {gb(m["copy"])} | {m["compute_bound"]:,.0f} | '
              + ' | '.join(hours(m['hours'][how]) if how in m['hours'] else '' for how in names) + ' |' for m in p['machines']]
    return '\n'.join(lines + ['', f'GPUs: {REACHED[0]:.0%} of the published matmul rate and {REACHED[1]:.0%} of the published copy rate; '
                                  'here: one layer measured. 8 ranks: without the time that gathering the layers takes.'])


# ================================================================ the whole run

def main(argv=None):
    s, planned = parse(argv)
    if planned:
        return print(plan_table(plan(s)))
    join(s.device)
    rank, size = ranks()
    check_ranks(s)
    out = open_out(s.out)
    for part in out.glob('*.new') if rank == 0 else []:        # what a killed run had begun to write
        if part.is_file():
            part.unlink()
    torch.manual_seed(s.seed)
    seconds, clock = {}, time.time()

    def lap(stage):
        nonlocal clock
        seconds[stage], clock = time.time() - clock, time.time()

    model, tokenizer, (text, calibration, heldout) = base_model(s, out)
    c = model.config
    check_budget(s, c.top_k)
    print(f'base: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {len(c.moe_layers)} MoE layers, '
          f'top-{c.top_k} of {c.n_experts}; text: {len(text.tokens):,} train, {len(calibration.tokens):,} calibration, '
          f'{len(heldout.tokens):,} held-out tokens')
    lap('base')
    allocators = new_allocators(s, model, text)
    print(f'allocators: {allocators.n_params():,} trained parameters')
    lap('warm')

    log, state = [], out / 'state.safetensors'
    if state.exists() and not s.resume:
        print(f'{state} is of an interrupted run; --resume would go on with it, this run starts anew')
    try:
        train_ppo(s, model, allocators, text, calibration, log, state)
    except KeyboardInterrupt:
        allocators.save(out / 'allocator.safetensors')         # usable as they are
        write_log(out / 'log.csv', log)
        print(f'\ninterrupted after {len(log)} of {s.ppo_steps} PPO steps; {out / "allocator.safetensors"} holds the allocators so far, '
              f'--resume goes on from {state}')
        leave(130)
        sys.exit(130)
    lap('ppo')

    if s.lam is None:          # 0.5% below the budget, so that other text keeps within it too
        windows = calibration.windows(s.seq, s.calibration_tokens)
        price = calibrate(model, windows, lambda knob: AdaK(allocators, price=knob), 0.995 * s.budget * c.top_k, 5, -5)
        allocators.price.fill_(price)
    allocators.save(out / 'allocator.safetensors')
    write_log(out / 'log.csv', log)
    rows = compare(s, model, allocators, calibration, heldout)
    windows = heldout.windows(s.seq, s.heldout_tokens)
    bpb = bits_per_byte(torch.tensor(rows[0]['loss'] * windows[1].numel(), dtype=torch.float64), windows, tokenizer)
    lap('evaluation')
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6 # kB on Linux
    peaks = gathered(peak)
    if rank:
        return
    print(table(rows))
    print(f'base model: {bpb:.3f} bits per byte on held-out text')
    write_json(out / 'results.json', {'run': out.name, 'seed': s.seed, 'config': asdict(s), 'seconds': seconds, 'peak_gb': max(peaks), 'ranks': size,
                                      'bits_per_byte': bpb, 'allocator_params': allocators.n_params(), 'rows': rows})
    state.unlink()                                             # the run is complete
    figures(out, log, rows, c.top_k, s.budget * c.top_k if s.lam is None else None)
    print(f'{sum(seconds.values()):.0f} s, {max(peaks):.1f} GB{" on each rank" * (size > 1)}; wrote {", ".join(sorted(p.name for p in out.iterdir()))} in {out}')


def one_line_errors(script, main, argv):
    """main(argv); a wrong input or a failing disk ends in one line on stderr and exit status 2, Ctrl-C in one line and status 130."""
    status = 2
    try:
        main(argv)
        return leave()
    except InputError as e:
        line = str(e)
    except KeyboardInterrupt:
        print()                                                # below the progress line
        line, status = 'interrupted; files that were complete before still are', 130
    except OSError as e:
        line = f'{e.filename or "writing"}: {e.strerror or e}; files that were complete before still are'
    except (MemoryError, RuntimeError) as e:
        cause = str(e).splitlines()[0][:200] if str(e) else 'out of memory'
        if isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in cause:
            line = f'memory ran out ({cause}): --plan says what is needed; --stream, a smaller --ppo-batch or --seq need less'
        elif dist.is_initialized() and re.search('(?i)connection|nccl|gloo|timed out', cause):
            line = f'another rank is gone ({cause}); train.py --resume goes on from the last saved state'
        else:
            raise
    if ranks()[0]:
        time.sleep(3)                                          # most errors are every rank's: rank 0 says them, and torchrun ends the others
        line = f'rank {ranks()[0]}: {line}'
    print(f'{script}: {line}', file=sys.stderr, flush=True)
    if dist.is_initialized():
        os._exit(status)                                       # what waits for a lost rank would not let us go
    sys.exit(status)


def command_line(argv=None):
    one_line_errors('train.py', main, argv)


if __name__ == '__main__':
    command_line()
