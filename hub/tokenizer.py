"""hub/tokenizer.py: the hub's tokenizer.json on tiktoken.

tiktoken merges whichever pair of neighbours has the lowest rank, so every kind of BPE is a table of ranks
(bytes -> rank) and, because a rank need not be an id, a table rank -> ids. Three kinds: SentencePiece with
byte fallback (Mixtral), byte-level with one pattern (Qwen, OLMoE, our own), byte-level behind several splits
(DeepSeek).
"""
import codecs
import re
import unicodedata
from pathlib import Path

import tiktoken

from hub.files import InputError, read_json

# what the hub's files leave to the library: GPT-2's pattern, and what Unicode (but not Python's re) calls
# white space
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WHITE_SPACE = r'[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]'


def byte_characters():
    """GPT-2's printable stand-in for each byte, as tokenizer.json spells pieces. [65] -> 'A', [32] -> 'Ġ'."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [b for b in range(256) if b not in own]
    return [chr(b) if b in own else chr(256 + other.index(b)) for b in range(256)]


def isolate(pieces, pattern):
    """Cut every piece at the matches of a compiled pattern; matches and what is between become pieces."""
    out = []
    for piece in pieces:
        at = 0
        for match in pattern.finditer(piece):
            out += [piece[at:match.start()], match[0]]
            at = match.end()
        out.append(piece[at:])
    return [piece for piece in out if piece]


def any_of(tokens):
    """A compiled pattern that matches one of the strings, the longest first."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile('|'.join(map(re.escape, longest_first)) or r'(?!)')


class Tokenizer:
    """Text to token ids and back, from tokenizer.json (and bos, eos of config.json) in a checkpoint folder.

    bos, eos: ids or None; bytes_of_id {id: bytes}; n_vocab, one more than the largest id. InputError names
    the file that is missing, damaged or of another kind than BPE.
    """

    def __init__(self, folder):
        path = Path(folder) / 'tokenizer.json'
        hf, config = read_json(path), read_json(Path(folder) / 'config.json')
        self.bos, self.eos = config.get('bos_token_id'), config.get('eos_token_id')
        if isinstance(self.eos, list):                         # chat models may name several
            self.eos = self.eos[0]
        self.ranks, self.ids_of_rank, self.bytes_of_id, self.stages = {}, [], {}, []
        try:
            bpe = hf['model']
            if bpe.get('type', 'BPE') != 'BPE':
                raise InputError(f'{path}: a {bpe["type"]} tokenizer is not supported, only BPE')
            merges = [tuple(m.split(' ')) if isinstance(m, str) else tuple(m) for m in bpe['merges']]
            self.spm = bool(bpe.get('byte_fallback'))
            self.nfc = (hf.get('normalizer') or {}).get('type') == 'NFC'
            if self.spm:
                pattern = self.read_spm(bpe['vocab'], merges)
            else:
                pattern = self.read_byte_level(bpe['vocab'], merges, hf['pre_tokenizer'])
            self.added = {token['content']: token['id'] for token in hf.get('added_tokens', [])}
            always = [token['content'] for token in hf.get('added_tokens', []) if not token['special']]
        except (KeyError, TypeError, AttributeError, IndexError) as e:
            cause = f'{type(e).__name__}: {e}'
            raise InputError(f'{path}: not a tokenizer.json this project can read ({cause})') from None
        for content, i in self.added.items():
            self.bytes_of_id[i] = content.encode()
        self.match_added, self.match_always = any_of(self.added), any_of(always)
        self.bpe = tiktoken.Encoding(str(path), pat_str=pattern, mergeable_ranks=self.ranks,
                                     special_tokens={})
        self.n_vocab = max(self.bytes_of_id) + 1

    def add_rank(self, key, ids):
        if key not in self.ranks:
            self.ranks[key] = len(self.ranks)
            self.ids_of_rank.append(ids)

    def read_byte_level(self, vocab, merges, pre):
        """Ranks: the bytes, then the merges in order. Returns tiktoken's pattern; more go to self.stages."""
        byte_of = {c: b for b, c in enumerate(byte_characters())}

        def as_bytes(piece):
            return bytes(byte_of[c] for c in piece)
        for c in byte_characters():
            # a byte that never occurs in UTF-8 may have no token; tiktoken wants a rank for each
            self.add_rank(as_bytes(c), [vocab[c]] if c in vocab else [])
        for left, right in merges:
            self.add_rank(as_bytes(left + right), [vocab[left + right]])
        for piece, i in vocab.items():
            if all(c in byte_of for c in piece):
                self.bytes_of_id[i] = as_bytes(piece)
        steps = pre['pretokenizers'] if pre['type'] == 'Sequence' else [pre]
        patterns = [step['pattern']['Regex'] for step in steps if step['type'] == 'Split']
        digits = any(step['type'] == 'Digits' for step in steps)
        if len(patterns) == 1 and not digits:
            return patterns[0]
        if not patterns and not digits:
            return GPT2_PATTERN
        self.stages = [re.compile(pattern.replace(r'\s', WHITE_SPACE)) for pattern in patterns]
        if digits:
            numbers = (chr(c) for c in range(0x110000) if unicodedata.category(chr(c))[0] == 'N')
            self.stages.append(re.compile('[' + ''.join(numbers) + ']'))
        return r'[\s\S]+'

    def read_spm(self, vocab, merges):
        """SentencePiece BPE with byte fallback: characters, then words in the order of the merges.

        A character that is no piece falls back to byte tokens, so its bytes must not merge half way: every
        character piece comes before the words, each behind pretended tokens for its unfinished prefixes.
        """
        byte_id = [vocab[f'<0x{b:02X}>'] for b in range(256)]
        for b in range(256):
            c = chr(b).replace(' ', '▁')
            self.add_rank(bytes([b]), [vocab[c] if b < 128 and c in vocab else byte_id[b]])
        for piece, i in vocab.items():
            if len(piece) == 1 and piece != '▁':
                key = piece.encode()
                for n in range(2, len(key)):
                    self.add_rank(key[:n], [byte_id[b] for b in key[:n]])
                self.add_rank(key, [i])
        for left, right in merges:
            self.add_rank((left + right).replace('▁', ' ').encode(), [vocab[left + right]])
        self.bytes_of_id = {i: piece.replace('▁', ' ').encode() for piece, i in vocab.items()}
        self.bytes_of_id.update({i: bytes([b]) for b, i in enumerate(byte_id)})
        return r' *[^ ]+| +'                                   # a run of spaces stays with the word behind it

    def encode(self, text, special=False):
        """Token ids of a text, no bos. `special` obeys special tokens in it, else they are plain text."""
        match, ids, at = self.match_added if special else self.match_always, [], 0
        for found in match.finditer(text):
            ids += self.encode_plain(text[at:found.start()]) + [self.added[found[0]]]
            at = found.end()
        return ids + self.encode_plain(text[at:])

    def encode_plain(self, text):
        if not text:
            return []
        if self.spm:
            text = ' ' + text.replace('▁', ' ')                # SentencePiece's dummy prefix
        if self.nfc:
            text = unicodedata.normalize('NFC', text)
        pieces = [text]
        for stage in self.stages:
            pieces = isolate(pieces, stage)
        ranks = (rank for piece in pieces for rank in self.bpe.encode_ordinary(piece))
        return [i for rank in ranks for i in self.ids_of_rank[rank]]

    def document(self, text):
        """The ids of a whole document: bos in front and eos behind, where the model has them."""
        bos, eos = ([] if i is None else [i] for i in (self.bos, self.eos))
        return bos + self.encode(text) + eos

    def decode(self, ids):
        """The text of token ids; unknown ids give nothing, bytes that are no UTF-8 give U+FFFD."""
        raw = b''.join(self.bytes_of_id.get(int(i), b'') for i in ids)
        text = raw.decode('utf-8', errors='replace')
        return text[1:] if self.spm and text.startswith(' ') else text

    def stream(self, ids, first=True):
        """The text of an iterable of ids as it comes; a character appears when its last byte is there.

        `first`: the ids begin a text, so that SentencePiece's space in front of it is dropped.
        """
        decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
        first = first and self.spm
        for i in ids:
            text = decoder.decode(self.bytes_of_id.get(int(i), b''))
            if first and text:
                text, first = text.removeprefix(' '), False
            yield text
        yield decoder.decode(b'', final=True)
