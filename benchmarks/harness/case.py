"""A benchmark case: one op on one shape, and the functions that compete on it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

Direction = Literal["forward", "forward+backward"]
Implementation = Callable[..., Tensor]


class UnavailableError(RuntimeError):
    """A case or study cannot run on this machine, e.g. because its data cannot be fetched."""


@dataclass(frozen=True)
class Target:
    """Bound that ours has to keep, e.g. at most 1.10 times the floor."""

    measure: Literal[
        "times the floor",
        "times faster than eager",
        "times faster than peer",
        "times faster than torch sparse",
        "MiB peak extra memory",
    ]
    bound: float

    def as_bound(self) -> dict[str, float]:
        """Return the argument of a Measurement that holds this bound."""
        return {"at_least" if self.measure.startswith("times faster") else "at_most": self.bound}


@dataclass
class Workload:
    """A case with its tensors in memory."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]
    leaves: dict[str, Tensor]  # the arguments that take a gradient
    upstream: Tensor  # the gradient of the output
    exact: Callable[[], dict[str, Tensor]]  # output and gradients of the reference in fp64
    # Ways to reach the floor; the fastest one counts, so that no slow library call flatters us.
    floors: dict[str, Callable[[], object]] = field(default_factory=dict)

    def run(self, implementation: Implementation, direction: Direction) -> Tensor:
        with torch.set_grad_enabled(direction != "forward"):
            return self.run_in_mode(implementation, direction)

    def run_in_mode(self, implementation: Implementation, direction: Direction) -> Tensor:
        """Run where the caller has set whether gradients are recorded."""
        if direction == "forward":
            return implementation(*self.arguments, **self.options)
        output = implementation(*self.arguments, **self.options)
        output.backward(self.upstream)
        return output.detach()

    def clear_gradients(self) -> None:
        for leaf in self.leaves.values():
            leaf.grad = None

    def gradients(self) -> dict[str, Tensor]:
        return {name: leaf.grad for name, leaf in self.leaves.items() if leaf.grad is not None}


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """One op on one shape. Small and picklable: tensors come with `build`."""

    op: ClassVar[str]
    ours: ClassVar[Implementation]
    eager: ClassVar[Implementation]

    direction: Direction
    dtype: torch.dtype
    device: str

    @property
    @abstractmethod
    def shape(self) -> str: ...

    @property
    @abstractmethod
    def layout(self) -> str: ...

    @property
    @abstractmethod
    def fill(self) -> float:
        """Share of real tokens in all positions."""

    @property
    @abstractmethod
    def targets(self) -> tuple[Target, ...]: ...

    @abstractmethod
    def tiny(self) -> "Case":
        """Return the same case at a size that loads every library and costs nothing."""

    @abstractmethod
    def build(self, *, floors: bool = True) -> Workload:
        """Make the tensors.

        Raises:
            UnavailableError: something that the case needs is missing.
        """

    @abstractmethod
    def peer(self) -> Implementation:
        """Return the same function as the peer library computes it.

        Raises:
            ImportError: the library is missing.
        """

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def title(self) -> str:
        return (
            f"{self.op} {self.shape} {self.layout} fill {self.fill:.2f} "
            f"{self.dtype_name} {self.device} {self.direction}"
        )

    def others(self) -> Mapping[str, Callable[[], Implementation]]:
        """Return makers of contenders of this case alone, which fail where a library is missing."""
        return {}

    def detail(self, contender: str, workload: Workload) -> str:
        """Return a remark on a contender that has run, e.g. its recall."""
        return ""

    def implementation(self, contender: str) -> Implementation:
        match contender:
            case "ours":
                return type(self).ours
            case "eager":
                return type(self).eager
            case "compile":
                # Otherwise the shapes of earlier cases count towards the recompilation limit,
                # past which the "compiled" function silently runs eagerly.
                torch.compiler.reset()
                return torch.compile(type(self).eager)
            case "peer":
                return self.peer()
            case _:
                return self.others()[contender]()
