"""Build the compiled parts with CMake. CMakeLists.txt lists all sources and flags."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
BUILT = ("_C", "_ops_cpu", "_ops_cuda")


class CMakeBuild(build_ext):
    """Configure, build and install the libraries into the package folder.

    Environment: SPLADE_FAST_CUDA=auto|0|1, TORCH_CUDA_ARCH_LIST, CUDA_HOME, MAX_JOBS.
    SPLADE_FAST_BUILD=0 installs the Python code alone, whose ops run in plain PyTorch.
    """

    def run(self) -> None:
        if os.environ.get("SPLADE_FAST_BUILD") == "0":
            return
        cuda = os.environ.get("SPLADE_FAST_CUDA", "auto")
        if cuda not in ("auto", "0", "1"):
            raise ValueError(f"SPLADE_FAST_CUDA must be auto, 0 or 1, got {cuda!r}")
        # setuptools gives an editable install a temporary folder. A permanent folder makes the next
        # build incremental.
        build = ROOT / "build" / "editable" if self._inplace() else Path(self.build_temp).resolve()
        package = self._package_folder()
        # An old CUDA library must not survive a build without CUDA.
        for stale in self._libraries(package):
            stale.unlink()
        cmake = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        if self._has_other_python(build / "CMakeCache.txt"):
            cmake.append("--fresh")
        cmake += [
            "-DSPLADE_FAST_PYTHON=ON",
            "-DSPLADE_FAST_TESTS=OFF",
            f"-DSPLADE_FAST_CUDA={cuda}",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DTORCH_ROOT=",  # CMake then asks this Python for its torch
            f"-DCMAKE_INSTALL_PREFIX={package}",
        ]
        subprocess.run(cmake, check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "--build", str(build), "-j", jobs], check=True)
        subprocess.run(["cmake", "--install", str(build)], check=True)

    def _package_folder(self) -> Path:
        return (ROOT if self._inplace() else Path(self.build_lib).resolve()) / "splade_fast"

    def _inplace(self) -> bool:
        return bool(self.inplace or self.editable_mode)

    @staticmethod
    def _has_other_python(cache: Path) -> bool:
        """Return whether an earlier build used another Python, whose tools may be gone."""
        return cache.exists() and f"={sys.executable}\n" not in cache.read_text()

    @staticmethod
    def _libraries(package: Path) -> list[Path]:
        return [path for name in BUILT for path in package.glob(f"{name}*.so")]

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self._libraries(self._package_folder())]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


# An extension makes setuptools build a wheel for this platform. CMake knows the sources.
setup(ext_modules=[Extension("splade_fast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
