"""base/text.py: from files to windows of tokens: documents, splits, a byte-pair encoding of our own.

Documents are split by a hash of their names into three parts: train, calibration (knobs are set on it) and
held-out (every reported number is of it). A part is one stream of tokens, cut into windows of T.
"""
import ast
import collections
import hashlib
import io
import itertools
import json
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from tokenize import COMMENT, DEDENT, INDENT, NEWLINE, NL, STRING, TokenError, generate_tokens

import numpy as np
import torch

from hub.files import InputError
from hub.tokenizer import byte_characters


# ================================================================ documents and their splits

# not in the default text; pydoc_data is one generated page, as long as all other files of a split together
LEFT_OUT = {'test', 'tests', 'idle_test', 'site-packages', '__pycache__', 'pydoc_data'}
PIECE = 65536           # characters
LEAST_PROSE = 200       # characters of a document of prose


def read_documents(source, most, prose=False):
    """{name: text} of a file or a folder of .txt, .jsonl and .py files, at most so many.

    source '' is the standard library without its tests. prose: of .py files the docstrings and comments,
    where there are LEAST_PROSE characters of them. InputError names what cannot be read, or is no text.
    """
    root = Path(source or sysconfig.get_paths()['stdlib'])
    if not root.exists():
        raise InputError(f'--data {source}: no such file or folder')
    kinds, left_out = (('.txt', '.jsonl', '.py'), set()) if source else (('.py',), LEFT_OUT)
    paths = [root]
    if root.is_dir():
        paths = sorted(p for p in root.rglob('*') if p.suffix in kinds and p.is_file()
                       and not left_out & set(p.relative_to(root).parts))
    documents = {}
    for path in paths:
        name = path.relative_to(root).as_posix() if path != root else path.name
        try:
            text = path.read_text(encoding='utf-8', errors='replace')
        except OSError as e:
            raise InputError(f'--data {path}: {e.strerror}') from None
        if path.suffix == '.jsonl':
            documents.update(jsonl_documents(name, text))
        elif path.suffix != '.py' or not prose:
            documents[name] = text
        elif len(written := docstrings_and_comments(text)) >= LEAST_PROSE:
            documents[name] = written
    if prose and not documents:
        raise InputError(f'--prose: no docstrings or comments in the .py files of {root}')
    if not any(text.strip() for text in documents.values()):
        raise InputError(f'--data {root}: no text in .txt, .jsonl or .py files there')
    return dict(itertools.islice(documents.items(), most))


def docstrings_and_comments(source):
    """The prose of Python source, piece by piece; of what the tokenizer cannot read, what stands before."""
    pieces = []
    try:
        for t, starts_statement in python_tokens(source):
            if t.type == COMMENT:
                pieces.append(t.string.lstrip('#').strip())
            elif t.type == STRING and starts_statement:
                pieces.append(str(ast.literal_eval(t.string)).strip())
    except (TokenError, SyntaxError, ValueError):
        pass
    return '\n'.join(pieces)


def python_tokens(source):
    """(token, does it start a statement?) of the standard library's tokenizer, whose errors pass through.

    A string that starts a statement is a docstring.
    """
    starts_statement = True
    for t in generate_tokens(io.StringIO(source).readline):
        yield t, starts_statement
        if t.type not in (NL, COMMENT):
            starts_statement = t.type in (NEWLINE, INDENT, DEDENT)


def jsonl_documents(name, text):
    """{name:line: text} of a .jsonl file: objects with a `text`, or with `messages` of role and content."""
    documents = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if 'text' in row:
                document = row['text']
            else:
                document = '\n\n'.join(f'{m["role"]}: {m["content"]}' for m in row['messages'])
            if not isinstance(document, str):
                raise TypeError
        except (ValueError, TypeError, KeyError, RecursionError):
            raise InputError(f'--data {name}:{number}: no JSON object with a `text` '
                             f'or with `messages`') from None
        documents[f'{name}:{number}'] = document
    return documents


def split_documents(documents):
    """[train, calibration, held-out], lists of texts: 80, 10, 10 % of the documents by a hash of their names.

    A few documents are cut into pieces of 64 KiB first, so that one long file can be split too.
    """
    if len(documents) < 20:
        documents = {f'{name}:{at}': text[at:at + PIECE]
                     for name, text in documents.items() for at in range(0, len(text), PIECE)}
    ranked = sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest())
    tenth = max(1, len(ranked) // 10)
    parts = ranked[2 * tenth:], ranked[:tenth], ranked[tenth:2 * tenth]
    return [[documents[name] for name in part] for part in parts]


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
            chosen = np.linspace(0, n - 1, limit // T).astype(int)
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


def tokenize(texts, tokenizer, T, name):
    """A Text of the documents. InputError if there are not T + 1 tokens for one sequence."""
    ids = [tokenizer.document(text) for text in texts]
    tokens = torch.tensor([i for document in ids for i in document])
    if len(tokens) <= T:
        raise InputError(f'--data: the {name} split has {len(tokens)} tokens, '
                         f'too short for one sequence of {T + 1}')
    return Text(tokens, np.repeat(np.arange(len(ids)), [len(document) for document in ids]))


# ================================================================ byte-pair encoding, learnt

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
    """The hub's tokenizer.json of a byte-level BPE: bytes 0-255, the merges, then <|endoftext|>."""
    pieces = byte_characters()
    for a, b in merges:
        pieces.append(pieces[a] + pieces[b])
    separator = {'id': len(pieces), 'content': '<|endoftext|>', 'single_word': False, 'lstrip': False,
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
