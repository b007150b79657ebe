"""train.py: learn a small Mixtral, freeze it, and train Ada-K allocators on it.

    python train.py                          the whole story on the sources of Python's standard library
    python train.py --budget 0.6             a smaller budget: mean k at most 0.6 K
    python train.py --ckpt mixtral-8x7b      allocators for real weights
    python train.py --paper                  the published recipe throughout
    python train.py --ckpt X --stream        two layers' weights on the device, the others in host memory
    torchrun --nproc-per-node 8 train.py --ckpt mixtral-8x22b      each GPU keeps an eighth of the weights
    python train.py --preset smoke           the same path in seconds, for tests

Stages, in order: text -> base model -> start of the allocators -> PPO -> evaluation. They write to `--out`:
    base/                     config.json, model.safetensors, tokenizer.json: transformers opens this folder
    allocator.safetensors     the trained allocators
    log.csv, training.png     every PPO step
    results.json              the table

The default recipe differs from the paper's (`--paper`) where that measured better; the README lists how.
"""
import argparse
import math
import resource
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import ppo
from allocator import AdaK, RandomMix, Rollout, TopK, TopP
from base.frozen import base_folder, base_model
from hub.checkpoint import base_digest
from hub.files import InputError, read_json, reading, write_json
from run.console import (OneLineParser, Progress, check_budget, check_settings, default_device,
                         one_line_errors, open_device)
from run.evaluate import (Probe, bits_per_byte, calibrate, clustered_error, evaluate, flops_shares,
                          rewards)
from run.ranks import average_gradients, averaged, check_ranks, gathered, join, leave, ranks
from run.report import table, training_figure, write_log
from run.rules import SkipFamilies, best_family
from run.start import new_allocators
from run.state import Interrupt, load_state, open_run, save_state
from scale.memory import PASS_TOKENS
from scale.stream import Streamed


# ================================================================ settings

@dataclass
class Settings:
    """Every number of a run: flags first (`parse`), then what only presets, the paper and studies set."""
    preset: str = 'deep'
    out: str = ''
    ckpt: str = ''                  # '': the base is learnt in OUT/base
    data: str = ''                  # '': the standard library's sources
    budget: float = 0.75            # mean k as a share of K
    price: float | None = None      # nats per expert and layer, fixed; None: whatever meets the budget
    paper: bool = False
    seed: int = 0                   # of everything after the base model
    device: str = 'cpu'
    stream: bool = False
    fresh: bool = False
    resume: bool = False
    save_every: int = 50            # PPO steps
    seq: int = 128                  # T
    ppo_steps: int = 300
    ppo_batch: int = 16             # sequences of a rollout, before they are repeated
    discount: float = 0.9           # of later tokens' rewards in a decision's credit
    prose: bool = False
    # text and base model
    documents: int = 10 ** 9        # at most so many
    n_vocab: int = 1024
    n_layers: int = 16
    dim: int = 64
    n_heads: int = 4
    n_experts: int = 8
    top_k: int = 2
    expert_dim: int = 96
    base_steps: int = 1200
    # allocators
    extended: bool = True           # do they see the router's sorted probabilities too?
    start: str = 'skip'             # where PPO starts: see run/start.py
    warm_steps: int = 200           # of the start 'p-warm'
    reward: str = 'expected'        # log p of the next token: 'expected' under top-k, or 'sampled'
    group: int = 4                  # G, rollouts of the same tokens; 1: top-k is the baseline
    ppo_lr: float = 5e-2            # falls linearly to 0; constant with --paper
    epochs: int = 3                 # PPO epochs a rollout
    entropy: float = 5e-4           # bonus, nats of reward per nat of entropy
    weight_decay: float = 0.0
    # evaluation
    heldout_tokens: int = 131072    # the probe of PPO, and the text that knobs are set on, are half as long


PRESETS = {
    # Mixtral in small: top-2 of 8 and many layers
    'deep': {},
    # twice as many experts, half as large, and as many as Qwen1.5-MoE runs
    'fine': dict(n_layers=4, dim=128, n_experts=16, top_k=4),
    # English instead of code: the docstrings and comments of the standard library
    'prose': dict(prose=True, n_layers=4, dim=128, expert_dim=192),
    'smoke': dict(
        documents=60,
        n_vocab=320,
        seq=64,
        n_layers=2,
        dim=32,
        n_heads=2,
        top_k=4,
        expert_dim=16,
        base_steps=20,
        warm_steps=10,
        ppo_steps=12,
        heldout_tokens=8192,
    ),
}
# the published settings; the clip range and mini-batches are not published, so ours stay
PAPER = dict(
    extended=False,
    start='p-warm',
    reward='sampled',
    discount=0.0,
    group=1,
    ppo_lr=1e-3,
    epochs=2,
    entropy=0.0,
    price=3e-3,
    weight_decay=0.1,
)

CLIP = 0.2              # eps of eq. 7, 8
PRICE_RATE = 0.1        # relative change of the price per step and unit of (mean k - target) / K
PROBES = 10             # how often in a run the probe is evaluated


# ================================================================ PPO (eq. 4-11)

def ppo_step(s, step, model, allocators, optimizer, inputs, targets, noise, price):
    """One step of PPO in the order of eq. 4-11; changes `allocators` -> statistics and the next price.

    inputs, targets (B,T): this rank's sequences; noise (L,G*P) uniform in [0,1), P = B*T; price: nats per
    expert.
    """
    # rollout (eq. 4, 5): the tokens G times with sampled k, and once with the model's own K
    rollout = Rollout(allocators, noise)
    with torch.no_grad():
        reward, reward_topk = rollout_reward(s, model, inputs, targets, rollout)    # (G,B,T), (B,T)

    # advantage (eq. 6, 9): credit over time, then against the other rollouts of a token, or against top-k
    credit = ppo.reward_to_go(reward, s.discount).flatten(1)                # (G,P)
    if s.group > 1:
        adv = ppo.group_advantage(credit)
    else:
        credit_topk = ppo.reward_to_go(reward_topk, s.discount).flatten()   # (P,)
        adv = ppo.topk_advantage(credit, credit_topk)
    adv = adv.flatten()                                                     # (G*P,) the same for all layers

    # update (eq. 7, 8, 10, 11): the language model is not run again
    if not s.paper:
        optimizer.param_groups[0]['lr'] = s.ppo_lr * (1 - (step - 1) / s.ppo_steps)
    for _ in range(s.epochs):
        logits = allocators.logits(slice(None), rollout.z)                  # (L,G*P,A)
        loss, stats = ppo.ppo_loss(logits, rollout.k, rollout.logp, adv, price, CLIP, s.entropy)
        stats = averaged(stats)
        if not math.isfinite(stats['loss']):
            raise InputError(f'ppo: the loss is {stats["loss"]} at step {step}: a NaN in the base model?')
        optimizer.zero_grad()
        loss.backward()
        average_gradients(allocators.parameters())
        optimizer.step()

    # price: up while the most probable k are too many experts, down while too few
    argmax_k = (1 + logits.argmax(-1)).float().mean()
    more = {
        'argmax_k': argmax_k.item(),
        'reward': reward.mean().item(),
        'adv_std': adv.std().item(),
    }
    stats.update(averaged(more))
    if s.price is None:
        K = model.config.top_k
        too_many = stats['argmax_k'] - s.budget * K
        price *= math.exp(PRICE_RATE * too_many / K)
    return {'step': step, 'price': price, **stats}


def rollout_reward(s, model, inputs, targets, rollout):
    """Rewards in nats: (G,B,T) of inputs (B,T) G times with sampled k, and (B,T) of the model's own K.

    Passes of at most PASS_TOKENS tokens keep the experts' activations small.
    """
    few = max(1, PASS_TOKENS // s.seq)                                      # sequences
    passes = [(part, None) for part in inputs.split(few)]
    passes += [(part, rollout) for part in inputs.repeat(s.group, 1).split(few)]
    hidden = torch.cat(model.hidden_of(passes))                             # ((1+G)*B,T,C), top-k first
    hidden = hidden.view(1 + s.group, inputs.numel(), -1)                   # (1+G,P,C)
    reward = rewards(model, hidden, targets.flatten(), s.reward == 'expected')
    reward = reward.unflatten(1, inputs.shape)                              # (1+G,B,T)
    return reward[1:], reward[0]


def train_ppo(s, model, allocators, price, text, log, probe=None, state=None):
    """PPO from a first price. Appends one dict per step to `log`; changes `allocators` in place.

    probe: windows of other text, on which what training gains is seen. state: a file that holds the run's
    state after every s.save_every steps and on an interrupt, for --resume; it needs a probe.
    """
    L = len(model.config.moe_layers)
    rank, size = ranks()
    mine = slice(rank * s.ppo_batch // size, (rank + 1) * s.ppo_batch // size)      # this rank's sequences
    batches = text.batches(s.ppo_batch, s.seq, torch.Generator().manual_seed(s.seed + 1))
    generator = torch.Generator(s.device).manual_seed(s.seed)
    optimizer = torch.optim.AdamW(allocators.parameters(), s.ppo_lr, weight_decay=s.weight_decay)
    facts = {}
    if probe:
        probe = Probe(model, probe, allocators)
        facts['start_loss'] = probe.start.mean().item()      # tells another base model or text by its number
    if s.resume:
        log += load_state(state, s, facts, allocators, optimizer, generator)
        price = log[-1]['price']
        for _ in log:                                          # these batches are done
            next(batches)
        print(f'resumed after step {len(log)} of {s.ppo_steps}')
    progress = Progress('ppo', s.ppo_steps, done=len(log))
    probed = {}
    with Interrupt() as interrupt:
        for step in range(len(log) + 1, s.ppo_steps + 1):
            inputs, targets = (z[mine].to(s.device) for z in next(batches))         # (B,T) both
            # noise of all ranks' tokens: a token's draw does not depend on how many ranks there are
            noise = torch.rand(L, s.group, s.ppo_batch, s.seq, generator=generator, device=s.device)
            noise = noise[:, :, mine].flatten(1)                            # (L,G*P)
            row = ppo_step(s, step, model, allocators, optimizer, inputs, targets, noise, price)
            price = row['price']
            last = step == s.ppo_steps
            if probe and (last or step % max(1, s.ppo_steps // PROBES) == 0):
                probed = probe.look(allocators, price)
                row.update(probed)
            log.append(row)
            tokens = step * s.group * s.ppo_batch * s.seq
            progress(step, tokens, loss=row['loss'], argmax_k=row['argmax_k'], price=price, **probed)
            stop = any(gathered(interrupt.asked))              # all ranks stop, or none
            if state and (last or stop or step % s.save_every == 0):
                save_state(state, s, facts, allocators, optimizer, generator, log)
            if stop:
                raise KeyboardInterrupt


# ================================================================ evaluation

def compare(s, model, allocators, families, dial, heldout):
    """The rows of results.json: top-k, Ada-K, and the rules without training at Ada-K's mean k on `dial`."""
    c = model.config
    ada = AdaK(allocators)
    [(_, tally)] = evaluate(model, dial, [ada])
    mean_k = tally.mean()
    p = calibrate(model, dial, lambda p: TopP(p, c.n_experts), mean_k, 0, 1)
    family = best_family(families, mean_k)

    def skip(k):
        return families.policy(family, k, around=mean_k)
    knob = calibrate(model, dial, skip, mean_k, 1, c.top_k)
    policies = {
        'top-k': TopK(c.top_k),
        'ada-k': ada,
        'random-mix': RandomMix(mean_k),
        'top-p': TopP(p, c.n_experts),
        'skip': skip(knob),
    }
    windows = heldout.windows(s.seq, s.heldout_tokens)
    rows = []
    progress = Progress('evaluation', len(policies))
    for method, policy in policies.items():
        torch.manual_seed(s.seed)                              # for RandomMix
        [(loss, tally)] = evaluate(model, windows, [policy])
        if method == 'top-k':
            of_topk = loss
        delta = (loss - of_topk).numpy()
        params = allocators.weight.numel() if method == 'ada-k' else 0
        rows.append({
            'method': method,
            'loss': loss.mean().item(),
            'delta': delta.mean(),
            'delta_se': clustered_error(delta, windows[2].flatten()),
            'mean_k': tally.mean(),
            'mean_k_by_layer': tally.mean_by_layer().tolist(),
            'k_histogram': (tally.counts.sum(0) / tally.counts.sum()).tolist(),
            **flops_shares(c, tally.mean(), s.seq, params),
        })
        progress(len(rows), len(rows) * len(loss), loss=rows[-1]['loss'])
    return rows


# ================================================================ the whole run

def main(argv=None):
    s = parse(argv)
    join(s.device)
    check_ranks(s)
    out = open_run(s.out)
    torch.manual_seed(s.seed)
    start = time.monotonic()
    seconds = {}

    def lap(stage):
        seconds[stage] = time.monotonic() - start - sum(seconds.values())

    # base model and text
    model, tokenizer, (text, calibration, heldout) = base_model(s, out)
    c = model.config
    check_budget(s, c.top_k)
    lap('base')

    # allocators: their start, then PPO
    families = SkipFamilies(model, calibration, s.seq)
    allocators, price = new_allocators(s, model, text, families)
    digest = base_digest(base_folder(s, out))
    print(f'allocators: {allocators.n_params():,} trained parameters')
    lap('warm')
    log = []
    state = out / 'state.pt'
    if state.exists() and not s.resume:
        print(f'{state} is of an interrupted run; --resume would go on with it, this run starts anew')
    try:
        probe = calibration.windows(s.seq, s.heldout_tokens // 2)
        train_ppo(s, model, allocators, price, text, log, probe, state)
    except KeyboardInterrupt:
        print(f'\ninterrupted after {len(log)} of {s.ppo_steps} PPO steps; --resume goes on from {state}')
        leave(130)
        sys.exit(130)
    lap('ppo')

    # evaluation
    dial = text.windows(s.seq, s.heldout_tokens // 2)          # mean k varies by document: take many
    if s.price is None:
        target = s.budget * c.top_k
        knob = calibrate(model, dial, lambda price: AdaK(allocators, price), target, 5, -5)
        allocators.price.fill_(knob)
    allocators.save(out / 'allocator.safetensors', digest)
    write_log(out / 'log.csv', log)
    rows = compare(s, model, allocators, families, dial, heldout)
    windows = heldout.windows(s.seq, s.heldout_tokens)
    bpb = bits_per_byte(rows[0]['loss'] * windows[1].numel(), windows, tokenizer)
    lap('evaluation')

    # files
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6        # kB on Linux
    peak_gb = max(gathered(peak))
    if ranks()[0] > 0:
        return
    write_json(out / 'results.json', {
        'run': out.name,
        'seed': s.seed,
        'config': asdict(s),
        'seconds': seconds,
        'peak_gb': peak_gb,
        'ranks': ranks()[1],
        'bits_per_byte': bpb,
        'allocator_params': allocators.n_params(),
        'rows': rows,
    })
    state.unlink()                                             # the run is complete
    training_figure(out / 'training.png', log, c.top_k, s.budget * c.top_k if s.price is None else None)
    print(table(rows))
    print(f'base model: {bpb:.3f} bits per byte on held-out text')
    print(f'{sum(seconds.values()):.0f} s, {peak_gb:.1f} GB; wrote {out}')


# ================================================================ command line

def parse(argv, doc=__doc__):
    """Command line -> Settings: the preset's values, then --paper's, then what was given."""
    p = OneLineParser(doc, argument_default=argparse.SUPPRESS)
    p.add_argument('--preset', choices=PRESETS, default='deep', help='default deep')
    p.add_argument('--out', help='run folder (default out/PRESET)')
    p.add_argument('--ckpt', help='a base: folder in the hub\'s format, or short name (default: learnt)')
    p.add_argument('--data', help='.txt, .jsonl, .py files (default: the standard library\'s sources)')
    goal = p.add_mutually_exclusive_group()
    goal.add_argument('--budget', type=float, help='mean k as a share of K, in (0, 1] (default 0.75)')
    goal.add_argument('--price', type=float, help='instead of a budget: nats per expert and layer')
    p.add_argument('--paper', action='store_true', help='the published recipe throughout (price 3e-3)')
    p.add_argument('--seed', type=int, help='of everything after the base model (default 0)')
    p.add_argument('--device', help='cpu, cuda, cuda:1 (default: cuda for --ckpt if there is one)')
    p.add_argument('--stream', action='store_true', help='two layers on the device, the others on the host')
    p.add_argument('--fresh', action='store_true', help='learn the base model again')
    p.add_argument('--resume', action='store_true', help='go on with an interrupted PPO from its saved state')
    p.add_argument('--save-every', type=int, help='PPO steps between two saved states (default 50)')
    p.add_argument('--seq', type=int, help='tokens of a sequence; documents are packed (default 128)')
    p.add_argument('--ppo-steps', type=int, help='PPO steps (default 300)')
    p.add_argument('--ppo-batch', type=int, help='sequences of a rollout (default 16)')
    given = vars(p.parse_args(argv))
    recipe = dict(PAPER) if 'paper' in given else {}
    if 'budget' in given:
        recipe['price'] = None                                 # the published recipe at a wanted budget
    s = Settings(**{**PRESETS[given['preset']], **recipe, **given})
    check_settings(s)
    if s.ckpt and 'device' not in given:
        s.device = default_device(s.ckpt)
    if s.stream and s.device != 'cpu' and 'ppo_batch' not in given:
        # as many tokens as hide the transfer time of the weights
        s.ppo_batch = max(1, Streamed.tokens_per_visit // ((1 + s.group) * s.seq))
    s.device = open_device(s.device)
    name = Path(s.ckpt).name if s.ckpt else s.preset
    s.out = s.out or f'out/{name}'
    return s


# ================================================================ for the programs that open a finished run

def settings_of(a, **others):
    """The Settings of the finished run a.run, or of `others`; device, stream, ckpt of the command line a."""
    s = Settings(**others)
    if a.run:
        path = Path(a.run) / 'results.json'
        with reading(path):
            s = Settings(**read_json(path)['config'])
        if not s.ckpt and not (Path(a.run) / 'base' / 'recipe.json').exists():
            raise InputError(f'{a.run}: the run is not complete, its base model is missing')
    ckpt = a.ckpt or s.ckpt
    return replace(s, device=a.device, stream=a.stream, ckpt=ckpt, fresh=False, resume=False)


if __name__ == '__main__':
    one_line_errors('train.py', main)
