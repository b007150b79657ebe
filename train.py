"""train.py: learn a small Mixtral, freeze it, and train Ada-K allocators on it.

    python train.py                          the whole story on the sources of Python's standard library
    python train.py --budget 0.6             a smaller budget: 0.6 of the expert FLOPs
    python train.py --ckpt mixtral-8x7b      allocators for real weights
    python train.py --paper                  the published recipe throughout
    python train.py --ckpt X --stream        two layers' weights on the device, the others in host memory
    torchrun --nproc-per-node 8 train.py --ckpt mixtral-8x22b      each GPU keeps an eighth of the weights
    python train.py --preset smoke           the same path in seconds, for tests

Stages, in order: text -> base model -> start of the allocators -> PPO -> evaluation. They write to `--out`:
    base/                     config.json, model.safetensors, tokenizer.json: transformers opens this folder
    allocator.safetensors     the trained allocators, and what stands in for experts that do not run
    log.csv, training.png     every PPO step
    results.json              the table

The default recipe differs from the paper's (`--paper`) where that measured better; the README lists how.
"""
import argparse
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import ppo
from allocator import AdaK, Rollout, TopK
from base.frozen import base_model
from hub.files import InputError, read_json, reading, write_json
from run.compare import compare
from run.console import (OneLineParser, Progress, check_budget, check_settings, model_flags, one_line_errors,
                         open_device)
from run.evaluate import bits_per_byte, calibrate, effective_documents, rewards_under
from run.ranks import average_gradients, averaged, gathered, my_rank, n_ranks
from run.report import tell, training_figure, write_log
from run.standins import refit, target_k
from run.start import new_allocators, prepare
from run.state import in_state, load_state, open_run, save_state, stop_signals
from scale.stream import Streamed


# ================================================================ settings

@dataclass
class Settings:
    """Every number of a run: flags first (`parse`), then what only presets, the paper and studies set."""
    preset: str = 'deep'
    out: str = ''
    ckpt: str = ''                  # '': the base is learnt in OUT/base
    data: str = ''                  # '': the standard library's sources
    budget: float = 0.75            # share of the expert FLOPs, stand-ins counted
    price: float | None = None      # nats per expert and layer, fixed; None: whatever meets the budget
    paper: bool = False
    seed: int = 0                   # of everything after the base model
    device: str = 'cpu'
    stream: bool = False
    fresh: bool = False
    resume: bool = False
    save_every: int = 50            # PPO steps
    seq: int = 128                  # T
    ppo_steps: int = 150
    ppo_batch: int = 16             # sequences of a rollout, before they are repeated
    discount: float = 0.9           # of later tokens' rewards in a decision's credit
    prose: bool = False
    # text and base model
    documents: int = 10 ** 9        # at most so many
    n_vocab: int = 1024
    n_layers: int = 6
    dim: int = 64
    n_heads: int = 2
    n_experts: int = 8
    top_k: int = 2
    expert_dim: int = 224            # 3.5 C, as Mixtral
    base_steps: int = 1000
    # what becomes of the weight of an expert that does not run (run/standins.py)
    dropped: str = 'stand-ins'      # 'published': the others get it; 'kept': they keep theirs; 'stand-ins'
    rank: int | None = None         # of the stand-ins; None: run/standins.py:rank_of
    beyond: int = 0                 # experts beyond K that a token may run
    # allocators
    extended: bool = True           # do they see the router's sorted probabilities too?
    start: str = 'skip'             # where PPO starts: see run/start.py
    warm_steps: int = 200           # of the start 'p-warm'
    reward: str = 'expected'        # log p of the next token: 'expected' under top-k, or 'sampled'
    group: int = 4                  # G, rollouts of the same tokens; 1: top-k is the baseline
    ppo_lr: float = 5e-2            # falls linearly to 0; constant with --paper
    epochs: int = 3                 # PPO epochs a rollout
    entropy: float = 0.15           # bonus of a nat of entropy, in first prices of an expert
    weight_decay: float = 0.0
    # evaluation
    heldout_tokens: int = 131072    # of training text stand-ins see as many, knobs a quarter


WIDE = dict(n_layers=4, dim=128, n_heads=4, base_steps=900)
PRESETS = {
    # Mixtral in small: top-2 of 8
    'deep': {},
    # twice as many experts, half as large, and as many as Qwen1.5-MoE runs
    'fine': dict(**WIDE, n_experts=16, top_k=4, expert_dim=96),
    # many small experts, OLMoE in small
    'many': dict(**WIDE, n_experts=64, top_k=8, expert_dim=48),
    # English instead of code: the docstrings and comments of the standard library
    'prose': dict(**WIDE, prose=True, expert_dim=192),
    'smoke': dict(
        documents=60,
        n_vocab=320,
        seq=64,
        n_layers=2,
        dim=32,
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
    dropped='published',
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


# ================================================================ PPO (eq. 4-11)

def ppo_step(s, step, model, allocators, optimizer, batch, noise, price, entropy):
    """One step of PPO in the order of eq. 4-11; changes `allocators` -> its statistics.

    batch: inputs, targets, documents, (B,T) each, this rank's sequences; noise (L,G*P) uniform in [0,1),
    P = B*T; price: nats per expert; entropy: nats per nat of entropy, its bonus.
    """
    inputs, targets, document = batch

    # rollout (eq. 4, 5): the tokens G times with sampled k, and once with the model's own K
    rollout = Rollout(allocators, noise)
    reward = rollout_reward(s, model, inputs, targets, rollout)             # (1+G,B,T), top-k first

    # advantage (eq. 6, 9): credit over time, then against the other rollouts of a token, or against top-k
    credit = ppo.reward_to_go(reward, s.discount, document).flatten(1)      # (1+G,P)
    if s.group > 1:
        adv = ppo.group_advantage(credit[1:])
    else:
        adv = ppo.topk_advantage(credit[1:], credit[0])
    adv = adv.flatten()                                                     # (G*P,) the same for all layers

    # update (eq. 7, 8, 10, 11), layer by layer: the language model is not run again
    for _ in range(s.epochs):
        optimizer.zero_grad()
        stats = []
        for layer, passes in enumerate(rollout.drawn):
            z, k, logp = map(torch.cat, zip(*passes))                       # of all G*P tokens
            logits = allocators.logits(layer, z)                            # (G*P,A)
            loss, of_layer = ppo.ppo_loss(logits, k, logp, adv, price, CLIP, entropy)
            (loss / len(rollout.drawn)).backward()
            of_layer['argmax_k'] = (1 + logits.argmax(-1)).float().mean()
            stats.append(of_layer)
        average_gradients(allocators.parameters())
        optimizer.step()

    # of the last epoch
    row = {name: torch.stack([of_layer[name] for of_layer in stats]).mean().item() for name in stats[0]}
    row = averaged({**row, 'reward': reward[1:].mean().item(), 'adv_std': adv.std().item()})
    if not math.isfinite(row['loss']):
        raise InputError(f'ppo: the loss is {row["loss"]} at step {step}: a NaN in the base model, or an '
                         f'absurd --price?')
    return {'step': step, 'price': price, **row}


def next_price(s, first, log, config):
    """The price of an expert in the next step: up while the most probable k are too many, down while too few.

    In nats; moved in proportion to the mean k that is too much, as it was in all steps and, ten times as
    strongly, against swings, in the last one. It stays within a factor of ten of the first price, so that a
    budget out of reach does no harm.
    """
    if s.price is not None or not log:
        return first
    target = target_k(s, config)
    misses = [(row['argmax_k'] - target) / config.top_k for row in log]
    change = PRICE_RATE * sum(misses) + misses[-1]
    return first * min(10, max(0.1, math.exp(change)))


@torch.no_grad()
def rollout_reward(s, model, inputs, targets, rollout):
    """Rewards in nats, (1+G,B,T): of inputs (B,T) with the model's own K, then G times with sampled k.

    What is expected is expected under the best static k that the allocators may choose: K, or s.beyond more.
    """
    expected = s.reward == 'expected'
    teacher = TopK(rollout.k_max) if expected else None
    times = {teacher: 1, rollout: s.group}
    reward = rewards_under(model, inputs, targets, times, expected)         # (1+G,P)
    return reward.unflatten(1, inputs.shape)


def train_ppo(s, model, allocators, first, text, state=None, facts={}, one_step=ppo_step):
    """PPO from a first price -> its log, one dict per step; changes `allocators` in place.

    state: a file that holds the run's state after every s.save_every steps and on an interrupt, for --resume;
    facts: what it depends on (run/state.py). one_step: ppo_step, or another with its arguments.
    """
    L = len(model.config.moe_layers)
    size = n_ranks()
    batches = text.batches(s.ppo_batch, s.seed + 1)
    generator = torch.Generator(s.device).manual_seed(s.seed)
    optimizer = torch.optim.AdamW(allocators.parameters(), s.ppo_lr, weight_decay=s.weight_decay)
    log = []
    if s.resume:
        log = load_state(state, facts, allocators, optimizer, generator)
        for _ in log:                                          # these batches are done
            next(batches)
        print(f'resumed after step {len(log)} of {s.ppo_steps}')
    progress = Progress('ppo', done=len(log))
    with stop_signals() as asked:
        for step in range(len(log) + 1, s.ppo_steps + 1):
            # of all sequences those of this rank
            batch = [part.chunk(size)[my_rank()].to(s.device) for part in next(batches)]    # (B,T) each
            # noise of all ranks' tokens: a token's draw does not depend on how many ranks there are
            noise = torch.rand(L, s.group, s.ppo_batch, s.seq, generator=generator, device=s.device)
            noise = noise.chunk(size, dim=2)[my_rank()].flatten(1)          # (L,G*P)
            price = next_price(s, first, log, model.config)
            if not s.paper:
                optimizer.param_groups[0]['lr'] = s.ppo_lr * (1 - (step - 1) / s.ppo_steps)
            row = one_step(s, step, model, allocators, optimizer, batch, noise, price, s.entropy * first)
            log.append(row)
            tokens = s.group * s.ppo_batch * s.seq
            progress(step, s.ppo_steps, tokens, loss=row['loss'], argmax_k=row['argmax_k'], price=price)
            stop = any(gathered(asked))                        # all ranks stop, or none
            if state and (stop or step % s.save_every == 0 or step == s.ppo_steps):
                save_state(state, facts, allocators, optimizer, generator, log)
            if stop:
                raise KeyboardInterrupt
    return log


# ================================================================ the whole run

def main(argv):
    s = parse(argv)
    with open_run(s.out) as out:
        run(s, out)


def run(s, out):
    """All stages of a run in its folder; its results are written together, at the end."""
    torch.manual_seed(s.seed)
    start = time.monotonic()
    seconds = {}

    def lap(stage):
        seconds[stage] = time.monotonic() - start - sum(seconds.values())

    # base model and text
    model, tokenizer, (text, heldout), digest = base_model(s, out)
    c = model.config
    check_budget(s, c.top_k)
    lap('base')

    # allocators: their start, then PPO
    _, families = prepare(s, model, text)
    allocators, price = new_allocators(s, model, text, families)
    print(f'allocators: {allocators.n_params():,} trained parameters')
    lap('warm')
    facts = {**in_state(s), 'base': digest, 'length of the text': len(text.tokens)}
    state = out / 'state.pt'
    if state.exists() and not s.resume:
        print(f'{state} is of an interrupted run; --resume would go on with it, this run starts anew')
    log = train_ppo(s, model, allocators, price, text, state, facts)
    lap('ppo')

    # evaluation
    target = target_k(s, c) if s.price is None else None
    if target:
        policy = calibrate(model, families.windows, allocators.at_price, target, 2, -2)
        allocators.price.fill_(policy.price)
    allocators.fitted = refit(s, model, text, AdaK(allocators))             # for what is dropped now
    windows = heldout.windows(s.heldout_tokens)
    rows = compare(s, model, text, allocators, families, windows, target)
    lap('evaluation')

    # files
    if my_rank() > 0:
        return
    allocators.save(out / 'allocator.safetensors', digest,
                    budget=s.budget, seed=s.seed, ppo_steps=s.ppo_steps)
    write_log(out / 'log.csv', log)
    results = {
        'config': vars(s),
        'seconds': seconds,
        'bits_per_byte': bits_per_byte(rows[0]['loss'], windows[1], tokenizer),
        'effective_documents': effective_documents(windows[2]),
        'allocator_params': allocators.n_params(),
        'rows': rows,
    }
    write_json(out / 'results.json', results)
    state.unlink()                                             # the run is complete
    training_figure(out / 'training.png', log, c.top_k, target)
    tell(results)
    print(f'wrote {out}')


# ================================================================ command line

def parse(argv, doc=__doc__):
    """Command line -> Settings: the preset's values, then --paper's, then what was given; joins the ranks."""
    p = OneLineParser(doc, argument_default=argparse.SUPPRESS)
    p.add_argument('--preset', choices=PRESETS, default='deep', help='default deep')
    p.add_argument('--out', help='run folder (default out/PRESET)')
    model_flags(p)
    p.add_argument('--data', help='.txt, .jsonl, .py files (default: the standard library\'s sources)')
    goal = p.add_mutually_exclusive_group()
    goal.add_argument('--budget', type=float, help='share of the expert FLOPs, in (0, 1] (default 0.75)')
    goal.add_argument('--price', type=float, help='instead of a budget: nats per expert and layer')
    p.add_argument('--paper', action='store_true', help='the published recipe throughout (price 3e-3)')
    p.add_argument('--dropped', choices=['published', 'kept', 'stand-ins'],
                   help='what gets the weight of an expert that does not run (run/standins.py)')
    p.add_argument('--rank', type=int, help='of the stand-ins (default: C / 4, less for small experts)')
    p.add_argument('--beyond', type=int, help='experts beyond K that a token may run (default 0); '
                                              '1 is better than top-k from a budget of 0.9 on')
    p.add_argument('--seed', type=int, help='of everything after the base model (default 0)')
    p.add_argument('--fresh', action='store_true', help='learn the base model again')
    p.add_argument('--resume', action='store_true', help='go on with an interrupted PPO from its saved state')
    p.add_argument('--save-every', type=int, help='PPO steps between two saved states (default 50)')
    p.add_argument('--seq', type=int, help='tokens of a sequence; documents are packed (default 128)')
    p.add_argument('--ppo-steps', type=int, help='PPO steps (default 150)')
    p.add_argument('--ppo-batch', type=int, help='sequences of a rollout (default 16)')
    given = vars(p.parse_args(argv))
    recipe = PAPER if 'paper' in given else {}
    if 'budget' in given:
        given['price'] = None                                  # the published recipe at a wanted budget
    s = Settings(**{**PRESETS[given['preset']], **recipe, **given})
    check_settings(s)
    s.device = given.get('device')
    open_device(s)
    if s.stream and s.device != 'cpu' and 'ppo_batch' not in given:
        # as many tokens as hide the transfer time of the weights
        s.ppo_batch = max(1, Streamed.tokens_per_visit // ((1 + s.group) * s.seq))
    name = Path(s.ckpt or s.preset).name
    s.out = s.out or f'out/{name}'
    return s


# ================================================================ for the programs that open a finished run

def settings_of(a, **others):
    """The Settings of the finished run a.run, or of `others`; device, stream, ckpt of the command line a.

    Opens that device and meets the other ranks.
    """
    open_device(a)
    s = Settings(**others)
    if a.run:
        path = Path(a.run) / 'results.json'
        with reading(path):
            s = Settings(**read_json(path)['config'])
        if not s.ckpt and not (path.parent / 'base/recipe.json').exists():
            raise InputError(f'{a.run}: the run is not complete, its base model is missing')
    return replace(s, device=a.device, stream=a.stream, ckpt=a.ckpt or s.ckpt, fresh=False, resume=False)


if __name__ == '__main__':
    one_line_errors('train.py', main)
