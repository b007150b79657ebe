"""base/text.py: from documents to windows of tokens, and a byte-pair encoding of our own.

A split of the text is one stream of tokens, cut into windows of T.
"""
import collections
import re
from dataclasses import dataclass

import numpy as np
import torch

from hub.files import InputError
from hub.pipeline import byte_characters


# ================================================================ a stream of tokens

@dataclass
class Text:
    """A split of the text as one stream of tokens, a separator behind every document."""
    tokens: torch.Tensor            # (n,) int64
    document: np.ndarray            # (n,) the number of the document each token belongs to

    def windows(self, T, limit=None):
        """(inputs, targets, documents), each (n,T), of consecutive windows, spread; `limit`: most tokens."""
        n = (len(self.tokens) - 1) // T
        chosen = np.arange(n)
        if limit is not None and n * T > limit:
            chosen = np.linspace(0, n - 1, max(1, limit // T)).astype(int)
        at = torch.from_numpy(chosen)[:, None] * T + torch.arange(T)                        # (n,T)
        return self.tokens[at], self.tokens[at + 1], self.document[at + 1]

    def batches(self, B, T, generator):
        """Endless random batches (inputs, targets), (B,T) each; every token once before any token twice."""
        while True:
            offset = torch.randint(T, (1,), generator=generator).item()
            n = (len(self.tokens) - offset - 1) // T
            for chosen in torch.randperm(n, generator=generator).split(B):
                if len(chosen) == B:
                    at = offset + chosen[:, None] * T + torch.arange(T)                     # (B,T)
                    yield self.tokens[at], self.tokens[at + 1]


def tokenize(texts, tokenizer, T, name, B=0):
    """A Text of the documents. InputError where there are too few tokens for one sequence, or one batch of B.

    A batch begins at an offset of up to T - 1 tokens.
    """
    ids = [tokenizer.document(text) for text in texts]
    tokens = torch.tensor([i for document in ids for i in document], dtype=torch.long)
    if len(tokens) <= T:
        raise InputError(f'--data: the {name} split has {len(tokens)} tokens, '
                         f'too short for one sequence of {T + 1}')
    if len(tokens) < (B + 1) * T:
        raise InputError(f'--data: the {name} split has {len(tokens) // T - 1} sequences of {T} tokens, '
                         f'a batch needs {B}: give more text, a shorter --seq or a smaller --ppo-batch')
    return Text(tokens, np.repeat(np.arange(len(ids)), [len(document) for document in ids]))


# ================================================================ byte-pair encoding, learnt

SEPARATOR = '<|endoftext|>'     # behind every document
# words with the space before them, digits, symbols with the line end after them, line ends, indentation
PATTERN = r' ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
# the same for `re`, to learn from
PATTERN_RE = r' ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'


def learn_bpe(texts, n_tokens):
    """The n_tokens - 256 merges, as pairs of ids (id = 256 + place in the list), most frequent first.

    Example: 'aaabdaaabac' -> (97,97), then (256,97) .. as in Sennrich et al. 2016, on bytes.
    """
    chunks = collections.Counter()
    for text in texts:
        chunks.update(re.findall(PATTERN_RE, text))
    words = [list(chunk.encode()) for chunk in chunks]
    times = list(chunks.values())
    count, where = collections.Counter(), collections.defaultdict(set)     # pair -> how often, in which words
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
    """The hub's tokenizer.json of a byte-level BPE: bytes 0-255, the merges, then SEPARATOR."""
    pieces = byte_characters()
    for a, b in merges:
        pieces.append(pieces[a] + pieces[b])
    separator = {'id': len(pieces), 'content': SEPARATOR, 'single_word': False, 'lstrip': False,
                 'rstrip': False, 'normalized': False, 'special': True}
    split = {'type': 'Split', 'pattern': {'Regex': PATTERN}, 'behavior': 'Isolated', 'invert': False}
    level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': False, 'use_regex': False}
    return {
        'version': '1.0', 'truncation': None, 'padding': None,
        'added_tokens': [separator], 'normalizer': None,
        'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [split, level]},
        'post_processor': None, 'decoder': level,
        'model': {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None,
                  'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False,
                  'ignore_merges': False,
                  'vocab': {piece: i for i, piece in enumerate(pieces)},
                  'merges': [[pieces[a], pieces[b]] for a, b in merges]}}
