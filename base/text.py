"""base/text.py: from documents to windows of tokens, and a byte-pair encoding of our own.

A split of the text is one stream of tokens, cut into windows of T.
"""
import collections
from dataclasses import dataclass

import numpy as np
import regex
import torch

from hub.files import InputError
from hub.tokenizer import byte_characters

SEPARATOR = '<|endoftext|>'     # behind every document
# words with the space before them, digits, symbols with the line end after them, line ends, indentation
PATTERN = r' ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'


# ================================================================ a stream of tokens

@dataclass
class Text:
    """A split of the text as one stream of tokens, a separator behind every document."""
    tokens: torch.Tensor            # (n,) int64
    document: np.ndarray            # (n,) the number of the document each token belongs to

    def windows(self, T, limit=None):
        """(inputs, targets, documents), each (n,T), of consecutive windows.

        limit: at most so many tokens, of windows spread over the whole split; at least one window.
        """
        n = (len(self.tokens) - 1) // T
        wanted = n if limit is None else min(n, max(1, limit // T))
        chosen = np.linspace(0, n - 1, wanted).astype(int)
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
    ids = []
    document = []
    for i, text in enumerate(texts):
        new = tokenizer.document(text)
        ids += new
        document += [i] * len(new)
    least = max(T + 1, (B + 1) * T)
    if len(ids) < least:
        raise InputError(f'--data: the {name} split has {len(ids)} tokens, {max(1, B)} sequences of {T} need '
                         f'{least}: give more text, a shorter --seq or a smaller --ppo-batch')
    return Text(torch.tensor(ids), np.array(document))


# ================================================================ byte-pair encoding, learnt

def learn_bpe(texts, n_tokens):
    """The n_tokens - 256 merges, as pairs of ids (id = 256 + place in the list), most frequent first.

    Example: 'aaabdaaabac' -> (97,97), then (256,97) .. as in Sennrich et al. 2016, on bytes.
    """
    chunks = collections.Counter()
    for text in texts:
        chunks.update(regex.findall(PATTERN, text))
    # a word is a string with a character for every id, so that str.replace merges a pair in it
    words = [chunk.encode().decode('latin-1') for chunk in chunks]
    times = list(chunks.values())
    count = collections.Counter()                       # pair -> how often it occurs
    where = collections.defaultdict(set)                # pair -> the words that may hold it

    def tally(i, n):
        for pair in zip(words[i], words[i][1:]):
            count[pair] += n
            where[pair].add(i)

    for i, n in enumerate(times):
        tally(i, n)
    merges = []
    while len(merges) < n_tokens - 256 and count:
        best = max(count, key=lambda pair: (count[pair], pair))
        a, b = best
        for i in where.pop(best):
            tally(i, -times[i])
            words[i] = words[i].replace(a + b, chr(256 + len(merges)))
            tally(i, times[i])
        del count[best]
        merges.append((ord(a), ord(b)))
    return merges


def tokenizer_json(merges):
    """The hub's tokenizer.json of a byte-level BPE: bytes 0-255, the merges, then SEPARATOR."""
    pieces = byte_characters()
    for a, b in merges:
        pieces.append(pieces[a] + pieces[b])
    separator = {
        'id': len(pieces), 'content': SEPARATOR, 'special': True,
        'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False,
    }
    split = {'type': 'Split', 'pattern': {'Regex': PATTERN}, 'behavior': 'Isolated', 'invert': False}
    level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': False, 'use_regex': False}
    return {
        'version': '1.0',
        'added_tokens': [separator],
        'pre_tokenizer': {
            'type': 'Sequence',
            'pretokenizers': [split, level],
        },
        'decoder': level,
        'model': {
            'type': 'BPE',
            'vocab': {piece: i for i, piece in enumerate(pieces)},
            'merges': [[pieces[a], pieces[b]] for a, b in merges],
        },
    }
