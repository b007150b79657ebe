"""hub/regex.py: the patterns of tokenizer.json, written for Oniguruma, as patterns of Python's `re`.

What differs: `re` knows no \\p{..}, no classes within classes and no &&; its \\s, \\w, \\d are other sets; in
Oniguruma ^ and $ are of lines. So every class becomes the explicit set of its characters. Which characters
have a Unicode property is asked of the engine inside tiktoken, which knows them all. The rest is refused by
name.
"""
import functools
import re

import numpy as np
import tiktoken

from hub.files import InputError

N_CODES = 0x110000
BYTES = {bytes([b]): b for b in range(256)}
# what Oniguruma's short names mean, as properties
SHORT = {'s': [r'\p{White_Space}'], 'd': [r'\p{Nd}'], 'h': ['[0-9a-fA-F]'],
         'w': [r'\p{Alphabetic}', r'\p{M}', r'\p{Nd}', r'\p{Pc}', '[²³¹¼½¾]']}
CONTROL = {'n': '\n', 't': '\t', 'r': '\r', 'f': '\f', 'v': '\v', 'a': '\a', 'e': '\x1b'}
ANCHORS = {'A': r'\A', 'z': r'\Z', 'Z': r'(?=\n?\Z)'}
ESCAPE = re.compile(r'\\(?:x\{([0-9a-fA-F]{1,6})\}|x([0-9a-fA-F]{1,2})|u([0-9a-fA-F]{4})'
                    r'|([pP])\{(\^?)([\w =]+)\}|(.))', re.DOTALL)
GROUP = re.compile(r'\((?:\?(?::|=|!|<=|<!|>|i:))?')
REPEAT = re.compile(r'(?:[*+?]|\{\d+(?:,\d*)?\}|\{,\d+\})(?:\?|\+)?')


def compiled(pattern, where):
    """The compiled Python pattern of an Oniguruma one; InputError names what it has that is not modelled."""
    try:
        return re.compile(translate(pattern))
    except (ValueError, re.error, OverflowError, RecursionError, IndexError) as e:
        raise InputError(f'{where}: the pattern {pattern[:80]!r} is not supported ({str(e)[:100]})') from None


def translate(pattern):
    """The same in Python's spelling. ValueError names what has none."""
    out, at = [], 0
    while at < len(pattern):
        c = pattern[at]
        if pattern.startswith('(?i)', at):
            if at:
                raise ValueError('(?i) is only read at the start')
            out.append('(?i)')
            at += 4
        elif c == '(':
            found = GROUP.match(pattern, at)
            if pattern.startswith('?', found.end()):
                raise ValueError(f'the group {pattern[at:at + 5]}')
            out.append('(?:' if found[0] == '(' else found[0])  # nothing refers back to a group
            at = found.end()
        elif c == '[':
            chars, at = read_class(pattern, at)
            out.append(spelled(chars))
        elif c == '\\':
            what, at = read_escape(pattern, at)
            out.append(what if isinstance(what, str) else spelled(what))
        elif found := REPEAT.match(pattern, at):
            if found[0][0] == '{' and found[0][-1] == '+':     # a repeated repeat there, possessive in re
                raise ValueError(f'the repeat {found[0]}')
            out.append(found[0])
            at = found.end()
        else:
            lines = {'^': r'(?:\A|(?<=\n)(?!\Z))', '$': r'(?=\n|\Z)'}
            out.append(lines.get(c) or (c if c in '|).' else re.escape(c)))
            at += 1
    return ''.join(out)


def read_escape(pattern, at):
    """(what the escape at `at` means: Python's spelling or a set of characters, the place behind it)."""
    found = ESCAPE.match(pattern, at)
    if not found:
        raise ValueError('a \\ at the end')
    *code, kind, negated, name, c = found.groups()
    if any(code):
        what = re.escape(chr(int(next(filter(None, code)), 16)))
    elif kind:
        chars = property_set(rf'\p{{{name}}}')
        what = ~chars if (kind == 'P') != bool(negated) else chars
    elif c.lower() in SHORT:
        chars = functools.reduce(np.logical_or, map(property_set, SHORT[c.lower()]))
        what = ~chars if c.isupper() else chars
    elif c in CONTROL:
        what = re.escape(CONTROL[c])
    elif c in ANCHORS:
        what = ANCHORS[c]
    elif c in 'bB':
        word = spelled(read_escape(r'\w', 0)[0])
        what = rf'(?:(?<={word})(?!{word})|(?<!{word})(?={word}))'
        what = what if c == 'b' else f'(?!{what})'
    elif c.isalnum():
        raise ValueError(f'the escape {found[0]}')
    else:
        what = re.escape(c)
    return what, found.end()


def read_class(pattern, at):
    """(the set of the class that opens at `at`, the place behind it). Classes nest, && intersects."""
    start, at = at, at + 1
    negated = pattern[at] == '^'
    at += negated
    chars, together, first = empty(), None, at
    while pattern[at] != ']' or at == first:
        if pattern[at] == ']' or pattern.startswith('[:', at):
            raise ValueError(f'the class {pattern[start:at + 9]}')
        if pattern.startswith('&&', at):
            together = chars if together is None else together & chars
            chars, at = empty(), at + 2
        elif pattern[at] == '[':
            inner, at = read_class(pattern, at)
            chars |= inner
        else:
            low, at = read_item(pattern, at)
            high = low
            if isinstance(low, int) and pattern[at] == '-' and pattern[at + 1] not in ']&[':
                high, at = read_item(pattern, at + 1)
                if not isinstance(high, int) or high < low:
                    raise ValueError(f'the range {pattern[start:at]}')
            if isinstance(low, int):
                chars[low:high + 1] = True
            else:
                chars |= low
    chars = chars if together is None else together & chars
    return ~chars if negated else chars, at + 1


def read_item(pattern, at):
    """(a code point or a set, the place behind it) within a class."""
    if pattern[at] != '\\':
        return ord(pattern[at]), at + 1
    if pattern[at + 1:at + 2] in tuple('bBAzZ'):
        raise ValueError(f'{pattern[at:at + 2]} in a class')
    what, at = read_escape(pattern, at)
    return (ord(what[-1]) if isinstance(what, str) else what), at


# ---------------------------------------------------------------- sets of characters: (N_CODES,) bool

def empty():
    return np.zeros(N_CODES, bool)


@functools.cache
def every_character():
    return ''.join(chr(c) for c in range(N_CODES) if not 0xd800 <= c < 0xe000)


@functools.cache
def property_set(pattern):
    """The characters that match a pattern of one character, by tiktoken, which drops what does not match."""
    engine = tiktoken.Encoding('property', pat_str=pattern, mergeable_ranks=BYTES, special_tokens={})
    matching = bytes(engine.encode_ordinary(every_character())).decode()
    chars = empty()
    chars[np.frombuffer(matching.encode('utf-32-le'), np.uint32)] = True
    return chars


def spelled(chars):
    """A set of characters as a class of Python's re."""
    if not chars.any():
        return '(?!)'
    edges = np.flatnonzero(np.diff(chars, prepend=False, append=False))
    ranges = (f'\\U{low:08x}-\\U{high - 1:08x}' for low, high in zip(edges[::2], edges[1::2]))
    return f'[{"".join(ranges)}]'
