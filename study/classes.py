"""study/classes.py: what kind of token is it? Classes of Python source and of prose, by character."""
import itertools
import keyword
import re
import sys
import tokenize

import numpy as np
import torch

from base.documents import python_tokens, read_documents, split_documents
from base.text import Text

SPACE = 'white space'
PYTHON_CLASSES = ('identifier', 'keyword', 'number', 'operator, punctuation', 'string', 'comment, docstring',
                  SPACE)
PROSE_CLASSES = 'content word', 'function word', 'number', 'operator, punctuation', SPACE
FUNCTION_WORDS = frozenset(
    'a an the and or but nor so yet if then than that this these those of to in on at by for from with '
    'without as is are was were be been being it its he she they we you i him her them us me my your his our '
    'their not no do does did has have had will would can could may might must shall should there which who '
    'whom what when where'.split())


def python_classes(text):
    """The class of every character of Python source, by the standard library's tokenizer.

    What that cannot read counts as a comment. A string that is a statement of its own is a docstring.
    Example: 'x = 1' -> identifier, white space, operator, white space, number.
    """
    classes = [SPACE] * len(text)
    lines = text.splitlines(True)
    starts = list(itertools.accumulate((len(line) for line in lines), initial=0))
    end = 0
    try:
        for t, starts_statement in python_tokens(text):
            kind = python_class(t, tokenize.tok_name[t.type], starts_statement)
            if kind:
                begin, end = (starts[line - 1] + column for line, column in (t.start, t.end))
                classes[begin:end] = [kind] * (end - begin)
    except (tokenize.TokenError, SyntaxError, ValueError, IndexError):
        classes[end:] = ['comment, docstring'] * (len(text) - end)
    return classes


def python_class(token, name, starts_statement):
    """The class of one token of the standard library's tokenizer, None for what is only layout."""
    if name == 'NAME':
        return 'keyword' if keyword.iskeyword(token.string) else 'identifier'
    if name == 'STRING':
        return 'comment, docstring' if starts_statement else 'string'
    if name.startswith('FSTRING'):
        return 'string'
    return {'NUMBER': 'number', 'OP': 'operator, punctuation', 'COMMENT': 'comment, docstring'}.get(name)


def prose_classes(text):
    """The class of every character of any other text; a word of the short list above is a function word."""
    classes = []
    for piece in re.findall(r'[^\W\d_]+|\d+|\s+|(?:[^\s\w]|_)+', text):
        if piece.isspace():
            kind = SPACE
        elif piece[0].isdigit():
            kind = 'number'
        elif not piece[0].isalpha():
            kind = 'operator, punctuation'
        else:
            kind = 'function word' if piece.lower() in FUNCTION_WORDS else 'content word'
        classes += [kind] * len(piece)
    return classes


def token_classes(tokenizer, ids, classes_of):
    """The class of each token: that of its first character that is not white space; bos, eos are white space.

    The text that is looked at is what the tokens spell: the tokenizer may have normalised what it was given,
    or put a space in front. classes_of(text) gives one class per character; tokens are bytes.
    """
    marks = tokenizer.marks
    pieces = [b'' if i in marks else tokenizer.bytes_of_id[i] for i in ids]
    text = b''.join(pieces).decode('utf-8', 'surrogateescape')
    in_front = tokenizer.drops_space and text.startswith(' ')
    classes = [SPACE] * in_front + classes_of(text[in_front:])
    widths = [len(c.encode('utf-8', 'surrogateescape')) for c in text]
    of_byte, at, result = np.repeat(np.array(classes, dtype=object), widths), 0, []
    for piece in pieces:
        skip = len(piece) - len(piece.lstrip())
        result.append(SPACE if skip == len(piece) else of_byte[at + skip])
        at += len(piece)
    return result


def held_out_classes(study):
    """(class of every input token of the held-out windows (n,), names of the classes).

    Prose rules where nothing is Python.
    """
    s = study.s
    documents = read_documents(s.data, s.documents, s.prose)
    names, classes_of = PYTHON_CLASSES, python_classes
    if s.prose or not any(name.endswith('.py') for name in documents):
        print('no Python files in the text: token classes by the rule for prose (prose_classes)',
              file=sys.stderr)
        names, classes_of = PROSE_CLASSES, prose_classes
    stream = []
    for text in split_documents(documents)[2]:
        stream += token_classes(study.tokenizer, study.tokenizer.document(text), classes_of)
    number = torch.tensor([names.index(kind) for kind in stream])
    inputs, _, _ = Text(number, study.heldout.document).windows(s.seq, s.heldout_tokens)
    return inputs.flatten(), names
