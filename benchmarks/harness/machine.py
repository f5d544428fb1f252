"""Machine, versions, commit and date of a measurement."""

import datetime
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

import splade_fast


@dataclass(frozen=True)
class Machine:
    date: str
    commit: str
    dirty: str
    torch: str
    cpu: str
    cores: int
    threads: int
    gpu: str
    kernels: str  # instruction set or GPU architectures of the build that "ours" ran on

    @classmethod
    def current(cls, device: str) -> "Machine":
        commit, dirty = _commit()
        return cls(
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            commit=commit,
            dirty=dirty,
            torch=torch.__version__,
            cpu=_cpu_model(),
            cores=len(os.sched_getaffinity(0)),
            threads=torch.get_num_threads(),
            gpu=torch.cuda.get_device_name() if device == "cuda" else "",
            kernels=_kernels(device),
        )

    @property
    def title(self) -> str:
        commit = f"{self.commit}{' (dirty)' if self.dirty == 'yes' else ''}"
        processor = self.gpu or f"{self.cpu}, {self.threads} threads"
        return (
            f"{processor}, kernels {self.kernels}, torch {self.torch}, commit {commit}, {self.date}"
        )


def _cpu_model() -> str:
    facts = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", facts.read_text()) if facts.exists() else None
    return found[1] if found else platform.processor()


def _kernels(device: str) -> str:
    build = splade_fast.build_info()
    if not build[device]["loaded"]:
        return "none, plain PyTorch"
    facts = {"cpu": build["cpu_instruction_set"], "cuda": build["built"].get("cuda_architectures")}
    return str(facts[device])


def _commit() -> tuple[str, str]:
    """Return the short hash and whether tracked files differ; else BENCHMARK_COMMIT."""
    try:
        return _git("rev-parse", "--short=12", "HEAD"), "yes" if _git("diff", "HEAD") else "no"
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("BENCHMARK_COMMIT", "unknown"), "unknown"


def _git(*arguments: str) -> str:
    repository = Path(__file__).parent
    command = ["git", "-C", str(repository), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
