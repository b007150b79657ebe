"""hub/plug.py inside transformers: the same logits as our own model, and none of it left behind."""
import copy
import pickle
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from allocator import Counted, Skip, TopK
from conftest import GOLDEN, ROOT, assert_close, model_and_policy, random_ada_k, random_model, tiny_config
from hub.checkpoint import base_digest, load, save
from hub.config import read_config
from hub.files import InputError
from hub.plug import attach, detach
from model import generate
from run.speed import theirs, twin_of

transformers = pytest.importorskip('transformers', minversion='5.23')
MIXTRAL = GOLDEN / 'mixtral-1'
NAMES = 'mixtral-1', 'qwen2_moe-every-second', 'qwen3_moe-1', 'olmoe-1'
HERE, ELSEWHERE = re.findall(r'```python\n(.*?)```', (ROOT / 'hub/README.md').read_text(), re.DOTALL)
GREEDY = dict(
    do_sample=False,
    eos_token_id=None,
    pad_token_id=0,
)


def opened(folder=MIXTRAL, way='grouped_mm'):
    """The model of transformers in a folder, its experts run in this way."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation=way)
    return model.eval()


def mlp(model, layer):
    return model.model.layers[layer].mlp


def random_tokens(*shape):
    return torch.randint(3, 32, shape)


def ada_k(folder=MIXTRAL):
    """Random allocators for the model in a folder, whose k goes beyond K."""
    config = read_config(folder)
    return random_ada_k(config, config.n_experts)


def saved(folder, tmp_path):
    """The path of a file of `ada_k` for the model in a folder."""
    path = tmp_path / 'allocator.safetensors'
    ada_k(folder).allocators.save(path, base_digest(folder))
    return path


# ================================================================ the same as our own model

@pytest.mark.parametrize('way', ['eager', 'grouped_mm', 'batched_mm'])
@pytest.mark.parametrize('name', NAMES)
def test_logits_and_counts_equal_those_of_our_own_model(name, way, tmp_path):
    folder = GOLDEN / name
    ours = load(folder)
    model = opened(folder, way)
    tokens = random_tokens(2, 20)
    before = model(tokens).logits
    K = ours.config.top_k
    for policy in ada_k(folder), Skip(0.6, K), TopK(K + 1):
        counted = Counted(policy, ours)
        expected = ours(tokens, counted)
        tally = attach(model, policy)
        found = model(tokens).logits
        detach(model)
        assert_close(found, expected)
        assert torch.equal(tally.counts, counted.counts)
    assert torch.equal(model(tokens).logits, before)           # detached: to the last bit
    attach(model.bfloat16(), saved(folder, tmp_path))          # the same base, whatever its dtype


def test_no_row_beyond_the_sum_of_k_is_computed(monkeypatch):
    model = opened()
    rows = []
    grouped = F.grouped_mm

    def spy(x, weight, offs):
        rows.append(int(offs[-1]))
        return grouped(x, weight, offs=offs)
    monkeypatch.setattr(F, 'grouped_mm', spy)
    tally = attach(model, ada_k())
    model(random_tokens(2, 20))
    sums = tally.counts @ torch.arange(tally.k_max + 1)                     # (L,)
    assert rows == sums.repeat_interleave(2).tolist()                       # two matmuls a layer


def test_a_run_of_ours_gives_the_same_through_transformers(smoke):
    out, _ = smoke
    ours, policy = model_and_policy(out)
    model = opened(out / 'base')
    attach(model, out / 'allocator.safetensors')               # with the stand-ins in it
    tokens = random_tokens(8, 60)
    assert_close(model(tokens).logits, ours(tokens, policy))


def test_the_lines_of_the_readme_run_as_they_stand(smoke, tmp_path, monkeypatch, capsys):
    shutil.copytree(smoke[0], tmp_path / 'out' / 'deep')
    monkeypatch.chdir(tmp_path)
    exec(HERE, {})
    assert re.search(r'mean k [\d.]+ of 4', capsys.readouterr().out)


def test_the_readme_from_a_project_with_a_model_of_its_own(tmp_path, monkeypatch):
    allocators = saved(MIXTRAL, tmp_path)
    mine = ModuleType('model')
    monkeypatch.setitem(sys.modules, 'model', mine)
    monkeypatch.delitem(sys.modules, 'allocator')
    folders = [folder for folder in sys.path if folder != str(ROOT)]
    monkeypatch.setattr(sys, 'path', folders.copy())
    names = {}
    exec(ELSEWHERE.replace('/path/to/the/checkout', str(ROOT)), names)
    assert sys.modules['model'] is mine
    assert 'allocator' not in sys.modules
    assert sys.path == folders
    model = opened()
    tally = names['attach'](model, allocators)
    model(random_tokens(2, 3))
    assert tally.counts.sum() == 12


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
    for given in mask, causal, added:
        assert counted(tally, lambda: model(tokens, given)) == 9
    assert counted(tally, lambda: model(inputs_embeds=embedded, attention_mask=mask)) == 9
    for cache in 'dynamic', 'static':
        how = dict(attention_mask=mask, cache_implementation=cache, max_new_tokens=5, **GREEDY)
        assert counted(tally, lambda: model.generate(tokens, **how)) == 9 + 2 * 4
    with pytest.warns(UserWarning, match='is not counted'):
        tally.begin(model.model, (tokens, object()), {})       # a mask that does not tell
    tally.count(0, None, None, torch.ones(12, dtype=torch.long))
    assert tally.unsure == 1
    assert tally.counts[0].sum() == tally.counts[1].sum()


@pytest.mark.parametrize('in_tracker', [False, True])
def test_nothing_behind_the_end_of_a_row_is_counted(in_tracker):
    """Rows end after n tokens; as in lm-eval, `done_tracker` may say so while the rows run on."""
    model = opened()
    tally = attach(model, ada_k())
    tokens = random_tokens(3, 6)

    def run(tokens, *n):
        def stop(ids, scores, **kwargs):
            done = ids.shape[1] - 6 >= torch.tensor(n)
            if in_tracker:
                stop.done_tracker = done.tolist()
                return done.all()
            return done
        model.generate(tokens, max_new_tokens=20, stopping_criteria=[stop], **GREEDY)
    assert counted(tally, lambda: run(tokens, 2, 3, 8)) == 3 * 6 + 1 + 2 + 7
    in_batch = tally.counts
    for row, n in enumerate([2, 3, 8]):
        run(tokens[row:row + 1], n)
    assert torch.equal(tally.counts, 2 * in_batch)
    assert counted(tally, lambda: model(tokens)) == 18         # the next pass is none of generate's


def test_threads_have_passes_of_their_own():
    model = opened().model                                     # as AutoModel gives it
    tally = attach(model, ada_k())
    texts = [random_tokens(1, n) for n in (4, 25, 40)]
    expected = [model(text).last_hidden_state for text in texts]
    once = tally.counts
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(model, texts * 20))
    for i, output in enumerate(found):
        assert_close(output.last_hidden_state, expected[i % 3])
    assert torch.equal(tally.counts, 21 * once)


# ================================================================ models as people have them

class Peft(torch.nn.Sequential):
    """Of the shape of a PeftModel."""

    def get_base_model(self):
        return self[0]


def compiled(model):
    return Peft(torch.compile(model, backend='eager'))


def on_disk(model):
    """Every layer is fetched when it is run."""
    accelerate = pytest.importorskip('accelerate')
    return accelerate.cpu_offload(model, execution_device=torch.device('cpu'))


@pytest.mark.parametrize('wrap', [compiled, on_disk])
def test_wrappers_and_parked_layers(wrap, tmp_path):
    folder = tmp_path / 'model'
    ours = random_model(tiny_config(n_layers=1))
    save(ours, folder)
    tokens = random_tokens(2, 6)
    model = wrap(opened(folder))
    before = model(tokens).logits
    assert_close(before, ours(tokens))
    tally = attach(model, saved(folder, tmp_path))
    assert_close(model(tokens).logits, ours(tokens, ada_k(folder)))
    assert tally.counts.sum() == 12
    detach(model)
    assert torch.equal(model(tokens).logits, before)


def test_detach_leaves_what_it_found_and_an_attached_model_is_not_copied():
    model = opened()
    mlp(model, 1).experts._is_expert_parallel = True           # as on several GPUs
    tokens = random_tokens(2, 6)
    logits = model(tokens, output_router_logits=True).router_logits[0]     # transformers' own hooks stay
    before = [list(vars(part)) for part in model.modules()]
    attach(model, TopK(1))
    assert torch.equal(model(tokens, output_router_logits=True).router_logits[0], logits)
    for refused in copy.deepcopy, pickle.dumps:
        with pytest.raises(InputError, match='detach it before'):
            refused(model)
    detach(model)
    assert [list(vars(part)) for part in model.modules()] == before
    assert [mlp(model, i).experts._is_expert_parallel for i in (0, 1)] == [False, True]
    copy.deepcopy(model)


def test_the_twin_of_bench_reads_and_writes_as_our_model_in_the_same_memory():
    model = random_model(tiny_config(top_k=2))
    twin = twin_of(model)
    tokens = torch.randint(50, (2, 9))
    assert_close(twin(tokens).logits, model(tokens))
    w_in = model.layers[1].mlp.w_in
    assert mlp(twin, 1).experts.gate_up_proj.data_ptr() == w_in.data_ptr()
    for policy in TopK(2), Skip(0.6, 2):
        attach(twin, policy)
        written = theirs({policy: twin}, 'eager', tokens, 5, policy)
        assert torch.equal(written, generate(model, tokens, 5, policy))
        detach(twin)


# ================================================================ bad input

def quantised(block):
    weight = block.experts.gate_up_proj.requires_grad_(False)
    weight.data = weight.data.char()


def old_experts(block):
    del block.experts._is_expert_parallel


def new_way(block):
    block.experts.config._experts_implementation = 'sonicmoe'


@pytest.mark.parametrize('change', [quantised, old_experts, new_way])
def test_a_model_that_is_not_as_expected_is_refused_and_untouched(change):
    model = opened()
    change(mlp(model, 1))
    with pytest.raises(InputError, match='^attach: .* and MixtralExperts are of another version'):
        attach(model, TopK(1))
    assert not mlp(model, 0).gate._forward_hooks


def test_what_does_not_fit_is_refused(tmp_path):
    with torch.device('meta'):
        llama = transformers.LlamaModel(transformers.LlamaConfig(num_hidden_layers=0))
    with pytest.raises(InputError, match="model_type 'llama' is not supported"):
        attach(llama, TopK(1))
    model = opened()
    with pytest.raises(InputError, match='another base model'):
        attach(model, saved(GOLDEN / 'mixtral-2', tmp_path))
    with pytest.raises(InputError, match='up to 99 experts'):
        attach(model, TopK(99))
    with pytest.raises(InputError, match='no policy is attached'):
        detach(model)
    attach(model, TopK(1))
    with pytest.raises(InputError, match='hooked before'):
        attach(model, TopK(1))
