"""study/tasks.py through lm-evaluation-harness, where it is installed, on tasks of our own."""
import json

import pytest
import torch

import study.tasks
from allocator import Counted, TopK
from model import generate
from test_tasks import opened, refused, run, slow_score  # noqa: F401: two of them are fixtures


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
    (folder / f'{name}.yaml').write_text(
        f'task: {name}\n{body}dataset_path: json\ntest_split: test\ndataset_kwargs:\n'
        f'  data_files: {{test: {folder / name}.jsonl}}\n  cache_dir: {folder / "cache"}\n'
    )
    return folder / f'{name}.yaml'


def test_tasks_of_both_kinds_agree_with_plain_logits(harness, run, opened, tmp_path, capsys):
    model, tokenizer, policy = opened
    words = 'the cat sat on mat dog ran to door and up tree'.split()
    pick = lambda n: [words[i] for i in torch.randperm(len(words))[:n]]
    questions = [
        {'question': ' '.join(pick(n)), 'choices': pick(4), 'answer': i % 4}
        for i, n in enumerate([1, 5, 2, 9, 3, 3, 7, 4] * 4)
    ]
    continued = lambda text, policy: ''.join(
        tokenizer.stream(
            generate(model, torch.tensor([tokenizer.encode(text)]), 8, policy)[
                0, len(tokenizer.encode(text)) :
            ],
            False,
        )
    ).split('<|endoftext|>')[0]
    prompts = [' '.join(pick(n)) for n in (2, 3, 4) * 4]
    stop = continued(prompts[0], TopK(3))[3]
    written = lambda text, policy: continued(text, policy).split(stop)[0]
    answers = [
        {'question': text, 'answer': ('none such', written(text, TopK(3)), written(text, policy))[i % 3]}
        for i, text in enumerate(prompts)
    ]

    files = (
        task_file(tmp_path, 'choose', MULTIPLE_CHOICE, questions),
        task_file(tmp_path, 'write', GENERATION % stop, answers),
    )
    study.tasks.main([','.join(map(str, files)), '--run', str(run), '--out', str(tmp_path)])
    results, printed = json.loads((tmp_path / 'tasks.json').read_text()), capsys.readouterr().out
    rows = {(r['task'], r['policy']): r for r in results['rows']}
    assert len(rows) == 4 and results['lm_eval'] == harness.__version__
    right = {}
    for name, p in (('top-k', TopK(3)), ('ada-k', policy)):
        scores = [
            [
                slow_score(model, tokenizer.encode(q['question']), tokenizer.encode(' ' + choice), p, 64)[0]
                for choice in q['choices']
            ]
            for q in questions
        ]
        right['choose', name] = [
            max(range(4), key=s.__getitem__) == q['answer'] for s, q in zip(scores, questions)
        ]
        right['write', name] = [written(r['question'], p) == r['answer'] for r in answers]
    for case, hits in right.items():
        value = sum(hits) / len(hits)
        assert (
            0 < value < 1 and rows[case]['value'] == pytest.approx(value) and rows[case]['n'] == len(hits)
        ), case
        assert rows[case]['stderr'] == pytest.approx((value * (1 - value) / (len(hits) - 1)) ** .5)
        assert f'{value:.4f} ± ' in printed
    counted = Counted(policy, 3)
    for ids in {
        tuple(tokenizer.encode(f'{q["question"]} {choice}')[:-1])
        for q in questions
        for choice in q['choices']
    }:
        model.hidden(torch.tensor([ids]), counted)
    assert (
        rows['choose', 'ada-k']['mean_k'] == pytest.approx(counted.mean())
        and rows['choose', 'top-k']['mean_k'] == 3
    )
    assert (
        rows['choose', 'top-k']['total_flops'] == 1
        and f'| {counted.mean():.3f} | {counted.mean() / 3:.3f} |' in printed
    )
    assert printed.count('| choose | 0 | 32 | acc |') == 1


def test_limit_shots_and_a_policy_by_name(harness, run, opened, tmp_path, capsys):
    model, tokenizer, _ = opened
    rows = [
        {'question': word, 'choices': ['on', 'up'], 'answer': 0}
        for word in ('cat', 'dog', 'mat', 'tree', 'door')
    ]
    file = task_file(
        tmp_path, 'few', MULTIPLE_CHOICE.replace('acc', 'acc, aggregation: median'), rows
    )  # its error is a bootstrap, which prints
    study.tasks.main(
        [
            str(file),
            '--ckpt',
            str(run / 'base'),
            '--policy',
            'skip=0.6',
            '--limit',
            '3',
            '--shots',
            '2',
            '--out',
            str(tmp_path),
        ]
    )
    top, skip = json.loads((tmp_path / 'tasks.json').read_text())['rows']
    assert (top['policy'], top['n'], top['shots'], top['mean_k']) == ('top-k', 3, 2, 3)
    assert skip['policy'] == 'skip=0.6' and skip['mean_k'] < 3
    # both read the same prompts, and these hold two examples
    assert (
        top['mean_length']
        == skip['mean_length']
        > 2 * max(len(tokenizer.encode(r['question'] + ' on')) for r in rows)
    )
    out = capsys.readouterr()
    assert out.out.startswith('| task |') and 'mean k, skip=0.6' in out.out and 'ada-k' not in out.out
    assert all(line.startswith(('load', 'few')) for line in out.err.splitlines())   # progress, and no noise


@pytest.fixture
def known(harness, tmp_path, monkeypatch):
    """The folder whose tasks lm_eval knows by name: a new one, its own 14,000 tasks take seconds to read."""
    import lm_eval.tasks.manager
    monkeypatch.setattr(lm_eval.tasks.manager, '__file__', str(tmp_path / 'known' / 'manager.py'))
    (tmp_path / 'known').mkdir()
    return tmp_path / 'known'


def test_a_group_is_one_mean_and_a_tag_is_its_tasks(known, run, tmp_path, capsys):
    for name, n in (('one', 5), ('two', 3)):
        task_file(
            known,
            name,
            'tag: both\n' + MULTIPLE_CHOICE,
            [{'question': f'the {name} {i}', 'choices': ['a', 'door'], 'answer': i % 2} for i in range(n)],
        )
    (known / 'g.yaml').write_text(
        'group: mean\ntask: [one, two]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n'
    )
    study.tasks.main(['mean,both', '--run', str(run), '--out', str(tmp_path)])
    rows = json.loads((tmp_path / 'tasks.json').read_text())['rows']
    assert [(r['unit'], r['task'], r['policy'], r['n']) for r in rows] == [
        *[
            ('mean', task, policy, n)
            for policy in ('top-k', 'ada-k')
            for task, n in (('one', 5), ('two', 3), ('mean', 8))
        ],
        *[(task, task, policy, n) for task, n in (('one', 5), ('two', 3)) for policy in ('top-k', 'ada-k')],
    ]
    assert rows[5]['value'] == pytest.approx((5 * rows[3]['value'] + 3 * rows[4]['value']) / 8)
    assert (
        rows[3]['mean_k'] == rows[4]['mean_k'] == rows[5]['mean_k'] and rows[7]['mean_k'] != rows[9]['mean_k']
    )  # of all that ran together
    assert capsys.readouterr().out.count('\n| ') == 1 + 3 + 2


def test_a_task_that_cannot_be_had_is_one_line(known, run, tmp_path, capsys):
    good = task_file(
        known, 'arc_easy', MULTIPLE_CHOICE, [{'question': 'the', 'choices': ['a', 'b'], 'answer': 0}]
    )
    assert (
        'arc_eazy: no such task' in (error := refused(capsys, 'arc_easy,arc_eazy', '--run', run))
        and 'is it arc_easy?' in error
    )
    assert 'gone.yaml' in refused(capsys, tmp_path / 'gone.yaml', '--run', run)
    assert "tasks : no such task" in refused(capsys, '', '--run', run)
    (tmp_path / 'broken.yaml').write_text('task: [')
    assert 'broken.yaml' in refused(capsys, tmp_path / 'broken.yaml', '--run', run)
    lost = task_file(tmp_path, 'lost', MULTIPLE_CHOICE, [])
    (tmp_path / 'lost.jsonl').unlink()
    assert 'lost.yaml: FileNotFoundError' in refused(capsys, lost, '--run', run)
    hub = tmp_path / 'hub.yaml'
    hub.write_text(
        good.read_text()
        .replace('dataset_path: json', 'dataset_path: no-one/nothing')
        .split('dataset_kwargs')[0]
    )
    assert 'hub.yaml' in refused(capsys, hub, '--run', run)
    unsafe = tmp_path / 'unsafe.yaml'
    unsafe.write_text(good.read_text() + 'unsafe_code: true\n')
    assert 'runs code' in refused(capsys, unsafe, '--run', run)
    assert 'tasks arc_easy: ' in refused(
        capsys, 'arc_easy', '--run', run, '--shots', '9'
    )  # one document has no nine others
    assert not (run / 'tasks.json').exists()
