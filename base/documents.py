"""base/documents.py: what --data names, as documents, and their three splits.

Documents are split by a hash of their names: train, calibration (knobs are set on it) and held-out (every
reported number is of it).
"""
import ast
import codecs
import hashlib
import io
import itertools
import json
import sys
import sysconfig
from pathlib import Path
from tokenize import COMMENT, DEDENT, INDENT, NEWLINE, NL, STRING, TokenError, generate_tokens

from hub.files import InputError
from hub.tokenizer import SURROGATES

KINDS = '.txt', '.jsonl', '.py'
# not in the default text; pydoc_data is one generated page, as long as all other files of a split together
LEFT_OUT = {'test', 'tests', 'idle_test', 'site-packages', '__pycache__', 'pydoc_data'}
LEAST_DOCUMENTS = 20    # fewer are cut into pieces, so that every split gets some
PIECE = 65536           # characters, at most
LEAST_PROSE = 200       # characters of a document of prose
MARKS = {codecs.BOM_UTF16_LE: 'utf-16', codecs.BOM_UTF16_BE: 'utf-16'}


def read_documents(source, most, prose=False):
    """{name: text} of a file or a folder of .txt, .jsonl and .py files, at most so many.

    source '' is the standard library without its tests. prose: of .py files the docstrings and comments,
    where there are LEAST_PROSE characters of them. InputError names what cannot be read, or is no text.
    """
    root = Path(source or sysconfig.get_paths()['stdlib'])
    if not root.exists():
        raise InputError(f'--data {source}: no such file or folder')
    documents, damaged = {}, 0
    for path in files_of(root, bool(source)):
        name = path.relative_to(root).as_posix() if path != root else path.name
        text = read_text(path)
        damaged += '\ufffd' in text
        if path.suffix.lower() == '.jsonl':
            documents.update(jsonl_documents(name, text))
        elif path.suffix.lower() != '.py' or not prose:
            documents[name] = text
        elif len(written := docstrings_and_comments(text)) >= LEAST_PROSE:
            documents[name] = written
    if prose and not documents:
        raise InputError(f'--prose: no docstrings or comments in the .py files of {root}')
    if not any(text.strip() for text in documents.values()):
        raise InputError(f'--data {root}: no text in {", ".join(KINDS)} files there')
    if damaged and source:
        print(f'text: {damaged} files hold U+FFFD, or bytes that are no UTF-8 and become it', file=sys.stderr)
    return dict(itertools.islice(documents.items(), most))


def files_of(root, is_data):
    """The files to read of a folder, or the one file; is_data: they were asked for by --data."""
    if root.is_file():
        if root.suffix.lower() not in KINDS:
            raise InputError(f'--data {root}: only {", ".join(KINDS)} files and folders of them are read; '
                             f'unpack or convert it')
        return [root]
    kinds, left_out = (KINDS, set()) if is_data else (('.py',), LEFT_OUT)
    files = sorted(p for p in root.rglob('*')
                   if p.is_file() and not left_out & set(p.relative_to(root).parts))
    others = [p for p in files if p.suffix.lower() not in kinds]
    if is_data and others:
        print(f'text: {len(others)} files of other kinds are left out, such as {others[0].name}',
              file=sys.stderr)
    return [p for p in files if p.suffix.lower() in kinds]


def read_text(path):
    """The text of a file: UTF-8 with or without a byte order mark, UTF-16 with one."""
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise InputError(f'--data {path}: {e.strerror}') from None
    text = raw.decode(MARKS.get(raw[:2], 'utf-8-sig'), errors='replace')
    return text.replace('\r\n', '\n').replace('\r', '\n')       # as files opened as text give it


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
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            document = row['text'] if 'text' in row else conversation(row['messages'])
            if not isinstance(document, str):
                raise TypeError
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise InputError(f'--data {name}:{number}: no JSON object with a `text`, or with `messages` '
                             f'of role and text') from None
        documents[f'{name}:{number}'] = SURROGATES.sub('\ufffd', document)
    return documents


def conversation(messages):
    """The text of a chat: "role: content" of every message that has any.

    content: a string, a list of parts of type text, or null beside tool calls.
    """
    said = []
    for message in messages:
        content = message['content'] if 'tool_calls' not in message else message.get('content')
        if isinstance(content, list):
            if any(part['type'] != 'text' for part in content):
                raise TypeError
            content = ''.join(part['text'] for part in content)
        if content is not None:
            said.append(message['role'] + ': ' + content)
    return '\n\n'.join(said)


def split_documents(documents):
    """[train, calibration, held-out], lists of texts: 80, 10, 10 % of the documents by a hash of their names.

    A few documents are cut into pieces first, so that one long file can be split too.
    """
    if len(documents) < LEAST_DOCUMENTS:
        size = max(1, min(PIECE, sum(map(len, documents.values())) // LEAST_DOCUMENTS))
        documents = {f'{name}:{at}': text[at:at + size]
                     for name, text in documents.items() for at in range(0, len(text), size)}
    ranked = sorted(documents, key=lambda name: hashlib.sha256(encoded(name)).digest())
    tenth = max(1, len(ranked) // 10)
    parts = ranked[2 * tenth:], ranked[:tenth], ranked[tenth:2 * tenth]
    return [[documents[name] for name in part] for part in parts]


def encoded(name):
    """A file name as bytes: on Linux it need not be UTF-8."""
    return name.encode('utf-8', 'surrogateescape')


def digest_of(documents):
    """A digest of names and texts."""
    digest = hashlib.sha256()
    for name in sorted(documents):
        digest.update(encoded(name) + b'\0' + documents[name].encode() + b'\0')
    return digest.hexdigest()
