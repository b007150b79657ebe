"""hub/plug.py: a policy of allocator.py inside a model of transformers, and out of it again.

The routers of transformers 5 return (logits, weights, indices) to experts of any number of choices. A forward
hook on each router asks the policy for k and gives the unused choices weight 0 and the index N, one beyond
the last expert: `eager` experts skip it, `grouped_mm` experts compute no rows for it once they are told, as
under expert parallelism, that such indices exist. Tried with transformers 5.23; 5.17 and 5.2 are refused.
"""
import copy

import torch

from allocator import AdaK, Allocators, Counted
from hub.checkpoint import weights_digest
from hub.config import from_hf
from hub.files import InputError
from moe_dispatch import select, used

ROUTERS = {
    'mixtral': 'MixtralTopKRouter',
    'qwen2_moe': 'Qwen2MoeTopKRouter',
    'qwen3_moe': 'Qwen3MoeTopKRouter',
    'olmoe': 'OlmoeTopKRouter',
}


def attach(model, policy):
    """Let a policy of allocator.py, or that of an allocator file, decide k in the model -> its Tally.

    model: a ...ForCausalLM. InputError, and an untouched model, for a family or version that is not known, a
    router that was changed before, quantised experts, or allocators of another base.
    """
    blocks, config = check_blocks(model)
    if not callable(policy):
        weights = []                                           # hub/checkpoint.py:weights_digest
        for block in blocks:
            weights.append(block.gate.weight)                               # (N,C)
            weights.append(block.experts.down_proj[:, 0])                   # (N,F)
        base = weights_digest(weights)
        policy = AdaK(Allocators.load(policy, config, base))
    if policy.k_max > config.n_experts:
        raise InputError(f'attach: up to {policy.k_max} experts, where the model has {config.n_experts}')
    tally = Tally(policy, len(blocks))
    tally.blocks = blocks
    tally.handles = [model.register_forward_pre_hook(tally.see, with_kwargs=True)]
    for layer, block in enumerate(blocks):
        there = on_device(policy, block.gate.weight.device)
        hook = router_hook(layer, there, config, tally)
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
        mask = kwargs.get('attention_mask')
        ids = kwargs.get('input_ids', args[0] if args else None)
        self.real = None
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and ids is not None:
            self.real = mask[:, -ids.shape[1]:].flatten().bool()

    def count(self, layer, x, probs, k):
        if self.real is not None:
            k = k[self.real.to(k.device)]
        super().count(layer, x, probs, k.to(self.counts.device))


def router_hook(layer, policy, config, tally):
    """A forward hook (router, inputs, outputs) -> outputs with the policy's choices."""
    def hook(router, args, outputs):
        logits, weights, _ = outputs
        x = args[0].reshape(-1, args[0].shape[-1])                          # (P,C)
        probs = logits.softmax(-1, dtype=torch.float32)                     # (P,N)
        k = policy(layer, x, probs)                                         # (P,)
        tally.count(layer, x, probs, k)
        width = policy.k_max
        if k.device.type == 'cpu':                                          # a GPU would have to wait for it
            width = int(k.max())
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


def check_blocks(model):
    """([the MoE blocks in order], Config) of a model; InputError unless transformers 5.23 built them so."""
    config = from_hf(model.config.to_dict(), 'attach: the config of the model')
    blocks = [model.model.layers[i].mlp for i in config.moe_layers]
    for block in blocks:
        router, experts = block.gate, block.experts
        forward = 'forward' in vars(router) and not hasattr(router, '_hf_hook')     # accelerate's is fine
        known = (
            type(router).__name__ == ROUTERS.get(config.model_type)
            and not forward
            and not router._forward_hooks
            and hasattr(experts, '_is_expert_parallel')
            and experts.gate_up_proj.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and model.config._experts_implementation in ('eager', 'grouped_mm', 'batched_mm')
        )
        if not known:
            raise InputError(f'attach: {type(router).__name__} and {type(experts).__name__} are of another '
                             f'version of transformers than 5.23, quantised, or changed before (then detach)')
    return blocks, config
