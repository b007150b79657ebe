"""Small models for the tests, one finished smoke run, and the project's folder on the import path."""
import contextlib
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


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


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def python_train(*args):
    """train.py in a process of its own, as a user starts it."""
    command = [sys.executable, ROOT / 'train.py', *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope='session')
def smoke(tmp_path_factory):
    """(folder, what was printed) of one finished smoke run."""
    import train
    out = tmp_path_factory.mktemp('smoke')
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        train.main(['--preset', 'smoke', '--out', str(out)])
    return out, printed.getvalue()


def refusal(capsys, script, main, *args):
    """The line with which a program refuses its arguments: status 2, nothing before it but progress."""
    from run.console import one_line_errors
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        one_line_errors(script, main, [str(a) for a in args])
    *before, line = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2
    assert line.startswith(f'{script}: ')
    assert all(progress.startswith(('load', 'base')) for progress in before)
    return line
