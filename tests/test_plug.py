"""hub/plug.py inside transformers: the same logits as our own model, and none of it left behind."""
import re
import shutil
from pathlib import Path

import pytest
import torch

from allocator import AdaK, Allocators, RandomMix, Skip, TopK, TopP
from bench import Experts
from conftest import random_model, tiny_config
from hub.checkpoint import load, router_digest, routers_of
from hub.config import read_config
from hub.files import InputError
from hub.plug import ROUTERS, attach, detach
from model import generate
from run.beside import beside, beside_lines, transformers_experts, twin_of, write

transformers = pytest.importorskip('transformers', minversion='5.23')
GOLDEN = Path(__file__).parent / 'golden'
NAMES = 'mixtral-1', 'qwen2_moe-1', 'qwen3_moe-1', 'olmoe-1', 'qwen2_moe-every-second', 'qwen3_moe-tied'


def theirs(name, way='eager', **how):
    """The model of transformers, eager experts or grouped."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        name if Path(name).is_dir() else GOLDEN / name, dtype=torch.float32, experts_implementation=way,
        **how).eval()


def ada_k(config, k_max):
    """Allocators with random weights: k differs from token to token, and goes beyond K."""
    allocators = Allocators(config, k_max, True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        allocators.weight.normal_(0, 1, generator=generator)
    return AdaK(allocators)


def policies(c):
    return {'ada-k': ada_k(c, c.n_experts), 'skip': Skip(0.6, c.top_k), 'top-p': TopP(0.6, c.n_experts),
            'static k': TopK(c.top_k + 1), 'random mix': RandomMix(1.5), 'top-k': TopK(c.top_k)}


@pytest.mark.parametrize('way', ['eager', 'grouped_mm', 'batched_mm'])
@pytest.mark.parametrize('name', NAMES)
def test_logits_equal_our_own_model(name, way):
    ours, model, c = load(GOLDEN / name), theirs(name, way), read_config(GOLDEN / name)
    tokens = torch.randint(32, (2, 20), generator=torch.Generator().manual_seed(1))
    before = model(tokens).logits
    for what, policy in policies(c).items():
        torch.manual_seed(0)
        expected = ours(tokens, policy)
        tally = attach(model, policy)
        torch.manual_seed(0)
        found = model(tokens).logits
        detach(model)
        assert (found - expected).abs().max() < 1e-5 * max(1, expected.abs().max()), what
        assert (tally.counts.sum(1) == 40).all(), what
    assert torch.equal(model(tokens).logits, before)           # detached: to the last bit


@pytest.mark.parametrize('name', ['mixtral-1', 'qwen2_moe-1'])
def test_generation_with_a_cache_equals_ours(name):
    ours, model, c = load(GOLDEN / name), theirs(name, 'grouped_mm'), read_config(GOLDEN / name)
    tokens = torch.randint(3, 32, (1, 7), generator=torch.Generator().manual_seed(2))
    for policy in (ada_k(c, c.top_k), Skip(0.6, c.top_k)):
        tally = attach(model, policy)
        found = model.generate(tokens, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        detach(model)
        assert torch.equal(found, generate(ours, tokens, 12, policy))
        assert tally.counts.sum() == (7 + 11) * len(c.moe_layers)             # the last token is not run


def test_padding_is_not_counted_and_changes_nothing():
    model, c = theirs('mixtral-1', 'grouped_mm'), read_config(GOLDEN / 'mixtral-1')
    rows = [[5, 6, 7], [8, 9, 10, 11, 12, 13]]
    padded = torch.tensor([[0] * (6 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (6 - len(row)) + [1] * len(row) for row in rows])
    how = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    tally = attach(model, ada_k(c, c.n_experts))
    together = model.generate(padded, attention_mask=mask, **how)
    in_batch = tally.counts.clone()
    for row, whole in zip(rows, together):
        alone = model.generate(torch.tensor([row]), **how)
        assert torch.equal(alone[0], whole[6 - len(row):])
    assert torch.equal(tally.counts - in_batch, in_batch)


def test_no_row_beyond_the_sum_of_k_is_computed(monkeypatch):
    c, model = read_config(GOLDEN / 'mixtral-1'), theirs('mixtral-1', 'grouped_mm')
    rows, grouped = [], torch.nn.functional.grouped_mm

    def spy(x, weight, offs):
        rows.append(int(offs[-1]))
        return grouped(x, weight, offs=offs)
    monkeypatch.setattr(torch.nn.functional, 'grouped_mm', spy)
    tally = attach(model, ada_k(c, c.n_experts))
    model(torch.randint(32, (2, 20)))
    k = (tally.counts * torch.arange(c.n_experts + 1)).sum(1)               # (L,)
    assert rows == [n for layer in k.tolist() for n in (layer, layer)]      # two matmuls a layer
    assert k.sum() < 40 * len(k) * c.n_experts


def test_a_run_of_ours_gives_its_own_loss_through_transformers(smoke):
    import json

    import train
    from base.frozen import base_model
    s = train.run_settings(smoke[0])
    results = json.loads((smoke[0] / 'results.json').read_text())
    inputs, targets, _ = base_model(s, smoke[0])[2][2].windows(s.seq, s.heldout_tokens)
    model = theirs(str(smoke[0] / 'base'))
    tally = attach(model, smoke[0] / 'allocator.safetensors')
    losses = [torch.nn.functional.cross_entropy(model(x).logits.flatten(0, 1), y.flatten(), reduction='sum')
              for x, y in zip(inputs.split(8), targets.split(8))]
    row = results['rows'][1]
    assert row['method'] == 'ada-k'
    assert sum(losses).item() / targets.numel() == pytest.approx(row['loss'], abs=1e-4)
    assert tally.mean() == pytest.approx(row['mean_k'], abs=1e-6)


def test_the_lines_of_the_readme_run_as_they_stand(smoke, tmp_path, monkeypatch, capsys):
    shutil.copytree(smoke[0], tmp_path / 'out' / 'deep')
    text = (Path(__file__).parent.parent / 'hub' / 'README.md').read_text()
    [lines] = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    assert re.search(r'mean k [\d.]+ of 4', capsys.readouterr().out)


# ---------------------------------------------------------------- whole models beside each other

def test_the_twin_is_the_same_model_in_the_same_memory():
    model = random_model(tiny_config(dim=32, expert_dim=16, top_k=2))
    twin, tokens = twin_of(model), torch.randint(50, (2, 9))
    assert (twin(tokens).logits - model(tokens)).abs().max() < 1e-5 * model(tokens).abs().max()
    model.layers[1].mlp.w_in[0, 0, 0] += 1
    assert twin.model.layers[1].mlp.experts.gate_up_proj[0, 0, 0] == model.layers[1].mlp.w_in[0, 0, 0]
    assert torch.equal(write(twin, tokens, 5), generate(model, tokens, 5))


def test_every_stage_is_timed_and_a_version_that_is_not_known_costs_its_rows_only(monkeypatch, capsys):
    model, tokens = random_model(tiny_config(dim=32, expert_dim=16, top_k=2)), torch.randint(50, (1, 160))
    rows = beside(model, tokens, Skip(0.6, 2), 3, 2, 'tiny')
    assert {(r['stage'], r['case']) for r in rows} == {
        (stage, case) for stage in ('prefill', 'batch 1', 'batch 8')
        for case in ('ours, K', 'ours, fewer', 'transformers, eager', 'transformers, grouped_mm',
                     'attached, eager', 'attached, grouped_mm')}
    assert all(r['tokens_per_s'] == pytest.approx(1000 * n / r['ms']) for r in rows
               for n in [{'prefill': 160, 'batch 1': 3, 'batch 8': 24}[r['stage']]])
    monkeypatch.setitem(ROUTERS, 'mixtral', 'AnotherRouter')
    rows = beside(model, tokens, Skip(0.6, 2), 3, 2, 'tiny')
    assert {r['case'].split(',')[0] for r in rows} == {'ours', 'transformers'}
    assert 'builds routers and experts in another way' in capsys.readouterr().out
    another = torch.nn.Linear(1, 1).load_state_dict            # knows no such tensors
    monkeypatch.setattr(transformers.MixtralForCausalLM, 'load_state_dict', another)
    rows = beside(model, tokens, Skip(0.6, 2), 3, 2, 'tiny')
    assert {r['case'] for r in rows} == {'ours, K', 'ours, fewer'}
    assert 'builds Mixtral in another way' in capsys.readouterr().out and '| - |' in beside_lines(rows)


def test_experts_of_a_version_that_is_not_known_cost_their_rows_only(monkeypatch, capsys):
    experts = Experts((32, 16, 4, 2, 8, (0.5, 0.5), 0), torch.float32, torch.device('cpu'))
    assert len(transformers_experts(experts)) == 3
    from transformers.models.mixtral import modeling_mixtral
    monkeypatch.setattr(modeling_mixtral.MixtralExperts, 'forward', lambda self, x: x)
    assert transformers_experts(experts) == {}
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and all('rows are left out' in line for line in said)


# ---------------------------------------------------------------- bad input

def test_allocators_of_another_base_are_refused_by_what_differs(smoke, tmp_path):
    model = theirs('mixtral-1')
    with pytest.raises(InputError, match='n_vocab 320, this one has 32'):
        attach(model, smoke[0] / 'allocator.safetensors')
    other = theirs(str(smoke[0] / 'base'))
    with torch.no_grad():
        other.model.layers[1].mlp.gate.weight[0, 0] += 1
    with pytest.raises(InputError, match='other weights'):
        attach(other, smoke[0] / 'allocator.safetensors')
    assert not hasattr(model, '_ada_k') and not model.model.layers[0].mlp.gate._forward_hooks


def test_the_digest_of_the_files_is_that_of_the_loaded_model():
    for name in NAMES:
        gates = [layer.mlp.gate.weight for layer in theirs(name).model.layers if hasattr(layer.mlp, 'gate')]
        assert router_digest(gates) == router_digest(routers_of(GOLDEN / name))


def patched_router(model):
    model.model.layers[1].mlp.gate.forward = lambda x: x


def hooked_router(model):
    model.model.layers[1].mlp.gate.register_forward_hook(lambda *a: None)


def another_router(model):
    model.model.layers[1].mlp.gate = torch.nn.Linear(32, 4)


def quantised(model):
    model.model.layers[0].mlp.experts.gate_up_proj = torch.nn.Parameter(
        torch.zeros(4, 16, 32, dtype=torch.int8), requires_grad=False)


def old_experts(model):
    del model.model.layers[0].mlp.experts._is_expert_parallel


def new_way(model):
    model.config._experts_implementation = 'sonicmoe'


@pytest.mark.parametrize('change, says', [
    (patched_router, 'changed a router'), (hooked_router, 'changed a router'), (another_router, 'Linear'),
    (quantised, 'int8'), (old_experts, transformers.__version__), (new_way, 'sonicmoe'),
    (lambda model: attach(model, TopK(1)), 'already')])
def test_a_model_that_is_not_as_expected_is_refused_and_untouched(change, says):
    model = theirs('mixtral-1')
    change(model)
    hooks = [len(layer.mlp.gate._forward_hooks) for layer in model.model.layers]
    with pytest.raises(InputError, match=says) as error:
        attach(model, TopK(1))
    assert '\n' not in str(error.value)
    assert hooks == [len(layer.mlp.gate._forward_hooks) for layer in model.model.layers]


def test_other_families_a_second_detach_and_too_many_experts_are_refused():
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8))
    with pytest.raises(InputError, match="family 'llama'"):
        attach(llama, TopK(1))
    model = theirs('mixtral-1')
    with pytest.raises(InputError, match='up to 5 experts, where the model has 4'):
        attach(model, TopK(5))
    with pytest.raises(InputError, match='no policy is attached'):
        detach(model)
