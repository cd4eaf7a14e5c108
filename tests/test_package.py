"""The package as a whole: imports without side effects, life without a compiler, a true README."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import fastdistill
from fastdistill.ops import Coefficients, _backend, denoising_cotangent, use_backend

ROOT = Path(__file__).parent.parent


def run(code: str) -> subprocess.CompletedProcess:
    """Run code in a process where every warning is an error."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )


def test_importing_does_no_work():
    done = run(
        "import sys, fastdistill\n"
        "assert 'torch' not in sys.modules\n"
        "import torch, fastdistill.ops, fastdistill.functional, fastdistill.objectives\n"
        "import fastdistill.optim.layout, fastdistill.optim.transfer\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not {'triton', 'diffusers', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "from fastdistill.ops._backend import load_extension\n"
        "assert load_extension.cache_info().currsize == 0, 'the extension is loaded on first use'\n"
    )
    assert done.returncode == 0, done.stderr


def test_the_arena_needs_no_torch():
    pytest.importorskip("fastdistill._arena")
    done = run(
        "import sys, fastdistill._arena as arena\n"
        "assert arena.plan([(37, 4, 0, 0)], shards=2, alignment=256, packed=False)\n"
        "assert 'torch' not in sys.modules\n"
    )
    assert done.returncode == 0, done.stderr


def test_without_the_arena_layouts_are_planned_in_python():
    """An extension that cannot be imported is not missed, and nothing more is said about it."""
    done = run(
        "import sys, torch\n"
        "sys.modules['fastdistill._arena'] = None\n"
        "from fastdistill.optim.layout import Entry, Layout\n"
        "from fastdistill.optim.transfer import checksum, pack_\n"
        "layout, packed = Layout([Entry(('weight',), (37, 4))], shards=2), torch.zeros(4)\n"
        "pack_(packed, [torch.ones(4)], [0])\n"
        "assert layout.shard('weight', 1).rows == 18\n"
        "assert checksum(packed) == checksum(torch.ones(4))\n"
    )
    assert done.returncode == 0, done.stderr


def test_public_names_are_there():
    for name in fastdistill.__all__:
        assert getattr(fastdistill, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trainer_'"):
        fastdistill.trainer_  # noqa: B018


def test_without_the_extension_the_reference_is_used_and_that_is_said_once(monkeypatch):
    monkeypatch.setattr(_backend, "extension_path", lambda: None)
    _backend.load_extension.cache_clear()
    try:
        x, one = torch.randn(2, 3), torch.ones(2)
        with pytest.warns(RuntimeWarning, match="C\\+\\+ kernels are unavailable"):
            first = denoising_cotangent(x, x + 1, x, Coefficients(one, one))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = denoising_cotangent(x, x + 1, x, Coefficients(one, one))
        assert torch.equal(first.cotangent, again.cotangent)
        with pytest.raises(ValueError, match="is not built here"), use_backend("cpu"):
            pass
    finally:
        _backend.load_extension.cache_clear()


def test_an_unknown_backend_is_refused():
    expected = "expected one of reference, cpu, triton"
    with pytest.raises(ValueError, match=expected), use_backend("gpu"):
        pass


def test_float64_is_refused_by_triton_and_not_computed_elsewhere():
    x, one = torch.randn(2, 3, dtype=torch.float64), torch.ones(2)
    with pytest.raises(ValueError, match="use_backend"), use_backend("triton"):
        denoising_cotangent(x, x, x, Coefficients(one, one))


def test_the_readmes_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_documents_link_to_files_that_exist():
    for document in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
