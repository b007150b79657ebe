"""hub/tokenizer.py: the hub's tokenizer.json, with the ids of the library that wrote it.

    text -> added tokens cut out -> normalizer -> pre-tokenizer -> byte-pair merging -> post-processor

Modelled on tiktoken is what the six families use: a byte-level BPE behind splits by patterns (Qwen, OLMoE,
DeepSeek, our own base), and SentencePiece's BPE with byte fallback (Mixtral). A file that has any other step
or option is handed to the package `tokenizers` where that is installed, else refused: a step left out would
give other ids.
"""
import codecs
import itertools
import json
import unicodedata

import regex
import tiktoken

from hub.config import token_ids
from hub.files import InputError, read_json, reading

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# What the six families do, spelled as in their files with the options in the order of the alphabet.
NORMALIZERS = {                 # all steps: text -> text; \u2581 is the ▁ that stands for a space
    '[]':
        lambda text: text,
    '[{"type": "NFC"}]':
        lambda text: unicodedata.normalize('NFC', text),
    r'[{"prepend": "\u2581", "type": "Prepend"}, '
    r'{"content": "\u2581", "pattern": {"String": " "}, "type": "Replace"}]':
        lambda text: text and '▁' + text.replace(' ', '▁'),
}
PRE_TOKENIZERS = {              # step: the pattern whose matches become pieces, as does what lies between
    '{"individual_digits": true, "type": "Digits"}': r'\p{N}',
    '{"add_prefix_space": false, "type": "ByteLevel"}': GPT2_PATTERN,
    '{"add_prefix_space": false, "type": "ByteLevel", "use_regex": true}': GPT2_PATTERN,
    '{"add_prefix_space": false, "type": "ByteLevel", "use_regex": false}': '',
}
SPLIT = r'\{"behavior": "Isolated", "invert": false, "pattern": \{"Regex": ".*"\}, "type": "Split"\}'
ORDER = '(((Split|Digits) )*ByteLevel)?'
# of a model what changes no id: all bytes have tokens, nothing is unknown
NO_OPTIONS = 'type', 'vocab', 'merges', 'unk_token', 'fuse_unk'

# The patterns of tokenizer.json are written for Oniguruma. What is in here means the same to `regex`, with
# (?m): no classes within classes, no &&, \w, \h, no groups that have a number or options but i.
SAME_PATTERN = r'''(?x) (?:
      \\ (?: p\{[LMNPSZ][a-z]?\} | [sSrnt] | [^\w\s] )                               # an escape
    | \[ \^? (?: \\ (?: p\{[LMNPSZ][a-z]?\} | [sSrnt] | [^\w\s] ) | (?!&&)[^][\\] )+ \]     # a class
    | \( \? (?: i?: | = | ! )  |  [)|*+?$.]  |  \{ \d+ (?: ,\d* )? \} (?! \+ )
    | [^][(){}\\^$*+?|.] )*'''


class Tokenizer:
    """Text to token ids and back, by the tokenizer.json in a checkpoint folder.

    front: the ids that stand before every text; eos: those behind a document, one or none; stops: all ids
    that end a generated text; marks: all of these, no part of a text; ids {piece: id}; bytes_of_id
    {id: bytes}.
    InputError names the file and what in it is damaged or unknown.
    """

    def __init__(self, folder):
        path = folder / 'tokenizer.json'
        hf = read_json(path)
        self.byte_level = 'ByteLevel' in str(hf.get('pre_tokenizer'))
        byte_of = BYTE_OF_CHARACTER if self.byte_level else BYTE_OF_TOKEN
        self.library = None
        self.front = []
        with reading(path):
            try:
                self.read_steps(hf, byte_of)
            except Exception as what:
                self.hand_over(path, what)
            added = {token['content'] for token in hf['added_tokens']}
            self.bytes_of_id = {
                i: piece.encode() if piece in added else spelt(piece.replace('▁', ' '), byte_of)
                for piece, i in self.ids.items()
            }
        self.read_ends(folder)

    def hand_over(self, path, what):
        """Let the package `tokenizers` find the ids, for `what` is not modelled."""
        try:
            import tokenizers
        except ImportError:
            raise InputError(f'{path}: {what} is not modelled here: pip install tokenizers') from None
        self.library = tokenizers.Tokenizer.from_file(str(path))
        self.library.no_truncation()
        self.library.no_padding()
        self.ids = self.library.get_vocab()
        found = self.library.encode('a.')
        self.front = found.ids[:found.sequence_ids.index(0)]

    def read_steps(self, hf, byte_of):
        """Set what turns text into ids.

        What the six families do not have is an error of one kind or another, never left out.
        """
        steps = steps_of(hf, 'normalizer', 'normalizers')
        self.normalise = NORMALIZERS[json.dumps(steps, sort_keys=True)]
        steps = steps_of(hf, 'pre_tokenizer', 'pretokenizers')
        kinds = ' '.join(step['type'] for step in steps)
        patterns = map(pattern_of, steps)
        self.splits = [regex.compile(f'(?m)({pattern})').split for pattern in patterns if pattern]
        if not regex.fullmatch(ORDER, kinds):
            raise ValueError(f'the pre_tokenizer {kinds}')
        model = hf['model']
        options = [name for name, value in model.items() if value and name not in NO_OPTIONS]
        if options != ([] if self.byte_level else ['byte_fallback']):
            raise ValueError(f'a model with the options {options}')
        self.ids = model['vocab']
        if sorted(self.ids.values()) != list(range(len(self.ids))):
            raise ValueError('a vocabulary whose ids are not 0, 1, 2, ...')
        ids_of = ids_of_bytes(self.ids, model['merges'], byte_of)
        self.ids_of_rank = list(ids_of.values())
        self.engine = tiktoken.Encoding(
            'pieces',
            pat_str=r'[\s\S]+',
            mergeable_ranks={key: rank for rank, key in enumerate(ids_of)},
            special_tokens={},
        )
        self.read_added(hf['added_tokens'])
        for step in steps_of(hf, 'post_processor', 'processors'):
            if step['type'] != 'ByteLevel':             # which moves offsets only
                self.front += [self.ids[part['SpecialToken']['id']] for part in step['single'][:-1]]

    def read_added(self, tokens):
        """The added tokens, numbered as by the library, whatever their `id` says."""
        self.sought = {}                                # what is looked for: (id, is it special?)
        keys = ['\ud800'], ['\ud800']                   # before the normalizer, and behind it; never empty
        for token in tokens:
            match token:
                case {
                    'content': str(content),
                    'special': bool(special),
                    'normalized': bool(normalized),
                    'single_word': False,
                    'lstrip': False,
                    'rstrip': False,
                } if content:
                    i = self.ids.setdefault(content, len(self.ids))
                    key = self.normalise(content) if normalized else content
                    self.sought[key] = i, special
                    keys[normalized].append(key)
                case _:
                    raise ValueError(f'the added token {token}')
        self.raw, self.normal = [regex.compile(r'\L<longest>', longest=own) for own in keys]

    def read_ends(self, folder):
        """front, eos and stops, of the first file that says something about them.

        front: the post-processor, else tokenizer_config.json's bos_token where add_bos_token is true. eos:
        tokenizer_config.json, else what generation stops at. stops: generation_config.json, else config.json.
        A bos_token_id alone says only which token that would be: Qwen names one and never adds it.
        """
        stops = []
        for name in 'generation_config.json', 'config.json':
            path = folder / name
            stops = stops or token_ids(read_json(path, {}), 'eos_token_id', path)
        path = folder / 'tokenizer_config.json'
        ours = read_json(path, {})

        def named(key):
            """The id, in a list, of a token that is a string or an object there; none of None."""
            token = ours.get(key)
            if isinstance(token, dict):
                token = token.get('content')
            return [] if token is None else [self.ids[token]]
        with reading(path):
            if ours.get('add_bos_token'):
                self.front = self.front or named('bos_token')
            eos = named('eos_token')
        self.eos = (eos or stops)[:1]
        self.stops = set(stops or eos)
        self.marks = {*self.front, *self.stops, *self.eos}

    # ------------------------------------------------------------ text to ids

    def encode(self, text, special=False):
        """The ids of a text alone. `special` obeys special tokens in it, else they are plain text."""
        if self.library:
            self.library.encode_special_tokens = not special
            return self.library.encode(text, add_special_tokens=False).ids
        ids = []
        for part, token in self.cut(text, self.raw, special):
            for inner, inner_token in self.cut(self.normalise(part), self.normal, special):
                ids += self.plain(inner) + inner_token
            ids += token
        return ids

    def cut(self, text, pattern, special):
        """(text before it, [id]) of every added token, then (rest, []). `special`: of special ones too."""
        at = 0
        for found in pattern.finditer(text):
            i, is_special = self.sought[found[0]]
            if special or not is_special:
                yield text[at:found.start()], [i]
                at = found.end()
        yield text[at:], []

    def plain(self, text):
        """The ids of a part of a text without added tokens."""
        pieces = [text]
        for split in self.splits:
            pieces = [part for piece in pieces for part in split(piece) if part]
        ids = []
        for piece in pieces:
            for rank in self.engine.encode_ordinary(piece):
                ids += self.ids_of_rank[rank]
        if None in ids:
            raise InputError(f'tokenizer.json: there is no token for a character of {text[:20]!r}')
        return ids

    def prompt(self, text):
        """The ids of a text to go on from: special tokens in it are obeyed, and none is put behind it."""
        return self.front + self.encode(text, special=True)

    def document(self, text):
        """The ids of a document to learn from: all of it plain text, eos behind it where there is one."""
        return self.front + self.encode(text) + self.eos

    # ------------------------------------------------------------ ids to text

    def decode(self, ids):
        """The text of token ids; unknown ids give nothing, bytes that are no UTF-8 give U+FFFD.

        Without the space that SentencePiece puts in front of a text.
        """
        text = ''.join(self.stream(ids))
        return text if self.byte_level else text.removeprefix(' ')

    def stream(self, ids):
        """The text of an iterable of ids as it comes; a character appears when its last byte is there."""
        decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
        for i in ids:
            yield decoder.decode(self.bytes_of_id.get(i, b''))
        yield decoder.decode(b'', final=True)


# ================================================================ how files spell it

def byte_of_character():
    """{character: byte} by GPT-2's printable stand-ins, as tokenizer.json spells pieces: 'A' 65, 'Ġ' 32."""
    others = itertools.count(256)
    byte_of = {}
    for b in range(256):
        visible = chr(b).isprintable() and chr(b) != ' '
        character = chr(b if visible else next(others))
        byte_of[character] = bytes([b])
    return byte_of


BYTE_OF_CHARACTER = byte_of_character()
BYTE_OF_TOKEN = {f'<0x{b:02X}>': bytes([b]) for b in range(256)}       # SentencePiece's byte tokens


def spelt(piece, byte_of):
    """The bytes of a piece of the vocabulary; byte_of: one of the two tables above."""
    return byte_of.get(piece) or b''.join(byte_of.get(c, c.encode()) for c in piece)


def steps_of(hf, part, sequence):
    """The steps of a part of tokenizer.json: one, those of a sequence, or none."""
    step = hf.get(part)
    if not step:
        return []
    return step.get(sequence, [step])


def pattern_of(step):
    """The pattern of a step of the pre-tokenizer, if it is modelled."""
    step.pop('trim_offsets', None)                      # it changes no id
    spelling = json.dumps(step, sort_keys=True)
    if regex.fullmatch(SPLIT, spelling):
        pattern = step['pattern']['Regex']
        if regex.fullmatch(SAME_PATTERN, pattern):
            return pattern
    return PRE_TOKENIZERS[spelling]


# ================================================================ merging

def ids_of_bytes(vocab, merges, byte_of):
    """{bytes: ids} in the order in which tiktoken is to merge: two neighbours become the first that is here.

    Several ids where a character has no token: those of its bytes. A character must be whole before it merges
    with a neighbour, so all characters come before the words, each behind pretended tokens for its unfinished
    prefixes. By definition pairs are merged, while tiktoken knows only what comes out: that is the same where
    all merges to a word stand together, and parts of it are there before it, as in what was learnt.
    """
    ids_of = {byte: [vocab.get(name)] for name, byte in byte_of.items()}
    made = {piece for piece in vocab if len(piece) == 1}
    for character in made:
        utf8 = spelt(character, byte_of)
        for n in range(2, len(utf8)):
            ids_of[utf8[:n]] = ids_of[utf8[:n - 1]] + ids_of[utf8[n - 1:n]]
        ids_of[utf8] = [vocab[character]]
    pairs = [merge.split(' ') if isinstance(merge, str) else merge for merge in merges]
    for word, pairs_to_it in itertools.groupby(pairs, ''.join):
        if word in made or not any(made.issuperset(pair) for pair in pairs_to_it):
            raise ValueError(f'the place of the merges to {word}')
        made.add(word)
        ids_of[spelt(word, byte_of)] = [vocab[word]]
    return ids_of
