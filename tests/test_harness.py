"""study/tasks.py: what it makes of the harness's answers, and the harness itself where it is installed."""
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import study.tasks
from allocator import AdaK, Counted
from conftest import refusal
from hub.checkpoint import base_digest, load
from hub.config import read_config
from hub.tokenizer import Tokenizer

transformers = pytest.importorskip('transformers')
try:
    import lm_eval
except ImportError:
    lm_eval = None
with_harness = pytest.mark.skipif(lm_eval is None, reason='lm-eval is not installed')

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


@pytest.fixture(scope='module', autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        for name in ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE'):
            patch.setenv(name, '1')
        yield


# ================================================================ without the harness

def test_metrics_of_any_kind_reach_the_file_and_the_table(smoke, tmp_path, monkeypatch, capsys):
    base = smoke[0] / 'base'
    model = transformers.AutoModelForCausalLM.from_pretrained(base, experts_implementation='grouped_mm')
    ids = torch.tensor([[5, 6, 7, 8]])
    metrics = {
        'alias': 'odd',
        'acc,none': np.float32(0.5),
        'acc_stderr,none': np.float32(0.25),
        'n,none': 3,
        'f1,all': {'a': 1},
        'list,none': [1, 2],
        'text,none': 'two\nlines',
        'none,none': None,
        'none_stderr,none': 'N/A',
    }

    def simple_evaluate(lm, **how):
        lm.model(ids)
        return {'results': {'odd': metrics}, 'n-shot': {'odd': 2}}
    monkeypatch.setitem(sys.modules, 'lm_eval', SimpleNamespace(simple_evaluate=simple_evaluate))
    monkeypatch.setitem(sys.modules, 'lm_eval.tasks', SimpleNamespace(TaskManager=lambda **how: None))
    monkeypatch.setattr(study.tasks, 'open_model', lambda *how: SimpleNamespace(model=model))
    study.tasks.main(['odd', '--run', str(smoke[0]), '--out', str(tmp_path)])
    rows = json.loads((tmp_path / 'tasks.json').read_text())['rows']
    values = {row['metric']: row['value'] for row in rows}
    assert values == {
        'acc,none': 0.5,
        'n,none': 3.0,
        'f1,all': "{'a': 1}",
        'list,none': '[1, 2]',
        'text,none': 'two lines',
        'none,none': 'None',
    }
    printed = capsys.readouterr().out
    assert '| acc,none | top-k | 0.5000 | 0.2500 | 4 |' in printed
    assert '| odd | 2 | list,none | ada-k | [1, 2] |' in printed
    policy = AdaK.of_run(smoke[0], read_config(base), base_digest(base), 'cpu')
    counted = Counted(policy, 2)
    load(base).hidden(ids, counted)
    assert rows[-1]['mean_k'] == pytest.approx(counted.mean())
    assert not hasattr(model, '_ada_k')


@pytest.mark.parametrize('args, says', [
    (['--limit', '-1'], '--limit'),
    (['--shots', '-1'], '--shots'),
    (['--policy', 'k=99'], 'k=99'),
    (['--ckpt', 'gpt-9'], 'gpt-9'),
    (['--run', ''], 'give --ckpt'),
    (['--device', 'abacus'], 'pip install lm-eval'),
])
def test_what_does_not_work_is_one_line(args, says, smoke, tmp_path, capsys):
    args = '--run', smoke[0], '--out', tmp_path, *args
    assert says in refusal(capsys, 'study.tasks', study.tasks.main, 'x.yaml', *args)
    assert not (tmp_path / 'tasks.json').exists()


# ================================================================ with it

@pytest.fixture(scope='module')
def done(smoke, tmp_path_factory):
    """({(task, policy): row}, the file of a task, its questions) after tasks of both kinds."""
    out = tmp_path_factory.mktemp('tasks')
    questions = []
    for i, n in enumerate([1, 5, 2, 9, 3, 7] * 3):
        words = (WORDS * 2)[i % 12:][:n]
        questions.append({
            'question': ' '.join(words),
            'answer': i % 3,
            'choices': [words[0], 'the', 'x'],
        })
    written = [{**q, 'answer': 'x'} for q in questions]
    choose = task_file(out, 'choose', CHOOSE, questions)
    write = task_file(out, 'write', WRITE, written)
    study.tasks.main([f'{choose},{write}', '--run', str(smoke[0]), '--out', str(out)])
    rows = json.loads((out / 'tasks.json').read_text())['rows']
    return {(row['task'], row['policy']): row for row in rows}, choose, questions


@with_harness
def test_top_k_is_what_the_harness_itself_says(done, smoke):
    rows, choose, _ = done
    own = lm_eval.simple_evaluate(
        'hf',
        model_args={'pretrained': str(smoke[0] / 'base'), 'dtype': 'auto'},
        device='cpu',
        batch_size=1,
        tasks=[str(choose)],
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
        log_samples=False,
    )
    row = rows['choose', 'top-k']
    assert row['value'] == own['results']['choose']['acc,none']
    assert row['mean_k'] == 4


@with_harness
def test_the_policy_scores_and_counts_as_our_own_model_does(done, smoke):
    rows, _, questions = done
    base = smoke[0] / 'base'
    model = load(base)
    tokenizer = Tokenizer(base)
    policy = AdaK.of_run(smoke[0], model.config, base_digest(base), 'cpu')
    counted = Counted(policy, 2)
    hits = []
    seen = set()
    for q in questions:
        scores = []
        context = tokenizer.encode(q['question'])
        for choice in q['choices']:
            ids = tokenizer.encode(f'{q["question"]} {choice}')
            tokens = torch.tensor([ids[:-1]])
            logp = model(tokens, policy)[0].log_softmax(-1)                 # (T,V)
            first = len(context)
            said = logp[range(first - 1, len(ids) - 1), ids[first:]]
            scores.append(said.sum().item())
            if tuple(ids[:-1]) not in seen:                    # the harness runs equal texts once
                seen.add(tuple(ids[:-1]))
                model.hidden(tokens, counted)
        hits.append(scores.index(max(scores)) == q['answer'])
    row = rows['choose', 'ada-k']
    assert row['value'] == pytest.approx(sum(hits) / len(hits))
    assert row['mean_k'] == pytest.approx(counted.mean(), rel=1e-6)        # padding is not counted
    assert 1 <= rows['write', 'ada-k']['mean_k'] <= 8
