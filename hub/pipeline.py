"""hub/pipeline.py: the steps of tokenizer.json before the merging, each with what tokenizers 0.23 does.

    normalizers         text -> text
    pre-tokenizers      (pieces, at_start) -> the same; at_start: the first piece begins where the text does
    post-processors     ids in front of a text, ids behind it

A step, an option or a value that is not here is refused by name: a step left out would give other ids.
"""
import functools
import itertools
import re
import unicodedata

from hub.files import InputError, checked
from hub.regex import compiled

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PUNCTUATION = r'[!-/:-@\[-`{-~\p{P}]'


def byte_characters():
    """GPT-2's printable stand-in for each byte, as tokenizer.json spells pieces: 65 -> 'A', 32 -> 'Ġ'."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [b for b in range(256) if b not in own]
    return [chr(b) if b in own else chr(256 + other.index(b)) for b in range(256)]


def one_of(step, steps, where):
    """What the maker of a step makes of it; steps: the makers by type, {type: function of (step, where)}."""
    kind = step.get('type') if isinstance(step, dict) else step
    if not isinstance(kind, str) or kind not in steps:
        raise InputError(f'{where}: {kind!r} is not supported, only {", ".join(steps)}')
    return steps[kind](step, f'{where} {kind}')


def options(step, where, **fields):
    """The values of a step's fields {name: (type or values, default)}; a field that is not named is refused.

    A field without a default, (type,), must be there.
    """
    unknown = sorted(step.keys() - fields.keys() - {'type'})
    if unknown:
        raise InputError(f'{where}: the option {unknown[0]} is not supported')
    return [checked(step, name, where, *how) for name, how in fields.items()]


def pattern_of(pattern, where):
    """A compiled pattern of {"String": s} or {"Regex": r}."""
    if isinstance(pattern, dict) and len(pattern) == 1:
        [(kind, value)] = pattern.items()
        if kind == 'String' and isinstance(value, str) and value:
            return re.compile(re.escape(value))
        if kind == 'Regex' and isinstance(value, str):
            return compiled(value, where)
    raise InputError(f'{where}: the pattern {str(pattern)[:80]} is neither a String nor a Regex')


# ================================================================ normalizers

def normalizer(step, where):
    """A function text -> text; of no step, the text itself."""
    return (lambda text: text) if step is None else one_of(step, NORMALIZERS, where)


def unicode_form(step, where):
    options(step, where)
    return lambda text: unicodedata.normalize(step['type'], text)


def prepend(step, where):
    [prefix] = options(step, where, prepend=(str,))
    return lambda text: prefix + text if text else text


def replace(step, where):
    pattern, content = options(step, where, pattern=(dict,), content=(str,))
    pattern = pattern_of(pattern, where)
    return lambda text: pattern.sub(lambda match: content, text)


def normalizer_sequence(step, where):
    [steps] = options(step, where, normalizers=(list,))
    functions = [one_of(inner, NORMALIZERS, where) for inner in steps]

    def run(text):
        for function in functions:
            text = function(text)
        return text
    return run


NORMALIZERS = {'NFC': unicode_form, 'NFD': unicode_form, 'NFKC': unicode_form, 'NFKD': unicode_form,
               'Prepend': prepend, 'Replace': replace, 'Sequence': normalizer_sequence}


# ================================================================ pre-tokenizers

def pre_tokenizer(step, where):
    """A function (pieces, at_start) -> (pieces, at_start); of no step, the pieces themselves."""
    return unchanged if step is None else one_of(step, PRE_TOKENIZERS, where)


def unchanged(pieces, at_start):
    return pieces, at_start


def marked(text, pattern, invert):
    """[(start, end, is it a match?)] of all of a text, in order: the matches and what lies between them."""
    spans, at = [], 0
    for match in pattern.finditer(text):
        start, end = match.span()
        if start == end == at and spans:                       # an empty match right behind another
            continue
        if at < start:
            spans.append((at, start, invert))
        spans.append((start, end, not invert))
        at = end
    return spans + [(at, len(text), invert)] * (at < len(text))


def joined(spans, behaviour):
    """[(start, end)] of the pieces that a behaviour makes of marked spans.

    Example: 'a-b--c' at '-'. Removed: a b c; Isolated: a - b - - c; Contiguous: a - b -- c;
    MergedWithPrevious: a- b- - c; MergedWithNext: a -b - -c.
    """
    if behaviour == 'Removed':
        return [(start, end) for start, end, match in spans if not match]
    if behaviour == 'Isolated':
        return [(start, end) for start, end, _ in spans]
    backwards = behaviour == 'MergedWithNext'
    out, before = [], False
    for start, end, match in reversed(spans) if backwards else spans:
        joins = match == before if behaviour == 'Contiguous' else match and not before
        if joins and out:
            other = out.pop()
            start, end = min(start, other[0]), max(end, other[1])
        out.append((start, end))
        before = match
    return out[::-1] if backwards else out


def splitter(pattern, behaviour='Isolated', invert=False):
    """The pre-tokenizer that cuts at the matches of a compiled pattern; with invert at what lies between."""
    def run(pieces, at_start):
        out, starts_at = [], None
        for piece in pieces:
            found = pattern.findall(piece) if behaviour == 'Isolated' else ()
            if found and sum(map(len, found)) == len(piece):   # the usual case: all of it matches
                spans, parts = [(0, 0)], filter(None, found)
            else:
                spans = joined(marked(piece, pattern, invert), behaviour)
                parts = [piece[start:end] for start, end in spans if start < end]
            if starts_at is None:                              # of the first piece
                starts_at = spans[0][0] if spans else -1
            out.extend(parts)
        return out, at_start and starts_at == 0
    return run


BEHAVIOURS = 'Removed', 'Isolated', 'MergedWithPrevious', 'MergedWithNext', 'Contiguous'


def split(step, where):
    pattern, behaviour, invert = options(
        step, where, pattern=(dict,), behavior=(BEHAVIOURS,), invert=(bool, False))
    return splitter(pattern_of(pattern, where), behaviour, invert)


def digits(step, where):
    [one_by_one] = options(step, where, individual_digits=(bool, False))
    return splitter(compiled(r'\p{N}', where), 'Isolated' if one_by_one else 'Contiguous')


def punctuation(step, where):
    [behaviour] = options(step, where, behavior=(BEHAVIOURS, 'Isolated'))
    return splitter(compiled(PUNCTUATION, where), behaviour)


def whitespace(step, where):
    options(step, where)
    return splitter(compiled(r'\w+|[^\w\s]+', where), 'Removed', invert=True)


def whitespace_split(step, where):
    options(step, where)
    return splitter(compiled(r'\s', where), 'Removed')


def byte_level(step, where):
    """Every byte becomes a printable character, after GPT-2's pattern unless use_regex is false."""
    add_space, _, use_regex = options(
        step, where, add_prefix_space=(bool, True), trim_offsets=(bool, True), use_regex=(bool, True))
    characters = byte_characters()
    cut = splitter(compiled(GPT2_PATTERN, where)) if use_regex else unchanged

    @functools.lru_cache(2 ** 16)
    def printable(piece):
        return ''.join([characters[b] for b in piece.encode()])

    def run(pieces, at_start):
        if add_space:
            pieces = [piece if piece.startswith(' ') else ' ' + piece for piece in pieces]
        pieces, at_start = cut(pieces, at_start)
        return [printable(piece) for piece in pieces], at_start
    return run


def metaspace(step, where):
    """Spaces become a marker, one more in front; cut in front of every marker unless split is false."""
    marker, scheme, cut, legacy, _ = options(
        step, where, replacement=(str, '▁'), prepend_scheme=(('always', 'first', 'never'), None),
        split=(bool, True), add_prefix_space=(bool, None), str_rep=(str, None))
    if len(marker) != 1:
        raise InputError(f'{where}: the replacement {marker!r} is not one character')
    if legacy is False and scheme in ('always', 'first'):
        raise InputError(f'{where}: add_prefix_space false contradicts prepend_scheme {scheme}')
    scheme = scheme or ('never' if legacy is False else 'always')
    behind = splitter(re.compile(re.escape(marker)), 'MergedWithNext') if cut else unchanged

    def run(pieces, at_start):
        pieces = [piece.replace(' ', marker) for piece in pieces]
        for i, piece in enumerate(pieces):
            wanted = scheme == 'always' or scheme == 'first' and at_start and i == 0
            if wanted and not piece.startswith(marker):
                pieces[i] = marker + piece
        return behind(pieces, at_start)
    return run


def pre_tokenizer_sequence(step, where):
    [steps] = options(step, where, pretokenizers=(list,))
    functions = [one_of(inner, PRE_TOKENIZERS, where) for inner in steps]

    def run(pieces, at_start):
        for function in functions:
            pieces, at_start = function(pieces, at_start)
        return pieces, at_start
    return run


PRE_TOKENIZERS = {
    'Split': split, 'Digits': digits, 'ByteLevel': byte_level, 'Metaspace': metaspace,
    'Whitespace': whitespace, 'WhitespaceSplit': whitespace_split, 'Punctuation': punctuation,
    'Sequence': pre_tokenizer_sequence}


# ================================================================ post-processors

def post_processor(step, where):
    """(ids in front, ids behind) that a post-processor puts around one text."""
    return ([], []) if step is None else one_of(step, POST_PROCESSORS, where)


def template(step, where):
    """Example: single <s> $A, special_tokens {<s>: {ids: [1]}} -> ([1], [])."""
    single, _, special = options(step, where, single=(list,), pair=(list, []), special_tokens=(dict, {}))
    around, side = ([], []), 0
    for part in single:
        if isinstance(part, dict) and 'Sequence' in part and not side:
            side = 1
        elif isinstance(part, dict) and 'SpecialToken' in part:
            name = checked(checked(part, 'SpecialToken', where, dict), 'id', where, str)
            ids = checked(checked(special, name, where, dict), 'ids', where, list)
            around[side].extend(checked({'ids': i}, 'ids', where, int) for i in ids)
        else:
            raise InputError(f'{where}: the part {str(part)[:80]} is not supported')
    if not side:
        raise InputError(f'{where}: the template has no place for the text')
    return around


def classifier(step, where):
    """BERT's and RoBERTa's: [cls] text [sep]."""
    sep, cls, *_ = options(step, where, sep=(list,), cls=(list,), trim_offsets=(bool, True),
                           add_prefix_space=(bool, True))
    return tuple([checked({'id': pair[-1] if pair else None}, 'id', where, int)] for pair in (cls, sep))


def offsets_only(step, where):
    options(step, where, add_prefix_space=(bool, True), trim_offsets=(bool, True), use_regex=(bool, True))
    return [], []


def post_processor_sequence(step, where):
    [steps] = options(step, where, processors=(list,))
    around = [one_of(inner, POST_PROCESSORS, where) for inner in steps]
    front, behind = (list(itertools.chain(*side)) for side in zip(*around)) if around else ([], [])
    return front, behind


POST_PROCESSORS = {'TemplateProcessing': template, 'ByteLevel': offsets_only, 'BertProcessing': classifier,
                   'RobertaProcessing': classifier, 'Sequence': post_processor_sequence}
