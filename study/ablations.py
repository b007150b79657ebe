"""study/ablations.py: one change of the recipe at a time, few PPO steps, one seed ->
RUN/ablations/ablations.json.

    python -m study.ablations out/deep        ten minutes on two cores; a stopped one goes on where it was
"""
import time

from allocator import AdaK, TopK
from hub.files import write_json
from run.console import one_line_errors
from run.report import markdown
from study.policies import Sampled
from study.study import BUDGETS, open_study, parse


def cases(s):
    """[(what is changed, the changes to Settings)]."""
    many = dict(group=1, ppo_batch=s.group * s.ppo_batch)      # as many rollouts, of more texts
    return [
        ('default', {}),
        ('cost as reward instead of loss', dict(cost='reward')),
        ('start: random', dict(start='random')),
        ('start: always K', dict(start='always-k')),
        ('start: P-Warm', dict(start='p-warm')),
        ('start: skipping, one beta', dict(start='one beta')),
        ('start: skipping, per layer', dict(start='per layer')),
        ('start: skipping, greedy', dict(start='greedy')),
        *((f'discount {d:g}', dict(discount=d)) for d in (0, 0.5, 0.8, 0.95, 1) if d != s.discount),
        ('reward of the text\'s own token', dict(reward='sampled')),
        ('baseline: Top-K', many),
        ('baseline: Top-K, reward of the text\'s own token (published)', dict(reward='sampled', **many)),
        ('allocator reads x only, start: P-Warm', dict(extended=False, start='p-warm', ppo_lr=1e-3)),
        ('1 PPO epoch', dict(epochs=1)),
        ('2 PPO epochs', dict(epochs=2))]


def some_layers(share):
    """Allocators in every (1/share)-th layer only: the others always run K, by a bias that never moves."""
    def prepare(allocators):
        for layer in range(len(allocators.bias)):
            if (layer + 1) % round(1 / share):
                allocators.weight.data[layer] = 0
                allocators.bias.data[layer] = 0
                allocators.bias.data[layer, allocators.top_k - 1] = 1000
    return prepare


def ablations(a):
    """Measure what is not there yet, then print the table."""
    start, study = time.time(), open_study(a, 'ablations')
    s, K, steps, budget = study.s, study.K, 6 if a.quick else 60, BUDGETS[1]
    reference, _ = study.measured('top-k', lambda: TopK(K))
    rows = []

    def add(what, allocators, policy):
        measurement = study.measured(what, policy)
        rows.append({'what': what, **study.row([measurement], reference, allocators.weight.numel())})
        write_json(study.folder / 'ablations.json', {'rows': rows, 'steps': steps, 'K': K, 'budget': budget,
                                                     'seconds': time.time() - start})
    for what, changes in cases(s):
        allocators = study.allocators(what, budget, s.seed, ppo_steps=steps, **changes)
        add(what, allocators, study.calibrated(lambda price: AdaK(allocators, price=price), budget, 20, -20))
        if what == 'default':
            add('sampled k at evaluation, no dial', allocators, lambda: Sampled(allocators))
    for share in (1, 1 / 2, 1 / 4, 1 / 8):
        if study.L * share >= 1:
            where = 'all' if share == 1 else f'1/{round(1 / share)} of the'
            what = f'price 2e-3, allocators in {where} layers'
            allocators = study.allocators(what, budget, s.seed, some_layers(share), ppo_steps=steps, lam=2e-3)
            add(what, allocators, lambda: AdaK(allocators, price=0.0))
    print(ablation_table({'rows': rows}))
    print(f'{time.time() - start:.0f} s; wrote ablations.json in {study.folder}')


def ablation_table(results):
    lines = [[r['what'], f'{1000 * r["delta"]:+.1f} ± {1000 * r["delta_se"]:.1f}', f'{r["mean_k"]:.2f}',
              f'{r["expert_flops"]:.2f}'] for r in results['rows']]
    return markdown(['what', 'minus Top-K (10⁻³ nats/token)', 'mean k', 'expert FLOPs'], lines)


def main(argv=None):
    ablations(parse(argv, __doc__))


if __name__ == '__main__':
    one_line_errors('study.ablations', main)
