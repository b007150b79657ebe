"""study/tasks.py: what it makes of the harness's answers, and the harness itself where it is installed."""
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import study.tasks
from allocator import Counted, TopK
from conftest import model_and_policy, refusal
from hub.tokenizer import Tokenizer

transformers = pytest.importorskip('transformers')
CHOOSE = '''output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: [def, the, x]
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


def test_metrics_of_any_kind_reach_the_file_and_the_table(smoke, tmp_path, monkeypatch, capsys):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smoke[0] / 'base', experts_implementation='grouped_mm')
    metrics = {
        'alias': 'odd',
        'acc,none': np.float32(0.5),
        'acc_stderr,none': np.float32(0.25),
        'text,none': 'two\nlines',
    }

    def simple_evaluate(lm, **how):
        lm.model(torch.tensor([[5, 6, 7, 8]]))
        return {'results': {'odd': metrics}, 'n-shot': {'odd': 2}}
    monkeypatch.setitem(sys.modules, 'lm_eval', SimpleNamespace(simple_evaluate=simple_evaluate))
    monkeypatch.setitem(sys.modules, 'lm_eval.tasks', SimpleNamespace(TaskManager=lambda **how: None))
    monkeypatch.setattr(study.tasks, 'open_model', lambda *how: SimpleNamespace(model=model))
    study.tasks.main(['odd', '--run', str(smoke[0]), '--policy', 'k=1', '--out', str(tmp_path)])
    rows = json.loads((tmp_path / 'tasks.json').read_text())['rows']
    assert [(row['policy'], row['value'], row['mean_k']) for row in rows] == [
        ('top-k', 0.5, 4),
        ('top-k', 'two lines', 4),
        ('k=1', 0.5, 1),
        ('k=1', 'two lines', 1),
    ]
    assert '| odd | 2 | acc,none | top-k | 0.5000 | 0.2500 | 4 |' in capsys.readouterr().out
    assert not hasattr(model.model, '_ada_k')


@pytest.mark.parametrize('args, says', [
    (['--run', ''], 'give --ckpt'),
    (['--device', 'abacus'], 'pip install lm-eval'),
])
def test_what_does_not_work_is_one_line(args, says, smoke, tmp_path, capsys):
    args = '--run', smoke[0], '--out', tmp_path, *args
    assert says in refusal(capsys, 'study.tasks', study.tasks.main, 'x.yaml', *args)
    assert not (tmp_path / 'tasks.json').exists()


@torch.no_grad()
def test_the_harness_scores_and_counts_as_our_own_model_does(smoke, tmp_path, monkeypatch):
    pytest.importorskip('lm_eval')
    for name in 'HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE':
        monkeypatch.setenv(name, '1')
    questions = []
    for i in range(12):
        words = WORDS[i:i + 1 + i % 5]
        questions.append({'question': ' '.join(words), 'answer': i % 3})
    (tmp_path / 'questions.jsonl').write_text('\n'.join(map(json.dumps, questions)))
    for name, body in ('choose', CHOOSE), ('write', WRITE):
        (tmp_path / f'{name}.yaml').write_text(
            f'task: {name}\n{body}dataset_path: json\ntest_split: test\ndataset_kwargs:\n'
            f'  data_files: {{test: {tmp_path}/questions.jsonl}}\n  cache_dir: {tmp_path}/cache\n')
    tasks = f'{tmp_path}/choose.yaml,{tmp_path}/write.yaml'
    study.tasks.main([tasks, '--run', str(smoke[0]), '--out', str(tmp_path)])
    rows = json.loads((tmp_path / 'tasks.json').read_text())['rows']
    of_top_k, of_ada_k, _, written = rows

    model, ada_k = model_and_policy(smoke[0])
    tokenizer = Tokenizer(smoke[0] / 'base')
    for row, policy in (of_top_k, TopK(4)), (of_ada_k, ada_k):
        hits = 0
        texts = set()
        for q in questions:
            first = len(tokenizer.encode(q['question']))
            scores = []
            for choice in 'def', 'the', 'x':
                ids = tokenizer.encode(f'{q["question"]} {choice}')
                logp = model(torch.tensor([ids[:-1]]), policy)[0].log_softmax(-1)       # (T,V)
                said = logp[range(first - 1, len(ids) - 1), ids[first:]]
                scores.append(said.sum())
                texts.add(tuple(ids[:-1]))
            hits += scores.index(max(scores)) == q['answer']
        counted = Counted(policy, model)
        for ids in texts:                                      # the harness runs equal texts once
            model.hidden(torch.tensor([ids]), counted)
        assert row['value'] == pytest.approx(hits / 12)
        assert row['mean_k'] == pytest.approx(counted.mean(), rel=1e-6)    # padding is not counted
    assert 1 <= written['mean_k'] <= 8
