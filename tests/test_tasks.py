"""bench.py --tasks: scores and texts against one sequence at a time, and lm-evaluation-harness, where it is installed, on tasks of our own."""
import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model, tiny_config

import bench
import train
from allocator import AdaK, Allocators, Counted, EntropyBands, Skip, TopK
from hub.checkpoint import save
from hub.files import write_json
from hub.tokenizer import Tokenizer
from model import generate

TEXT = 'the cat sat on the mat; the dog ran to the door and the cat ran up the tree. ' * 3


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The folder of a run with random weights: a base with a tokenizer of ours, and allocators that use every k."""
    run = tmp_path_factory.mktemp('run')
    merges = train.learn_bpe([TEXT], 300)
    c = tiny_config(n_vocab=257 + len(merges), max_len=64, eos=256 + len(merges))
    model = random_model(c)
    model.lm_head.weight[[i for i in range(256) if not chr(i).isascii() or not chr(i).isalpha()]] = 0          # what it writes is text
    save(model, run / 'base')
    write_json(run / 'base' / 'tokenizer.json', train.tokenizer_json(merges))
    allocators = Allocators(c, 6, False)
    allocators.weight.data.normal_(0, 0.3)
    allocators.save(run / 'allocator.safetensors')
    return run


@pytest.fixture
def opened(run):
    model = train.load_model(train.Settings(), run / 'base')
    return model, Tokenizer(run / 'base'), AdaK(Allocators.load(run / 'allocator.safetensors', model.config))


def asked(*args):
    return SimpleNamespace(args=args)


def slow_score(model, context, continuation, policy, max_len):
    """The same from the full logits of one sequence; every token of the continuation has all the context that fits."""
    ids = (context + continuation)[-max(max_len, len(continuation)) - 1:]
    logp = F.log_softmax(model(torch.tensor([ids[:-1]]), policy)[0].double(), -1)[-len(continuation):]
    y = torch.tensor(continuation)
    return logp.gather(1, y[:, None]).sum().item(), bool((logp.argmax(-1) == y).all())


# ---------------------------------------------------------------- without lm_eval

@pytest.mark.parametrize('policy', [TopK(3), Skip(.6, 3), EntropyBands(.6, 5)], ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize('batch', [1, 40, 10 ** 6])
def test_scores_are_those_of_one_sequence_at_a_time(policy, batch):
    model = random_model(tiny_config(max_len=16))
    draw = lambda n: torch.randint(50, (n,)).tolist()
    requests = [(draw(a), draw(b)) for a, b in [(1, 1), (9, 4), (3, 12), (15, 2), (30, 3), (1, 16), (2, 20), (16, 1), (5, 5), (40, 17)]]
    requests += [(requests[1][0], y) for y in ([7], [8], [9])]                  # three choices of one token: one input
    for T in (1, 6, 11):                                                        # what greedy decoding gives, and that with another last token
        prompt = draw(T)
        greedy = generate(model, torch.tensor([prompt]), 5, policy)[0, T:].tolist()
        requests += [(prompt, greedy), (prompt, greedy[:4] + [(greedy[4] + 1) % 50])]
    tally = bench.Tally(policy, 3, 'cpu')
    found = bench.score(model, requests, tally, batch)
    slow = [slow_score(model, *request, policy, 16) for request in requests]
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in slow], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in slow]
    assert [greedy for _, greedy in found[-6:]] == [True, False] * 3

    counted, inputs = Counted(policy, 3), {tuple((a + b)[-max(16, len(b)) - 1:][:-1]) for a, b in requests}
    for ids in inputs:                                                          # real tokens only, each input once
        model.hidden(torch.tensor([ids]), counted)
    assert sorted(tally.lengths) == sorted(map(len, inputs))
    assert torch.equal(tally.counts, counted.counts)


def test_the_context_is_cut_from_the_left_to_the_models_length():
    model, y = random_model(tiny_config(max_len=8)), [1, 2, 3]
    context = torch.randint(50, (20,)).tolist()
    (long, _), (cut, _), (shorter, _) = bench.score(model, [(context, y), (context[-6:], y), (context[-5:], y)], bench.Tally(TopK(3), 3, 'cpu'))
    assert long == cut != shorter                                               # 6 of the context and 2 of y are the 8 that are read


def test_padding_runs_one_expert():
    seen = []

    class Watch(TopK):
        def __call__(self, layer, x, probs):
            seen.append(len(x))
            return super().__call__(layer, x, probs)
    real = torch.tensor([True, True, False, True])
    tally = bench.Tally(Watch(3), 1, 'cpu')
    assert bench.RealOnly(tally, real)(0, torch.zeros(4, 2), None).tolist() == [3, 3, 1, 3]
    assert bench.RealOnly(tally, real)(0, torch.zeros(8, 2), None).tolist() == [3, 3, 3, 3, 1, 1, 3, 3]         # rows of two tokens
    assert seen == [4, 8] and tally.counts.tolist() == [[0, 0, 0, 9]]


def test_a_long_text_rolls_in_windows_that_predict_each_token_once(opened):
    model, tokenizer, policy = opened
    model.config.max_len = 4
    ids = tokenizer.encode(TEXT)
    ids = ids[:len(ids) // 4 * 4 - 1]
    text, n = tokenizer.decode(ids), len(ids)
    assert tokenizer.encode(text) == ids and n > 12
    answers = bench.Answers(model, tokenizer, policy, 'test')
    found = answers.loglikelihood_rolling([asked(text), asked(''), asked('the')])
    whole, expected = [tokenizer.eos] + ids, 0.0
    for first in range(0, n, 4):                                                # predicts ids[first:last] from the 4 tokens before ids[last]
        last = min(first + 4, n)
        logp = F.log_softmax(model(torch.tensor([whole[last - 4:last]]), policy)[0], -1)
        expected += sum(logp[i - (last - 4), ids[i]].item() for i in range(first, last))
    assert found[0] == pytest.approx(expected, abs=1e-4) and found[1] == 0
    assert found[2] == pytest.approx(slow_score(model, [tokenizer.eos], tokenizer.encode('the'), policy, 4)[0], abs=1e-4)


def test_how_texts_become_tokens(opened):
    model, tokenizer, policy = opened
    answers = bench.Answers(model, tokenizer, policy, 'test')
    encode = tokenizer.encode
    assert answers.pair('the cat', ' sat') == (encode('the cat'), encode(' sat'))
    assert answers.pair('the cat ', 'sat on') == (encode('the cat'), encode(' sat on'))         # the space belongs to the word behind it
    assert answers.pair('', 'the') == ([tokenizer.eos], encode('the'))
    assert answers.pair(' ', 'the') == ([tokenizer.eos], encode(' the'))
    assert len(encode('the')) == 1 and answers.pair('th', 'e') == ([tokenizer.eos], encode('the'))              # one token over the cut
    assert answers.pair('the cat th', 'e') == (encode('the cat'), encode(' the'))
    tokenizer.bos = 1
    for family, first in (('mixtral', [1]), ('qwen2_moe', [])):
        model.config.model_type = family
        answers = bench.Answers(model, tokenizer, policy, 'test')
        assert answers.pair('the cat', ' sat') == (first + encode('the cat'), encode(' sat'))
        assert answers.pair('', 'the') == ([1], encode('the'))
    tokenizer.bos = tokenizer.eos = None
    with pytest.raises(bench.InputError, match='neither bos nor eos'):
        bench.Answers(model, tokenizer, policy, 'test')


def test_texts_end_before_their_stop_string_even_inside_a_token(opened):
    model, tokenizer, policy = opened
    contexts = ['the cat', 'the dog', 'a tree', 'door', 'the mat; the', 'ran up', 'sat on']
    alone = [''.join(tokenizer.stream(generate(model, torch.tensor([tokenizer.encode(context)]), 20, policy)[0, len(tokenizer.encode(context)):], False))
             for context in contexts]
    # stops from the texts themselves: characters 3-4 of one, which no token needs to end at, one that never comes, an empty one
    until = [[text[3:5], text[9:10]] for text in alone[:4]] + [text[2:3] for text in alone[4:5]] + [['never, ever'], ['', 'never']]
    ways = [{'until': stop, 'max_gen_toks': 20} for stop in until]
    answers = bench.Answers(model, tokenizer, policy, 'test')
    found = answers.generate_until([asked(*pair) for pair in zip(contexts, ways)], batch=60)
    for text, stop, got in zip(alone, until, found):
        at = [text.find(s) for s in ([stop] if isinstance(stop, str) else stop) if s and s in text]
        assert got == text[:min(at, default=None)].split('<|endoftext|>')[0]
    assert len(found[0]) <= 3 < len(alone[0]) and len(found[4]) <= 2 and found[5] == alone[5]
    assert answers.tally.counts[0].sum() == sum(answers.tally.lengths)          # rows that had ended are not counted

    ids = tokenizer.encode(contexts[0])
    written = generate(model, torch.tensor([ids]), 20, policy)[0, len(ids):].tolist()
    tokenizer.eos = written[6]
    assert answers.generate_until([asked(contexts[0], {'max_gen_toks': 20})]) == [tokenizer.decode(written[:written.index(written[6])])]


def test_only_what_runs_before_the_end_of_a_row_counts(opened):
    model, tokenizer, policy = opened
    prompts = [tokenizer.encode('the cat sat'), tokenizer.encode('the dog ran')]
    assert len(prompts[0]) == len(prompts[1])
    whole = generate(model, torch.tensor(prompts), 9, policy)
    T = len(prompts[0])
    tally, counted = bench.Tally(policy, 3, 'cpu'), Counted(policy, 3)
    texts = bench.write_until(model, tokenizer, prompts, [[tokenizer.decode(whole[0, T:T + 3])], []], 9, 0.0, tally, None)
    assert texts == ['', tokenizer.decode(whole[1, T:])]
    for row, n in zip(whole, (T + 2, T + 8)):                                   # the first stops at its third token; a text's last token is not run
        model.hidden(row[None, :n], counted)
    assert tally.lengths == [T + 2, T + 8] and torch.equal(tally.counts, counted.counts)


def test_generation_is_greedy_or_sampled_as_the_task_says(opened):
    model, tokenizer, policy = opened
    text = lambda **how: bench.Answers(model, tokenizer, policy, 'test', seed=0).generate_until([asked('the', {'max_gen_toks': 12, **how})])[0]
    greedy = text()
    assert text(do_sample=False, temperature=3.0, top_p=.9) == text(temperature=0.0) == greedy
    assert text(temperature=3.0) == text(temperature=3.0, do_sample=True) != greedy
    assert text(do_sample=True) == text(do_sample=True, temperature=1.0) != text(do_sample=True, temperature=9.0)
    assert text(do_sample=True) != greedy
    with pytest.raises(bench.InputError, match='top_p'):
        text(temperature=3.0, top_p=.9)
    with pytest.raises(bench.InputError, match='64 new tokens'):
        text(max_gen_toks=64)
    answers = bench.Answers(model, tokenizer, policy, 'test')
    answers.generate_until([asked(TEXT, {'max_gen_toks': 12})])                 # cut from the left to leave room
    assert answers.tally.lengths[0] <= 64 - 1


def test_flops_count_the_allocators_and_the_length(opened):
    model, tokenizer, policy = opened
    tally = bench.Tally(policy, 3, 'cpu')
    bench.score(model, [([1] * 10, [2]), ([1] * 30, [2])], tally)
    row, = bench.task_rows({'results': {'t': {'alias': 't', 'sample_len': 2, 'acc,none': .5, 'acc_stderr,none': 'N/A'}}, 'versions': {}, 'n-shot': {}},
                           tally, model.config)
    T = (10 * 10 + 30 * 30) / 40
    top, ada = bench.flops(model.config, 3, T), bench.flops(model.config, tally.mean(), T, 3 * 6 * 32)
    assert row['total_flops'] == pytest.approx(ada['total'] / top['total']) and row['expert_flops'] == pytest.approx(tally.mean() / 3)
    assert (row['metric'], row['value'], row['stderr'], row['mean_length']) == ('acc', .5, None, T)


def test_the_base_of_a_run_is_the_one_it_was_trained_on(run, tmp_path):
    def base(**a):
        s = bench.opened_settings(SimpleNamespace(**{'ckpt': None, 'run': None, 'device': 'cpu', 'stream': False, **a}), finished=False)
        return train.base_folder(s, Path(a['run']))
    assert base(run=str(run)) == run / 'base' == base(ckpt=str(run / 'base'), run='elsewhere')
    write_json(tmp_path / 'results.json', {'config': asdict(train.Settings(ckpt=str(run / 'base')))})
    assert base(run=str(tmp_path)) == run / 'base'


def refused(capsys, *args):
    with pytest.raises(SystemExit) as exit:
        bench.command_line(list(map(str, args)))
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count('\n') == 1
    return error


def test_without_lm_eval_one_line_says_what_to_install(run, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split('.')[0] == 'lm_eval']:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'lm_eval', None)
    assert 'pip install lm-eval' in refused(capsys, '--tasks', 'arc_easy', '--run', run)


@pytest.mark.parametrize('args, says', [([], '--ckpt'), (['--run', 'RUN', '--limit', '0'], '--limit'), (['--run', 'RUN', '--shots', '-1'], '--shots'),
                                        (['--ckpt', 'gpt-9'], 'gpt-9'), (['--run', '/no/such'], 'no/such'),
                                        (['--run', 'RUN', '--policy', 'best'], 'best')])
def test_wrong_flags_are_refused_in_one_line(args, says, run, capsys):
    assert says in refused(capsys, '--tasks', 'x.yaml', *[str(run) if arg == 'RUN' else arg for arg in args])


# ---------------------------------------------------------------- with lm_eval

MULTIPLE_CHOICE = '''output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
fewshot_split: test
metric_list: [{metric: acc}]
'''
GENERATION = '''output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["%s"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
'''


@pytest.fixture
def harness(monkeypatch):
    for name in ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE'):
        monkeypatch.setenv(name, '1')
    return pytest.importorskip('lm_eval')


def task_file(folder, name, body, rows):
    (folder / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    (folder / f'{name}.yaml').write_text(f'task: {name}\n{body}dataset_path: json\ntest_split: test\ndataset_kwargs:\n'
                                         f'  data_files: {{test: {folder / name}.jsonl}}\n  cache_dir: {folder / "cache"}\n')
    return folder / f'{name}.yaml'


def test_tasks_of_both_kinds_agree_with_plain_logits(harness, run, opened, tmp_path, capsys):
    model, tokenizer, policy = opened
    words = 'the cat sat on mat dog ran to door and up tree'.split()
    pick = lambda n: [words[i] for i in torch.randperm(len(words))[:n]]
    questions = [{'question': ' '.join(pick(n)), 'choices': pick(4), 'answer': i % 4} for i, n in enumerate([1, 5, 2, 9, 3, 3, 7, 4] * 4)]
    continued = lambda text, policy: ''.join(tokenizer.stream(
        generate(model, torch.tensor([tokenizer.encode(text)]), 8, policy)[0, len(tokenizer.encode(text)):], False)).split('<|endoftext|>')[0]
    prompts = [' '.join(pick(n)) for n in (2, 3, 4) * 4]
    stop = continued(prompts[0], TopK(3))[3]
    written = lambda text, policy: continued(text, policy).split(stop)[0]
    answers = [{'question': text, 'answer': ('none such', written(text, TopK(3)), written(text, policy))[i % 3]} for i, text in enumerate(prompts)]

    files = task_file(tmp_path, 'choose', MULTIPLE_CHOICE, questions), task_file(tmp_path, 'write', GENERATION % stop, answers)
    bench.main(['--tasks', ','.join(map(str, files)), '--run', str(run), '--out', str(tmp_path)])
    results, printed = json.loads((tmp_path / 'tasks.json').read_text()), capsys.readouterr().out
    rows = {(r['task'], r['policy']): r for r in results['rows']}
    assert len(rows) == 4 and results['lm_eval'] == harness.__version__
    right = {}
    for name, p in (('top-k', TopK(3)), ('ada-k', policy)):
        scores = [[slow_score(model, tokenizer.encode(q['question']), tokenizer.encode(' ' + choice), p, 64)[0] for choice in q['choices']] for q in questions]
        right['choose', name] = [max(range(4), key=s.__getitem__) == q['answer'] for s, q in zip(scores, questions)]
        right['write', name] = [written(r['question'], p) == r['answer'] for r in answers]
    for case, hits in right.items():
        value = sum(hits) / len(hits)
        assert 0 < value < 1 and rows[case]['value'] == pytest.approx(value) and rows[case]['n'] == len(hits), case
        assert rows[case]['stderr'] == pytest.approx((value * (1 - value) / (len(hits) - 1)) ** .5)
        assert f'{value:.4f} ± ' in printed
    counted = Counted(policy, 3)
    for ids in {tuple(tokenizer.encode(f'{q["question"]} {choice}')[:-1]) for q in questions for choice in q['choices']}:
        model.hidden(torch.tensor([ids]), counted)
    assert rows['choose', 'ada-k']['mean_k'] == pytest.approx(counted.mean()) and rows['choose', 'top-k']['mean_k'] == 3
    assert rows['choose', 'top-k']['total_flops'] == 1 and f'| {counted.mean():.3f} | {counted.mean() / 3:.3f} |' in printed
    assert printed.count('| choose | 0 | 32 | acc |') == 1


def test_limit_shots_and_a_policy_by_name(harness, run, opened, tmp_path, capsys):
    model, tokenizer, _ = opened
    rows = [{'question': word, 'choices': ['on', 'up'], 'answer': 0} for word in ('cat', 'dog', 'mat', 'tree', 'door')]
    file = task_file(tmp_path, 'few', MULTIPLE_CHOICE.replace('acc', 'acc, aggregation: median'), rows)         # its error is a bootstrap, which prints
    bench.main(['--tasks', str(file), '--ckpt', str(run / 'base'), '--policy', 'skip=0.6', '--limit', '3', '--shots', '2', '--out', str(tmp_path)])
    top, skip = json.loads((tmp_path / 'tasks.json').read_text())['rows']
    assert (top['policy'], top['n'], top['shots'], top['mean_k']) == ('top-k', 3, 2, 3)
    assert skip['policy'] == 'skip=0.6' and skip['mean_k'] < 3
    # both read the same prompts, and these hold two examples
    assert top['mean_length'] == skip['mean_length'] > 2 * max(len(tokenizer.encode(r['question'] + ' on')) for r in rows)
    out = capsys.readouterr()
    assert out.out.startswith('| task |') and 'mean k, skip=0.6' in out.out and 'ada-k' not in out.out
    assert all(line.startswith(('load', 'few')) for line in out.err.splitlines())                # progress, and no noise


@pytest.fixture
def known(harness, tmp_path, monkeypatch):
    """The folder whose tasks lm_eval knows by name: a new one, its own 14,000 tasks take seconds to read."""
    import lm_eval.tasks.manager
    monkeypatch.setattr(lm_eval.tasks.manager, '__file__', str(tmp_path / 'known' / 'manager.py'))
    (tmp_path / 'known').mkdir()
    return tmp_path / 'known'


def test_a_group_is_one_mean_and_a_tag_is_its_tasks(known, run, tmp_path, capsys):
    for name, n in (('one', 5), ('two', 3)):
        task_file(known, name, 'tag: both\n' + MULTIPLE_CHOICE, [{'question': f'the {name} {i}', 'choices': ['a', 'door'], 'answer': i % 2} for i in range(n)])
    (known / 'g.yaml').write_text('group: mean\ntask: [one, two]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n')
    bench.main(['--tasks', 'mean,both', '--run', str(run), '--out', str(tmp_path)])
    rows = json.loads((tmp_path / 'tasks.json').read_text())['rows']
    assert [(r['unit'], r['task'], r['policy'], r['n']) for r in rows] == [
        *[('mean', task, policy, n) for policy in ('top-k', 'ada-k') for task, n in (('one', 5), ('two', 3), ('mean', 8))],
        *[(task, task, policy, n) for task, n in (('one', 5), ('two', 3)) for policy in ('top-k', 'ada-k')]]
    assert rows[5]['value'] == pytest.approx((5 * rows[3]['value'] + 3 * rows[4]['value']) / 8)
    assert rows[3]['mean_k'] == rows[4]['mean_k'] == rows[5]['mean_k'] and rows[7]['mean_k'] != rows[9]['mean_k']       # of all that ran together
    assert capsys.readouterr().out.count('\n| ') == 1 + 3 + 2


def test_a_task_that_cannot_be_had_is_one_line(known, run, tmp_path, capsys):
    good = task_file(known, 'arc_easy', MULTIPLE_CHOICE, [{'question': 'the', 'choices': ['a', 'b'], 'answer': 0}])
    assert 'arc_eazy: no such task' in (error := refused(capsys, '--tasks', 'arc_easy,arc_eazy', '--run', run)) and 'is it arc_easy?' in error
    assert 'gone.yaml' in refused(capsys, '--tasks', tmp_path / 'gone.yaml', '--run', run)
    assert "--tasks : no such task" in refused(capsys, '--tasks', '', '--run', run)
    (tmp_path / 'broken.yaml').write_text('task: [')
    assert 'broken.yaml' in refused(capsys, '--tasks', tmp_path / 'broken.yaml', '--run', run)
    lost = task_file(tmp_path, 'lost', MULTIPLE_CHOICE, [])
    (tmp_path / 'lost.jsonl').unlink()
    assert 'lost.yaml: FileNotFoundError' in refused(capsys, '--tasks', lost, '--run', run)
    hub = tmp_path / 'hub.yaml'
    hub.write_text(good.read_text().replace('dataset_path: json', 'dataset_path: no-one/nothing').split('dataset_kwargs')[0])
    assert 'hub.yaml' in refused(capsys, '--tasks', hub, '--run', run)
    unsafe = tmp_path / 'unsafe.yaml'
    unsafe.write_text(good.read_text() + 'unsafe_code: true\n')
    assert 'runs code' in refused(capsys, '--tasks', unsafe, '--run', run)
    assert '--tasks arc_easy: ' in refused(capsys, '--tasks', 'arc_easy', '--run', run, '--shots', '9')      # one document has no nine others
    assert not (run / 'tasks.json').exists()
