"""run/beside.py: a whole model beside transformers: the same weights in memory, the same prompt, in turn.

Rows are of one model, dtype and stage: reading a prompt, or writing behind one for 1 or 8 texts at once. Who
runs: ours at K, ours with allocators that run fewer experts, transformers' two ways at K, and the better of
them with our allocators attached.
"""
import contextlib
import statistics

import torch
import torch.nn as nn

from allocator import Counted
from hub.config import to_hf
from hub.files import InputError
from hub.plug import attach, detach
from model import generate
from run.report import markdown
from run.timing import interleaved, summary

WAYS = 'eager', 'grouped_mm'
PROMPT = 16             # tokens before those that are written
# what a version of transformers that is not known may raise
UNKNOWN = AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError


def transformers_experts(e):
    """{name: module(x, ids, weights)} of transformers' implementations on our weights; {} without it."""
    try:
        from transformers import MixtralConfig, __version__
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    except ImportError:
        return {}
    found = {}
    for name in ('eager', 'grouped_mm', 'batched_mm'):
        try:
            config = MixtralConfig(hidden_size=e.C, intermediate_size=e.F, num_local_experts=e.N,
                                   num_experts_per_tok=e.K)
            config._experts_implementation = name
            with torch.device('meta'):
                module = MixtralExperts(config)
            module.gate_up_proj, module.down_proj = nn.Parameter(e.w_in, False), nn.Parameter(e.w_out, False)
            ids = torch.zeros(1, e.K, dtype=torch.long, device=e.w_in.device)
            module(e.w_in.new_zeros(1, e.C), ids, e.w_in.new_zeros(1, e.K))         # does it run?
        except UNKNOWN as error:
            print(f'transformers {__version__} builds {name} experts in another way: their rows are left out '
                  f'({" ".join(str(error).split())[:100]})', flush=True)
        else:
            found[f'transformers {__version__} {name}'] = module
    return found


def twin_of(model):
    """transformers' MixtralForCausalLM over the memory of our weights; InputError where it cannot be."""
    try:
        import transformers
    except ImportError:
        raise InputError('transformers is not installed: its rows are left out') from None
    hf = to_hf(model.config)
    config = transformers.MixtralConfig(**{name: value for name, value in hf.items() if name != 'model_type'})
    spelling = {'router.weight': 'gate.weight', 'w_in': 'experts.gate_up_proj', 'w_out': 'experts.down_proj'}
    tensors = {}
    for name, p in model.named_parameters():
        name = name if name.startswith('lm_head') else f'model.{name}'
        for ours, theirs in spelling.items():
            name = name.replace(f'mlp.{ours}', f'mlp.{theirs}')
        tensors[name] = p
    try:
        with torch.device('meta'):
            twin = transformers.MixtralForCausalLM(config).eval()
        twin.load_state_dict(tensors, assign=True)
        twin.requires_grad_(False)
        twin.model.rotary_emb = type(twin.model.rotary_emb)(config).to(model.device)        # not a weight
        tokens = torch.arange(8, device=model.device)[None]
        assert (twin(tokens).logits - model(tokens)).abs().max() < 0.1, 'other logits'
    except UNKNOWN as e:
        raise InputError(f'transformers {transformers.__version__} builds Mixtral in another way: '
                         f'its rows are left out ({" ".join(str(e).split())[:100]})') from None
    return twin


@contextlib.contextmanager
def attached(twin, policy):
    attach(twin, policy)
    yield
    detach(twin)


def write(twin, tokens, n):
    """n tokens behind tokens (B,T) by transformers' own loop, greedy."""
    return twin.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=n, min_new_tokens=n,
                         do_sample=False, pad_token_id=0)


def stages_of(tokens, n):
    """{name: (tokens to read (B,T), how many to write)}."""
    return {'prefill': (tokens, 0), 'batch 1': (tokens[:, :PROMPT], n),
            'batch 8': (tokens.view(8, -1)[:, :PROMPT], n)}


@torch.no_grad()
def beside(model, tokens, policy, n, rounds, name):
    """The rows of one model: tokens (1,T) are read, n are written; `policy` runs fewer experts."""
    twin, who, rows = None, [], []
    try:
        twin = twin_of(model)
        who.append('transformers')
        with attached(twin, policy):
            who.append('attached')
    except InputError as e:                        # an unknown version: what can be measured still is
        print(e, flush=True)
    for stage, (prompt, new) in stages_of(tokens, n).items():
        def ours(choose_k):
            return generate(model, prompt, new, choose_k) if new else model(prompt, choose_k)

        def theirs(way):
            twin.config._experts_implementation = way
            return write(twin, prompt, new) if new else twin(prompt)

        def around(case):
            return attached(twin, policy) if case.startswith('attached') else contextlib.nullcontext()
        cases = {'ours, K': lambda: ours(None), 'ours, fewer': lambda: ours(policy)}
        for whose in who:
            cases.update({f'{whose}, {way}': lambda way=way: theirs(way) for way in WAYS})
        times = interleaved(cases, rounds if new else rounds + 2, model.device, around)
        tally = Counted(policy, len(model.config.moe_layers), model.device)
        generate(model, prompt, new, tally) if new else model(prompt, tally)
        n_tokens = prompt.shape[0] * (new or prompt.shape[1])
        for case, spent in times.items():
            rows.append({'model': name, 'dtype': str(model.dtype).removeprefix('torch.'), 'stage': stage,
                         'case': case, **summary(spent),
                         'tokens_per_s': n_tokens / statistics.median(spent),
                         'mean_k': tally.mean(), 'K': model.config.top_k})
    return rows


def beside_lines(rows):
    """The table: tokens per second, and how many times as fast as the better of transformers' ways at K."""
    lines, groups = [], {}
    for r in rows:
        groups.setdefault((r['model'], r['dtype'], r['stage']), {})[r['case']] = r
    for (model, dtype, stage), cases in groups.items():
        theirs = [r for case, r in cases.items() if case.startswith('transformers')]
        best = min(theirs, key=lambda r: r['ms']) if theirs else None
        attached = min((r for case, r in cases.items() if case.startswith('attached')), default=None,
                       key=lambda r: r['ms'])

        def times(r):
            """A ratio of medians, and of the outer quartiles."""
            if best is None or r is None:
                return '-'
            return f'{best["ms"] / r["ms"]:.2f} ({best["low"] / r["high"]:.2f}-{best["high"] / r["low"]:.2f})'
        ours, fewer = cases['ours, K'], cases['ours, fewer']
        lines.append([model, dtype, stage, f'{fewer["mean_k"] / fewer["K"]:.2f}',
                      f'{ours["tokens_per_s"]:,.0f}', f'{best["tokens_per_s"]:,.0f}' if best else '-',
                      best['case'].split(', ')[1] if best else '-', *map(times, (ours, fewer, attached))])
    return markdown(['model', 'dtype', 'stage', 'fewer: mean k / K', 'ours, tokens/s', 'theirs, tokens/s',
                     'their way', 'ours, K', 'ours, fewer', 'theirs with ours attached'], lines)
