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
from pathlib import Path
from tokenize import COMMENT, DEDENT, INDENT, NEWLINE, NL, STRING, TokenError, generate_tokens

from hub.files import InputError, reading
from hub.tokenizer import SURROGATES

KINDS = '.txt', '.jsonl', '.py'
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
    damaged = 0
    for path in files_of(root, is_data=source):
        with reading(path):
            text = path.read_text(encoding='utf-8-sig', errors='replace')
        damaged += '\ufffd' in text
        name = path.name if path == root else path.relative_to(root).as_posix()
        kind = path.suffix.lower()
        if kind == '.jsonl':
            documents.update(jsonl_documents(name, text))
        elif kind == '.py' and prose:
            written = docstrings_and_comments(text)
            if len(written) >= LEAST_PROSE:
                documents[name] = written
        else:
            documents[name] = text
    if damaged and source:
        print(f'text: {damaged} files hold U+FFFD, or bytes that are no UTF-8 and become it', file=sys.stderr)
    return {name: SURROGATES.sub('\ufffd', documents[name]) for name in list(documents)[:most]}


def files_of(root, is_data):
    """The files to read of a folder, or the one file; is_data: they were asked for by --data."""
    files = sorted(path for path in [root, *root.rglob('*')] if path.is_file())
    if not is_data:
        return [path for path in files
                if path.suffix == '.py' and not LEFT_OUT & set(path.relative_to(root).parts)]
    ours = [path for path in files if path.suffix.lower() in KINDS]
    if not ours:
        raise InputError(f'--data {root}: no {", ".join(KINDS)} file there; unpack or convert what there is')
    others = sorted(set(files) - set(ours))
    if others:
        print(f'text: {len(others)} files of other kinds are left out, such as {others[0].name}',
              file=sys.stderr)
    return ours


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
    """{name:line: text} of a .jsonl file: objects with a `text`, or with `messages` of role and content.

    Rows end at \\n alone: JSON may hold other line ends bare.
    """
    documents = {}
    for number, line in enumerate(text.split('\n'), 1):
        if line.strip():
            where = f'{name}:{number}'
            try:
                documents[where] = row_text(json.loads(line))
            except Exception:                                  # whatever JSON of another shape leads to
                raise InputError(f'--data {where}: no JSON object with a `text`, or with `messages` of role '
                                 f'and text; correct or remove it') from None
    return documents


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
