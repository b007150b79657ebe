"""Small models for the tests, one finished smoke run, programs in processes of their own."""
import contextlib
import io
import multiprocessing
import os
import shutil
import socket
import sys
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / 'tests/golden'
sys.path.insert(0, str(ROOT))
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device here')


def tiny_config(**changes):
    from model import Config
    sizes = dict(
        n_vocab=50,
        dim=32,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        n_experts=8,
        top_k=3,
        expert_dim=16,
    )
    return Config(**{**sizes, **changes})


def random_model(config, seed=0):
    """Weights large enough that routing and logits depend on every part."""
    from model import Transformer
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            std = 1 if p.dim() == 1 else 1.5 * p.shape[-1] ** -0.5
            p.normal_(0, std, generator=generator)
    return model.requires_grad_(False)


def random_ada_k(config, k_max):
    """Allocators with random weights, the same at every call: k differs from token to token."""
    from allocator import AdaK, Allocators
    allocators = Allocators(config, k_max, True)
    generator = torch.Generator().manual_seed(3)
    allocators.weight.data.normal_(generator=generator)
    return AdaK(allocators)


def random_text(n, T=16):
    """n tokens of the vocabulary of tiny_config, one document, in windows of T."""
    from base.text import Text
    return Text(torch.randint(50, (n,)), torch.zeros(n), T)


def assert_close(found, expected):
    """Logits or hidden states are the same but for rounding errors."""
    largest = expected.abs().max()
    assert (found - expected).abs().max() < 1e-5 * max(1, largest)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope='session', autouse=True)
def one_library():
    """The standard library, the text of most runs, is read once."""
    import base.frozen
    read = base.frozen.read_documents

    @cache
    def library(documents, prose):
        return read(SimpleNamespace(data='', documents=documents, prose=prose))

    def read_once(s):
        return read(s) if s.data else library(s.documents, s.prose)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base.frozen, 'read_documents', read_once)
        yield


@pytest.fixture(scope='session')
def smoke(tmp_path_factory):
    """(folder, what was printed) of one finished smoke run."""
    import train
    forkserver.ensure_running()                                # it imports what it preloads meanwhile
    out = tmp_path_factory.mktemp('smoke')
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        train.main(['--preset', 'smoke', '--out', str(out)])
    return out, printed.getvalue()


@pytest.fixture
def finished(smoke, tmp_path):
    """A copy of the finished run, to be harmed."""
    return shutil.copytree(smoke[0], tmp_path / 'run')


def rows_of(out):
    """{method: its row} in the results.json of a run."""
    from hub.files import read_json
    return {row['method']: row for row in read_json(out / 'results.json')['rows']}


def model_and_policy(out):
    """(the model with its stand-ins, the policy) of a finished run."""
    import run.standins as standins
    from hub.checkpoint import base_digest, load
    from run.state import trained_policy
    model = load(out / 'base')
    policy = trained_policy(out, model.config, base_digest(out / 'base'))
    standins.use(model, policy.fitted)
    return model, policy


# ---------------------------------------------------------------- processes

# a process that has imported what takes long, and is forked for every program that is started
server = multiprocessing.get_context('forkserver')
server.set_forkserver_preload(['train', 'torch._dynamo'])


def look_at_less(patch):
    """Less text on which policies are measured; too little to choose among rules, near ties would decide."""
    import run.rules
    import train
    patch.setattr(run.rules, 'SEARCH_TOKENS', 512)
    patch.setitem(train.PRESETS['smoke'], 'heldout_tokens', 512)
    patch.setattr(run.rules, 'FAMILIES', ['one beta'])


@pytest.fixture(scope='module')
def quick(smoke):
    """The flags of a short run on the base of `smoke`, which this fixture finds already there."""
    with pytest.MonkeyPatch.context() as patch:
        look_at_less(patch)
        yield '--preset', 'smoke', '--ckpt', str(smoke[0] / 'base'), '--data', str(ROOT / 'train.py')


def program(main, args, environment, printed):
    """In a process of its own: main(args), as its script runs it; output goes to `printed`.out and .err."""
    from run.console import one_line_errors
    os.environ.update(environment)
    for number, end in (1, 'out'), (2, 'err'):
        os.dup2(os.open(f'{printed}.{end}', os.O_WRONLY | os.O_CREAT), number)
    look_at_less(pytest.MonkeyPatch())
    one_line_errors('train.py', main, [str(a) for a in args])


def meeting(size):
    """[the environment of every rank], as torchrun gives it, of ranks that meet here."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    common = {**os.environ, 'WORLD_SIZE': str(size), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
    return [{**common, 'RANK': str(rank), 'LOCAL_RANK': str(rank)} for rank in range(size)]


def start(folder, *programs):
    """Processes that run (main, arguments), .. as ranks 0, 1, .. and print into files of the folder."""
    processes = []
    for (main, args), environment in zip(programs, meeting(len(programs))):
        printed = folder / f'{environment["MASTER_PORT"]}-{environment["RANK"]}'
        process = server.Process(target=program, args=(main, args, environment, printed), daemon=True)
        process.printed = printed
        process.start()
        processes.append(process)
    return processes


def finish(processes):
    """[(status, stdout, stderr), ..]"""
    for p in processes:
        p.join(200)
    return [(p.exitcode, *[Path(f'{p.printed}.{end}').read_text() for end in ('out', 'err')])
            for p in processes]


def refusal(capsys, script, main, *args):
    """The line with which a program refuses its arguments: status 2, nothing before it but progress."""
    from run.console import one_line_errors
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        one_line_errors(script, main, [str(a) for a in args])
    *before, line = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2
    assert line.startswith(f'{script}: ')
    assert all(progress.startswith(('load', 'base', 'stand-ins')) for progress in before)
    return line
