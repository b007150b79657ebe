"""study/policies.py: allocators learnt without RL, for comparison with PPO, and policies by name.

Every token runs all its choices of k at once, weighted by their probabilities, so the loss can be
differentiated by them. After training the most probable k is taken, as after PPO.
"""
from pathlib import Path

import torch

import ppo
from allocator import Skip, TopK
from base.frozen import base_folder
from hub.checkpoint import base_digest
from hub.config import read_config
from hub.files import InputError
from run.state import trained_policy
from train import settings_of

DECISIVE = 3e-4         # price of entropy at the end, nats: a mixture must become a choice


class SoftMixture(TopK):
    """Every token runs k_max experts, and its output is the mean over k of what k experts would give.

    y = sum_k pi_k y_k with pi from the allocators. One object for one pass; after it `steps` holds pi
    (P,k_max) of every layer. For training only: it costs what k_max experts cost.
    """

    def __init__(self, allocators):
        super().__init__(allocators.k_max)
        self.allocators = allocators
        self.steps = []

    def __call__(self, layer, x, probs):
        z = self.allocators.inputs(layer, x, probs)
        logits = self.allocators.logits(layer, z)
        self.steps.append(logits.softmax(-1))
        return super().__call__(layer, x, probs)

    def select(self, probs, k, how):
        """As moe_dispatch.py:select, in the mean over k: expert j runs where k >= j, is left where k < j."""
        weights = 0
        left = 0
        for n, pi in enumerate(self.steps[-1].T[..., None], 1):             # (P,1) each
            ids, of_n, left_by_n = super().select(probs, torch.full_like(k, n), how)
            weights += pi * of_n
            left += pi * left_by_n
        return ids, weights, left


def soft_step(s, step, model, allocators, optimizer, batch, noise, price, entropy):
    """One step of the comparison without RL: PPO's objective, learnt through `SoftMixture` -> its statistics.

    In the place of train.py:ppo_step, with its arguments; noise and entropy are of no use here.
    """
    inputs, _, _ = batch                                                    # (B,T)
    mixture = SoftMixture(allocators)
    teacher = model(inputs, TopK(allocators.k_max))                         # (B,T,V)
    change = model(inputs, mixture) - teacher
    reward = ppo.expected_gain(change, teacher).mean()
    pi = torch.stack(mixture.steps)                                         # (L,P,A)
    k = torch.arange(1.0, allocators.k_max + 1, device=s.device)            # (A,)
    mean_k = (pi @ k).mean()
    spread = torch.special.entr(pi).sum(-1).mean()
    decisive = DECISIVE * min(1, 2 * step / s.ppo_steps)
    of_layer = price * mean_k + decisive * spread
    loss = len(pi) * of_layer - reward
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    argmax_k = (1 + pi.argmax(-1)).float().mean()
    return {'loss': loss.item(), 'argmax_k': argmax_k.item()}


# ================================================================ policies by name

def policy_flags(p):
    """Add the flags that name a policy."""
    p.add_argument('--run', default='', help='a run of train.py: its base and its allocators')
    p.add_argument('--policy', help='ada-k, top-k, k=2, skip=0.5 (default: ada-k with --run, else top-k)')


def open_policy(a):
    """(Settings, folder of the base, its Config, policy) that a program's flags name.

    Opens their device and meets the other ranks (train.py:settings_of); sets a.policy.
    """
    if not a.run and not a.ckpt:
        raise InputError('give --ckpt NAME_OR_FOLDER, --run FOLDER, or both')
    a.policy = a.policy or ('ada-k' if a.run else 'top-k')
    s = settings_of(a)
    folder = base_folder(s, Path(a.run))
    config = read_config(folder)
    if a.policy == 'ada-k' and a.run:
        policy = trained_policy(a.run, config, base_digest(folder))
    else:
        policy = rule(a.policy, config)
    return s, folder, config, policy


def rule(name, config):
    """The policy without training that `--policy` names; InputError if it is none."""
    if name == 'top-k':
        name = f'k={config.top_k}'
    kind, _, knob = name.partition('=')
    try:
        if kind == 'k' and 1 <= int(knob) <= config.n_experts:
            return TopK(int(knob))
        if kind == 'skip' and float(knob) >= 0:
            return Skip(float(knob), config.top_k)
    except ValueError:                                         # a knob that is no number
        pass
    raise InputError(f'--policy {name}: use ada-k with --run, or top-k, k=1..{config.n_experts}, skip=BETA')
