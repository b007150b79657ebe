"""train.py: learn a small Mixtral, freeze it, and train Ada-K allocators on it.

    python train.py                          the whole story on the sources of Python's standard library
    python train.py --budget 0.6             a smaller budget: mean k at most 0.6 K
    python train.py --ckpt mixtral-8x7b      allocators for real weights
    python train.py --paper                  the published recipe throughout
    python train.py --ckpt X --stream        two layers' weights on the device, the others in host memory
    torchrun --nproc-per-node 8 train.py --ckpt mixtral-8x22b      each GPU keeps an eighth of the weights
    python train.py --preset smoke           the same path in seconds, for tests

Stages, in order: text -> base model -> start of the allocators -> PPO -> evaluation. Everything lands in
`--out`:
    base/                    config.json, model.safetensors, tokenizer.json: transformers opens this folder
    allocator.safetensors    the trained allocators
    log.csv, results.json    every PPO step; the table
    training.png, layers.png the figures

The default recipe differs from the paper's (`--paper`) where that measured better; the README lists how.
"""
import argparse
import inspect
import math
import re
import resource
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

import ppo
from allocator import AdaK, RandomMix, Rollout, TopK, TopP
from base.frozen import base_digest, base_model
from hub.files import InputError, checked, read_object, write_json
from moe_dispatch import flops
from run.console import OneLineParser, Progress, default_device, one_line_errors, open_device
from run.evaluate import bits_per_byte, calibrate, clustered_error, evaluate
from run.ranks import average_gradients, averaged, check_ranks, gathered, join, leave, ranks
from run.report import layers_figure, table, training_figure, write_log
from run.rules import SkipFamilies, best_family
from run.start import new_allocators
from run.state import Interrupt, load_state, open_run, save_state
from scale.memory import LOGITS, PASS_TOKENS
from scale.stream import Streamed


# ================================================================ settings

@dataclass
class Settings:
    """Every number of a run. FLAGS are set on the command line, the others by PRESETS, PAPER and studies."""
    preset: str = 'deep'            # deep, fine, prose, gpu or smoke (default deep)
    out: str = ''                   # run folder (default out/PRESET)
    ckpt: str = ''                # a base in the hub's format: folder or short name (default: learn OUT/base)
    data: str = ''                  # .txt, .jsonl, .py files (default: the standard library's sources)
    budget: float = 0.75            # mean k as a share of K, in (0, 1] (default 0.75)
    lam: float | None = None        # a fixed price in nats per expert and layer instead of a budget
    paper: bool = False             # the published recipe throughout (price 3e-3)
    seed: int = 0                   # of everything after the base model (default 0)
    device: str = 'cpu'            # cpu, cuda, cuda:1 (default: cuda for --ckpt where there is one, else cpu)
    stream: bool = False            # two layers' weights on the device, the others in host memory or files
    fresh: bool = False             # learn the base model again
    resume: bool = False            # go on with an interrupted PPO where its last saved state left it
    save_every: int = 50            # PPO steps between two saved states (default 50)
    seq: int = 128                  # T, tokens of a sequence; documents are packed (default 128)
    ppo_steps: int = 300            # PPO steps (default 300)
    ppo_batch: int = 16             # sequences of a rollout, before they are repeated (default 16)
    discount: float = 0.9           # of later tokens' rewards in a decision's credit, 0..1 (default 0.9)
    prose: bool = False             # take the docstrings and comments of .py files instead of the files
    # text and base model
    documents: int = 10 ** 9        # at most so many documents
    n_vocab: int = 1024             # tokens of the byte-level BPE
    n_layers: int = 16
    dim: int = 64
    n_heads: int = 4
    n_kv_heads: int = 2
    n_experts: int = 8
    top_k: int = 2
    expert_dim: int = 96
    base_steps: int = 1200
    base_batch: int = 16            # sequences
    bf16: bool = False              # matmuls in bfloat16 over fp32 weights, which are saved as bfloat16
    # allocators
    extended: bool = True           # do they see the router's sorted probabilities too?
    start: str = 'skip'             # where PPO starts: see run/start.py
    warm_steps: int = 200           # of 'p-warm'
    reward: str = 'expected'       # log p of the next token, 'expected' under Top-K's prediction or 'sampled'
    cost: str = 'loss'              # the price of experts: exact in the 'loss' (eq. 10) or in the 'reward'
    group: int = 4                  # G, rollouts of the same tokens; 1: Top-K is the baseline
    ppo_lr: float = 5e-2            # decays linearly to 0; constant with --paper
    epochs: int = 3                 # PPO epochs a rollout
    entropy: float = 5e-4           # bonus, nats of reward per nat of entropy
    weight_decay: float = 0.0
    # evaluation
    calibration_tokens: int = 65536         # on which knobs are set, spread over all training documents
    heldout_tokens: int = 131072


FLAGS = ('preset', 'out', 'ckpt', 'data', 'budget', 'lam', 'paper', 'seed', 'device', 'stream', 'fresh',
         'resume', 'save_every', 'seq', 'ppo_steps', 'ppo_batch', 'discount', 'prose')
PRESETS = {
    # Mixtral in small: top-2 of 8 and many layers
    'deep': {},
    # twice as many experts, half as large, and as many as Qwen1.5-MoE runs
    'fine': dict(n_layers=4, dim=128, n_experts=16, top_k=4),
    # for one H100, not run yet: 0.45B parameters, 0.1B active, on the text of the whole Python installation
    'gpu': dict(
        device='cuda', bf16=True, data=sysconfig.get_paths()['stdlib'], n_vocab=4096, seq=512, n_layers=8,
        dim=1024, n_heads=16, n_kv_heads=4, n_experts=64, top_k=8, expert_dim=256, base_steps=5000,
        base_batch=64, ppo_steps=1500, ppo_batch=64, calibration_tokens=2 ** 17, heldout_tokens=2 ** 20),
    # English instead of code: the docstrings and comments of the standard library
    'prose': dict(prose=True, n_layers=4, dim=128, expert_dim=192),
    'smoke': dict(
        n_vocab=320, seq=64, documents=60, n_layers=2, dim=32, n_heads=2, n_kv_heads=1, top_k=4,
        expert_dim=16, base_steps=30, base_batch=8, warm_steps=10, ppo_steps=12, calibration_tokens=4096,
        heldout_tokens=4096)}
# the published settings; the clip range and mini-batches are not published, so ours stay
PAPER = dict(extended=False, start='p-warm', reward='sampled', discount=0.0, group=1, ppo_lr=1e-3, epochs=2,
             entropy=0.0, lam=3e-3, weight_decay=0.1)
MOVED = {'--plan': 'python -m scale.plan --ckpt NAME_OR_FOLDER'}

CLIP = 0.2              # eps of eq. 7, 8
PRICE_RATE = 0.1        # relative change of the price per step and unit of (mean k - target) / K
PROBES = 10             # how often in a run the probe is evaluated
PROBE_TOKENS = 65536


def parse(argv, doc=__doc__):
    """Command line -> Settings: the preset's values, then --paper's, then what was given."""
    p = OneLineParser(doc, MOVED, argument_default=argparse.SUPPRESS)
    help_of = dict(re.findall(r'^    (\w+): .*?# (.*)$', inspect.getsource(Settings), re.MULTILINE))
    for field in fields(Settings):
        how = {'action': 'store_true'} if field.type is bool else {'type': field.type}
        if field.name == 'lam':
            how = {'type': float}
        if field.name in FLAGS:
            p.add_argument('--' + field.name.replace('_', '-'), help=help_of[field.name], **how)
    given = vars(p.parse_args(argv))
    preset = given.get('preset', 'deep')
    if preset not in PRESETS:
        raise InputError(f'--preset {preset}: use one of {", ".join(PRESETS)}')
    if {'budget', 'lam'} <= set(given):
        raise InputError('--budget and --lam: give one, not both')
    recipe = dict(PAPER) if given.get('paper') else {}
    if 'budget' in given:
        recipe['lam'] = None                                   # the published recipe at a wanted budget
    s = Settings(**{**PRESETS[preset], **recipe, **given})
    check_settings(s)
    if s.ckpt and 'device' not in given:
        s.device = default_device(s.ckpt)
    if s.stream and s.device != 'cpu' and 'ppo_batch' not in given:
        # as many tokens as hide the way of the weights
        s.ppo_batch = max(1, Streamed.tokens_per_visit // ((1 + s.group) * s.seq))
    s.device = open_device(s.device)
    s.out = s.out or f'out/{Path(s.ckpt).name if s.ckpt else s.preset}'
    return s


def check_settings(s):
    """InputError names the first setting that makes no sense."""
    for wrong, line in (
            (not 0 <= s.seed < 2 ** 63, f'--seed {s.seed}: must be 0 or more and below 2^63'),
            (s.resume and s.fresh, '--fresh learns a new base, --resume keeps the old one: give one of them'),
            (s.ckpt and s.fresh, '--fresh learns a base model, --ckpt brings one: give one of them'),
            (not 0 < s.budget <= 1, f'--budget {s.budget}: must be above 0 and at most 1'),
            (s.lam is not None and not 0 <= s.lam < math.inf, f'--lam {s.lam}: must be nats, 0 or more'),
            (not 0 <= s.discount <= 1, f'--discount {s.discount}: must be in 0..1'),
            (s.stream and not s.ckpt, '--stream needs --ckpt: a base that is learnt here is in memory')):
        if wrong:
            raise InputError(line)
    for field in fields(s):
        if field.type is int and field.name != 'seed' and getattr(s, field.name) < 1:
            raise InputError(f'--{field.name.replace("_", "-")} {getattr(s, field.name)}: must be 1 or more')
    if not s.ckpt:
        check_budget(s, s.top_k)


def check_budget(s, top_k):
    """InputError if the budget is below one expert a token."""
    if s.lam is None and s.budget * top_k < 1:
        raise InputError(f'--budget {s.budget}: every token runs at least 1 of K = {top_k} experts, '
                         f'so at least {1 / top_k:g}')


def run_settings(run):
    """The Settings of a finished run whose base is there; InputError if it is not, or of another version."""
    path = Path(run) / 'results.json'
    config = checked(read_object(path), 'config', path, dict)
    if odd := {field.name for field in fields(Settings)} ^ set(config):
        raise InputError(f'{path}: written by another version of train.py (setting {min(odd)}); '
                         f'train it again')
    for field in fields(Settings):
        checked(config, field.name, path, *([float, None] if field.name == 'lam' else [field.type]))
    if not config['ckpt'] and not (Path(run) / 'base' / 'recipe.json').exists():
        raise InputError(f'{run}: the run is not complete, its base model is missing; '
                         f'run train.py --out {run} again')
    s = Settings(**{**config, 'fresh': False, 'resume': False})            # how it was started is over
    try:
        check_settings(s)
    except InputError as e:
        raise InputError(f'{path}: {e}') from None
    return s


def settings_of(a, finished=True, **others):
    """The Settings of a command line with run, ckpt, device, stream: those of a.run, or else `others`.

    `finished`: InputError unless the run is. An interrupted one has a base and allocators too.
    """
    known = a.run and (finished or (Path(a.run) / 'results.json').exists())
    s = run_settings(a.run) if known else Settings(**others)
    return replace(s, device=a.device, stream=a.stream, ckpt=a.ckpt or s.ckpt)


# ================================================================ PPO (eq. 4-11)

def rollout_reward(s, model, inputs, targets, rollout):
    """(reward (G,P), reward under Top-K (P,)) in nats: inputs (B,T) G times with sampled k, once without.

    P = B*T. Passes of at most PASS_TOKENS tokens keep the experts' activations small; the head runs on a few
    sequences at a time.
    """
    (B, T), G = inputs.shape, s.group
    few = max(1, PASS_TOKENS // T)
    passes = [(part, None) for part in inputs.split(few)]
    passes += [(part, rollout) for part in inputs.repeat(G, 1).split(few)]
    hidden = torch.cat(model.hidden_of(passes)).view(1 + G, B, T, -1)       # (1+G,B,T,C), Top-K first
    few = max(1, LOGITS // (model.config.n_vocab * T * (1 + G)))
    rewards = []
    for h, y in zip(hidden.split(few, 1), targets.split(few)):
        logits = model.lm_head(h)                                           # (1+G,few,T,V)
        if s.reward == 'expected':
            rewards.append(ppo.expected_gain(logits, logits[0]))
        else:
            rewards.append(torch.stack([ppo.next_token_logp(one, y) for one in logits]))
    reward = torch.cat(rewards, 1).flatten(1)                               # (1+G,P)
    return reward[1:], reward[0]


def ppo_step(s, step, model, allocators, optimizer, inputs, targets, noise, price):
    """One step of PPO in the order of eq. 4-11; changes `allocators` -> statistics and the next price.

    inputs, targets (B,T): this rank's sequences; noise (L,G*P) uniform in [0,1), P = B*T; price: nats per
    expert.
    """
    G, K, P = s.group, model.config.top_k, inputs.numel()

    # rollout (eq. 4, 5): the tokens G times with sampled k, and once with the model's own K
    rollout = Rollout(allocators, noise)
    with torch.no_grad():
        reward, reward_topk = rollout_reward(s, model, inputs, targets, rollout)            # (G,P), (P,)
    z, k, logp_old = rollout.z, rollout.k, rollout.logp                     # (L,G*P,n_in), (L,G*P), (L,G*P)
    own_reward = reward.mean().item()

    # advantage (eq. 6, 9): credit over time, then against the other rollouts of a token, or against Top-K
    reward, reward_topk = (ppo.reward_to_go(r.unflatten(-1, inputs.shape), s.discount).flatten(-2)
                           for r in (reward, reward_topk))
    if s.cost == 'reward':                                                # then each layer has its own reward
        reward = reward - price * k.view(-1, G, P)                          # (L,G,P)
        reward_topk = reward_topk - price * K
    adv = ppo.group_advantage(reward) if G > 1 else ppo.topk_advantage(reward, reward_topk)
    adv = adv.reshape(-1, G * P)                                            # (1 or L,G*P)

    # update (eq. 7, 8, 10, 11): the language model is not run again
    if not s.paper:
        optimizer.param_groups[0]['lr'] = s.ppo_lr * (1 - (step - 1) / s.ppo_steps)
    for _ in range(s.epochs):
        logits = allocators.logits(slice(None), z)                          # (L,G*P,A)
        price_in_loss = price if s.cost == 'loss' else 0
        loss, stats = ppo.ppo_loss(logits, k, logp_old, adv, price_in_loss, CLIP, s.entropy)
        stats = averaged(stats)
        if not math.isfinite(stats['loss']):
            raise InputError(f'ppo: the loss is {stats["loss"]} at step {step}; '
                             f'is there a NaN in the base model?')
        optimizer.zero_grad()
        loss.backward()
        average_gradients(allocators.parameters())
        optimizer.step()

    # price: up while the most probable k are too many experts, down while too few
    argmax_k = (1 + logits.argmax(-1)).float().mean().item()
    more = {'argmax_k': argmax_k, 'reward': own_reward, 'adv_std': adv.std().item()}
    stats.update(averaged(more))
    if s.lam is None:
        price *= math.exp(PRICE_RATE * (stats['argmax_k'] - s.budget * K) / K)
    return {'step': step, 'price': price, **stats}


def train_ppo(s, model, allocators, price, text, log, probe=None, state=None):
    """PPO from a first price. Appends one dict per step to `log`; changes `allocators` in place.

    probe: windows of other text, on which what training gains is seen. state: a file that holds the run's
    state after every s.save_every steps and on an interrupt, for --resume; it needs a probe.
    """
    c, (rank, size) = model.config, ranks()
    mine = slice(rank * s.ppo_batch // size, (rank + 1) * s.ppo_batch // size)         # this rank's sequences
    batches = text.batches(s.ppo_batch, s.seq, torch.Generator().manual_seed(s.seed + 1))
    generator = torch.Generator(s.device).manual_seed(s.seed)
    optimizer = torch.optim.AdamW(allocators.parameters(), s.ppo_lr, weight_decay=s.weight_decay)
    shape, facts = (len(c.moe_layers), s.group, s.ppo_batch, s.seq), {}
    if probe:
        of_topk, _ = evaluate(model, probe, TopK(c.top_k))
        at_start, counted = evaluate(model, probe, AdaK(allocators))
        facts = {'base_loss': of_topk.mean().item()}         # tells another base model or text by its numbers
    if s.resume:
        log += load_state(state, s, facts, allocators, optimizer, generator)
        price = log[-1]['price']
        for _ in log:                                          # these batches are done
            next(batches)
        print(f'resumed after step {len(log)} of {s.ppo_steps}')
    progress, probed = Progress('ppo', s.ppo_steps, done=len(log)), {}
    with Interrupt() as interrupt:
        for step in range(len(log) + 1, s.ppo_steps + 1):
            inputs, targets = (z[mine].to(s.device) for z in next(batches))                 # (B,T) both
            # noise of all ranks' tokens: a token's draw does not depend on how many ranks there are
            noise = torch.rand(shape, generator=generator, device=s.device)[:, :, mine].flatten(1)   # (L,G*P)
            row = ppo_step(s, step, model, allocators, optimizer, inputs, targets, noise, price)
            price = row['price']
            last = step == s.ppo_steps
            if probe and (last or step % max(1, s.ppo_steps // PROBES) == 0):
                nats, tally = evaluate(model, probe, AdaK(allocators))
                change, more_k = (nats - at_start).numpy(), tally.mean() - counted.mean()
                # what PPO minimises, against its start: the loss, and the price of the experts
                gain = change.mean().item() + price * len(c.moe_layers) * more_k
                probed = {'delta': (nats - of_topk).mean().item(), 'gain': gain,
                          'gain_se': clustered_error(change, probe[2].flatten()), 'probe_k': tally.mean()}
                row.update(probed)
            log.append(row)
            progress(step, step * s.group * s.ppo_batch * s.seq, loss=row['loss'], argmax_k=row['argmax_k'],
                     price=price, **probed)
            stop = any(gathered(interrupt.asked))              # all ranks stop, or none
            if state and (last or stop or step % s.save_every == 0):
                save_state(state, s, facts, allocators, optimizer, generator, log)
            if stop:
                raise KeyboardInterrupt


# ================================================================ evaluation

def compare(s, model, allocators, families, dial, heldout):
    """The rows of results.json: Top-K, Ada-K, and the rules without training at Ada-K's mean k on `dial`."""
    c, ada = model.config, AdaK(allocators)
    windows = heldout.windows(s.seq, s.heldout_tokens)
    mean_k = evaluate(model, dial, ada)[1].mean()
    p = calibrate(model, dial, lambda p: TopP(p, c.n_experts), mean_k, 0, 1)
    family = best_family(families, families.windows, mean_k)
    knob = calibrate(model, dial, lambda k: families.policy(family, k), mean_k, 1, c.top_k)
    policies = {'top-k': TopK(c.top_k), 'ada-k': ada, 'random-mix': RandomMix(mean_k),
                'top-p': TopP(p, c.n_experts), 'skip': families.policy(family, knob)}
    of_topk, rows, reference = flops(c, c.top_k, s.seq), [], None
    progress = Progress('evaluation', len(policies))
    for i, (method, policy) in enumerate(policies.items(), 1):
        torch.manual_seed(s.seed)                              # for RandomMix
        loss, tally = evaluate(model, windows, policy)
        reference = loss if reference is None else reference
        delta = (loss - reference).numpy()
        cost = flops(c, tally.mean(), s.seq, allocators.weight.numel() if policy is ada else 0)
        rows.append({
            'method': method, 'loss': loss.mean().item(), 'delta': delta.mean(),
            'delta_se': clustered_error(delta, windows[2].flatten()),
            'mean_k': tally.mean(), 'mean_k_by_layer': tally.mean_by_layer().tolist(),
            'k_histogram': (tally.counts.sum(0) / tally.counts.sum()).tolist(),
            'expert_flops': cost['experts'] / of_topk['experts'],
            'total_flops': cost['total'] / of_topk['total']})
        progress(i, i * len(loss), loss=rows[-1]['loss'])
    return rows


# ================================================================ the whole run

def main(argv=None):
    s = parse(argv)
    join(s.device)
    rank, size = ranks()
    check_ranks(s)
    out = open_run(s.out)
    torch.manual_seed(s.seed)
    seconds, clock = {}, time.time()

    def lap(stage):
        nonlocal clock
        seconds[stage], clock = time.time() - clock, time.time()

    # base model and text
    model, tokenizer, (text, calibration, heldout) = base_model(s, out)
    c = model.config
    check_budget(s, c.top_k)
    size_m = sum(p.numel() for p in model.parameters()) / 1e6
    print(f'base: {size_m:.2f}M parameters, {len(c.moe_layers)} MoE layers, top-{c.top_k} of {c.n_experts}; '
          f'text: {len(text.tokens):,} train, {len(calibration.tokens):,} calibration, '
          f'{len(heldout.tokens):,} held-out tokens')
    lap('base')

    # allocators: their start, then PPO
    families = SkipFamilies(model, calibration, s.seq)
    allocators, price = new_allocators(s, model, text, families)
    allocators.fingerprint['routers'] = base_digest(s, out)
    print(f'allocators: {allocators.n_params():,} trained parameters')
    lap('warm')
    log, state = [], out / 'state.safetensors'
    if state.exists() and not s.resume:
        print(f'{state} is of an interrupted run; --resume would go on with it, this run starts anew')
    try:
        probe = calibration.windows(s.seq, PROBE_TOKENS)
        train_ppo(s, model, allocators, price, text, log, probe, state)
    except KeyboardInterrupt:
        allocators.save(out / 'allocator.safetensors')         # usable as they are
        write_log(out / 'log.csv', log)
        print(f'\ninterrupted after {len(log)} of {s.ppo_steps} PPO steps; --resume goes on from {state}, '
              f'{out / "allocator.safetensors"} holds the allocators so far')
        leave(130)
        sys.exit(130)
    lap('ppo')

    # evaluation
    dial = text.windows(s.seq, s.calibration_tokens)           # mean k varies by document: take many
    if s.lam is None:
        target = s.budget * c.top_k
        allocators.price.fill_(calibrate(model, dial, lambda price: AdaK(allocators, price), target, 5, -5))
    allocators.save(out / 'allocator.safetensors')
    write_log(out / 'log.csv', log)
    rows = compare(s, model, allocators, families, dial, heldout)
    windows = heldout.windows(s.seq, s.heldout_tokens)
    documents = len(set(windows[2].flat))
    bpb = bits_per_byte(rows[0]['loss'] * windows[1].numel(), windows, tokenizer)
    lap('evaluation')

    # files
    peak_gb = max(gathered(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6))       # kB on Linux
    if rank:
        return
    write_json(out / 'results.json', {
        'run': out.name, 'seed': s.seed, 'config': asdict(s), 'seconds': seconds, 'peak_gb': peak_gb,
        'ranks': size, 'bits_per_byte': bpb, 'documents': documents,
        'allocator_params': allocators.n_params(), 'rows': rows})
    state.unlink()                                             # the run is complete
    training_figure(out / 'training.png', log, c.top_k, s.budget * c.top_k if s.lam is None else None)
    layers_figure(out / 'layers.png', rows)
    print(table(rows))
    print(f'base model: {bpb:.3f} bits per byte on held-out text')
    if documents == 1:
        print('the held-out text is one document: errors are over equal parts of it')
    print(f'{sum(seconds.values()):.0f} s, {peak_gb:.1f} GB{" on each rank" * (size > 1)}; '
          f'wrote {", ".join(sorted(p.name for p in out.iterdir()))} in {out}')


if __name__ == '__main__':
    one_line_errors('train.py', main)
