"""hub/plug.py: a policy of allocator.py inside a model of transformers, and out of it again.

The routers of transformers 5 return (logits, weights, indices) to experts of any number of choices. A forward
hook on each router asks the policy for k and gives the unused choices weight 0 and the index N, one beyond
the last expert: `eager` experts skip it, `grouped_mm` experts compute no rows for it once they are told, as
under expert parallelism, that such indices exist. Tried with transformers 5.23; 5.17 and 5.2 are refused.
"""
import copy

import torch

from allocator import AdaK, Allocators, Counted
from hub.checkpoint import router_digest
from hub.config import from_hf
from hub.files import InputError
from moe_dispatch import select, used

ROUTERS = {'mixtral': 'MixtralTopKRouter', 'qwen2_moe': 'Qwen2MoeTopKRouter',
           'qwen3_moe': 'Qwen3MoeTopKRouter', 'olmoe': 'OlmoeTopKRouter'}


def attach(model, policy):
    """Let a policy of allocator.py, or that of an allocator file, decide k in the model -> its Tally.

    model: a ...ForCausalLM. InputError, and an untouched model, for a family or version that is not known, a
    router that was changed before, quantised experts, or allocators of another base.
    """
    blocks, config = checked_blocks(model)
    if not callable(policy):
        policy = AdaK(Allocators.load(policy, config, router_digest(b.gate.weight for b in blocks)))
    if policy.k_max > config.n_experts:
        raise InputError(f'attach: up to {policy.k_max} experts, where the model has {config.n_experts}')
    tally = Tally(policy, len(blocks))
    tally.blocks, tally.handles = blocks, [model.register_forward_pre_hook(tally.see, with_kwargs=True)]
    for layer, block in enumerate(blocks):
        hook = router_hook(layer, on_device(policy, block.gate.weight.device), config, tally)
        tally.handles.append(block.gate.register_forward_hook(hook))
        block.experts._is_expert_parallel = True
    model._ada_k = tally
    return tally


def detach(model):
    """Take the policy out again: the model computes what it did before, to the last bit."""
    tally = vars(model).pop('_ada_k', None)
    if tally is None:
        raise InputError('detach: no policy is attached to this model')
    for handle in tally.handles:
        handle.remove()
    for block in tally.blocks:
        block.experts._is_expert_parallel = False


class Tally(Counted):
    """How often each k was chosen in each layer, `counts` (L,k_max+1), at tokens that are no padding."""

    real = None                     # which tokens of this pass, (P,) bool; None: all

    def see(self, model, args, kwargs):
        """Before every pass: which of its tokens are real, by the attention mask where there is one."""
        mask, ids = kwargs.get('attention_mask'), kwargs.get('input_ids', args[0] if args else None)
        known = isinstance(mask, torch.Tensor) and mask.dim() == 2 and ids is not None
        self.real = mask[:, -ids.shape[1]:].flatten().bool() if known else None

    def count(self, layer, x, probs, k):
        real = k if self.real is None else k[self.real.to(k.device)]
        super().count(layer, x, probs, real.to(self.counts.device))


def router_hook(layer, policy, config, tally):
    """A forward hook (router, inputs, outputs) -> outputs with the policy's choices."""
    def hook(router, args, outputs):
        logits, weights, _ = outputs
        x = args[0].reshape(-1, args[0].shape[-1])                          # (P,C)
        probs = logits.softmax(-1, dtype=torch.float32)                     # (P,N)
        k = policy(layer, x, probs)                                         # (P,)
        tally.count(layer, x, probs, k)
        width = int(k.max()) if k.device.type == 'cpu' else policy.k_max   # a GPU would have to wait for it
        ids, chosen = select(probs, k, width, config.norm_topk)             # (P,width) both
        ids = torch.where(used(k, width), ids, config.n_experts)
        return logits, chosen.to(weights.dtype), ids
    return hook


def on_device(policy, device):
    """The policy where a layer is: transformers may spread a model over devices."""
    if isinstance(policy, AdaK) and policy.maps[0][0].device != device:
        policy = copy.copy(policy)
        policy.maps = [(weight.to(device), bias.to(device)) for weight, bias in policy.maps]
    return policy


def checked_blocks(model):
    """([the MoE blocks in order], Config) of a model; InputError names what is not as it should be."""
    try:
        import transformers
    except ImportError:
        raise InputError('attach: needs transformers 5; install it with: pip install transformers') from None
    hf = getattr(model, 'config', None)
    family = getattr(hf, 'model_type', None)
    if family not in ROUTERS:
        raise InputError(f'attach: a model of the family {family!r} is not known, only {", ".join(ROUTERS)}')
    if hasattr(model, '_ada_k'):
        raise InputError('attach: a policy is attached to this model already; detach it first')
    config = from_hf(hf.to_dict())
    blocks = [layer.mlp for i, layer in enumerate(model.model.layers) if i in config.moe_layers]
    for block in blocks:
        router, experts = getattr(block, 'gate', None), getattr(block, 'experts', None)
        if type(router).__name__ != ROUTERS[family] or not hasattr(experts, '_is_expert_parallel'):
            raise InputError(f'attach: transformers {transformers.__version__} builds routers and experts in '
                             f'another way: {type(router).__name__}, {type(experts).__name__}')
        own = type(router).forward.__module__ == type(router).__module__
        patched = 'forward' in vars(router) and not hasattr(router, '_hf_hook')     # accelerate's is fine
        if patched or not own or router._forward_hooks:
            raise InputError('attach: somebody has changed a router of this model already')
        if (dtype := experts.gate_up_proj.dtype).itemsize == 1 or not dtype.is_floating_point:
            raise InputError(f'attach: experts of {dtype} are not supported')
    if (way := hf._experts_implementation) not in ('eager', 'grouped_mm', 'batched_mm'):
        raise InputError(f'attach: experts_implementation {way!r} is not known, eager or grouped_mm is')
    return blocks, config
