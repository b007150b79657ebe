"""hub/plug.py inside transformers: the same logits as our own model, and none of it left behind."""
import re
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from allocator import AdaK, Allocators, RandomMix, Skip, TopK, TopP
from base.frozen import base_model
from conftest import random_model, tiny_config
from hub.checkpoint import base_digest, load
from hub.config import read_config
from hub.files import InputError, read_json
from hub.plug import attach, detach
from model import generate
from moe_dispatch import moe
from run.speed import theirs, transformers_experts, twin_of
from train import settings_of

transformers = pytest.importorskip('transformers', minversion='5.23')
ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / 'tests' / 'golden'
NAMES = [
    'mixtral-1',
    'qwen2_moe-1',
    'qwen3_moe-1',
    'olmoe-1',
    'qwen2_moe-every-second',
    'qwen3_moe-tied',
]


def opened(folder, way='eager'):
    """The model of transformers in a folder, its experts run in this way."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation=way)
    return model.eval()


def mlp(model, layer):
    return model.model.layers[layer].mlp


def hooks(model):
    return [len(layer.mlp.gate._forward_hooks) for layer in model.model.layers]


def assert_close(found, expected, what=''):
    largest = expected.abs().max()
    assert (found - expected).abs().max() < 1e-5 * max(1, largest), what


def random_tokens(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 32, shape, generator=generator)


GREEDY = dict(
    do_sample=False,
    eos_token_id=None,
    pad_token_id=0,
)


def ada_k(config):
    """Allocators with random weights: k differs from token to token, and goes beyond K."""
    allocators = Allocators(config, config.n_experts, True)
    generator = torch.Generator().manual_seed(3)
    allocators.weight.data.normal_(generator=generator)
    return AdaK(allocators)


def policies(c):
    return {
        'ada-k': ada_k(c),
        'skip': Skip(0.6, c.top_k),
        'top-p': TopP(0.6, c.n_experts),
        'static k': TopK(c.top_k + 1),
        'random-mix': RandomMix(1.5),
        'top-k': TopK(c.top_k),
    }


# ================================================================ the same as our own model

@pytest.mark.parametrize('way', ['eager', 'grouped_mm', 'batched_mm'])
@pytest.mark.parametrize('name', NAMES)
def test_logits_equal_our_own_model(name, way):
    ours = load(GOLDEN / name)
    model = opened(GOLDEN / name, way)
    tokens = random_tokens(2, 20)
    before = model(tokens).logits
    for what, policy in policies(ours.config).items():
        torch.manual_seed(0)
        expected = ours(tokens, policy)
        tally = attach(model, policy)
        torch.manual_seed(0)
        found = model(tokens).logits
        detach(model)
        assert_close(found, expected, what)
        assert set(tally.counts.sum(1).tolist()) == {40}
    assert torch.equal(model(tokens).logits, before)           # detached: to the last bit


@pytest.mark.parametrize('name', ['mixtral-1', 'qwen2_moe-1'])
def test_generation_with_a_cache_equals_ours(name):
    ours = load(GOLDEN / name)
    model = opened(GOLDEN / name, 'grouped_mm')
    c = ours.config
    tokens = random_tokens(1, 7)
    n_run = 7 + 11                                             # the last token is not run
    for policy in (ada_k(c), Skip(0.6, c.top_k)):
        tally = attach(model, policy)
        found = model.generate(tokens, max_new_tokens=12, **GREEDY)
        detach(model)
        expected = generate(ours, tokens, 12, policy)
        assert torch.equal(found, expected)
        assert tally.counts.sum() == n_run * len(c.moe_layers)


def test_padding_is_not_counted_and_changes_nothing():
    model = opened(GOLDEN / 'mixtral-1', 'grouped_mm')
    padded = random_tokens(2, 6)
    mask = torch.ones_like(padded)
    padded[0, :3] = 0
    mask[0, :3] = 0
    tally = attach(model, ada_k(read_config(GOLDEN / 'mixtral-1')))
    together = model.generate(padded, attention_mask=mask, max_new_tokens=5, **GREEDY)
    in_batch = tally.counts.clone()
    for row, begin in (0, 3), (1, 0):
        prompt = padded[row:row + 1, begin:]
        alone = model.generate(prompt, max_new_tokens=5, **GREEDY)
        assert torch.equal(alone[0], together[row, begin:])
    assert torch.equal(tally.counts, 2 * in_batch)


def test_no_row_beyond_the_sum_of_k_is_computed(monkeypatch):
    model = opened(GOLDEN / 'mixtral-1', 'grouped_mm')
    c = read_config(GOLDEN / 'mixtral-1')
    rows = []
    grouped = F.grouped_mm

    def spy(x, weight, offs):
        rows.append(int(offs[-1]))
        return grouped(x, weight, offs=offs)
    monkeypatch.setattr(F, 'grouped_mm', spy)
    tally = attach(model, ada_k(c))
    model(random_tokens(2, 20))
    k = torch.arange(c.n_experts + 1)
    sums = tally.counts @ k                                                 # (L,)
    assert rows == sums.repeat_interleave(2).tolist()                       # two matmuls a layer
    assert sums.max() < 40 * c.n_experts


def test_a_run_of_ours_gives_its_own_loss_through_transformers(smoke):
    out, _ = smoke
    flags = Namespace(run=out, ckpt='', device='cpu', stream=False)
    s = settings_of(flags)
    row = read_json(out / 'results.json')['rows'][1]
    assert row['method'] == 'ada-k'
    _, _, texts = base_model(s, out)
    inputs, targets, _ = texts[2].windows(s.seq, s.heldout_tokens)
    model = opened(out / 'base')
    tally = attach(model, out / 'allocator.safetensors')
    losses = []
    for x, y in zip(inputs.split(1), targets.split(1)):
        logits = model(x).logits[0]
        losses.append(F.cross_entropy(logits, y[0]))
    loss = torch.stack(losses).mean().item()
    assert loss == pytest.approx(row['loss'], abs=1e-4)
    # of 16,384 decisions a few are ties to the last bit, and batches of another size may round them otherwise
    assert tally.mean() == pytest.approx(row['mean_k'], abs=5 / 16384)


def test_the_lines_of_the_readme_run_as_they_stand(smoke, tmp_path, monkeypatch, capsys):
    shutil.copytree(smoke[0], tmp_path / 'out' / 'deep')
    text = (ROOT / 'hub' / 'README.md').read_text()
    [lines] = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    assert re.search(r'mean k [\d.]+ of 4', capsys.readouterr().out)


# ================================================================ what bench.py compares with

def test_the_twin_is_the_same_model_in_the_same_memory():
    model = random_model(tiny_config(top_k=2))
    twin = twin_of(model)
    tokens = torch.randint(50, (2, 9))
    assert_close(twin(tokens).logits, model(tokens))
    w_in = model.layers[1].mlp.w_in
    assert mlp(twin, 1).experts.gate_up_proj.data_ptr() == w_in.data_ptr()
    found = theirs(twin, 'eager', tokens, 5)
    assert torch.equal(found, generate(model, tokens, 5))


def test_experts_of_transformers_equal_ours():
    model = random_model(tiny_config(top_k=2))
    ours = model.layers[0].mlp
    x = torch.randn(8, 32)
    k = torch.randint(1, 3, (8,))
    probs = ours.router(x).softmax(-1)
    ids, weights = TopK(2).select(probs, k, True)
    batch = x, ids, weights, k, ours.w_in, ours.w_out
    cases = transformers_experts(*batch)
    assert len(cases) == 2
    for run in cases.values():
        assert_close(run(), moe(*batch))


# ================================================================ bad input

def test_allocators_of_another_base_are_refused_by_what_differs(smoke):
    out, _ = smoke
    model = opened(GOLDEN / 'mixtral-1')
    with pytest.raises(InputError, match='another base model'):
        attach(model, out / 'allocator.safetensors')
    assert not hasattr(model, '_ada_k')
    assert hooks(model) == [0, 0]
    for part in ('gate.weight', 'experts.down_proj'):
        other = opened(out / 'base')
        weight = mlp(other, 1).get_parameter(part).data
        weight.view(-1)[0] += 1
        with pytest.raises(InputError, match='another base model'):
            attach(other, out / 'allocator.safetensors')


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_the_digest_of_the_files_is_that_of_the_loaded_model(name, dtype, tmp_path):
    folder = GOLDEN / name
    path = tmp_path / 'allocator.safetensors'
    policy = ada_k(read_config(folder))
    policy.allocators.save(path, base_digest(folder))
    model = opened(folder).to(dtype)
    attach(model, path)


def patched_router(model):
    mlp(model, 1).gate.forward = lambda x: x


def hooked_router(model):
    mlp(model, 1).gate.register_forward_hook(lambda *a: None)


def another_router(model):
    mlp(model, 1).gate = torch.nn.Linear(32, 4)


def quantised(model):
    weight = mlp(model, 0).experts.gate_up_proj.requires_grad_(False)
    weight.data = weight.data.char()


def old_experts(model):
    del mlp(model, 0).experts._is_expert_parallel


def new_way(model):
    model.config._experts_implementation = 'sonicmoe'


def attached(model):
    attach(model, TopK(1))


@pytest.mark.parametrize('change', [
    patched_router,
    hooked_router,
    another_router,
    quantised,
    old_experts,
    new_way,
    attached,
])
def test_a_model_that_is_not_as_expected_is_refused_and_untouched(change):
    model = opened(GOLDEN / 'mixtral-1')
    change(model)
    before = hooks(model)
    with pytest.raises(InputError, match='^attach: .* and MixtralExperts are of another version') as error:
        attach(model, TopK(1))
    assert '\n' not in str(error.value)
    assert hooks(model) == before


def test_other_families_a_second_detach_and_too_many_experts_are_refused():
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
    )
    llama = transformers.LlamaForCausalLM(config)
    with pytest.raises(InputError, match="model_type 'llama' is not supported"):
        attach(llama, TopK(1))
    model = opened(GOLDEN / 'mixtral-1')
    with pytest.raises(InputError, match='up to 5 experts, where the model has 4'):
        attach(model, TopK(5))
    with pytest.raises(InputError, match='no policy is attached'):
        detach(model)
