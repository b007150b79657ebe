"""hub/plug.py: a policy of allocator.py inside a model of transformers, and out of it again.

The routers of transformers 5 return (logits, weights, indices) to experts of any number of choices. A forward
hook on each router asks the policy for k and gives the unused choices weight 0 and the index N, one beyond
the last expert: `eager` experts skip it, `grouped_mm` experts compute no rows for it once they are told, as
under expert parallelism, that such indices exist. Tried with transformers 5.23; 5.17 and 5.2 are refused.
"""
import contextlib
import inspect
import threading
import warnings

import torch

from allocator import AdaK, Allocators, Counted, Watched
from hub.checkpoint import weights_digest
from hub.config import from_hf
from hub.files import InputError
from moe_dispatch import used
from run import standins


# ================================================================ in and out

def attach(model, policy):
    """Let a policy of allocator.py decide k in the model, with the stand-ins that it brings -> its Tally.

    policy: also the path of a file of allocators. model: of AutoModelForCausalLM or AutoModel, wherever its
    layers lie, also in the wrapper of PEFT or of torch.compile. InputError, and an untouched model, for a
    family or version that is not known, a router that has hooks of others, quantised experts, or allocators
    of another base.
    """
    model, decoder = unwrap(model)
    blocks, config = check_blocks(decoder)
    if not callable(policy):
        base = weights_digest(digest_weights(blocks))
        policy = AdaK(Allocators.load(policy, config, base))
    if policy.k_max > config.n_experts:
        raise InputError(f'attach: up to {policy.k_max} experts, where the model has {config.n_experts}')
    tally = Tally(policy, len(blocks))
    undoing = contextlib.ExitStack()                           # what detach does
    undo = undoing.callback
    eager = torch.compiler.disable                             # a compiled hook would not count
    undo(decoder.register_forward_pre_hook(eager(tally.begin), with_kwargs=True).remove)
    for layer, block in enumerate(blocks):
        how, stand_in = standins.of_layer(config, policy.fitted, layer, block.gate.weight)
        hook = router_hook(layer, tally, how, stand_in, config)
        undo(block.gate.register_forward_hook(eager(hook)).remove)
        if stand_in:
            undo(block.register_forward_hook(eager(tally.add_standins)).remove)
        undo(setattr, block.experts, '_is_expert_parallel', block.experts._is_expert_parallel)
        block.experts._is_expert_parallel = True
    criteria = getattr(model, '_get_stopping_criteria', None)
    if criteria:                                               # it can generate
        model._get_stopping_criteria = lambda *args, **kwargs: noting(criteria(*args, **kwargs), tally.here)
        undo(delattr, model, '_get_stopping_criteria')
    decoder.__reduce_ex__ = refuse_copies
    undo(delattr, decoder, '__reduce_ex__')
    decoder._ada_k = undoing
    torch.compiler.reset()                                     # code compiled before knows of no hooks
    return tally


def detach(model):
    """Take the policy out again: the model computes what it did before, to the last bit."""
    _, decoder = unwrap(model)
    undoing = vars(decoder).pop('_ada_k', None)
    if undoing is None:
        raise InputError('detach: no policy is attached to this model')
    undoing.close()
    torch.compiler.reset()


def refuse_copies(protocol):
    """In the place of what copy.deepcopy and pickle ask: a copy would share the hooks and their counts."""
    raise InputError('a policy is attached to this model: detach it before you copy or pickle the model')


def unwrap(model):
    """(the model of transformers inside its wrappers, of PEFT or torch.compile; the same without a head)."""
    for module in model.modules():                             # the outermost first
        if hasattr(type(module), 'base_model_prefix'):
            return module, module.base_model
    raise InputError(f'attach, detach: {type(model).__name__} is no model of transformers')


def digest_weights(blocks):
    """What hub/checkpoint.py:weights_digest asks for, one layer after the other."""
    for block in blocks:
        yield weight_of(block.gate, 'weight')                               # (N,C)
        yield weight_of(block.experts, 'down_proj')[:, 0]                   # (N,F)


def weight_of(module, name):
    """A weight of a module, also while accelerate keeps it on the disk or on the CPU (device_map)."""
    weight = getattr(module, name)
    if weight.is_meta:
        weight = module._hf_hook.weights_map[name]
    return weight


# ================================================================ what is counted

class Pass(threading.local):
    """A pass through the model, of which each thread may have one."""
    real = None                     # which of its tokens are real, (P,) int64 0 or 1; None: not known
    standing_in = None              # what the block that runs must still add, (P,C)
    ended = ()                      # which rows of its generate have ended, (B,) bool; (): none


class Tally(Counted):
    """How often each k was chosen in each layer, `counts` (L,k_max+1), at the tokens that are real.

    Neither padding is, nor what generate feeds to rows of its batch that have ended. `unsure`: in how many
    passes the mask did not tell which tokens are real; none of these is counted. All beams of a search are.
    """

    def __init__(self, policy, n_layers):
        Watched.__init__(self, policy, self.count)
        self.by_layer = [torch.zeros(self.k_max + 1, dtype=torch.long)] * n_layers
        self.unsure = 0
        self.here = Pass()
        self.lock = threading.Lock()

    @property
    def counts(self):
        return torch.stack([counts.cpu() for counts in self.by_layer])

    def begin(self, decoder, args, kwargs):
        """Before every pass: which of its tokens are real."""
        given = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments
        x = given.get('input_ids')                                          # (B,T)
        if x is None:
            x = given['inputs_embeds']                                      # (B,T,C)
        cache = given.get('past_key_values')
        past = cache.get_seq_length() if cache else 0
        real = real_tokens(x, given.get('attention_mask'), past)
        ended = self.here.ended
        if real is None:
            warnings.warn('attach: a pass is not counted: its mask does not tell which tokens are padding')
            self.unsure += 1
        else:
            if len(ended) == len(x):
                real = real & ~ended[:, None]
            real = real.flatten().long()
        self.here.real = real
        self.here.ended = ()                                   # until generate looks again

    def count(self, layer, x, probs, k):
        """Adds on the device of k (P,): no GPU waits for the host."""
        real = self.here.real
        if real is not None:                       # else a layer by itself, backward's thread, or not known
            with self.lock:
                counts = self.by_layer[layer].to(k.device)
                self.by_layer[layer] = counts.scatter_add(0, k, real.to(k.device))

    def add_standins(self, block, args, output):
        """After a block: its output with what stands in for experts that do not run."""
        return output + self.here.standing_in.view_as(output)


def noting(criteria, here):
    """The stopping criteria of a generate, which also note after every pass which rows have ended."""
    class Ends(type(criteria)):                                # transformers' list of them
        stopped = False                                                     # (B,) bool

        def __call__(self, ids, scores, **kwargs):
            stops = super().__call__(ids, scores, **kwargs)                 # (B,) bool
            self.stopped = self.stopped | stops
            ended = self.stopped
            for criterion in self:
                rows = getattr(criterion, 'done_tracker', [])  # lm-eval's lets a row that has ended run on
                if len(rows) == len(ids):
                    ended = ended | torch.tensor(rows, device=ids.device)
            here.ended = () if self.stopped.all() else ended
            return stops
    return Ends(criteria)


def real_tokens(x, mask, past):
    """Which tokens are no padding, (B,T) bool; None where the mask does not tell.

    x (B,T) or (B,T,C) behind `past` tokens in a cache. mask: None; (B,past+T); (B,1,T,S), bool or added to
    the scores, in which a token is real that sees itself; or a dict of masks of one padding. Those for a
    static cache are as wide as the cache.
    """
    T = x.shape[1]
    if isinstance(mask, dict):
        mask = next(iter(mask.values()))
    if mask is None:
        return x.new_ones(x.shape[:2], dtype=torch.bool)
    if not isinstance(mask, torch.Tensor):                     # flex attention's
        return None
    first = torch.as_tensor(past, device=mask.device).clamp(max=mask.shape[-1] - T)
    t = torch.arange(T, device=mask.device)
    if mask.dim() == 2:
        return mask[:, first + t].bool()
    own = mask[:, 0, t, first + t]
    if own.dtype != torch.bool:
        own = own == 0
    return own.expand(x.shape[:2])


# ================================================================ the hook, and what it may be put into

def router_hook(layer, tally, how, stand_in, config):
    """A forward hook (router, inputs, outputs) -> outputs with the choices of the tally's policy.

    What stands in for experts that do not run waits in tally.here for the end of the block.
    """
    def hook(router, args, outputs):
        logits, weights, _ = outputs
        x = args[0]                                                         # (P,C)
        probs = logits.softmax(-1, dtype=torch.float32)                     # (P,N)
        k = tally(layer, x, probs)                                          # (P,)
        ids, chosen, left = tally.select(probs, k, how)                     # (P,width)
        if stand_in:
            tally.here.standing_in = stand_in(x, ids, left)                 # (P,C)
        ids = torch.where(used(k, ids), ids, config.n_experts)
        return logits, chosen.to(weights.dtype), ids
    return hook


def check_blocks(decoder):
    """([the MoE blocks in order], Config) of a model; InputError unless transformers 5.23 built them so."""
    config = from_hf(decoder.config.to_dict())
    blocks = [decoder.layers[i].mlp for i in config.moe_layers]
    for block in blocks:
        router, experts = block.gate, block.experts
        hooks = {hook.__module__ for hook in router._forward_hooks.values()}
        known = (
            type(router).__name__.endswith('TopKRouter')
            and hooks <= {'transformers.utils.output_capturing'}            # of output_hidden_states, ..
            and '_is_expert_parallel' in vars(experts)
            and experts.gate_up_proj.dtype.itemsize > 1                     # not quantised
            and decoder.config._experts_implementation in ('eager', 'grouped_mm', 'batched_mm')
        )
        if not known:
            raise InputError(f'attach: {type(router).__name__} and {type(experts).__name__} are of another '
                             f'version of transformers than 5.23, quantised, or hooked before (then detach)')
    return blocks, config
