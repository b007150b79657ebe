"""study/tasks.py through lm-evaluation-harness, where it is installed, on tasks of our own."""
import json

import pytest
import torch

import study.tasks
from allocator import AdaK, Counted
from conftest import refusal
from hub.checkpoint import load
from hub.config import read_config
from hub.tokenizer import Tokenizer

lm_eval = pytest.importorskip('lm_eval')
pytest.importorskip('transformers')

CHOOSE = '''output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
'''
WRITE = '''output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
'''
WORDS = 'import def self return for in if not None class raise with'.split()


def task_file(folder, name, body, rows):
    (folder / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    (folder / f'{name}.yaml').write_text(
        f'task: {name}\n{body}dataset_path: json\ntest_split: test\ndataset_kwargs:\n'
        f'  data_files: {{test: {folder / name}.jsonl}}\n  cache_dir: {folder / "cache"}\n')
    return folder / f'{name}.yaml'


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    for name in ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE'):
        monkeypatch.setenv(name, '1')


@pytest.fixture(scope='module')
def done(smoke, tmp_path_factory):
    """(folder with tasks.json, questions, the policy of the run) after tasks of both kinds."""
    out = tmp_path_factory.mktemp('tasks')
    questions = [{'question': ' '.join(WORDS[(i + j) % 12] for j in range(n)), 'answer': i % 3,
                  'choices': [WORDS[i % 12], 'the', 'x'][:3]} for i, n in enumerate([1, 5, 2, 9, 3, 7] * 3)]
    files = (task_file(out, 'choose', CHOOSE, questions),
             task_file(out, 'write', WRITE, [{**q, 'answer': 'x'} for q in questions]))
    study.tasks.main([','.join(map(str, files)), '--run', str(smoke[0]), '--out', str(out), '--batch', '3'])
    return out, questions, AdaK.of_run(smoke[0], read_config(smoke[0] / 'base'), 'cpu')


def rows_of(done):
    return {(r['task'], r['policy']): r for r in json.loads((done[0] / 'tasks.json').read_text())['rows']}


def test_top_k_is_what_the_harness_itself_says(done, smoke, offline):
    own = lm_eval.simple_evaluate(
        'hf', model_args={'pretrained': str(smoke[0] / 'base'), 'dtype': 'auto'}, device='cpu', batch_size=3,
        tasks=[str(done[0] / 'choose.yaml')], task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
        log_samples=False)
    assert rows_of(done)['choose', 'top-k']['value'] == own['results']['choose']['acc,none']
    assert rows_of(done)['choose', 'top-k']['mean_k'] == 4 and rows_of(done)['write', 'top-k']['mean_k'] == 4


def test_the_policy_scores_and_counts_as_our_own_model_does(done, smoke):
    _, questions, policy = done
    model, tokenizer = load(smoke[0] / 'base'), Tokenizer(smoke[0] / 'base')
    counted, hits, seen = Counted(policy, 2), [], set()
    for q in questions:
        scores, context = [], tokenizer.encode(q['question'])
        for choice in q['choices']:
            ids = tokenizer.encode(f'{q["question"]} {choice}')
            logits = model(torch.tensor([ids[:-1]]), policy)[0].log_softmax(-1)              # (T,V)
            scores.append(sum(logits[t - 1, ids[t]].item() for t in range(len(context), len(ids))))
            if tuple(ids[:-1]) not in seen:                    # the harness runs equal texts once
                seen.add(tuple(ids[:-1]))
                model.hidden(torch.tensor([ids[:-1]]), counted)
        hits.append(max(range(3), key=scores.__getitem__) == q['answer'])
    row = rows_of(done)['choose', 'ada-k']
    assert row['value'] == pytest.approx(sum(hits) / len(hits))
    assert row['mean_k'] == pytest.approx(counted.mean(), rel=1e-6)        # padding is not counted
    assert row['expert_flops'] == pytest.approx(row['mean_k'] / 4) and 0 < row['total_flops'] < 1.2
    assert 1 <= rows_of(done)['write', 'ada-k']['mean_k'] <= 8


def test_limit_shots_and_a_policy_by_name(smoke, tmp_path, capsys):
    questions = [{'question': w, 'choices': ['on', 'up'], 'answer': 0} for w in WORDS]
    file = task_file(tmp_path, 'few', CHOOSE + 'fewshot_split: test\n', questions)
    study.tasks.main([str(file), '--ckpt', str(smoke[0] / 'base'), '--policy', 'skip=0.6', '--limit', '3',
                      '--shots', '2', '--out', str(tmp_path)])
    top, skip = json.loads((tmp_path / 'tasks.json').read_text())['rows']
    assert (top['policy'], top['shots'], top['mean_k']) == ('top-k', 2, 4)
    assert skip['policy'] == 'skip=0.6' and skip['mean_k'] < 4
    assert '| task | shots | metric | top-k | skip=0.6 |' in capsys.readouterr().out


@pytest.mark.parametrize('args, says', [
    (['no_such_task.yaml'], 'no_such_task.yaml'), (['broken.yaml'], 'broken.yaml'),
    (['lost.yaml'], 'lost.yaml'),
    (['x.yaml', '--limit', '0'], 'limit is 0'), (['x.yaml', '--shots', '-1'], 'shots is -1'),
    (['x.yaml', '--policy', 'k=99'], 'k=99'), (['x.yaml', '--device', 'tpu9'], 'tasks: '),
    (['x.yaml', '--batch', '0'], 'batch is 0')])
def test_what_cannot_be_run_is_one_line(args, says, smoke, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'broken.yaml').write_text('task: [')
    task_file(tmp_path, 'lost', CHOOSE, [])
    (tmp_path / 'lost.jsonl').unlink()
    line = refusal(capsys, 'study.tasks', study.tasks.main, *args, '--run', smoke[0], '--out', tmp_path / 'o')
    assert says in line and not (tmp_path / 'o/tasks.json').exists()


def test_neither_a_run_nor_a_checkpoint(capsys):
    assert 'give --ckpt' in refusal(capsys, 'study.tasks', study.tasks.main, 'x.yaml')
