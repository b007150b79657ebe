"""study/tasks.py: tasks of EleutherAI's lm-evaluation-harness under Top-K and, beside it, a run's allocators.

    python -m study.tasks arc_challenge,hellaswag --ckpt mixtral-8x7b --run out/mixtral-8x7b --device auto
    python -m study.tasks my_task.yaml --run out/deep --limit 100

Needs `pip install lm-eval transformers accelerate`. The model is transformers', read and scored by the
harness; Top-K is the model as it is, the other policy is attached to it (hub/plug.py).
"""
import functools
import os
from pathlib import Path

import torch

from allocator import AdaK
from hub.checkpoint import find_checkpoint
from hub.config import read_config
from hub.files import InputError, checked, write_json
from hub.plug import attach, detach
from moe_dispatch import flops
from run.console import OneLineParser, one_line_errors, open_out
from run.report import markdown
from study.policies import POLICIES, make_policy


def open_model(a, folder):
    """The harness's own model over a checkpoint folder; InputError where a package or device is missing."""
    os.environ.update(LOGLEVEL='ERROR', TRANSFORMERS_VERBOSITY='error', DISABLE_MULTIPROC='1')     # no forks
    try:
        import tqdm
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoModelForCausalLM, AutoTokenizer
        tqdm.tqdm.__init__ = functools.partialmethod(tqdm.tqdm.__init__, disable=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype='auto', device_map=a.device, experts_implementation='grouped_mm')
        return HFLM(model.eval(), tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=a.batch)
    except Exception as e:                                     # of many kinds, from three packages
        raise InputError(f'tasks: {" ".join(str(e).split())[:300]}; '
                         f'it needs: pip install lm-eval transformers accelerate') from None


class Lengths:
    """Looks at every pass: the mean length of a token's sequence, and padding behind texts.

    The harness pads behind its texts with zeros and has no mask that says so: a text that itself ends in
    token 0 counts as shorter. Its padding in front, to generate, is in the mask.
    """

    def __init__(self, tally):
        self.tally, self.tokens, self.total = tally, 0, 0

    def see(self, model, args, kwargs):
        ids, mask = kwargs.get('input_ids', args[0] if args else None), kwargs.get('attention_mask')   # (B,T)
        if mask is None:
            self.tally.real = ids.flip(1).cumsum(1).flip(1).flatten() > 0   # is there a token from here on?
        real = self.tally.real.view(ids.shape).sum(1)                       # (B,)
        self.tokens += real.sum().item()
        self.total += (real * (real if mask is None else mask.sum(1))).sum().item()


def run_task(a, lm, name, policy, c):
    """[one dict per metric] of a task or group under a policy; None: the model as it is."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    ran = {'mean_k': c.top_k, 'expert_flops': 1.0, 'total_flops': 1.0}
    if policy:
        lengths = Lengths(tally := attach(lm.model, policy))
        tally.handles.append(lm.model.register_forward_pre_hook(lengths.see, with_kwargs=True))
    try:
        manager = TaskManager(include_defaults=not name.endswith('.yaml'))             # 14,000 files
        results = simple_evaluate(lm, tasks=[name], num_fewshot=a.shots, limit=a.limit, task_manager=manager,
                                  log_samples=False, bootstrap_iters=1000)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:                         # no network, a broken .yaml, a package that the task wants
        raise InputError(f'tasks {name}: {type(e).__name__}: {" ".join(str(e).split())[:300]}') from None
    finally:
        if policy:
            detach(lm.model)
    if policy:
        params = policy.allocators.weight.numel() if isinstance(policy, AdaK) else 0
        T = lengths.total / lengths.tokens
        cost, topk = flops(c, tally.mean(), T, params), flops(c, c.top_k, T)
        ran = {'mean_k': tally.mean(), 'expert_flops': cost['experts'] / topk['experts'],
               'total_flops': cost['total'] / topk['total']}
    rows = []
    for task, metrics in results['results'].items():
        for key, value in metrics.items():
            metric, _, kept = key.partition(',')               # 'acc,none': accuracy, every answer as it came
            if kept and not metric.endswith('_stderr'):
                stderr = metrics.get(f'{metric}_stderr,{kept}')
                rows.append({'unit': name, 'task': task, 'shots': results['n-shot'].get(task), **ran,
                             'metric': metric if kept == 'none' else f'{metric} ({kept})', 'value': value,
                             'stderr': stderr if isinstance(stderr, float) else None})
    return rows


def task_lines(rows, policies):
    """The table: one line per task and metric, policies side by side; FLOPs are those of the last."""
    cases, lines = {}, []
    for r in rows:
        cases.setdefault((r['unit'], r['task'], r['metric']), []).append(r)
    for (_, task, metric), side in cases.items():
        shown = [f'{r["value"]:.4f}' + (f' ± {r["stderr"]:.4f}' if r['stderr'] else '') for r in side]
        last = [f'{side[-1][name]:.3f}' for name in ('expert_flops', 'total_flops')]
        shown += [f'{r["mean_k"]:.3f}' for r in side]
        lines.append([task, str(side[0]['shots']), metric, *shown, *last])
    head = ['task', 'shots', 'metric', *policies, *(f'mean k, {name}' for name in policies)]
    return markdown([*head, 'expert FLOPs', 'total FLOPs'], lines)


def main(argv=None):
    p = OneLineParser(__doc__)
    p.add_argument('tasks', metavar='NAME[,NAME]', help='tasks or groups of the harness, or .yaml files')
    p.add_argument('--run', default='', help='a run of train.py: its base and its allocators')
    p.add_argument('--ckpt', help='the base model: folder or short name (default: RUN/base)')
    p.add_argument('--policy', help=f'{POLICIES} (default: ada-k with --run, else top-k)')
    p.add_argument('--device', default='cpu', help='cpu, cuda, .. or auto: over all GPUs (default cpu)')
    p.add_argument('--batch', type=int, default=1, help='texts of a pass (default 1)')
    p.add_argument('--limit', type=int, help='the first so many examples of each task')
    p.add_argument('--shots', type=int, help='examples in the prompt (default: as the task says)')
    p.add_argument('--out', help='folder of tasks.json (default: RUN, or out/NAME)')
    a = p.parse_args(argv)
    for name, least in (('limit', 1), ('shots', 0), ('batch', 1)):
        checked(vars(a), name, 'tasks', int, None, least)
    if not a.run and not a.ckpt:
        raise InputError('give --ckpt NAME_OR_FOLDER, --run FOLDER, or both')
    folder = find_checkpoint(a.ckpt) if a.ckpt else Path(a.run) / 'base'
    c, chosen = read_config(folder), a.policy or ('ada-k' if a.run else 'top-k')
    policies = {'top-k': None, chosen: make_policy(chosen, c, a.run, 'cpu') if chosen != 'top-k' else None}
    out = open_out(a.out or a.run or f'out/{Path(a.ckpt).name}', 'tasks.json')
    lm, rows = open_model(a, folder), []
    for name in dict.fromkeys(a.tasks.split(',')):
        for which, policy in policies.items():
            rows += [{'policy': which, **row} for row in run_task(a, lm, name, policy, c)]
        write_json(out / 'tasks.json', {'torch': torch.__version__, 'ckpt': str(folder), 'run': a.run,
                                        'limit': a.limit, 'K': c.top_k, 'rows': rows})
    print(task_lines(rows, policies))
    print(f'wrote tasks.json in {out}')


if __name__ == '__main__':
    one_line_errors('study.tasks', main)
