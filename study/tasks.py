"""study/tasks.py: tasks of EleutherAI's lm-evaluation-harness under top-k and, beside it, a run's allocators.

    python -m study.tasks arc_challenge,hellaswag --ckpt mixtral-8x7b --run out/mixtral-8x7b --device auto
    python -m study.tasks my_task.yaml --run out/deep --limit 100

Needs `pip install lm-eval transformers accelerate`. The model is transformers', read and scored by the
harness; top-k is the model as it is, the other policy is attached to it (hub/plug.py).
"""
import os
from numbers import Real

from hub.files import InputError, write_json
from hub.plug import attach, detach
from run.console import OneLineParser, one_line_errors, open_out
from run.report import markdown
from study.policies import open_policy, policy_flags


def open_model(folder, device_map):
    """The harness's own model over a checkpoint folder; InputError where a package or device is missing."""
    os.environ.update(
        LOGLEVEL='ERROR',
        TRANSFORMERS_VERBOSITY='error',
        DISABLE_MULTIPROC='1',                                 # no forks
    )
    try:
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype='auto',
            device_map=device_map,
            experts_implementation='grouped_mm',
        )
        return HFLM(model, batch_size=1)                       # with its tokenizer; no padding to be counted
    except Exception as e:                                     # of many kinds, from three packages
        raise InputError(f'tasks: {plain(e)}; '
                         f'it needs: pip install lm-eval transformers accelerate') from None


def run_task(a, lm, name):
    """What the harness returns for a task or group, under what is in the model."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        return simple_evaluate(
            lm,
            tasks=[name],
            num_fewshot=a.shots,
            limit=a.limit,
            task_manager=TaskManager(include_defaults=not name.endswith('.yaml')),     # 14,000 files
            log_samples=False,
            bootstrap_iters=1000,
        )
    except Exception as e:                         # no network, a broken .yaml, a package that the task wants
        raise InputError(f'tasks {name}: {plain(e)}') from None


def metric_rows(results, policy, mean_k):
    """Yield one dict per metric of what the harness returns; a metric's name is the harness's: 'acc,none'."""
    for task, metrics in results['results'].items():
        for metric, value in metrics.items():
            if ',' in metric and '_stderr,' not in metric:
                stderr = metrics.get(metric.replace(',', '_stderr,'), '')
                yield {
                    'task': task,
                    'shots': results['n-shot'].get(task),
                    'metric': metric,
                    'policy': policy,
                    'value': plain(value),
                    'stderr': plain(stderr),
                    'mean_k': mean_k,
                }


def plain(value):
    """A number as one that JSON knows, anything else as one line of text."""
    return float(value) if isinstance(value, Real) else ' '.join(str(value).split())[:300]


def task_table(rows):
    """One line per task, metric and policy."""
    lines = []
    for row in rows:
        lines.append([f'{cell:.4f}' if isinstance(cell, float) else str(cell) for cell in row.values()])
    return markdown(rows[0], lines)


def main(argv):
    p = OneLineParser(__doc__)
    p.add_argument('tasks', metavar='NAME[,NAME]', help='tasks or groups of the harness, or .yaml files')
    policy_flags(p)
    p.add_argument('--ckpt', help='the base model: folder or short name (default: RUN/base)')
    p.add_argument('--device', dest='device_map', default='cpu', help='cpu, cuda, auto (default cpu)')
    p.add_argument('--limit', type=int, help='the first so many examples of each task')
    p.add_argument('--shots', type=int, help='examples in the prompt (default: as the task says)')
    p.add_argument('--out', default='out/tasks', help='folder of tasks.json (default out/tasks)')
    p.set_defaults(device='cpu', stream=False)                 # of the allocators until they are attached
    a = p.parse_args(argv)
    _, folder, config, policy = open_policy(a)
    out = open_out(a.out, 'tasks.json')
    lm = open_model(folder, a.device_map)
    rows = []
    for name in a.tasks.split(','):
        rows += metric_rows(run_task(a, lm, name), 'top-k', config.top_k)
        if a.policy != 'top-k':
            tally = attach(lm.model, policy)
            rows += metric_rows(run_task(a, lm, name), a.policy, tally.mean())
            detach(lm.model)
        write_json(out / 'tasks.json', {
            'flags': vars(a),
            'rows': rows,
        })
    print(task_table(rows))
    print(f'wrote {out}')


if __name__ == '__main__':
    one_line_errors('study.tasks', main)
