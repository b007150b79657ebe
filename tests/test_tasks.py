"""study/scores.py, study/tasks.py: scores and texts against one sequence at a time (see test_harness.py)."""

import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import study.tasks
import train
from allocator import AdaK, Allocators, Counted, Skip, TopK
from conftest import random_model, refusal, tiny_config
from hub.checkpoint import save
from hub.files import write_json
from hub.tokenizer import Tokenizer
from model import generate
from base.frozen import base_folder, load_model
from base.text import learn_bpe, tokenizer_json
from hub.files import InputError
from moe_dispatch import flops
from study.policies import EntropyBands
from study.scores import RealOnly, Tally, score, write_until
from study.tasks import Answers, task_rows

TEXT = 'the cat sat on the mat; the dog ran to the door and the cat ran up the tree. ' * 3


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The folder of a run with random weights: a base with a tokenizer, and allocators that use every k."""
    run = tmp_path_factory.mktemp('run')
    merges = learn_bpe([TEXT], 300)
    c = tiny_config(n_vocab=257 + len(merges), max_len=64, eos=256 + len(merges))
    model = random_model(c)
    no_letters = [i for i in range(256) if not chr(i).isascii() or not chr(i).isalpha()]
    model.lm_head.weight[no_letters] = 0                       # what it writes is text
    save(model, run / 'base')
    write_json(run / 'base' / 'tokenizer.json', tokenizer_json(merges))
    allocators = Allocators(c, 6, False)
    allocators.weight.data.normal_(0, 0.3)
    allocators.save(run / 'allocator.safetensors')
    return run


@pytest.fixture
def opened(run):
    model = load_model(train.Settings(), run / 'base')
    return model, Tokenizer(run / 'base'), AdaK(Allocators.load(run / 'allocator.safetensors', model.config))


def asked(*args):
    return SimpleNamespace(args=args)


def slow_score(model, context, continuation, policy, max_len):
    """The same from the full logits of one sequence; every token has all the context that fits."""
    ids = (context + continuation)[-max(max_len, len(continuation)) - 1:]
    logp = F.log_softmax(model(torch.tensor([ids[:-1]]), policy)[0].double(), -1)[-len(continuation):]
    y = torch.tensor(continuation)
    return logp.gather(1, y[:, None]).sum().item(), bool((logp.argmax(-1) == y).all())


@pytest.mark.parametrize(
    'policy', [TopK(3), Skip(0.6, 3), EntropyBands(0.6, 5)], ids=lambda policy: type(policy).__name__
)
@pytest.mark.parametrize('batch', [1, 40, 10**6])
def test_scores_are_those_of_one_sequence_at_a_time(policy, batch):
    model = random_model(tiny_config(max_len=16))
    draw = lambda n: torch.randint(50, (n,)).tolist()
    sizes = [(1, 1), (9, 4), (3, 12), (15, 2), (30, 3), (1, 16), (2, 20), (16, 1), (5, 5), (40, 17)]
    requests = [(draw(a), draw(b)) for a, b in sizes]
    requests += [(requests[1][0], y) for y in ([7], [8], [9])]         # three choices of one token: one input
    for T in (1, 6, 11):                        # what greedy decoding gives, and that with another last token
        prompt = draw(T)
        greedy = generate(model, torch.tensor([prompt]), 5, policy)[0, T:].tolist()
        requests += [(prompt, greedy), (prompt, greedy[:4] + [(greedy[4] + 1) % 50])]
    tally = Tally(policy, 3, 'cpu')
    found = score(model, requests, tally, batch)
    slow = [slow_score(model, *request, policy, 16) for request in requests]
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in slow], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in slow]
    assert [greedy for _, greedy in found[-6:]] == [True, False] * 3

    counted, inputs = Counted(policy, 3), {tuple((a + b)[-max(16, len(b)) - 1:][:-1]) for a, b in requests}
    for ids in inputs:                                                     # real tokens only, each input once
        model.hidden(torch.tensor([ids]), counted)
    assert sorted(tally.lengths) == sorted(map(len, inputs))
    assert torch.equal(tally.counts, counted.counts)


def test_the_context_is_cut_from_the_left_to_the_models_length():
    model, y = random_model(tiny_config(max_len=8)), [1, 2, 3]
    context = torch.randint(50, (20,)).tolist()
    (long, _), (cut, _), (shorter, _) = score(
        model, [(context, y), (context[-6:], y), (context[-5:], y)], Tally(TopK(3), 3, 'cpu')
    )
    assert long == cut != shorter                        # 6 of the context and 2 of y are the 8 that are read


def test_padding_runs_one_expert():
    seen = []

    class Watch(TopK):
        def __call__(self, layer, x, probs):
            seen.append(len(x))
            return super().__call__(layer, x, probs)
    real = torch.tensor([True, True, False, True])
    tally = Tally(Watch(3), 1, 'cpu')
    assert RealOnly(tally, real)(0, torch.zeros(4, 2), None).tolist() == [3, 3, 1, 3]
    assert RealOnly(tally, real)(0, torch.zeros(8, 2), None).tolist() == [
        3,
        3,
        3,
        3,
        1,
        1,
        3,
        3,
    ]  # rows of two tokens
    assert seen == [4, 8] and tally.counts.tolist() == [[0, 0, 0, 9]]


def test_a_long_text_rolls_in_windows_that_predict_each_token_once(opened):
    model, tokenizer, policy = opened
    model.config.max_len = 4
    ids = tokenizer.encode(TEXT)
    ids = ids[:len(ids) // 4 * 4 - 1]
    text, n = tokenizer.decode(ids), len(ids)
    assert tokenizer.encode(text) == ids and n > 12
    answers = Answers(model, tokenizer, policy, 'test')
    found = answers.loglikelihood_rolling([asked(text), asked(''), asked('the')])
    whole, expected = [tokenizer.eos] + ids, 0.0
    for first in range(0, n, 4):                 # predicts ids[first:last] from the 4 tokens before ids[last]
        last = min(first + 4, n)
        logp = F.log_softmax(model(torch.tensor([whole[last - 4:last]]), policy)[0], -1)
        expected += sum(logp[i - (last - 4), ids[i]].item() for i in range(first, last))
    assert found[0] == pytest.approx(expected, abs=1e-4) and found[1] == 0
    slow, _ = slow_score(model, [tokenizer.eos], tokenizer.encode('the'), policy, 4)
    assert found[2] == pytest.approx(slow, abs=1e-4)


def test_how_texts_become_tokens(opened):
    model, tokenizer, policy = opened
    answers = Answers(model, tokenizer, policy, 'test')
    encode = tokenizer.encode
    assert answers.pair('the cat', ' sat') == (encode('the cat'), encode(' sat'))
    # the space belongs to the word behind it
    assert answers.pair('the cat ', 'sat on') == (encode('the cat'), encode(' sat on'))
    assert answers.pair('', 'the') == ([tokenizer.eos], encode('the'))
    assert answers.pair(' ', 'the') == ([tokenizer.eos], encode(' the'))
    # one token over the cut
    assert len(encode('the')) == 1 and answers.pair('th', 'e') == ([tokenizer.eos], encode('the'))
    assert answers.pair('the cat th', 'e') == (encode('the cat'), encode(' the'))
    tokenizer.bos = 1
    for family, first in (('mixtral', [1]), ('qwen2_moe', [])):
        model.config.model_type = family
        answers = Answers(model, tokenizer, policy, 'test')
        assert answers.pair('the cat', ' sat') == (first + encode('the cat'), encode(' sat'))
        assert answers.pair('', 'the') == ([1], encode('the'))
    tokenizer.bos = tokenizer.eos = None
    with pytest.raises(InputError, match='neither bos nor eos'):
        Answers(model, tokenizer, policy, 'test')


def test_texts_end_before_their_stop_string_even_inside_a_token(opened):
    model, tokenizer, policy = opened
    contexts = ['the cat', 'the dog', 'a tree', 'door', 'the mat; the', 'ran up', 'sat on']
    alone = [
        ''.join(
            tokenizer.stream(
                generate(model, torch.tensor([tokenizer.encode(context)]), 20, policy)[
                    0, len(tokenizer.encode(context)) :
                ],
                False,
            )
        )
        for context in contexts
    ]
    # stops from the texts themselves: characters 3-4 of one, which no token needs to end at, one that never
    # comes, an empty one
    until = (
        [[text[3:5], text[9:10]] for text in alone[:4]]
        + [text[2:3] for text in alone[4:5]]
        + [['never, ever'], ['', 'never']]
    )
    ways = [{'until': stop, 'max_gen_toks': 20} for stop in until]
    answers = Answers(model, tokenizer, policy, 'test')
    found = answers.generate_until([asked(*pair) for pair in zip(contexts, ways)], batch=60)
    for text, stop, got in zip(alone, until, found):
        at = [text.find(s) for s in ([stop] if isinstance(stop, str) else stop) if s and s in text]
        assert got == text[:min(at, default=None)].split('<|endoftext|>')[0]
    assert len(found[0]) <= 3 < len(alone[0]) and len(found[4]) <= 2 and found[5] == alone[5]
    assert answers.tally.counts[0].sum() == sum(answers.tally.lengths)   # rows that had ended are not counted

    ids = tokenizer.encode(contexts[0])
    written = generate(model, torch.tensor([ids]), 20, policy)[0, len(ids):].tolist()
    tokenizer.eos = written[6]
    assert answers.generate_until([asked(contexts[0], {'max_gen_toks': 20})]) == [
        tokenizer.decode(written[: written.index(written[6])])
    ]


def test_only_what_runs_before_the_end_of_a_row_counts(opened):
    model, tokenizer, policy = opened
    prompts = [tokenizer.encode('the cat sat'), tokenizer.encode('the dog ran')]
    assert len(prompts[0]) == len(prompts[1])
    whole = generate(model, torch.tensor(prompts), 9, policy)
    T = len(prompts[0])
    tally, counted = Tally(policy, 3, 'cpu'), Counted(policy, 3)
    texts = write_until(
        model, tokenizer, prompts, [[tokenizer.decode(whole[0, T : T + 3])], []], 9, 0.0, tally, None
    )
    assert texts == ['', tokenizer.decode(whole[1, T:])]
    for row, n in zip(
        whole, (T + 2, T + 8)
    ):  # the first stops at its third token; a text's last token is not run
        model.hidden(row[None, :n], counted)
    assert tally.lengths == [T + 2, T + 8] and torch.equal(tally.counts, counted.counts)


def test_generation_is_greedy_or_sampled_as_the_task_says(opened):
    model, tokenizer, policy = opened
    text = lambda **how: Answers(model, tokenizer, policy, 'test', seed=0).generate_until(
        [asked('the', {'max_gen_toks': 12, **how})]
    )[0]
    greedy = text()
    assert text(do_sample=False, temperature=3.0, top_p=.9) == text(temperature=0.0) == greedy
    assert text(temperature=3.0) == text(temperature=3.0, do_sample=True) != greedy
    assert (
        text(do_sample=True) == text(do_sample=True, temperature=1.0) != text(do_sample=True, temperature=9.0)
    )
    assert text(do_sample=True) != greedy
    with pytest.raises(InputError, match='top_p'):
        text(temperature=3.0, top_p=.9)
    with pytest.raises(InputError, match='64 new tokens'):
        text(max_gen_toks=64)
    answers = Answers(model, tokenizer, policy, 'test')
    answers.generate_until([asked(TEXT, {'max_gen_toks': 12})])              # cut from the left to leave room
    assert answers.tally.lengths[0] <= 64 - 1


def test_flops_count_the_allocators_and_the_length(opened):
    model, tokenizer, policy = opened
    tally = Tally(policy, 3, 'cpu')
    score(model, [([1] * 10, [2]), ([1] * 30, [2])], tally)
    (row,) = task_rows(
        {
            'results': {'t': {'alias': 't', 'sample_len': 2, 'acc,none': 0.5, 'acc_stderr,none': 'N/A'}},
            'versions': {},
            'n-shot': {},
        },
        tally,
        model.config,
    )
    T = (10 * 10 + 30 * 30) / 40
    top, ada = flops(model.config, 3, T), flops(model.config, tally.mean(), T, 3 * 6 * 32)
    assert row['total_flops'] == pytest.approx(ada['total'] / top['total']) and row[
        'expert_flops'
    ] == pytest.approx(tally.mean() / 3)
    assert (row['metric'], row['value'], row['stderr'], row['mean_length']) == ('acc', .5, None, T)


def test_the_base_of_a_run_is_the_one_it_was_trained_on(run, tmp_path):
    def base(**a):
        s = train.settings_of(
            SimpleNamespace(**{'ckpt': None, 'run': None, 'device': 'cpu', 'stream': False, **a}),
            finished=False,
        )
        return base_folder(s, Path(a['run']))
    assert base(run=str(run)) == run / 'base' == base(ckpt=str(run / 'base'), run='elsewhere')
    write_json(tmp_path / 'results.json', {'config': asdict(train.Settings(ckpt=str(run / 'base')))})
    assert base(run=str(tmp_path)) == run / 'base'


def refused(capsys, *args):
    return refusal(capsys, 'study.tasks', study.tasks.main, *args)


def test_without_lm_eval_one_line_says_what_to_install(run, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split('.')[0] == 'lm_eval']:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'lm_eval', None)
    assert 'pip install lm-eval' in refused(capsys, 'arc_easy', '--run', run)


@pytest.mark.parametrize(
    'args, says',
    [
        ([], '--ckpt'),
        (['--run', 'RUN', '--limit', '0'], '--limit'),
        (['--run', 'RUN', '--shots', '-1'], '--shots'),
        (['--ckpt', 'gpt-9'], 'gpt-9'),
        (['--run', '/no/such'], 'no/such'),
        (['--run', 'RUN', '--policy', 'best'], 'best'),
    ],
)
def test_wrong_flags_are_refused_in_one_line(args, says, run, capsys):
    assert says in refused(capsys, 'x.yaml', *[str(run) if arg == 'RUN' else arg for arg in args])
