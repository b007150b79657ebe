"""Makes tests/golden/pipelines.json.gz: steps and options of tokenizer.json with the ids of the library.

Run once by hand; running the tests needs no tokenizers:
    pip install tokenizers==0.23.3 && python tests/make_pipelines.py

{models: {name: model}, texts: [..], cases: [{name, model, hf: what differs from a plain file, plain: [ids of
each text, special tokens as plain text], special: [the same, special tokens obeyed]}]}
"""
import gzip
import json
import random
import sysconfig
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

GOLDEN = Path(__file__).parent / 'golden'
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+")
O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve)?"
         r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}{1,3}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
DEEPSEEK3 = [r'\p{N}{1,3}', r'[一-龥぀-ゟ゠-ヿ]+',
             r'[!"#$%&\'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+'
             r'| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+']
BLOOM = r' ?[^(\s|[.,!?…。，、।۔،])]+'
ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def corpus():
    root = Path(sysconfig.get_paths()['stdlib'])
    own = 'Größe naïve café Москва 漢字かな交じり文 한국어 🙂👍🏽 ½ ٣٤ 12345 x\u0301 ﬁ ǅ\n\n\t  \r\n'
    return [(root / name).read_text() for name in ('argparse.py', 'this.py', 'heapq.py')] + [own] * 20


def texts():
    rng, lines = random.Random(0), corpus()[0].splitlines(keepends=True)
    kinds = ['abc def_ghi', ' \t\n\r', '0123456789½٣²', 'äößñÀÿøþǅ', '漢字かな한국어', '🙂👍🏽\u200d',
             'e\u0301x\u0308ﬁ', '.,;:!?()[]{}"\'`~/-', '\x00\x1c\x7f\x85\xa0\u3000▁', 'HELLO World',
             'ΑΒΓ абв']
    out = ['', ' ', '  ', 'a', ' a', 'a ', "I'll DON'T they've", 'One, two!', 'größe', '▁a ▁▁ b', 'x' * 90,
           ' ' * 40, '\n\n\n', '12345 67', '<s>', 'a <s> b</s>c', '<|x|>', 'a <|x|>  b', 'foo<|x|>foo',
           'foo <tool> foo', 'footool tool tool_ tool.', 'TOOL tool', '  <w>  w<w> <w>', 'ﬁ<ﬁ>fi<fi>',
           'a\u3000b', '\u2028\u2029x']
    out += [''.join(rng.choice(rng.choice(kinds)) for _ in range(rng.randint(1, 30))) for _ in range(94)]
    return out + [line for line in lines if line.strip()][:35]


def trained(pre, size=380, normalizer=None, **how):
    """The model of a BPE learnt on the corpus."""
    special = how.pop('special_tokens', [])
    t = Tokenizer(models.BPE(**how))
    t.pre_tokenizer = pre
    if normalizer:
        t.normalizer = normalizer
    t.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, show_progress=False,
        initial_alphabet=ALPHABET if isinstance(pre, pre_tokenizers.ByteLevel) else []))
    return json.loads(t.to_str())['model']


def all_models():
    byte_tokens = [f'<0x{b:02X}>' for b in range(256)]
    spaces = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    words = pre_tokenizers.Split(Regex('▁+[^▁]*|[^▁]+'), 'isolated')
    unk = dict(unk_token='<unk>', special_tokens=['<unk>'])
    return {
        'bytes': trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
        'fallback': trained(words, 560, spaces, byte_fallback=True, fuse_unk=True, unk_token='<unk>',
                            special_tokens=['<unk>', '<s>', '</s>', *byte_tokens]),
        'unk': trained(pre_tokenizers.Metaspace(), 260, **unk)}


def split(pattern, behavior='Isolated', invert=False, kind='Regex'):
    return {'type': 'Split', 'pattern': {kind: pattern}, 'behavior': behavior, 'invert': invert}


def level(space=False, regex=False):
    return {'type': 'ByteLevel', 'add_prefix_space': space, 'trim_offsets': True, 'use_regex': regex}


def metaspace(scheme, cut, marker='▁'):
    return {'type': 'Metaspace', 'replacement': marker, 'prepend_scheme': scheme, 'split': cut}


def chain(*steps):
    return {'type': 'Sequence', 'pretokenizers': list(steps)}


def norms(*steps):
    return {'type': 'Sequence', 'normalizers': list(steps)}


def token(i, content, **flags):
    return {'id': i, 'content': content, 'single_word': False, 'lstrip': False, 'rstrip': False,
            'normalized': False, 'special': True, **flags}


NFC, NFKC = {'type': 'NFC'}, {'type': 'NFKC'}
PREPEND = {'type': 'Prepend', 'prepend': '▁'}
SPACES = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'}
DIGITS = {'type': 'Digits', 'individual_digits': True}


def variants():
    """[(name, model, changes to the file)]."""
    out = []

    def add(name, model, pre=None, normalizer=None, added=(), post=None, **changes):
        out.append((name, model, {'normalizer': normalizer, 'pre_tokenizer': pre, 'added_tokens': list(added),
                                  'post_processor': post, 'model': changes}))
    for behaviour in ('Removed', 'Isolated', 'MergedWithPrevious', 'MergedWithNext', 'Contiguous'):
        for invert in (False, True):
            add(f'Split regex {behaviour} invert {invert}', 'bytes',
                chain(split(r'[\s.,!?]', behaviour, invert), level()))
        add(f'Split string {behaviour}', 'bytes', chain(split(' ', behaviour, kind='String'), level()))
        add(f'Punctuation {behaviour}', 'bytes',
            chain({'type': 'Punctuation', 'behavior': behaviour}, level()))
    add('a Split that does not match everything', 'bytes', chain(split(r' ?[^\s.,!?]+'), level()))
    add('the same, removed and inverted', 'bytes', chain(split(r' ?[^\s.,!?]+', 'Removed', True), level()))
    add('Qwen', 'bytes', chain(split(QWEN), level()), NFC)
    add('Qwen without its last alternative', 'bytes', chain(split(QWEN.rpartition('|')[0]), level()))
    add('o200k', 'bytes', chain(split(O200K), level()))
    add('DeepSeek-V3', 'bytes', chain(*map(split, DEEPSEEK3), level()))
    add('BLOOM', 'bytes', chain(split(BLOOM), level()))
    add('two Splits with properties', 'bytes', chain(split(r'\p{N}{1,2}'), split(r'\p{Lu}\p{Ll}*'), level()))
    add('lines, words, escapes', 'bytes',
        chain(split(r'^\s*\w+|\b\d+\b$|[\x{4E00}-\u9fff&&[^\x{6F22}]]++'), level()))
    add('case, look-behind, atomic', 'bytes',
        chain(split(r'(?i)hello|(?<=a)b|(?<!\s)(?>\h{2})|\P{L}\S'), level()))
    add('scripts', 'bytes', chain(split(r'\p{Han}+|\p{Greek}|\p{^Cyrillic}{3}'), level()))
    add('empty matches', 'bytes', chain(split(r'a*'), level()))
    add('Digits', 'bytes', chain({'type': 'Digits', 'individual_digits': False}, level()))
    add('Digits then ByteLevel with its pattern', 'bytes', chain(DIGITS, level(regex=True)))
    add('ByteLevel then Digits', 'bytes', chain(level(regex=True), DIGITS))
    add('ByteLevel', 'bytes', level(regex=True))
    add('ByteLevel with a space in front', 'bytes', level(True, True))
    add('a space in front of every piece', 'bytes', chain(DIGITS, level(True)))
    add('no pattern at all', 'bytes', level())
    add('Sequence of NFC', 'bytes', level(regex=True), norms(NFC))
    add('NFKC', 'bytes', level(regex=True), NFKC)
    add('NFD and NFKD', 'bytes', level(regex=True), norms({'type': 'NFD'}, {'type': 'NFKD'}))
    add('Replace by a regex', 'bytes', level(regex=True),
        {'type': 'Replace', 'pattern': {'Regex': r'\s{2,}|\d'}, 'content': '#'})
    add('Whitespace', 'bytes', chain({'type': 'Whitespace'}, level()))
    add('WhitespaceSplit', 'bytes', chain({'type': 'WhitespaceSplit'}, level()))
    add('ignore_merges', 'bytes', level(regex=True), ignore_merges=True, merges_from=40)
    for scheme in ('always', 'first', 'never'):
        for cut in (True, False):
            add(f'Metaspace {scheme} split {cut}', 'fallback', metaspace(scheme, cut))
    add('Metaspace as old files spell it', 'fallback',
        {'type': 'Metaspace', 'replacement': '▁', 'add_prefix_space': True, 'str_rep': '▁'})
    add('Metaspace as old files spell it, no space', 'fallback',
        {'type': 'Metaspace', 'replacement': '▁', 'add_prefix_space': False, 'prepend_scheme': 'never'})
    add('Metaspace first behind Digits', 'fallback', chain(DIGITS, metaspace('first', True)))
    add('Metaspace first behind a removed start', 'fallback',
        chain(split(r'\A[a-z]', 'Removed'), metaspace('first', True)))
    add('Mixtral', 'fallback', None, norms(PREPEND, SPACES))
    add('Replace without Prepend', 'fallback', None, SPACES)
    add('Prepend alone', 'fallback', None, PREPEND)
    add('NFKC, Prepend, Replace', 'fallback', None, norms(NFKC, PREPEND, SPACES))
    for fuse in (True, False):
        add(f'unk, fuse_unk {fuse}', 'unk', metaspace('always', True), fuse_unk=fuse)
    special = [token(1000, '<s>'), token(1001, '</s>')]
    for name, flags in [('plain', {}), ('lstrip', dict(lstrip=True)), ('rstrip', dict(rstrip=True)),
                        ('both', dict(lstrip=True, rstrip=True)), ('single_word', dict(single_word=True)),
                        ('normalized', dict(normalized=True))]:
        more = [token(1002, '<|x|>', **flags), token(1003, 'tool', special=False, **flags),
                token(1004, '<w>', special=False, **flags), token(1005, '<ﬁ>', special=False, **flags)]
        add(f'added tokens, {name}', 'bytes', level(regex=True), NFKC, special + more)
        add(f'added tokens, {name}, Metaspace first', 'fallback', metaspace('first', True), None,
            special + more)
        add(f'added tokens, {name}, Mixtral', 'fallback', None, norms(PREPEND, SPACES), special + more)
    front = {'type': 'TemplateProcessing', 'pair': [], 'special_tokens': {
        '<s>': {'id': '<s>', 'ids': [1000], 'tokens': ['<s>']}},
        'single': [{'SpecialToken': {'id': '<s>', 'type_id': 0}}, {'Sequence': {'id': 'A', 'type_id': 0}}]}
    both = {'type': 'RobertaProcessing', 'sep': ['</s>', 1001], 'cls': ['<s>', 1000], 'trim_offsets': True,
            'add_prefix_space': False}
    offsets = {'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': False, 'use_regex': True}
    add('bos by a template', 'bytes', level(regex=True), None, special, front)
    add('bos in a sequence', 'bytes', level(regex=True), None, special,
        {'type': 'Sequence', 'processors': [offsets, front]})
    add('bos and eos', 'bytes', level(regex=True), None, special, both)
    add('offsets only', 'bytes', level(regex=True), None, special, offsets)
    return out


def whole_file(parts, model):
    """The tokenizer.json of a case: ids of added tokens lie behind the model's."""
    changes = dict(parts['model'])
    model = {**model}
    if start := changes.pop('merges_from', 0):
        model['merges'] = model['merges'][start:]              # so that words in vocab are out of their reach
        joined = {''.join(m) for m in model['merges']} | set(ALPHABET)
        model['merges'] = [m for m in model['merges'] if set(m) <= joined]
    shift = len(model['vocab']) - 1000
    moved = json.loads(json.dumps({k: v for k, v in parts.items() if k != 'model'}), object_hook=lambda d: {
        k: v + shift if k == 'id' and isinstance(v, int) else [i + shift for i in v] if k == 'ids'
        else [v[0], v[1] + shift] if k in ('sep', 'cls') else v for k, v in d.items()})
    return {'version': '1.0', 'truncation': None, 'padding': None, 'decoder': None, **moved,
            'model': {**model, **changes}}


def main():
    base, strings, cases = all_models(), texts(), []
    for name, model, parts in variants():
        hf = whole_file(parts, base[model])
        t, case = Tokenizer.from_str(json.dumps(hf)), {'name': name, 'model': model}
        case['special'] = [t.encode(s).ids for s in strings]
        t.encode_special_tokens = True
        case['plain'] = [t.encode(s, add_special_tokens=False).ids for s in strings]
        changed = {k: v for k, v in hf['model'].items() if v != base[model][k]}
        cases.append({**case, 'hf': {**hf, 'model': changed}})
    raw = json.dumps({'models': base, 'texts': strings, 'cases': cases}).encode()
    (GOLDEN / 'pipelines.json.gz').write_bytes(gzip.compress(raw, 9, mtime=0))
    size = (GOLDEN / 'pipelines.json.gz').stat().st_size
    print(f'{len(cases)} cases of {len(strings)} texts, {size:,} bytes')


if __name__ == '__main__':
    main()
