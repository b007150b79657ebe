"""hub/plug.py inside transformers: the same logits as our own model, and none of it left behind."""
import copy
import pickle
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import run.standins as standins
from allocator import AdaK, Allocators, RandomMix, Skip, TopK, TopP, Watched
from base.frozen import base_model
from conftest import random_model, tiny_config
from hub.checkpoint import base_digest, load
from hub.config import read_config
from hub.files import InputError, read_json
from hub.plug import Tally, attach, detach
from model import generate
from moe_dispatch import moe
from run.speed import theirs, transformers_experts, twin_of
from train import settings_of

transformers = pytest.importorskip('transformers', minversion='5.23')
ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / 'tests' / 'golden'
MIXTRAL = GOLDEN / 'mixtral-1'
NAMES = [
    'mixtral-1',
    'qwen2_moe-1',
    'qwen3_moe-1',
    'olmoe-1',
    'qwen2_moe-every-second',
    'qwen3_moe-tied',
]


def opened(folder=MIXTRAL, way='eager'):
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


def test_no_row_beyond_the_sum_of_k_is_computed(monkeypatch):
    model = opened(way='grouped_mm')
    c = read_config(MIXTRAL)
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
    policy = AdaK.of_run(out, read_config(out / 'base'), base_digest(out / 'base'), 'cpu')
    leads = []

    def look(layer, x, probs, k):
        logits = F.linear(policy.allocators.raw(x, probs), *policy.maps[layer])
        leads.append(logits.topk(2).values @ torch.tensor([1., -1]))
    digest = base_digest(out / 'base')
    tally = attach(model, Watched(policy, look), standins.of_run(out, digest))
    losses = []
    for x, y in zip(inputs.split(1), targets.split(1)):
        logits = model(x).logits[0]
        losses.append(F.cross_entropy(logits, y[0]))
    loss = torch.stack(losses).mean().item()
    assert loss == pytest.approx(row['loss'], abs=1e-4)
    near_tie = torch.cat(leads).min() < 1e-5                   # may be rounded otherwise, and what follows
    assert tally.mean() == pytest.approx(row['mean_k'], rel=1e-4 if near_tie else 1e-12)


def test_the_lines_of_the_readme_run_as_they_stand(smoke, tmp_path, monkeypatch, capsys):
    shutil.copytree(smoke[0], tmp_path / 'out' / 'deep')
    text = (ROOT / 'hub' / 'README.md').read_text()
    lines, _ = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    assert re.search(r'mean k [\d.]+ of 4', capsys.readouterr().out)


# ================================================================ which tokens are counted

def counted(tally, run):
    """How many tokens of every layer the tally counts while this runs."""
    before = tally.counts.sum(1)
    run()
    [n] = set((tally.counts.sum(1) - before).tolist())
    return n


@pytest.mark.parametrize('name', ['mixtral-1', 'qwen2_moe-1'])     # the second makes a dict of masks
def test_padding_is_not_counted_however_the_mask_is_given(name):
    model = opened(GOLDEN / name)
    tally = attach(model, TopK(2))
    tokens = random_tokens(2, 6)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    causal = torch.ones(6, 6).tril().bool() & mask[:, None, None].bool()   # (2,1,6,6)
    added = torch.zeros(2, 1, 6, 6).masked_fill(~causal, -1e9)
    embedded = model.get_input_embeddings()(tokens)
    assert counted(tally, lambda: model(tokens)) == 12
    for given in (mask, causal, added):
        assert counted(tally, lambda: model(tokens, given)) == 9
    assert counted(tally, lambda: model(inputs_embeds=embedded, attention_mask=mask)) == 9
    headless = transformers.AutoModel.from_pretrained(GOLDEN / name)
    assert counted(attach(headless, TopK(1)), lambda: headless(tokens, mask)) == 9
    for cache in ('dynamic', 'static'):
        how = dict(attention_mask=mask, cache_implementation=cache, max_new_tokens=5, **GREEDY)
        assert counted(tally, lambda: model.generate(tokens, **how)) == 9 + 2 * 4
    alone = model.generate(tokens[:1, 3:], max_new_tokens=5, **GREEDY)
    assert torch.equal(model.generate(tokens, **how)[0, 3:], alone[0])
    assert counted(tally, lambda: mlp(model, 0)(embedded)) == 0            # no pass of the model


def test_a_mask_that_does_not_tell_is_said_and_not_counted():
    tally = Tally(TopK(1), 1)
    with pytest.warns(UserWarning, match='is not counted'):
        tally.begin(opened(), (random_tokens(2, 6), object()), {})
    tally.count(0, None, None, torch.ones(12, dtype=torch.long))
    assert tally.unsure == 1
    assert tally.counts.sum() == 0


class Stop(transformers.StoppingCriteria):
    """Rows end after n tokens; as in lm-eval, `done_tracker` may say so while the rows run on."""

    def __init__(self, n, in_tracker):
        self.n = torch.tensor(n)
        self.in_tracker = in_tracker

    def __call__(self, ids, scores, **kwargs):
        done = ids.shape[1] - 6 >= self.n
        if self.in_tracker:
            self.done_tracker = done.tolist()
            return done.all()
        return done


@pytest.mark.parametrize('in_tracker', [False, True])
@pytest.mark.parametrize('cache', ['dynamic', 'static'])
def test_nothing_behind_the_end_of_a_row_is_counted(cache, in_tracker):
    model = opened()
    tally = attach(model, ada_k(read_config(MIXTRAL)))
    tokens = random_tokens(3, 6)

    def run(tokens, *n):
        how = dict(cache_implementation=cache, max_new_tokens=20, **GREEDY)
        model.generate(tokens, stopping_criteria=[Stop(n, in_tracker)], **how)
    assert counted(tally, lambda: run(tokens, 2, 3, 8)) == 3 * 6 + 1 + 2 + 7
    in_batch = tally.counts
    for row, n in enumerate([2, 3, 8]):
        run(tokens[row:row + 1], n)
    assert torch.equal(tally.counts, 2 * in_batch)
    assert counted(tally, lambda: model(tokens)) == 18         # the next pass is none of generate's


def test_threads_have_passes_of_their_own():
    model = opened()
    tally = attach(model, ada_k(read_config(MIXTRAL)))
    texts = [random_tokens(1, n) for n in (4, 25, 40)]
    expected = [model(text).logits for text in texts]
    once = tally.counts

    def run(text):
        return [model(text).logits for _ in range(20)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(run, texts))
    for logits, same in zip(found, expected):
        assert_close(torch.stack(logits), same)
    assert torch.equal(tally.counts, 21 * once)


# ================================================================ models as people have them

@pytest.mark.parametrize('outputs', ['hidden_states', 'router_logits'])
def test_what_transformers_captures_is_there_before_and_after(outputs):
    model = opened()
    how = {f'output_{outputs}': True}
    tokens = random_tokens(2, 6)
    first = model(tokens, **how)[outputs][0]
    attach(model, TopK(1))
    assert torch.equal(model(tokens, **how)[outputs][0], first)


class Peft(torch.nn.Sequential):
    """Of the shape of a PeftModel."""

    def get_base_model(self):
        return self[0]


def on_disk(model):
    """Every layer is fetched when it is run."""
    accelerate = pytest.importorskip('accelerate')
    return accelerate.cpu_offload(model, execution_device=torch.device('cpu'))


@pytest.mark.parametrize('wrap', [
    on_disk,
    lambda model: Peft(torch.compile(model, backend='eager')),
])
def test_wrappers_and_parked_layers(wrap, tmp_path):
    path = tmp_path / 'allocator.safetensors'
    ada_k(read_config(MIXTRAL)).allocators.save(path, base_digest(MIXTRAL))
    plain = opened(way='grouped_mm')
    tokens = random_tokens(2, 6)
    before = plain(tokens).logits
    tally = attach(plain, path)
    expected = plain(tokens).logits
    model = wrap(opened(way='grouped_mm'))
    assert torch.equal(model(tokens).logits, before)
    other = attach(model, path)
    assert torch.equal(model(tokens).logits, expected)
    assert torch.equal(other.counts, tally.counts)
    detach(model)
    assert torch.equal(model(tokens).logits, before)


def test_detach_leaves_what_it_found_and_an_attached_model_is_not_copied():
    model = opened()
    mlp(model, 1).experts._is_expert_parallel = True           # as on several GPUs
    before = [list(vars(part)) for part in model.modules()]
    attach(model, TopK(1))
    for refused in (copy.deepcopy, pickle.dumps):
        with pytest.raises(InputError, match='detach it before'):
            refused(model)
    detach(model)
    assert [list(vars(part)) for part in model.modules()] == before
    assert [mlp(model, i).experts._is_expert_parallel for i in (0, 1)] == [False, True]
    copy.deepcopy(model)


def test_the_readme_from_a_project_with_a_model_of_its_own(tmp_path):
    _, lines = re.findall(r'```python\n(.*?)```', (ROOT / 'hub' / 'README.md').read_text(), re.DOTALL)
    for name in ('model', 'hub'):
        (tmp_path / f'{name}.py').write_text('mine = True\n')
    program = lines.replace('/path/to/the/checkout', str(ROOT)) + f"""
import hub, torch, transformers
assert model.mine and hub.mine
theirs = transformers.AutoModelForCausalLM.from_pretrained({str(MIXTRAL)!r})
tally = attach(theirs, plug.AdaK(plug.Allocators(plug.check_blocks(theirs.model)[1], 3, True)))
theirs(torch.arange(3, 9)[None])
assert tally.mean() == 1 and tally.counts.sum() == 12
detach(theirs)
try:
    import allocator
except ImportError:
    print('nothing of the checkout is left')
"""
    done = subprocess.run(
        [sys.executable, '-c', 'import model\n' + program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == 'nothing of the checkout is left\n', done.stderr


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
    ids, weights, _ = TopK(2).select(probs, k, ours.weighting)
    batch = x, ids, weights, k, ours.w_in, ours.w_out
    cases = transformers_experts(*batch)
    assert len(cases) == 2
    for run in cases.values():
        assert_close(run(), moe(*batch))


# ================================================================ bad input

def test_allocators_of_another_base_are_refused_by_what_differs(smoke):
    out, _ = smoke
    model = opened()
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
    model = opened()
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
    model = opened()
    with pytest.raises(InputError, match='up to 5 experts, where the model has 4'):
        attach(model, TopK(5))
    with pytest.raises(InputError, match='no policy is attached'):
        detach(model)
    with pytest.raises(InputError, match='Linear is no model of transformers'):
        attach(torch.nn.Linear(2, 2), TopK(1))
