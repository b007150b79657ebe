"""base/text.py: from documents to windows of tokens, and a byte-pair encoding of our own.

A split of the text is one stream of tokens, cut into windows of T.
"""
import collections
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import regex
import torch

from hub.files import InputError, read_json
from hub.tokenizer import BYTE_OF_CHARACTER
from run.console import Progress

SEPARATOR = '<|endoftext|>'     # behind every document
ENOUGH = 2e6            # characters of text to learn the merges from
# words with the space before them, digits, symbols with the line end after them, line ends, indentation
PATTERN = r' ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'


# ================================================================ a stream of tokens

@dataclass
class Text:
    """A split of the text as one stream of tokens, a separator behind every document."""
    tokens: torch.Tensor            # (n,) whole numbers; int32 where memory counts, batches are int64
    document: torch.Tensor          # (n,) the number of the document each token belongs to
    T: int                          # tokens of a window
    front: tuple = ()               # the ids that the tokenizer puts in front of a text

    def at(self, begin):
        """The T tokens from `begin` (n,) on, (n,T) int64, those behind them, and the documents of the latter.

        A model that was trained with a token in front of every text attends to it all the time, so it stands
        at the beginning of a window, in place of the text's own token. It is never a target.
        """
        place = begin[:, None] + torch.arange(self.T)                       # (n,T)
        inputs = self.tokens[place].long()
        for i, front in enumerate(self.front):
            inputs[:, i] = front
        return inputs, self.tokens[place + 1].long(), self.document[place + 1]

    def windows(self, limit):
        """(inputs, targets, documents), each (n,T), of consecutive windows.

        limit: at most so many tokens, of windows spread over the whole split; at least one window.
        """
        n = (len(self.tokens) - 1) // self.T
        wanted = min(n, max(1, limit // self.T))
        chosen = np.linspace(0, n - 1, wanted).astype(int)
        return self.at(torch.from_numpy(chosen) * self.T)

    def batches(self, B, seed):
        """Endless random batches as `windows` (B,T); every token once before any token twice."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            offset = torch.randint(self.T, (1,), generator=generator).item()
            n = (len(self.tokens) - offset - 1) // self.T
            for chosen in torch.randperm(n, generator=generator).split(B):
                if len(chosen) == B:
                    yield self.at(offset + chosen * self.T)                 # (B,T) each


def tokenize(texts, tokenizer, T, name, B=0):
    """A Text of the documents. InputError where there are too few tokens for one sequence, or one batch of B.

    A batch begins at an offset of up to T - 1 tokens. 8 bytes are kept of a token: text may be gigabytes.
    """
    progress = Progress(f'load {name} text')
    parts = []
    for text in texts:
        parts.append(torch.tensor(tokenizer.document(text)).int())
        progress(len(parts), len(texts))
    lengths = [len(part) for part in parts]
    n = sum(lengths)
    least = (B + 1) * T + 1
    if n < least:
        raise InputError(f'--data: the {name} split has {n} tokens, {max(1, B)} sequences of {T} need '
                         f'{least}: give more text, a shorter --seq or a smaller --ppo-batch')
    document = torch.repeat_interleave(torch.tensor(lengths)).int()         # 0 0 0 1 1 ..
    return Text(torch.cat(parts), document, T, tokenizer.front)


# ================================================================ byte-pair encoding, learnt

def learn_bpe(texts, n_tokens):
    """The n_tokens - 256 merges, as pairs of ids (id = 256 + place in the list), most frequent first.

    Example: 'aaabdaaabac' -> (97,97), then (256,97) .. as in Sennrich et al. 2016, on bytes.
    """
    # how often each word occurs: a string with a character for every id, so that str.replace merges a pair
    words = collections.Counter()
    seen = 0                                            # characters
    for text in texts:
        for word in regex.findall(PATTERN, text):
            words[word.encode().decode('latin-1')] += 1
        seen += len(text)
        if seen >= ENOUGH:
            break
    count = collections.Counter()                       # pair of characters -> how often it occurs

    def tally(word, n):
        for a, b in itertools.pairwise(word):
            count[a + b] += n

    for word, n in words.items():
        tally(word, n)
    merges = []
    for new in range(256, n_tokens):
        if not count:
            break
        pair = max(count, key=lambda pair: (count[pair], pair))
        for word in [word for word in words if pair in word]:
            n = words.pop(word)
            tally(word, -n)
            word = word.replace(pair, chr(new))
            tally(word, n)
            words[word] = n
        del count[pair]
        merges.append(tuple(map(ord, pair)))
    return merges


def tokenizer_json(merges):
    """The hub's tokenizer.json of a byte-level BPE: bytes 0-255, the merges, then SEPARATOR.

    base/tokenizer.json has all of it that is not learnt.
    """
    pieces = list(BYTE_OF_CHARACTER)
    for a, b in merges:
        pieces.append(pieces[a] + pieces[b])
    hf = read_json(Path(__file__).with_name('tokenizer.json'))
    [split, _] = hf['pre_tokenizer']['pretokenizers']
    split['pattern']['Regex'] = PATTERN
    hf['model']['vocab'] = {piece: i for i, piece in enumerate(pieces)}
    hf['model']['merges'] = [[pieces[a], pieces[b]] for a, b in merges]
    [separator] = hf['added_tokens']
    separator['id'] = len(pieces)
    return hf
