"""study/exercise.py: write the functions of the method yourself, one at a time.

    python -m study.exercise                          the exercises, in reading order
    python -m study.exercise clipped_loss             a copy of the project without the body of this function
    python -m study.exercise clipped_loss --check     its tests on your copy: passed, or what differs

The copy lies in out/exercise/NAME/ and is made from the code as it is; the three commands do the same there.
"""
import ast
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from hub.files import InputError
from run.console import OneLineParser, one_line_errors

# the project's folder, also from within a copy
ROOT = Path(re.sub('(/out/exercise/[^/]+)?/study/exercise.py$', '', __file__))
COPIES = ROOT / 'out' / 'exercise'


@dataclass
class Exercise:
    """A function to write, and the tests that say whether it is right."""
    where: str              # FILE:FUNCTION or FILE:CLASS.METHOD
    minutes: int            # for a reader who has read the file up to there
    equation: str
    hint: str
    tests: str              # pytest's names of them, a line each
    first: type = ast.stmt  # to be written: the first statement of this kind, and all behind it


EXERCISES = {
    'select': Exercise(
        'moe_dispatch.py:select',
        15,
        'g_n = p_n / (p_1 + .. + p_k) for the k most probable experts, else 0 (eq. 1-3); see its docstring',
        'topk gives ids and weights, the most probable first; `used` says which of them run',
        'tests/test_dispatch.py::test_select_by_hand',
    ),
    'moe_loop': Exercise(
        'moe_dispatch.py:moe_loop',
        10,
        'y = sum over the k experts n of g_n * w_out[n] (silu(gate) * up), [gate; up] = w_in[n] x (eq. 1)',
        'expert by expert: which tokens chose it, what it makes of them, index_add to y in fp32',
        'tests/test_dispatch.py::test_forward_and_backward',
    ),
    'sort_by_expert': Exercise(
        'moe_dispatch.py:sort_by_expert',
        20,
        'the pairs (token, choice) in the order of their experts; row[order[i]] = i leads back',
        'sort the flat ids, N for those not used, stably; searchsorted finds the ends, scatter_ the rows',
        'tests/test_dispatch.py::test_forward_and_backward',
    ),
    'moe_exact': Exercise(
        'moe_dispatch.py:moe_exact',
        10,
        'the y of moe_loop, by two grouped matmuls over exactly sum(k) rows',
        'sort_by_expert, check (it returns sum(k)), experts_grouped, combine; cpu.experts may wait',
        'tests/test_dispatch.py::test_forward_and_backward\n  '
        'tests/test_dispatch.py::test_wrong_plans_are_refused_with_the_value',
    ),
    'mass_labels': Exercise(
        'allocator.py:mass_labels',
        5,
        'k = the least k with p_1 + .. + p_k >= p, probabilities in falling order (eq. 12)',
        '1 + how many of the sums p_1, p_1 + p_2, .. without the last are below p',
        'tests/test_allocator.py::test_top_p_by_hand',
    ),
    'Skip': Exercise(
        'allocator.py:Skip.__call__',
        10,
        'k = the least k with p_{k+1} + .. + p_K <= beta * (p_1 + .. + p_k)',
        'the ratios of tail_ratios fall: count those above beta, which may be a list, one a layer',
        'tests/test_allocator.py::test_skip_by_hand\n  '
        'tests/test_allocator.py::test_skip_for_top_2_is_the_published_rule',
    ),
    'Allocators.logits': Exercise(
        'allocator.py:Allocators.logits',
        5,
        'logits = W z + b; their softmax is the distribution over k (eq. 4)',
        'a matmul and a bias in fp32 that also take all layers at once, layer = slice(None)',
        'tests/test_allocator.py::test_adak_takes_the_argmax_and_the_price_is_a_dial\n  '
        'tests/test_exercise.py::test_ppo_step_goes_down_the_gradient_of_ppo_loss',
    ),
    'sample_k': Exercise(
        'allocator.py:sample_k',
        5,
        'k = the least k with pi(1) + .. + pi(k) > u, u uniform in [0, 1) (eq. 5)',
        'count the sums that do not exceed the noise; rounding may leave the last sum below 1',
        'tests/test_allocator.py::test_rollout_records_what_it_drew',
    ),
    'next_token_logp': Exercise(
        'ppo.py:next_token_logp',
        5,
        'r_t = log p(x_{t+1} | x_1 .. x_t) (eq. 6)',
        'log_softmax in fp32, then gather the targets',
        'tests/test_ppo.py::test_reward_of_a_position_is_the_log_prob_of_the_next_token',
    ),
    'expected_gain': Exercise(
        'ppo.py:expected_gain',
        20,
        '-KL(p_topk || p) = -log E[exp(change - E change)], E under p_topk',
        'clamp before you exponentiate; expm1 and log1p keep the digits of small numbers',
        'tests/test_ppo.py::test_expected_reward_by_enumeration_and_by_drawing\n  '
        'tests/test_ppo.py::test_expected_reward_keeps_its_digits_however_small_the_change\n  '
        'tests/test_ppo.py::test_expected_reward_of_a_plan_that_ruins_the_prediction_is_finite',
    ),
    'group_advantage': Exercise(
        'ppo.py:group_advantage',
        5,
        'A_g = r_g - (the mean of the other G - 1 rewards)',
        'the mean of the others follows from the mean of all: no loop',
        'tests/test_ppo.py::test_group_advantage',
    ),
    'clipped_loss': Exercise(
        'ppo.py:clipped_loss',
        10,
        '-mean min(r A, clip(r, 1 - eps, 1 + eps) A), r = pi(k) / pi_old(k) (eq. 7, 8)',
        'return loss, {approx_kl: the mean of r - 1 - log r, clipfrac: the share of r outside the clip}',
        'tests/test_ppo.py::test_clipped_loss',
    ),
    'expected_k': Exercise(
        'ppo.py:expected_k',
        5,
        'E[k] = sum_n n pi(n) (eq. 10)',
        'a softmax and a dot product',
        'tests/test_ppo.py::test_cost_gradient_is_that_of_the_exact_mean',
    ),
    'ppo_loss': Exercise(
        'ppo.py:ppo_loss',
        15,
        'clipped_loss + price * E[k] - entropy_bonus * entropy, means over layers and tokens (eq. 11)',
        'gather log pi of the k that were drawn; to the stats of clipped_loss add loss, mean_k, entropy',
        'tests/test_ppo.py::test_whole_loss\n  '
        'tests/test_ppo.py::test_first_epoch_has_ratio_1_and_clips_nothing',
    ),
    'ppo_step': Exercise(
        'train.py:ppo_step',
        20,
        's.epochs steps of the optimizer on the mean of ppo_loss over the layers (eq. 7, 8, 10, 11)',
        'return a dict: step, price, and of the last epoch the stats of ppo_loss, argmax_k, reward, adv_std',
        'tests/test_exercise.py::test_ppo_step_goes_down_the_gradient_of_ppo_loss',
        first=ast.For,
    ),
    'your_rule': Exercise(
        'allocator.py:TopP.__call__',
        20,
        'any k(probs, p); python train.py --preset smoke in the copy then has its row, under the name top-p',
        'a rule of your own in place of top-p: k in 1..k_max, on average the more the larger self.p in 0..1',
        'tests/test_exercise.py::test_your_rule_can_be_set_to_a_mean_k',
    ),
}


def blanked(source, exercise):
    """The source of a file, with the hint in place of what is to be written."""
    function = ast.parse(source)
    for name in exercise.where.split(':')[1].split('.'):
        function = next(node for node in function.body if getattr(node, 'name', '') == name)
    body = function.body[ast.get_docstring(function) is not None:]
    start = next(statement for statement in body if isinstance(statement, exercise.first))
    lines = source.splitlines(keepends=True)
    your_turn = f'{" " * start.col_offset}raise NotImplementedError("your turn: {exercise.hint}")\n'
    lines[start.lineno - 1:function.end_lineno] = [your_turn]
    return ''.join(lines)


def make(exercise, folder):
    """Copy the project's own files to `folder`, one function blanked, and say how to go on."""
    if folder.exists():
        raise InputError(f'{folder} is there already and stays as it is: go on there, or move it away')
    new = folder.with_name(f'{folder.name}.new')
    new.mkdir(parents=True, exist_ok=True)
    cache = shutil.ignore_patterns('__pycache__')
    for path in ROOT.glob('[!.]*'):
        if path.is_file():
            shutil.copy(path, new)
        elif any(path.glob('*.py')):                           # not what was trained or downloaded
            shutil.copytree(path, new / path.name, ignore=cache, dirs_exist_ok=True)
    file = exercise.where.split(':')[0]
    (new / file).write_text(blanked((ROOT / file).read_text(), exercise))
    new.rename(folder)                                         # whole, or not there at all
    print(f'{folder.name}, about {exercise.minutes} minutes: {exercise.equation}\n'
          f'open {folder / file} and write what "your turn" asks for\n'
          f'then python -m study.exercise {folder.name} --check')


def check(exercise, folder):
    """Run the tests of an exercise in its copy; exit with status 1 unless they pass."""
    if not folder.exists():
        raise InputError(f'no {folder} yet: python -m study.exercise {folder.name} makes it')
    pytest = f'-m pytest -x -q --tb=short --color=no {exercise.tests}'
    done = subprocess.run([sys.executable, *pytest.split()], cwd=folder, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.splitlines()
    if done.returncode == 0:
        print(f'{folder.name}: {lines[-1]}. Now compare yours with {exercise.where}')
        return
    # where it failed in the project's files, and what pytest says of it
    told = [line[:110] for line in lines if re.match(r'\w[\w/]*\.py:\d+: |E +\S|ERROR', line)]
    print(f'{folder.name}: not yet', *told[:10], sep='\n')
    sys.exit(1)


def main(argv=None):
    p = OneLineParser(__doc__)
    p.add_argument('name', nargs='?', default='', help='an exercise (without it: the list)')
    p.add_argument('--check', action='store_true', help='run its tests on your copy')
    a = p.parse_args(argv)
    if a.name in EXERCISES:
        act = check if a.check else make
        act(EXERCISES[a.name], COPIES / a.name)
    elif a.name or a.check:
        raise InputError(f'no exercise "{a.name}": choose one of {", ".join(EXERCISES)}')
    else:
        for name, exercise in EXERCISES.items():
            print(f'{name}, {exercise.minutes} minutes, {exercise.where}\n'
                  f'  {exercise.equation}\n'
                  f'  {exercise.tests}\n')


if __name__ == '__main__':
    one_line_errors('study.exercise', main)
