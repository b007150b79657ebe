"""hub/bpe.py: byte-pair merging of the pieces of a text, by the vocabulary and merges of tokenizer.json.

tiktoken merges whichever pair of neighbours has the lowest rank, so a vocabulary becomes a table of ranks
(bytes -> rank) and, because a rank need not be an id, a table rank -> id.
"""
import functools

import tiktoken

from hub.files import InputError, checked

REMEMBERED = 2 ** 18    # pieces whose ids are kept: words come again and again
SHORT = 64              # characters of a piece that is kept


class BPE:
    """Pieces to ids: `bpe(piece) -> [ids]`.

    model: the `model` of a tokenizer.json. InputError names what it has that is not modelled, and a character
    that it has no token for where a text holds one.
    """

    def __init__(self, model, where):
        self.where = where
        checked(model, 'type', where, ('BPE',), 'BPE')
        for name in ('continuing_subword_prefix', 'end_of_word_suffix'):
            checked(model, name, where, ('',), '')
        checked(model, 'dropout', where, (0, 0.0), 0)
        vocab = checked(model, 'vocab', where, dict)
        self.vocab = {piece: checked(vocab, piece, f'{where} vocab', int, least=0) for piece in vocab}
        self.ignore_merges = checked(model, 'ignore_merges', where, bool, False)
        self.fuse_unk = checked(model, 'fuse_unk', where, bool, False)
        unk = checked(model, 'unk_token', where, str, None)
        self.unk = None if unk is None else self.vocab.get(unk)
        self.byte_ids = []
        if checked(model, 'byte_fallback', where, bool, False):
            self.byte_ids = [self.vocab[name] for name in byte_tokens() if name in self.vocab]
            if len(self.byte_ids) not in (0, 256):
                raise InputError(f'{where}: byte_fallback with {len(self.byte_ids)} of 256 byte tokens '
                                 f'is not supported')
        pairs = [self.read_merge(merge) for merge in checked(model, 'merges', where, list)]
        merged = {left + right for left, right in pairs}
        self.inside = {piece[i:i + 2] for piece in merged for i in range(len(piece) - 1)}
        self.rank_of_pair = {tuple(pair): rank for rank, pair in enumerate(pairs)}
        self.build(pairs)
        if any(self.merge_by_pairs(piece) != [self.vocab[piece]] for piece in merged if len(piece) > 2):
            self.merge_long = self.merge_by_pairs
        self.remember = functools.lru_cache(REMEMBERED)(self.ids)
        self.merge = functools.lru_cache(REMEMBERED)(self.merge_long)

    def read_merge(self, merge):
        """(left, right) of 'left right' or of a list of both."""
        pair = merge.split(' ') if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(p, str) for p in pair):
            raise InputError(f'{self.where}: the merge {str(merge)[:80]!r} is not a pair of pieces')
        for piece in (*pair, ''.join(pair)):
            if piece not in self.vocab:
                raise InputError(f'{self.where}: the merge {merge!r} needs {piece!r}, which is not in vocab')
        return pair

    def build(self, pairs):
        """The ranks: single bytes, characters, then words in the order of the merges.

        A character must be whole before it merges with a neighbour, so all characters come before the words,
        each behind pretended tokens for its unfinished prefixes.
        """
        ranks, self.id_of_rank = {}, []

        def add(key, i=None):
            if key not in ranks:
                ranks[key] = len(ranks)
                self.id_of_rank.append(i)
        for b in range(256):
            add(bytes([b]), self.vocab.get(chr(b)) if b < 128 else None)
        for piece, i in self.vocab.items():
            if len(piece) == 1:
                key = encoded(piece)
                for n in range(2, len(key)):
                    add(key[:n])
                add(key, i)
        for left, right in pairs:
            add(encoded(left + right), self.vocab[left + right])
        self.engine = tiktoken.Encoding(self.where, pat_str=r'[\s\S]+', mergeable_ranks=ranks,
                                        special_tokens={})

    def __call__(self, piece):
        return self.remember(piece) if len(piece) <= SHORT else self.ids(piece)

    def ids(self, piece):
        """The ids of a piece, part by part.

        Two characters that stand side by side in no word never end up in one token, so a piece can be cut
        between them; a character without a token is a part by itself.
        """
        if self.ignore_merges and piece in self.vocab:
            return [self.vocab[piece]]
        cuts = [i for i in range(1, len(piece)) if piece[i - 1:i + 1] not in self.inside]
        ids, unknown = [], False
        for start, end in zip([0, *cuts], [*cuts, len(piece)]):
            part = piece[start:end]
            known = end - start > 1 or part in self.vocab
            if known:
                ids += self.merge(part) if end - start <= SHORT else self.merge_long(part)
            elif self.byte_ids:
                ids += [self.byte_ids[b] for b in part.encode()]
                known = True
            elif self.unk is None:
                raise InputError(f'{self.where}: there is no token for the character {part!r} of the text, '
                                 f'and no unk_token')
            elif not (unknown and self.fuse_unk):
                ids.append(self.unk)
            unknown = not known
        return ids

    def merge_long(self, part):
        """The ids of a part whose characters all have tokens."""
        return [self.id_of_rank[rank] for rank in self.engine.encode_ordinary(part)]

    def merge_by_pairs(self, part):
        """The same by the definition: the first pair of the lowest rank is merged, again and again.

        It differs where a word can be put together from two pieces that are no merge, which a table of words
        cannot say; in a vocabulary that was learnt, not edited, every word ends as itself, and it does not.
        """
        pieces = list(part)
        while True:
            pairs = enumerate(zip(pieces, pieces[1:]))
            found = [(self.rank_of_pair[pair], i) for i, pair in pairs if pair in self.rank_of_pair]
            if not found:
                return [self.vocab[piece] for piece in pieces]
            i = min(found)[1]
            pieces[i:i + 2] = [pieces[i] + pieces[i + 1]]


def byte_tokens():
    """The names of SentencePiece's byte tokens."""
    return [f'<0x{b:02X}>' for b in range(256)]


def encoded(piece):
    return piece.encode('utf-8', 'surrogatepass')
