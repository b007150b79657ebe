"""Makes tests/golden/pipelines.json.gz: small files like tokenizer.json with the ids of the library.

Run once by hand; running the tests needs no tokenizers:
    pip install tokenizers==0.23.3 && python tests/make_pipelines.py

{models: {name: model}, texts: [..], cases: [{name, model, hf: the rest of the file, foreign: what in it is
not modelled here, '' where all of it is, plain: [ids of each text, special tokens as plain text], special:
[the same, special tokens obeyed]}]}
"""
import gzip
import json
import random
import sysconfig
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as pre

GOLDEN = Path(__file__).parent / 'golden'
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+")
O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve)?"
         r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}{1,3}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
DEEPSEEK3 = [r'\p{N}{1,3}', r'[一-龥぀-ゟ゠-ヿ]+',
             r'[!"#$%&\'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+'
             r'| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+']
OWN = 'Größe naïve café Москва 漢字かな交じり文 한국어 🙂👍🏽 ½ ٣٤ 12345 x\u0301 ﬁ ǅ\n\n\t  \r\n'
KINDS = [
    'abc def_ghi',
    ' \t\n\r',
    '0123456789½٣²',
    'äößñÀÿøþǅ',
    '漢字かな한국어🙂👍🏽\u200d',
    'e\u0301x\u0308ﬁ',
    '.,;:!?()[]{}"\'`~/-',
    '\x00\x1c\x7f\x85\xa0\u3000▁',
    'HELLO World ΑΒΓ абв ſK>\u0338\uffff',
]
TEXTS = [
    '',
    ' a ',
    "I'll DON'T they've",
    '▁a ▁▁ b größe',
    'x' * 90 + ' ' * 40,
    '<s>',
    'a <s> b</s>c',
    'foo<|x|>foo <|x|>  b',
    'footool <tool> tool tool_ tool.',
    '  <w>  w<w> <w>',
    'ﬁ<ﬁ>fi<fi>',
]


def corpus():
    root = Path(sysconfig.get_paths()['stdlib'])
    return [(root / name).read_text() for name in ('argparse.py', 'this.py', 'heapq.py')] + [OWN] * 20


def texts():
    rng = random.Random(0)
    out = list(TEXTS)
    for _ in range(94):
        out.append(''.join(rng.choice(rng.choice(KINDS)) for _ in range(rng.randint(1, 30))))
    return out + corpus()[0].splitlines(keepends=True)[:60]


def trained(cut, size, alphabet=[], special=[], **how):
    """The model of a BPE learnt on the corpus."""
    t = Tokenizer(models.BPE(**how))
    t.pre_tokenizer = cut
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    t.train_from_iterator(corpus(), trainer)
    return json.loads(t.to_str())['model']


def level(regex=True):
    return pre.ByteLevel(add_prefix_space=False, use_regex=regex)


def behind(*steps):
    """ByteLevel without its own pattern behind others: a string is a pattern to split at."""
    steps = [pre.Split(Regex(step), 'isolated') if isinstance(step, str) else step for step in steps]
    return pre.Sequence([*steps, level(False)])


MODELS = {
    'bytes': trained(level(), 380, pre.ByteLevel.alphabet()),
    'fallback': trained(
        pre.Metaspace(),
        560,
        special=['<unk>', *(f'<0x{b:02X}>' for b in range(256))],
        byte_fallback=True,
        unk_token='<unk>',
    ),
    'unk': trained(pre.Metaspace(), 260, special=['<unk>'], unk_token='<unk>'),
}
MODELS['edited'] = {**MODELS['bytes'], 'merges': MODELS['bytes']['merges'][40:]}


def case(name, foreign, model, cut=None, normalizer=None, post=None, **flags):
    """A case: the tokenizer of these parts, with added tokens of these flags."""
    t = Tokenizer.from_str(json.dumps({'model': MODELS[model]}))
    t.pre_tokenizer = cut
    t.normalizer = normalizer
    how = {'normalized': False, **flags}
    t.add_special_tokens([AddedToken(content, **how) for content in ('<s>', '</s>', '<|x|>')])
    t.add_tokens([AddedToken(content, **how) for content in ('tool', '<w>', '<ﬁ>')])
    if post:
        t.post_processor = post
    hf = json.loads(t.to_str())
    del hf['model']
    special = [t.encode(text).ids for text in texts()]
    t.encode_special_tokens = True
    plain = [t.encode(text, add_special_tokens=False).ids for text in texts()]
    return dict(name=name, foreign=foreign, model=model, hf=hf, plain=plain, special=special)


def main():
    nfc = normalizers.NFC()
    mixtral = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    bos = processors.TemplateProcessing('<s> $A', special_tokens=[('<s>', 380)])
    both = processors.RobertaProcessing(('</s>', 381), ('<s>', 380))
    cases = [
        case('Qwen', '', 'bytes', behind(QWEN), nfc),
        case('OLMoE', '', 'bytes', level(), nfc, processors.ByteLevel(), normalized=True),
        case('o200k', '', 'bytes', behind(O200K)),
        case('DeepSeek-V3', '', 'bytes', behind(*DEEPSEEK3), post=bos),
        case('Digits', '', 'bytes', behind(r'\s+$', pre.Digits(individual_digits=True))),
        case('Mixtral', '', 'fallback', None, mixtral),
        case('Mixtral, normalized', '', 'fallback', None, mixtral, normalized=True),
        case('Metaspace always', 'Metaspace', 'fallback', pre.Metaspace(split=False)),
        case('Metaspace first', 'Metaspace', 'fallback', pre.Metaspace(prepend_scheme='first', split=False)),
        case('Metaspace cuts', 'Metaspace', 'fallback', pre.Metaspace()),
        case('NFKC', 'NFKC', 'bytes', level(), normalizers.NFKC()),
        case('removed', 'Removed', 'bytes', behind(pre.Split(' ', 'removed'))),
        case('a class in a class', 'Split', 'bytes', behind(r'[^\s[.,]]+')),
        case('a pre-tokenizer', 'Punctuation', 'bytes', behind(pre.Punctuation())),
        case('edited', 'merges', 'edited', level()),
        case('no bytes', 'model', 'unk', pre.Metaspace(split=False)),
        case('bos and eos', 'single', 'bytes', level(), post=both),
    ]
    for flag in ('lstrip', 'rstrip', 'single_word'):
        cases.append(case(flag, flag, 'bytes', level(), **{flag: True}))
    raw = json.dumps({'models': MODELS, 'texts': texts(), 'cases': cases}).encode()
    path = GOLDEN / 'pipelines.json.gz'
    path.write_bytes(gzip.compress(raw, 9, mtime=0))
    print(f'{len(cases)} cases of {len(texts())} texts, {path.stat().st_size:,} bytes')


if __name__ == '__main__':
    main()
