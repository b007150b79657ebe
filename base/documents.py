"""base/documents.py: what --data names, as documents, and their three splits.

Documents are split by a hash of their names: train, calibration (where knobs are set) and held-out (which
every reported number is of).
"""
import ast
import hashlib
import io
import json
import sys
import sysconfig
import tokenize
from pathlib import Path

from hub.files import InputError, reading
from hub.tokenizer import SURROGATES

KINDS = '.txt', '.jsonl', '.py'
LINE_ENDS = tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT
# not in the default text; pydoc_data is one generated page, as long as all other files of a split together
LEFT_OUT = {'test', 'tests', 'idle_test', 'site-packages', 'pydoc_data'}
FEW = 20                # fewer documents are cut into pieces, so that every split gets some
PIECE = 65536           # characters of a piece, at most
LEAST_PROSE = 200       # characters of a document of prose


def read_documents(source, most, prose=False):
    """Read the {name: text} of a file or a folder of .txt, .jsonl and .py files, at most `most` of them.

    source '' is the standard library without its tests. prose: of .py files only the docstrings and comments,
    where there are LEAST_PROSE characters of them. InputError names what cannot be read.
    """
    root = Path(source or sysconfig.get_paths()['stdlib'])
    documents = {}
    for path in files_of(root, KINDS if source else ['.py']):
        name = path.name if path == root else path.relative_to(root).as_posix()
        if not source and LEFT_OUT & set(name.split('/')):
            continue
        with reading(path):
            text = path.read_text(encoding='utf-8-sig', errors='replace')
        kind = path.suffix.lower()
        if kind == '.jsonl':
            documents.update(jsonl_documents(name, text))
        elif kind == '.py' and prose:
            written = docstrings_and_comments(text)
            if len(written) >= LEAST_PROSE:
                documents[name] = written
        else:
            documents[name] = text
    documents = {name: SURROGATES.sub('\ufffd', documents[name]) for name in list(documents)[:most]}
    damaged = sum('\ufffd' in text for text in documents.values())
    if damaged and source:
        print(f'text: {damaged} documents hold U+FFFD, or bytes that are no UTF-8', file=sys.stderr)
    return documents


def files_of(root, kinds):
    """The files of these kinds in a folder, or the one file."""
    files = []
    for path in sorted([root, *root.rglob('*')]):
        if path.suffix.lower() in kinds and path.is_file():
            files.append(path)
    if not files:
        raise InputError(f'--data {root}: no {", ".join(KINDS)} file there; unpack or convert what there is')
    return files


def docstrings_and_comments(source):
    """The prose of Python source, piece by piece; of what Python cannot read, what stands before."""
    pieces = []
    last = tokenize.NEWLINE
    try:
        for t in tokenize.generate_tokens(io.StringIO(source).readline):
            if t.type == tokenize.COMMENT:
                pieces.append(t.string.lstrip('#').strip())
            elif t.type == tokenize.STRING and last in LINE_ENDS:          # a docstring is a statement
                pieces.append(str(ast.literal_eval(t.string)).strip())
            if t.type not in (tokenize.NL, tokenize.COMMENT):
                last = t.type
    except (tokenize.TokenError, SyntaxError, ValueError):
        pass
    return '\n'.join(pieces)


def jsonl_documents(name, text):
    """{name:line: text} of a .jsonl file."""
    documents = {}
    for number, line in enumerate(text.split('\n'), 1):        # JSON may hold other line ends bare
        if line.strip():
            where = f'{name}:{number}'
            with reading(f'--data {where}: a row is an object with a `text`, or with `messages`'):
                documents[where] = row_text(json.loads(line))
    return documents


def row_text(row):
    """Its `text`, or of a chat "role: content" of every message; a tool call may be without content."""
    if 'text' in row:
        return '' + row['text']                                # raises unless it is a string
    said = []
    for message in row['messages']:
        content = message.get('content')
        if content is not None or 'tool_calls' not in message:
            said.append(message['role'] + ': ' + content)
    return '\n\n'.join(said)


def split_documents(documents):
    """[train, calibration, held-out], lists of texts: 80, 10, 10 % of the documents by a hash of their names.

    A few documents are cut into pieces first, so that one long file can be split too.
    """
    texts = documents
    if len(documents) < FEW:
        size = max(1, min(PIECE, sum(map(len, documents.values())) // FEW))
        texts = {}
        for name, text in documents.items():
            for at in range(0, len(text), size):
                texts[f'{name}:{at}'] = text[at:at + size]
    ranked = sorted(texts, key=digest)
    tenth = max(1, len(ranked) // 10)
    parts = ranked[2 * tenth:], ranked[:tenth], ranked[tenth:2 * tenth]
    return [[texts[name] for name in part] for part in parts]


def text_digest(documents):
    """A digest of names and texts."""
    return digest(''.join(f'{name}\0{documents[name]}\0' for name in sorted(documents)))


def digest(text):
    """The sha256 of a text; on Linux a file name need not be UTF-8."""
    return hashlib.sha256(text.encode(errors='surrogateescape')).hexdigest()
