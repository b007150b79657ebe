"""base/documents.py: what --data names, as documents, and their three splits.

Documents are split by a hash of their names: train, calibration (no program reads it: settings are to be
chosen on it) and held-out (which every reported number is of).
"""
import ast
import collections
import hashlib
import itertools
import json
import os
import re
import sys
import sysconfig
from pathlib import Path
from tokenize import COMMENT, DEDENT, INDENT, NEWLINE, NL, STRING, TokenError, generate_tokens

from hub.files import InputError

SURROGATES = '[\ud800-\udfff]'  # halves of a character, which JSON can spell and UTF-8 cannot
KINDS = '.txt', '.jsonl', '.py'
# not in the default text: tests; encodings, one table many times over; pydoc_data, a generated page that is
# as long as all other files of a split
LEFT_OUT = 'test|tests|idle_test|site-packages|encodings|pydoc_data'
COPIES = r'\._.*|__MACOSX|\.ipynb_checkpoints'  # what macOS and Jupyter put beside the files of a user
FEW = 20                # fewer documents are cut into pieces, so that every split gets some
PIECES = 160            # so many, or more where these would be longer than
PIECE = 65536           # characters
LEAST_PROSE = 200       # characters of a document of prose


def read_documents(s):
    """Read the {name: text} of s.data, a file or folder of .txt, .jsonl and .py files: s.documents at most.

    s.data '' is the standard library without its tests. With s.prose only the docstrings and comments of .py
    files, where there are LEAST_PROSE characters of them. InputError names what cannot be read.
    """
    root = Path(s.data or sysconfig.get_path('stdlib'))
    found = itertools.islice(documents_of(files_of(root, s.data), root, s.prose), s.documents)
    documents = {name: re.sub(SURROGATES, '\ufffd', text) for name, text in found}
    damaged = sum('\ufffd' in text for text in documents.values())
    if damaged and s.data:
        print(f'text: {damaged} documents hold U+FFFD, or what is no UTF-8 and becomes it', file=sys.stderr)
    return documents


def files_of(root, is_data):
    """The files to read of a folder, or the one file, in order; is_data: they were asked for by --data.

    Linked folders are followed, each folder is read once. A line on stderr says what of --data is left out.
    """
    kinds = KINDS if is_data else ['.py']
    skipped = COPIES if is_data else LEFT_OUT
    ours = []
    left_out = collections.defaultdict(list)                   # {what: [path, ..]}
    visited = set()

    def visit(path):
        if re.fullmatch(skipped, path.name):
            left_out['copies of macOS or Jupyter'].append(path)
        elif path.is_file() and path.suffix.lower() in kinds:
            ours.append(path)
        elif path.is_dir() and path.resolve() not in visited:
            visited.add(path.resolve())
            try:
                for inside in sorted(path.iterdir()):
                    visit(inside)
            except OSError:
                left_out['folders that cannot be listed'].append(path)
        else:
            left_out['files of other kinds, or links that lead nowhere or back'].append(path)

    visit(root)
    said = '; '.join(f'{len(paths)} {what}, such as {paths[0]}' for what, paths in left_out.items())
    if not ours:
        raise InputError(f'--data {root}: no {", ".join(kinds)} file there; unpack or convert what there is '
                         f'({said or "it is empty"})')
    if said and is_data:
        print(f'text: left out: {said}', file=sys.stderr)
    return ours


def documents_of(paths, root, prose):
    """Yield the (name, text) of every document in these files as it is read. InputError names a wrong row."""
    for path in paths:
        name = path.name if path == root else path.relative_to(root).as_posix()
        kind = path.suffix.lower()
        with open(path, encoding='utf-8-sig', errors='replace') as f:
            if kind == '.jsonl':
                yield from row_texts(f, name)
            elif kind == '.py' and prose:
                text = docstrings_and_comments(f)
                if len(text) >= LEAST_PROSE:
                    yield name, text
            else:
                yield name, f.read()


def docstrings_and_comments(f):
    """The prose of a Python source, piece by piece; of what the tokenizer cannot read, what stands before."""
    pieces = []
    starts_statement = True                                    # a string that does is a docstring
    try:
        for t in generate_tokens(f.readline):
            if t.type == COMMENT:
                pieces.append(t.string.lstrip('#').strip())
            elif t.type == STRING and starts_statement:
                pieces.append(str(ast.literal_eval(t.string)).strip())
            if t.type not in (NL, COMMENT):
                starts_statement = t.type in (NEWLINE, INDENT, DEDENT)
    except (TokenError, SyntaxError, ValueError):
        pass
    return '\n'.join(pieces)


def row_texts(rows, name):
    """Yield (name:line, text) of the rows of .jsonl: each has a `text`, or `messages` of role and content."""
    for number, row in enumerate(rows, 1):
        if row.isspace():
            continue
        where = f'{name}:{number}'
        try:
            # numbers are not used, and int refuses those of more than 4,300 digits
            yield where, row_text(json.loads(row, parse_int=float))
        except Exception:                                      # whatever JSON of another shape leads to
            raise InputError(f'--data {where}: no JSON object with a `text`, or with `messages` of role and '
                             f'text; correct or remove it') from None


def row_text(row):
    """Its `text`, or of a chat "role: content" of every message; null content beside tool calls is none."""
    if 'text' in row:
        return '' + row['text']                                # raises unless it is a string
    said = []
    for message in row['messages']:
        content = message.get('content') if 'tool_calls' in message else message['content']
        if content is not None:
            said.append(message['role'] + ': ' + content)
    return '\n\n'.join(said)


def split_documents(documents):
    """(train, calibration, held-out), lists of texts: 80, 10, 10 % of the documents by a hash of their names.

    A few documents are cut into pieces first, so that one long file can be split too.
    """
    if len(documents) < FEW:
        size = max(1, min(PIECE, sum(map(len, documents.values())) // PIECES))
        documents = {
            f'{name}:{at}': text[at:at + size]
            for name, text in documents.items()
            for at in range(0, len(text), size)
        }
    names = sorted(documents, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    texts = [documents[name] for name in names]
    tenth = len(texts) // 10
    return texts[2 * tenth:], texts[:tenth], texts[tenth:2 * tenth]


def text_digest(documents):
    """The sha256 of names and texts."""
    together = hashlib.sha256()
    for name in sorted(documents):
        text = f'{name}\0{documents[name]}\0'
        together.update(text.encode(errors='surrogateescape'))
    return together.hexdigest()
