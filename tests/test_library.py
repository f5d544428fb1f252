"""Loading of the libraries: build_info(), the reference without a library, version checks."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import splade_fast as sf
from splade_fast import _library

PACKAGE = Path(sf.__file__).parent


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_build_info():
    info = sf.build_info()
    assert info["version"] == sf.__version__ == info["built"]["version"]
    assert info["torch"] == torch.__version__
    assert info["cpu"] == {"loaded": True, "why_not": None}
    assert info["cpu_instruction_set"] in info["built"]["cpu_instruction_sets"].split()
    assert info["built"]["torch_target"] == "2.10"
    assert set(info["built"]) >= {"compiler", "torch_headers", "cuda", "cuda_architectures"}
    has_sm90a = "sm_90a" in info["built"]["cuda_architectures"].split()
    assert info["built"]["cuda_kernels"] == ("head_sm90a" if has_sm90a else "")


def test_facts_for_a_python_without_the_module(monkeypatch):
    """The library tells the same facts as the module `_C`, which serves one version of Python."""
    facts = _library._read_build_facts()
    monkeypatch.setitem(sys.modules, "splade_fast._C", None)  # import raises ImportError
    assert _library._read_build_facts() == facts
    assert facts["compiler"]


def test_the_cuda_library_waits_for_a_torch_with_cuda():
    """The CUDA library is loaded only if torch has CUDA."""
    info = sf.build_info()
    if not (PACKAGE / "_ops_cuda.so").exists():
        assert "not built" in info["cuda"]["why_not"]
        assert info["built"]["cuda"] == ""
    elif torch.version.cuda is None:
        assert "has no CUDA" in info["cuda"]["why_not"]
        assert "sm_80" in info["built"]["cuda_architectures"]
    else:
        assert info["cuda"] == {"loaded": True, "why_not": None}


def test_without_a_library_the_reference_runs_after_one_warning():
    code = (
        "import torch, warnings, splade_fast as sf\n"
        "h, w = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(2):\n"
        "        sf.splade_head(h, w).sum().backward()\n"
        "        sf.splade_pool(h)\n"
        "assert torch.equal(sf.splade_head(h, w), sf.reference.splade_head(h, w))\n"
        "print([str(w.message) for w in caught])\n"
        "print(sf.build_info()['cpu'])\n"
    )
    run = run_python(code, SPLADE_FAST_REFERENCE="1")
    assert run.returncode == 0, run.stderr
    warned, info = run.stdout.splitlines()
    assert warned.count("splade_fast runs in plain PyTorch on cpu") == 1
    assert "SPLADE_FAST_REFERENCE=1" in warned
    assert "'loaded': False" in info


def test_an_unknown_instruction_set_is_refused():
    code = "import torch, splade_fast as sf; sf.splade_head(torch.ones(1, 1, 1), torch.ones(1, 1))"
    run = run_python(code, SPLADE_FAST_ISA="mmx")
    assert run.returncode != 0
    assert "SPLADE_FAST_ISA=mmx is not an instruction set of this build and machine" in run.stderr


def test_a_device_without_kernels_runs_the_reference_after_a_warning():
    _library._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="there are none for xpu devices"):
        assert not _library.has_kernels(torch.device("xpu"))


@pytest.mark.parametrize(
    ("built", "message"),
    [
        ({"version": "0.0.1", "torch_target": "2.10"}, "found a library built for 0.0.1"),
        (
            {"version": sf.__version__, "torch_target": "9.0"},
            r"built for torch >= 9.0, found torch",
        ),
    ],
)
def test_versions_that_do_not_fit(built, message):
    with pytest.raises(ImportError, match=message):
        _library._check_versions(built)


@pytest.mark.parametrize(
    ("architecture", "runs", "runs_not"),
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (12, 0)]),
        ("sm_90a", [(9, 0)], [(8, 0), (10, 0)]),
        ("compute_80", [(8, 0), (9, 0), (12, 0)], [(7, 5)]),
        ("sm_120", [(12, 0), (12, 1)], [(9, 0), (10, 0)]),
    ],
)
def test_which_gpus_an_architecture_serves(architecture, runs, runs_not):
    assert all(_library._runs_on(architecture, *capability) for capability in runs)
    assert not any(_library._runs_on(architecture, *capability) for capability in runs_not)


def test_importing_an_op_module_twice_is_harmless():
    assert importlib.import_module("splade_fast.ops.head") is sys.modules["splade_fast.ops.head"]
