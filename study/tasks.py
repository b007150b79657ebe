"""study/tasks.py: tasks of EleutherAI's lm-evaluation-harness under Top-K and, beside it, a run's allocators.

    python -m study.tasks arc_challenge,hellaswag --ckpt mixtral-8x7b --run out/mixtral-8x7b
    python -m study.tasks my_task.yaml --run out/deep --limit 100

Needs `pip install lm-eval`. Everything goes to tasks.json in the run folder, written again after every task.
"""
import contextlib
import difflib
import functools
import io
import logging
import os
import random
import time
from pathlib import Path

import numpy as np
import torch

from allocator import AdaK
from base.frozen import load_model
from hub.files import InputError, write_json
from moe_dispatch import flops
from run.console import Progress, one_line_errors, open_out
from run.report import markdown
from study.policies import make_policy
from study.sample import opened, parser
from study.scores import Tally, score, write_until


class Answers:
    """What lm-eval asks of a model: requests with texts as `args` in, an answer each out. One per policy.

    Texts become tokens as with the harness's own models, so that numbers compare: a bos in front where the
    family's tokenizer puts one (Qwen's does not, though config.json names one), and bos, or else eos, for an
    empty context.
    """

    def __init__(self, model, tokenizer, policy, stage, seed=0):
        super().__init__()
        self.model, self.tokenizer, self.stage, self.max_len = model, tokenizer, stage, model.config.max_len
        self.tally = Tally(policy, len(model.config.moe_layers), model.device)
        self.generator = torch.Generator(model.device).manual_seed(seed)
        self.first = tokenizer.front
        self.empty = (self.first or [i for i in (tokenizer.eos,) if i is not None])[:1]
        if not self.empty:
            raise InputError('tasks: config.json names neither bos nor eos, and an empty context needs one')

    def pair(self, context, continuation):
        """(context ids, continuation ids): one text, cut behind the context; spaces go to what follows."""
        text, stem = self.tokenizer.encode(context + continuation), self.tokenizer.encode(context.rstrip())
        if not stem:
            return self.empty, text
        # a token across the cut is the continuation's
        ids, n = self.first + text, len(self.first) + min(len(stem), len(text) - 1)
        return ids[:n] or self.empty, ids[n:]

    def loglikelihood(self, requests):
        return score(self.model, [self.pair(*r.args) for r in requests], self.tally, stage=self.stage)

    def loglikelihood_rolling(self, requests):
        """log p of whole texts, in windows of max_len: every token predicted once, the last window full."""
        pairs, owner, logp = [], [], [0.0] * len(requests)
        for i, r in enumerate(requests):
            ids = self.empty + self.tokenizer.encode(r.args[0])
            for at in range(1, len(ids), self.max_len):
                pairs.append((ids[max(0, at - self.max_len):at], ids[at:at + self.max_len]))
                owner.append(i)
        for i, (nats, _) in zip(owner, score(self.model, pairs, self.tally, stage=self.stage)):
            logp[i] += nats
        return logp

    def generate_until(self, requests, batch=8192):
        groups = {}                                            # prompts of one length need no padding
        for i, r in enumerate(requests):
            context, how = r.args
            n, temperature, stops = self.ways(how)
            ids = (self.first + self.tokenizer.encode(context) or self.empty)[n - self.max_len:]
            groups.setdefault((len(ids), n, temperature), []).append((i, ids, stops))
        texts, done, progress = [''] * len(requests), 0, Progress(self.stage, len(requests))
        for (T, n, temperature), group in groups.items():
            size = max(1, batch // (T + n))
            for at in range(0, len(group), size):
                where, prompts, stops = zip(*group[at:at + size])
                written = write_until(self.model, self.tokenizer, prompts, stops, n, temperature, self.tally,
                                      self.generator)
                for i, text in zip(where, written):
                    texts[i] = text
                done += len(prompts)
                progress(done, sum(self.tally.lengths), mean_k=self.tally.mean())
        return texts

    def ways(self, how):
        """(most new tokens, temperature, stop strings) of a task's generation_kwargs."""
        n = how.get('max_gen_toks', how.get('max_new_tokens', 256))
        temperature = how.get('temperature', 1.0 if how.get('do_sample') else 0.0)
        if how.get('do_sample') is False:
            temperature = 0.0
        if temperature and how.keys() & {'top_p', 'top_k'}:
            raise InputError(f'tasks: {self.stage}: samples with top_p or top_k, which is not supported')
        if n >= self.max_len:
            raise InputError(f'tasks: {self.stage}: {n} new tokens leave no room for a prompt, '
                             f'the model\'s length is {self.max_len}')
        until = how.get('until') or []
        until = [until] if isinstance(until, str) else until
        return n, temperature, [stop for stop in until if stop]


# ================================================================ the harness

def open_harness():
    """The package lm_eval, made quiet; InputError where it is not installed."""
    try:
        import lm_eval.api.model
        import lm_eval.evaluator
        import lm_eval.tasks
        import tqdm
    except ImportError as e:
        raise InputError(f'tasks: {e}; it needs the harness: pip install lm-eval') from None
    os.environ.setdefault('DISABLE_MULTIPROC', '1')            # its bootstrap would fork this process
    tqdm.tqdm.__init__ = functools.partialmethod(tqdm.tqdm.__init__, disable=True)
    for name in ('lm_eval', 'datasets', 'huggingface_hub', 'evaluate'):
        logging.getLogger(name).setLevel(logging.ERROR)
    return lm_eval


def find_tasks(lm_eval, names, shots):
    """{name: what lm_eval's evaluate takes} of tasks, groups, .yaml files; a tag becomes its tasks."""
    own = all(name.endswith('.yaml') for name in names)        # else 14,000 files are read
    manager = lm_eval.tasks.TaskManager(include_defaults=not own)
    for name in names:
        if name not in manager.all_tasks and not Path(name).is_file():
            close = difflib.get_close_matches(name, manager.all_tasks, 1)
            hint = f'; is it {close[0]}?' if close else ''
            raise InputError(f'tasks {name}: no such task, and no such .yaml file{hint}')
    found = {}
    for name in names:
        try:
            loaded = manager.load([name])
            tasks = loaded['tasks']
            for task in tasks.values():
                if shots is not None and task.get_config('num_fewshot') != 0:        # a 0 is part of the task
                    task.set_config('num_fewshot', shots)
                task.build_all_requests(limit=1)               # so that what is wrong is known now
        except Exception as e:                     # no network, a broken .yaml, a package that the task wants
            raise InputError(f'tasks {name}: {type(e).__name__}: {" ".join(str(e).split())[:300]}') from None
        kinds = 'UNSAFE_CODE', 'MULTIMODAL'
        if any(getattr(task, kind, False) for task in tasks.values() for kind in kinds):
            raise InputError(f'tasks {name}: runs code that the model writes, or needs more than text; '
                             f'neither is supported')
        if loaded.get('groups'):
            found[name] = loaded
        else:
            found.update({task: {'tasks': {task: tasks[task]}} for task in tasks})
    return found


def seed_everything(tasks):
    """The harness's own seeds: its prompts, and the same ones for both policies."""
    random.seed(0)
    np.random.seed(1234)
    torch.manual_seed(1234)
    for task in tasks['tasks'].values():
        task.set_fewshot_seed(1234)


def task_rows(results, tally, c):
    """One dict per metric of each task or group of lm_eval's results; mean k and FLOPs of all that ran."""
    T = sum(n * n for n in tally.lengths) / sum(tally.lengths)            # length of a token's sequence, mean
    params = tally.policy.allocators.weight.numel() if isinstance(tally.policy, AdaK) else 0
    cost, topk, rows = flops(c, tally.mean(), T, params), flops(c, c.top_k, T), []
    ran = {'mean_k': tally.mean(), 'mean_length': T, 'expert_flops': cost['experts'] / topk['experts'],
           'total_flops': cost['total'] / topk['total']}
    for task, metrics in results['results'].items():
        about = {'task': task, 'version': results['versions'].get(task), 'shots': results['n-shot'].get(task),
                 'n': metrics['sample_len']}
        for key, value in metrics.items():
            metric, _, kept = key.partition(',')               # 'acc,none': accuracy, every answer as it came
            if not kept or metric.endswith('_stderr'):
                continue
            stderr = metrics.get(f'{metric}_stderr,{kept}')
            rows.append({**about, **ran, 'metric': metric if kept == 'none' else f'{metric} ({kept})',
                         'value': float(value), 'stderr': stderr if isinstance(stderr, float) else None})
    return rows


def task_lines(rows, policies):
    """The table: one line per task and metric, policies side by side; FLOPs are those of the last."""
    def shown(r):
        return f'{r["value"]:.4f}' + (f' ± {r["stderr"]:.4f}' if r['stderr'] is not None else '')
    cases = {}
    for r in rows:
        cases.setdefault((r['unit'], r['task'], r['metric']), []).append(r)
    head = ['task', 'shots', 'n', 'metric', *policies, *(f'mean k, {name}' for name in policies),
            'expert FLOPs', 'total FLOPs']
    lines = []
    for (_, task, metric), side in cases.items():
        last = side[-1]
        lines.append([task, str(last['shots']), str(last['n']), metric, *map(shown, side),
                      *(f'{r["mean_k"]:.3f}' for r in side), f'{last["expert_flops"]:.3f}',
                      f'{last["total_flops"]:.3f}'])
    return markdown(head, lines)


def tasks(a):
    """Run every task under both policies, then print the table."""
    s, folder, tokenizer, c, chosen = opened(a)
    policies = {name: make_policy(name, c, a.run, a.device) for name in dict.fromkeys(['top-k', chosen])}
    lm_eval, out = open_harness(), open_out(a.out or a.run or f'out/{Path(a.ckpt).name}')
    units = find_tasks(lm_eval, list(dict.fromkeys(a.tasks.split(','))), a.shots)
    Model = type('Model', (Answers, lm_eval.api.model.LM), {})
    model, rows = load_model(s, folder), []
    for unit, found in units.items():
        for name, policy in policies.items():
            start, lm = time.time(), Model(model, tokenizer, policy, f'{unit} {name}', a.seed)
            seed_everything(found)
            with contextlib.redirect_stdout(io.StringIO()):    # lm_eval prints
                results = lm_eval.evaluator.evaluate(lm, found, limit=a.limit, bootstrap_iters=1000,
                                                     log_samples=False)
            about = {'unit': unit, 'policy': name, 'seconds': time.time() - start}
            rows += [{**about, **r} for r in task_rows(results, lm.tally, c)]
        write_json(out / 'tasks.json', {
            'lm_eval': lm_eval.__version__, 'torch': torch.__version__, 'ckpt': str(folder), 'run': a.run,
            'limit': a.limit, 'seed': a.seed, 'K': c.top_k, 'rows': rows})
    print(task_lines(rows, policies))
    print(f'lm-eval {lm_eval.__version__}; wrote tasks.json in {out}')


def main(argv=None):
    p = parser(__doc__)
    p.add_argument('tasks', metavar='NAME[,NAME]', help='tasks or groups of the harness, or .yaml files')
    p.add_argument('--limit', type=int, help='the first so many examples of each task')
    p.add_argument('--shots', type=int, help='examples in the prompt (default: as the task says)')
    p.add_argument('--out', help='folder of tasks.json (default: RUN, or out/NAME)')
    a = p.parse_args(argv)
    if (a.limit is not None and a.limit < 1) or (a.shots is not None and a.shots < 0):
        raise InputError('--limit must be 1 or more, --shots 0 or more')
    tasks(a)


if __name__ == '__main__':
    one_line_errors('study.tasks', main)
