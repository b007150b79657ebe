"""hub/tokenizer.py: the hub's tokenizer.json, with the ids of the library that wrote it.

    text -> added tokens cut out -> normalizer -> pre-tokenizer -> merging -> ids -> post-processor

Steps are in hub/pipeline.py, merging in hub/bpe.py. The same object decides what stands in front of a text,
what ends a document, and where generation stops: everything that reads or writes text asks it.
"""
import codecs
import re
from pathlib import Path

from hub.bpe import BPE, byte_tokens, encoded
from hub.config import token_ids
from hub.files import InputError, checked, read_object
from hub.pipeline import byte_characters, normalizer, options, post_processor, pre_tokenizer
from hub.regex import compiled

SURROGATES = re.compile('[\ud800-\udfff]')      # halves of a character, which JSON can spell and UTF-8 cannot


class Added:
    """One added token and its flags."""

    def __init__(self, values, where):
        self.id, self.content, self.special, self.single_word, self.lstrip, self.rstrip, self.normalized = (
            options(values, where, id=(int,), content=(str,), special=(bool, False),
                    single_word=(bool, False), lstrip=(bool, False), rstrip=(bool, False),
                    normalized=(bool, True)))
        if self.id < 0 or not self.content:
            raise InputError(f'{where}: an added token with id {self.id} and content {self.content!r}')


class Tokenizer:
    """Text to token ids and back, by the tokenizer.json in a checkpoint folder.

    front: the ids that stand before every text; eos: the id behind a document, or None; stops: all ids that
    end a generated text; bytes_of_id {id: bytes}; n_vocab, one more than the largest id. InputError names the
    file and what in it is damaged or not modelled.
    """

    def __init__(self, folder):
        path = Path(folder) / 'tokenizer.json'
        hf, where = read_object(path), str(path)
        self.normalise = normalizer(hf.get('normalizer'), f'{where}: normalizer')
        self.pre_tokenise = pre_tokenizer(hf.get('pre_tokenizer'), f'{where}: pre_tokenizer')
        self.bpe = BPE(checked(hf, 'model', where, dict), f'{where}: model')
        added = [Added(checked({'token': token}, 'token', f'{where}: added_tokens', dict),
                       f'{where}: added_tokens') for token in checked(hf, 'added_tokens', where, list, [])]
        n_added = len(self.bpe.vocab)
        for token in added:                            # numbered as by the library, whatever `id` says
            known = self.bpe.vocab.get(token.content)
            token.id, n_added = (n_added, n_added + 1) if known is None else (known, n_added)
        self.added = {token.content: token.id for token in added}
        self.raw = Finder([token for token in added if not token.normalized], lambda text: text, where)
        self.normal = Finder([token for token in added if token.normalized], self.normalise, where)
        self.bytes_of_id, self.drops_space = spelling(hf, self.bpe.vocab, where)
        self.bytes_of_id.update({token.id: encoded(token.content) for token in added})
        if not self.bytes_of_id:
            raise InputError(f'{where}: the vocabulary is empty')
        self.n_vocab = max(self.bytes_of_id) + 1
        self.front, self.behind = post_processor(hf.get('post_processor'), f'{where}: post_processor')
        self.eos, self.stops = None, set()
        self.read_ends(Path(folder))

    def read_ends(self, folder):
        """front, eos and stops, of the first file that says something about them.

        front: the post-processor, else tokenizer_config.json's bos_token where add_bos_token is true. eos:
        tokenizer_config.json, else what generation stops at. stops: generation_config.json, else config.json.
        A bos_token_id alone says only which token that would be: Qwen names one and never adds it.
        """
        says = {name: read_object(folder / name) if (folder / name).exists() else {}
                for name in ('tokenizer_config.json', 'generation_config.json', 'config.json')}
        where, ours = f'{folder}/tokenizer_config.json', says['tokenizer_config.json']
        if checked(ours, 'add_bos_token', where, bool, False) and not self.front:
            self.front = [i for i in [self.named(ours, 'bos_token', where)] if i is not None]
        stops = []
        for name in ('generation_config.json', 'config.json'):
            stops = stops or token_ids(says[name], 'eos_token_id', f'{folder}/{name}')
        self.eos = self.named(ours, 'eos_token', where)
        if self.eos is None and stops:
            self.eos = stops[0]
        self.stops = set(stops) if stops else {self.eos} - {None}

    def named(self, values, name, where):
        """The id of a token of tokenizer_config.json, a string or an object there; None if it has none."""
        content = values.get(name)
        if isinstance(content, dict):
            content = content.get('content')
        content = checked({name: content}, name, where, str, None)
        i = self.added.get(content, self.bpe.vocab.get(content))
        if i is None and content is not None:
            raise InputError(f'{where}: {name} {content!r} is no token of tokenizer.json')
        return i

    # ------------------------------------------------------------ text to ids

    def encode(self, text, special=False):
        """The ids of a text alone. `special` obeys special tokens in it, else they are plain text."""
        text, ids = SURROGATES.sub('\ufffd', text), []
        for start, end, i in self.raw.spans(text, special):
            if i is not None:
                ids.append(i)
                continue
            part = self.normalise(text[start:end])
            for inner_start, inner_end, i in self.normal.spans(part, special):
                if i is not None:
                    ids.append(i)
                else:
                    pieces, _ = self.pre_tokenise([part[inner_start:inner_end]], start == inner_start == 0)
                    for piece in pieces:
                        ids += self.bpe(piece)
        return ids

    def prompt(self, text):
        """The ids of a text to go on from, as transformers' tokenizers give them: special tokens obeyed."""
        return self.front + self.encode(text, special=True) + self.behind

    def document(self, text):
        """The ids of a document to learn from: all of it plain text, eos behind it where there is one."""
        return self.front + self.encode(text) + ([] if self.eos is None else [self.eos])

    @property
    def marks(self):
        """The ids that mark where texts begin and end: no part of the text."""
        return {*self.front, *self.stops, self.eos} - {None}

    # ------------------------------------------------------------ ids to text

    def decode(self, ids):
        """The text of token ids; unknown ids give nothing, bytes that are no UTF-8 give U+FFFD."""
        return ''.join(self.stream(ids))

    def stream(self, ids, first=True):
        """The text of an iterable of ids as it comes; a character appears when its last byte is there.

        `first`: the ids begin a text, so that a space that the tokenizer put in front of it is dropped.
        """
        decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
        first = first and self.drops_space
        for i in map(int, ids):
            text = decoder.decode(self.bytes_of_id.get(i, b''))
            if first and text and i not in self.front:
                text, first = text.removeprefix(' '), False
            yield text
        yield decoder.decode(b'', final=True)


class Finder:
    """Where added tokens occur in a text.

    tokens: [Added]; normalise: what happens to their contents before they are looked for.
    """

    def __init__(self, tokens, normalise, where):
        self.tokens = {normalise(token.content): token for token in tokens}
        longest_first = sorted(filter(None, self.tokens), key=len, reverse=True)
        self.pattern = re.compile('|'.join(map(re.escape, longest_first)) or r'(?!)')
        self.word, self.spaces = compiled(r'\w', where), compiled(r'\s*', where)

    def spans(self, text, special):
        """[(start, end, id or None)] of all of a text. `special`: find special tokens too."""
        out, at = [], 0
        for found in self.pattern.finditer(text):
            token, (start, end) = self.tokens[found[0]], found.span()
            if token.special and not special:
                continue
            around = text[start - 1:start] + text[end:end + 1]
            if token.single_word and self.word.search(around):
                continue
            if token.lstrip:
                while start > at and self.spaces.fullmatch(text, start - 1, start):
                    start -= 1
            if token.rstrip:
                end = self.spaces.match(text, end).end()
            if at < start:
                out.append((at, start, None))
            out.append((start, end, token.id))
            at = end
        return out + [(at, len(text), None)] * (at < len(text))


# ---------------------------------------------------------------- reading

def steps_of(step, inner):
    """The steps within a step of tokenizer.json, sequences laid open."""
    if not isinstance(step, dict):
        return []
    if isinstance(step.get(inner), list):
        return [one for part in step[inner] for one in steps_of(part, inner)]
    return [step]


def spelling(hf, vocab, where):
    """({id: bytes}, does decoding drop a space in front?) by the decoder.

    Where there is none, by undoing what the normalizer and the pre-tokenizer do.
    """
    where, marker, drops, characters = f'{where}: decoder', None, False, None
    steps = steps_of(hf.get('decoder'), 'decoders') or undone(hf)
    for step in steps:
        kind = step.get('type')
        if kind == 'ByteLevel':
            characters = {c: b for b, c in enumerate(byte_characters())}
        elif kind == 'Metaspace':
            marker = checked(step, 'replacement', where, str, '▁')
            never = step.get('prepend_scheme') == 'never' or step.get('add_prefix_space') is False
            drops = not never
        elif kind == 'Replace' and step.get('content') == ' ' and isinstance(step.get('pattern'), dict):
            marker = checked(step['pattern'], 'String', where, str)
        elif kind == 'Strip':
            [content, start, stop] = options(step, where, content=(str,), start=(int,), stop=(int,))
            if (content, stop) != (' ', 0) or start not in (0, 1):
                raise InputError(f'{where}: Strip of {start} {content!r} in front, {stop} behind '
                                 f'is not supported')
            drops = start == 1
        elif kind not in ('ByteFallback', 'Fuse'):
            raise InputError(f'{where}: {str(kind)[:80]!r} is not supported, only ByteLevel, ByteFallback, '
                             f'Fuse, Metaspace, Replace by a space, Strip, Sequence')
    bytes_of_id = {}
    for piece, i in vocab.items():
        if characters and all(c in characters for c in piece):
            bytes_of_id[i] = bytes(characters[c] for c in piece)
        else:
            bytes_of_id[i] = encoded(piece.replace(marker, ' ') if marker else piece)
    if hf['model'].get('byte_fallback'):
        bytes_of_id.update({vocab[name]: bytes([b]) for b, name in enumerate(byte_tokens()) if name in vocab})
    return bytes_of_id, drops


def undone(hf):
    """The steps of a decoder that undo those before the merging."""
    steps = [step for step in steps_of(hf.get('pre_tokenizer'), 'pretokenizers')
             if step.get('type') in ('ByteLevel', 'Metaspace')]
    for step in steps_of(hf.get('normalizer'), 'normalizers'):
        if step.get('type') == 'Prepend':
            steps.append({'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0})
        elif step.get('type') == 'Replace' and step.get('pattern') == {'String': ' '}:
            steps.append({'type': 'Replace', 'pattern': {'String': step['content']}, 'content': ' '})
    return steps
