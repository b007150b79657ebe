"""study/study.py: one frozen base and everything measured on it.

A study keeps one file per row and one per set of trained allocators in a folder of its own, so that a second
start goes on where the first one stopped. The folder belongs to one base model, one text and one recipe.
"""
import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from allocator import Allocators
from base.frozen import base_folder, base_model
from base.text import Text
from hub.checkpoint import fingerprint
from hub.files import InputError, read_object, write_json
from hub.safetensors import read_safetensors, write_safetensors
from hub.tokenizer import Tokenizer
from model import Transformer
from moe_dispatch import flops
from run.console import OneLineParser, model_flags, open_model_flags, open_out
from run.evaluate import calibrate, clustered_error, evaluate
from run.ranks import check_ranks, gathered
from run.rules import SkipFamilies
from run.start import new_allocators
from study.policies import train_soft
from train import PRESETS, PRICE_RATE, Settings, check_budget, settings_of, train_ppo

BUDGETS = 0.9, 0.75, 0.6, 0.5
SOFT_STEPS = 200        # of learning without RL
# settings that may differ between two starts of a study
FREE = 'out', 'fresh', 'budget', 'lam', 'seed', 'device', 'ckpt', 'stream'


@dataclass
class Study:
    """A base, its text in three splits, and the folder of what has been measured."""
    s: Settings
    model: Transformer
    tokenizer: Tokenizer
    text: Text                      # to train allocators on
    calibration: Text
    heldout: Text
    folder: Path
    quick: bool = False             # few steps, for tests

    def __post_init__(self):
        self.dial = self.text.windows(self.s.seq, self.s.calibration_tokens)
        self.windows = self.heldout.windows(self.s.seq, self.s.heldout_tokens)
        self.families = SkipFamilies(self.model, self.calibration, self.s.seq)
        self.K, self.L = self.model.config.top_k, len(self.model.config.moe_layers)

    def measured(self, name, policy_of):
        """(loss (n,), counts (L,k_max+1)) of policy_of() on the held-out windows, from the folder or now."""
        path = self.folder / f'{plain(name)}.row'
        if there(path):
            tensors = self.read_row(path)
        else:
            torch.manual_seed(self.s.seed)                     # for the policies that draw
            loss, tally = evaluate(self.model, self.windows, policy_of())
            tensors = {'loss': loss.float(), 'counts': tally.counts.cpu()}
            write_safetensors(path, tensors)
            print(f'{name}: {loss.mean():.4f} nats at mean k {tally.mean():.3f}', flush=True)
        return tensors['loss'].double(), tensors['counts']

    def read_row(self, path):
        """{'loss', 'counts'} of a file that `measured` wrote; InputError if it is damaged."""
        tensors, _ = read_safetensors(path)
        loss, counts = (tensors.get(name, torch.zeros(0)) for name in ('loss', 'counts'))
        sound = loss.shape == self.windows[1].flatten().shape and loss.isfinite().all()
        if not sound or counts.dim() != 2 or len(counts) != self.L or counts.sum() != self.L * len(loss):
            raise InputError(f'{path}: damaged, or of other text; delete it to measure it again')
        return tensors

    def calibrated(self, policy_of, budget, low, high):
        """A function that makes policy_of(knob) with mean k = budget * K on many training documents."""
        def policy():
            target = budget * self.K
            return policy_of(calibrate(self.model, self.dial, policy_of, target, low, high))
        return policy

    def allocators(self, kind, budget, seed, prepare=None, **changes):
        """Trained allocators from the folder, or trained now: kind 'ada-k', 'no-rl', 'p-warm' or another.

        `changes` are to the run's Settings; prepare(allocators) may change the start.
        """
        path = self.folder / f'{plain(kind)}-{budget}-seed{seed}.safetensors'
        if not there(path):
            s = replace(self.s, **{'budget': budget, 'seed': seed, 'lam': None, **changes})
            print(f'training {path.stem}', flush=True)
            allocators, price = new_allocators(s, self.model, self.text, self.families)
            if prepare:
                prepare(allocators)
            if kind == 'no-rl':
                steps = 12 if self.quick else SOFT_STEPS
                train_soft(s, self.model, allocators, self.text, steps, price, PRICE_RATE)
            elif kind != 'p-warm':
                train_ppo(s, self.model, allocators, price, self.text, [])
            allocators.save(path)
            gathered('saved')
        return Allocators.load(path, self.model.config).to(self.s.device)

    def row(self, measurements, reference, params=0):
        """The mean over seeds of [(loss, counts), ..], its difference to Top-K's loss, and a standard error.

        The error has two parts: tokens of one document are dependent (clustered), and seeds differ. params:
        the allocator weights that the FLOPs count.
        """
        c = self.model.config
        losses = torch.stack([loss for loss, _ in measurements]).numpy()    # (seeds,n)
        counts = sum(counts / counts.sum() for _, counts in measurements) / len(measurements)
        mean_k = (counts.sum(0) * torch.arange(counts.shape[1])).sum().item()
        delta = losses - reference.numpy()
        seed_std = float(delta.mean(1).std(ddof=1)) if len(losses) > 1 else 0.0
        of_text = clustered_error(delta.mean(0), self.windows[2].flatten())
        topk, cost = flops(c, c.top_k, self.s.seq), flops(c, mean_k, self.s.seq, params)
        return {'seeds': len(losses), 'delta': delta.mean(), 'seed_std': seed_std,
                'delta_se': math.hypot(of_text, seed_std / len(losses) ** 0.5), 'mean_k': mean_k,
                'expert_flops': cost['experts'] / topk['experts'],
                'total_flops': cost['total'] / topk['total']}


def plain(name):
    """A file name of letters, digits, dots, dashes. Example: 'price 2e-3, 1/4' -> 'price-2e-3-1-4'."""
    return re.sub(r'[^a-z0-9.]+', '-', name.lower())


def there(path):
    """Is the file there? Rank 0's answer for all ranks, which must then do the same."""
    return gathered(path.exists())[0]


def parse(argv, doc):
    """The command line that studies share; joins the ranks."""
    p = OneLineParser(doc)
    p.add_argument('run', nargs='?', default='', help='folder of a finished run of train.py')
    model_flags(p)
    p.add_argument('--out', help='where the study goes without a RUN (default out/NAME)')
    p.add_argument('--quick', action='store_true', help='few rows and steps, for tests')
    a = p.parse_args(argv)
    if not a.run and not a.ckpt:
        raise InputError('give the folder of a run, or --ckpt NAME_OR_FOLDER')
    open_model_flags(a)
    return a


def open_study(a, name):
    """The Study called `name` of a.run or a.ckpt."""
    s = settings_of(a, **PRESETS['smoke' if a.quick else 'deep'])
    return study_at(s, Path(a.run or open_out(a.out or f'out/{Path(a.ckpt).name}')), name, a.quick)


def study_at(s, out, name, quick=False):
    """The Study called `name` in the folder `out`, its base learnt if need be.

    InputError says in what it differs from the study that is there already.
    """
    model, tokenizer, texts = base_model(s, out)
    check_budget(replace(s, budget=min(BUDGETS), lam=None), model.config.top_k)
    check_ranks(s)
    study, kept = Study(s, model, tokenizer, *texts, open_out(out / name), quick), out / name / 'study.json'
    if not kept.exists() and any(study.folder.iterdir()):
        raise InputError(f'{study.folder} holds files that no study made: move them away')
    facts = {'base': fingerprint(base_folder(s, out)), 'text': [len(t.tokens) for t in texts],
             **{field: value for field, value in asdict(s).items() if field not in FREE}}
    check_facts(kept, facts)
    write_json(kept, facts)
    return study


def check_facts(kept, facts):
    """InputError that says in what the study whose facts are kept differs from these, if there is one."""
    for fact, value in (read_object(kept) if kept.exists() else {}).items():
        if facts.get(fact) != value:
            raise InputError(f'{kept.parent} was measured with another {fact}: move it away to measure again')
