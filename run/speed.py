"""run/speed.py: what bench.py compares with, and how it shows it.

    pairs of times: everything at top-k, and with fewer experts
    transformers over the memory of our weights: a whole Mixtral
    whole models beside each other
    the table

transformers is optional: where it is missing, or of a version that builds its models in another way, its rows
are left out and a line says so.
"""
import sys
from functools import partial

import torch

from allocator import Counted
from hub.config import to_hf
from hub.plug import attach
from model import Transformer, generate
from run.report import markdown
from run.standins import StandIns, blocks, default_rank, rank_in
from run.timing import interleaved
from scale.graph import graph_decoder

CHOICES = 'top-k', 'fewer'                  # numbers of experts
PROMPT = 16                                 # tokens before those that are written


def pairs(about, paths, batches):
    """A row of every path {name: function}, with the times of both batches {one of CHOICES: its arguments}.

    All are timed in the same rounds, so that ratios between them mean something. `about` goes into every row.
    """
    print(f'timing {about["name"]}, {about["stage"]}', file=sys.stderr)
    cases = {}
    for choice, batch in batches.items():
        for path, run in paths.items():
            cases[path, choice] = partial(run, *batch)
    times = interleaved(cases)
    rows = []
    for path in paths:
        of_path = {choice: times[path, choice] for choice in batches}
        rows.append({**about, 'path': path, **of_path})
    return rows


# ================================================================ transformers over our weights

def twin_of(model):
    """transformers' MixtralForCausalLM over the memory of our weights; an error for another family."""
    from transformers import MixtralConfig, MixtralForCausalLM
    assert type(model) is Transformer, 'weights that come and go'
    config = MixtralConfig(**to_hf(model.config))
    with torch.device('meta'):
        twin = MixtralForCausalLM(config).eval()
    tensors = {}
    for name, p in model.named_parameters():
        name = name.replace('mlp.router', 'mlp.gate')
        name = name.replace('mlp.w_in', 'mlp.experts.gate_up_proj')
        name = name.replace('mlp.w_out', 'mlp.experts.down_proj')
        tensors[name if name.startswith('lm_head') else f'model.{name}'] = p
    twin.load_state_dict(tensors, assign=True)
    # a table of its own, not a weight
    twin.model.rotary_emb = type(twin.model.rotary_emb)(config).to(model.device)
    return twin


def theirs(twins, way, prompt, n, choose_k):
    """As model.py:generate, by transformers' own loop. twins {choose_k: their model with that policy}."""
    twin = twins[choose_k]
    twin.config._experts_implementation = way
    return twin.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=n,
        min_new_tokens=n,
        do_sample=False,
        pad_token_id=0,
    )


# ================================================================ whole models beside each other

def random_standins(model):
    """Stand-ins with random weights for every MoE layer: they cost what fitted ones cost."""
    c = model.config
    rank = default_rank(c)
    sizes = (rank, c.dim), (c.dim, rank), (c.dim,)
    like = model.norm.weight
    return [StandIns(*(like.new_ones(c.n_experts, *size).normal_() for size in sizes)) for _ in c.moe_layers]


def with_standins(model, standins, *how):
    """generate(model, *how), with what stands in for experts that do not run."""
    for moe, of_layer in zip(blocks(model), standins):
        moe.standins = of_layer
    generate(model, *how, decoder=graph_decoder)
    for moe in blocks(model):
        moe.standins = None


def whole_rows(name, model, tokens, policy):
    """The rows of one model: ours, and transformers in two ways, at top-k and with the `policy`.

    Each reads tokens (B,T) up to the first new one, and writes a 64th as many behind 1 and behind 8 prompts.
    """
    paths = {'ours': partial(generate, model, decoder=graph_decoder)}
    if rank_in(model) == 0:                                    # else they are timed above
        paths['ours, stand-ins'] = partial(with_standins, model, random_standins(model))
    try:
        twins = {None: twin_of(model), policy: twin_of(model)}
        attach(twins[policy], policy)
        for way in 'eager', 'grouped_mm':                      # in which transformers runs its experts
            paths[f'transformers {way}'] = partial(theirs, twins, way)
    except Exception as e:                                     # a version that is not known may raise any
        print(f'transformers: its rows are left out, {name} ({repr(e)[:200]})')
    n = tokens.numel() // 64
    prompts = tokens.flatten().repeat(8)[:8 * PROMPT].view(8, PROMPT)       # a short text is repeated
    rows = []
    for stage, prompt, new in ('prefill', tokens, 1), ('batch 1', prompts[:1], n), ('batch 8', prompts, n):
        tally = Counted(policy, model)
        generate(model, prompt, new, tally)
        about = {'name': name, 'stage': stage, 'k_share': tally.mean() / model.config.top_k}
        batches = {'top-k': (prompt, new, None), 'fewer': (prompt, new, policy)}
        rows += pairs(about, paths, batches)
    return rows


# ================================================================ the table

def speed_table(rows):
    """Milliseconds, quartiles, share of the limit; in bold the path that the model takes.

    The last columns: how many times as fast as the better of transformers' two ways at top-k.
    """
    theirs = [r for r in rows if r['path'].startswith('transformers')]
    lines = []
    for r in rows:
        bold = '**' if r['path'] == r.get('default') else ''
        line = [r['name'], r['stage'], f'{bold}{r["path"]}{bold}']
        for choice in CHOICES:
            t = r[choice]
            limit = f', {r["limit_ms"][choice] / t["ms"]:.0%}' if 'limit_ms' in r else ''
            line.append(f'{t["ms"]:.2f} ({t["low"]:.2f}-{t["high"]:.2f}){limit}')
        line += [f'{r["fewer"]["ms"] / r["top-k"]["ms"]:.2f}', f'{r["k_share"]:.2f}']
        ways = [
            way['top-k']['ms'] for way in theirs
            if way['name'] == r['name'] and way['stage'] == r['stage']
        ]
        if ways:
            line += [f'{min(ways) / r[choice]["ms"]:.2f}' for choice in CHOICES]
        lines.append(line)
    head = ['', 'stage', 'path', 'ms at top-k', 'ms with fewer', 'time: fewer / top-k', 'k: fewer / top-k']
    if theirs:
        head += ['transformers / this', 'with fewer']
    return markdown(head, lines)
