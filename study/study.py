"""study/study.py: one frozen base and everything measured on it.

A study keeps one file per row and one per set of trained allocators in a folder of its own, so that a second
start goes on where the first one stopped. The folder belongs to one base model, one text and one recipe.
"""
from dataclasses import replace
from pathlib import Path

import torch

from allocator import Allocators, TopK
from base.frozen import base_model
from hub.files import InputError, read_json, write_json
from hub.safetensors import read_safetensors, write_safetensors
from run import standins
from run.console import OneLineParser, model_flags, open_out
from run.evaluate import calibrate, clustered_error, evaluate
from run.ranks import gathered
from run.start import new_allocators, prepare
from study.policies import soft_step
from train import PAPER, ppo_step, settings_of, train_ppo

BUDGET = 0.75           # where one budget is enough
DEAREST = 100           # price in nats at which Ada-K runs 1 expert; at its negative, all that it may
PUBLISHED = {**PAPER, 'paper': True, 'price': None}      # the price that meets a budget
SOFT = {'paper': False, 'ppo_lr': 3e-2, 'weight_decay': 1e-2}           # learnt without RL
# settings that may differ between two starts of a study
FREE = 'out preset budget price seed device ckpt stream save_every'.split()


class Study:
    """A base, its text, and the folder OUT/NAME of what has been measured on it.

    s: the Settings of the run in OUT, whose base is learnt if need be. InputError says in what they differ
    from those of the study that is there already.
    """

    def __init__(self, s, folder):
        self.s = s
        there = [path.name for path in folder.glob('*')]
        self.folder = open_out(folder, *there)
        self.model, self.tokenizer, texts, self.digest = base_model(s, folder.parent)
        self.text, heldout = texts
        self.windows = heldout.windows(s.heldout_tokens)     # rows are of these
        self.fitted, self.families = prepare(s, self.model, self.text)
        facts = {
            'base': self.digest,
            'text': [len(text.tokens) for text in texts],
            **vars(s),
        }
        path = folder / 'study.json'
        old = read_json(path, facts)
        for fact, value in facts.items():
            if fact not in FREE and old.get(fact) != value:
                raise InputError(f'{self.folder} was measured with another {fact}: move it away')
        write_json(path, facts)
        self.of_topk = 0                                       # so that top-k's own loss is measured
        self.of_topk, _ = self.measured('top-k', lambda: TopK(self.families.K))      # (n,)

    def measured(self, name, policy_of):
        """(loss minus top-k's (n,) float64, counts (L,k_max+1)) of policy_of() on held-out text.

        From the folder, or measured now, with stand-ins fitted for this policy; before and afterwards the
        model runs with those of the start.
        """
        path = self.folder / f'{name}.row'
        if not path.exists():
            policy = policy_of()
            if name != 'top-k':                                # which drops nothing
                standins.refit(self.s, self.model, self.text, policy)
            torch.manual_seed(self.s.seed)                     # for the policies that draw
            [(loss, tally)] = evaluate(self.model, self.windows, [policy])
            standins.use(self.model, self.fitted)
            print(f'{name}: {loss.mean():.4f} nats at mean k {tally.mean():.3f}')
            write_safetensors(path, {
                'loss': loss.float(),
                'counts': tally.counts,
            })
            gathered('written')                                # by rank 0
        tensors, _ = read_safetensors(path)
        return tensors['loss'].double().numpy() - self.of_topk, tensors['counts']

    def target(self, budget):
        """The mean k of a budget."""
        return standins.target_k(replace(self.s, budget=budget), self.model.config)

    def ada_k(self, kind, dialled_to, **changes):
        """Ada-K dialled to a budget, by allocators from the folder or trained now.

        kind: its name in the folder; 'soft' is learnt without RL. changes: to the run's Settings, among them
        the budget that it is trained for.
        """
        s = replace(self.s, **changes)
        path = self.folder / f'{kind}-{s.budget}-seed{s.seed}.safetensors'
        if not path.exists():
            print(f'training {path.stem}')
            allocators, price = new_allocators(s, self.model, self.text, self.families)
            one_step = soft_step if kind == 'soft' else ppo_step
            train_ppo(s, self.model, allocators, price, self.text, one_step=one_step)
            allocators.save(path, self.digest)
            gathered('written')
        allocators = Allocators.load(path, self.model.config, self.digest)
        most = 5 if dialled_to == s.budget else DEAREST        # dialled far, it may need all
        return calibrate(self.model, self.families.windows, allocators.at_price,
                         self.target(dialled_to), most, -most)

    def row(self, delta, counts):
        """A row of what was `measured`: one seed, and the error of the text alone."""
        counts = counts.sum(0)                                              # (k_max+1,)
        mean_k = counts @ torch.arange(len(counts)) / counts.sum()
        return {
            'delta': delta.mean(),
            'delta_se': self.error(delta),
            'mean_k': mean_k.item(),
        }

    def error(self, delta):
        """The standard error of the mean of delta (n,), of held-out text."""
        return clustered_error(delta, self.windows[2])


def thousandths(row, value='delta', error='delta_se'):
    """Nats of a row and their standard error, as text in thousandths; '' where it has none."""
    return f'{1000 * row[value]:+.1f} ± {1000 * row[error]:.1f}' if value in row else ''


# ================================================================ command line

def parser(doc):
    """The command line that studies share."""
    p = OneLineParser(doc)
    p.add_argument('run', help='folder of a finished run of train.py')
    model_flags(p)
    return p


def open_study(a, name, **changes):
    """The Study called `name` of a.run, with changes to its Settings; joins the ranks.

    No price is fixed: it follows from a budget.
    """
    return Study(replace(settings_of(a), price=None, **changes), Path(a.run) / name)
