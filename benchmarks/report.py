"""One Markdown page with the tables and plots of all CSVs, and a function of nothing else."""

import csv
import dataclasses
import importlib
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cases
from benchmarks.harness import plots
from benchmarks.harness.results import Row, by_case, read_csv
from benchmarks.harness.tables import markdown_table
from benchmarks.studies import scale
from benchmarks.studies.scale import plots as scale_plots
from benchmarks.studies.scale.findings import Fact as ScaleFact
from benchmarks.studies.scale.tables import study_tables
from benchmarks.studies.screening import plots as screening_plots
from benchmarks.studies.screening.facts import Fact

_INTRODUCTION = """\
# Benchmarks

Every table and plot here is made of the CSV files in `benchmarks/results` by
`python -m benchmarks --report`, and every row of those names the machine, the versions and the
commit it was measured with. A case is checked against float64 first and not timed if it is wrong;
then all contenders run in turns in one process, and the medians are compared.

- **ours**: the public function. **eager**: the same formula in plain PyTorch
  (`splade_fast.reference`). **compile**: that through `torch.compile`. **peer**: what the best
  known library does; each section says which.
- **floor**: what no implementation of the formula in full precision avoids: one read of the memory
  at the speed of a copy, or the bare matrix product of the same real tokens, measured in the same
  run.
- Times are median milliseconds, with the ratio to ours in brackets; quartiles are in the CSV.
"""
_CASE = ("shape", "layout", "fill", "active", "dtype", "direction")
_LONG = 30  # rows; longer tables are folded


def write_report(results: Path, page: Path) -> None:
    """The page, and the plots in a folder of its name beside it."""
    paths = sorted(results.glob("*.csv"))
    if not paths:
        raise FileNotFoundError(f"no CSV in {results}")
    folder = page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    sections = [_INTRODUCTION, *(_section(path, folder) for path in paths)]
    page.write_text("\n".join(sections), encoding="utf-8")


def _section(path: Path, folder: Path) -> str:
    with path.open(newline="") as file:
        lines = list(csv.reader(file))
    header = lines[0] if lines else []
    if header == _fields(Row):
        body, images = _rows_section(path, folder)
    elif header == _fields(Fact):
        body, images = _facts_section(path, folder)
    elif header == _fields(ScaleFact):
        body, images = _scale_section(path, folder)
    else:
        body, images = _plain_section(lines), _copied(path, folder)
    pictures = [f"![{image.stem}]({folder.name}/{image.name})\n" for image in images]
    return "\n".join([f"## {path.stem}\n", *body, *pictures])


def _fields(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _rows_section(path: Path, folder: Path) -> tuple[list[str], list[Path]]:
    rows = read_csv(Row, path)
    groups = list(by_case(rows).values())
    contenders = list(dict.fromkeys(row.contender for row in rows))
    body = [_description(rows[0].op), _provenance(rows)]
    times = [(*_case(group[0]), *_times(group, contenders)) for group in groups]
    body.append(markdown_table((*_CASE, *(f"{name}, ms" for name in contenders)), times))
    measured = [name for name in contenders if any(_peak(rows, name) for rows in groups)]
    if measured:
        memory = [
            (*_case(group[0]), *(_peak(group, name) for name in measured)) for group in groups
        ]
        header = (*_CASE, *(f"{name}, peak extra MiB" for name in measured))
        body.append(
            _folded("peak memory beyond inputs and outputs", markdown_table(header, memory))
        )
    targets = [
        (*_case(row), verdict) for row in rows for verdict in row.verdict.split("; ") if verdict
    ]
    if targets:
        missed = sum(verdict.endswith("missed") for *_, verdict in targets)
        summary = f"targets: {len(targets) - missed} met, {missed} missed"
        body.append(_folded(summary, markdown_table((*_CASE, "target"), targets)))
    image = folder / f"{path.stem}.svg"
    plots.draw(rows, image)
    return body, [image]


def _facts_section(path: Path, folder: Path) -> tuple[list[str], list[Path]]:
    facts = read_csv(Fact, path)
    body = [_provenance(facts)]
    for study in dict.fromkeys(fact.study for fact in facts):
        chosen = [fact for fact in facts if fact.study == study]
        header = ("model", "D", "dtype", "active", "variant", "quantity", "value", "target")
        lines = [
            (
                fact.model,
                str(fact.dim),
                fact.dtype,
                "" if fact.active is None else f"{fact.active:.2%}",
                fact.variant,
                fact.quantity,
                f"{_number(fact.value)} {fact.unit}".strip(),
                fact.verdict,
            )
            for fact in chosen
        ]
        body.append(_folded(f"{study}, {len(lines)} values", markdown_table(header, lines)))
    if not path.stem.startswith("screening"):
        return body, _copied(path, folder)
    screening_plots.draw(facts, folder / path.name)
    return body, sorted(folder.glob("screening-*.svg"))


def _scale_section(path: Path, folder: Path) -> tuple[list[str], list[Path]]:
    facts = read_csv(ScaleFact, path)
    body = [f"{scale.__doc__}\n", _provenance(facts)]
    body += [f"### {study}\n\n{table}" for study, table in study_tables(facts).items()]
    image = folder / f"{path.stem}.svg"
    scale_plots.draw(facts, image)
    return body, [image]


def _plain_section(lines: Sequence[Sequence[str]]) -> list[str]:
    """Any other table: what is the same in all of its rows is said once."""
    if len(lines) < 2:
        return ["Empty.\n"]
    header, *rows = lines
    constant = [len(rows) > 1 and len(set(column)) == 1 for column in zip(*rows, strict=True)]
    facts = [
        f"{name} {value}"
        for name, value, same in zip(header, rows[0], constant, strict=True)
        if same and value
    ]
    varying = [
        [cell for cell, same in zip(row, constant, strict=True) if not same] for row in lines
    ]
    table = markdown_table(varying[0], varying[1:])
    folded = _folded(f"{len(rows)} rows", table) if len(rows) > _LONG else table
    return [f"{', '.join(facts)}.\n", folded] if facts else [folded]


def _copied(path: Path, folder: Path) -> list[Path]:
    """The plots that lie beside the CSV."""
    plots_beside = sorted(path.parent.glob(f"{path.stem}*.svg"))
    return [Path(shutil.copy(plot, folder / plot.name)) for plot in plots_beside]


def _description(op: str) -> str:
    if op not in cases.names():
        return ""
    return f"{importlib.import_module(f'benchmarks.cases.{op}').__doc__}\n"


def _provenance(rows: Sequence[Row] | Sequence[Fact] | Sequence[ScaleFact]) -> str:
    def all_of(values: Iterable[str]) -> str:
        return ", ".join(sorted(set(values)))

    facts = (
        all_of(row.gpu or row.cpu for row in rows),
        f"{all_of(str(row.threads) for row in rows)} threads",
        f"kernels {all_of(row.kernels for row in rows)}",
        f"torch {all_of(row.torch for row in rows)}",
        f"commit {all_of(row.commit for row in rows)}",
        all_of(row.date.partition("T")[0] for row in rows),
    )
    return f"{', '.join(facts)}.\n"


def _case(row: Row) -> tuple[str, ...]:
    share = (f"{row.fill:.2f}", f"{row.active:.1%}")
    return row.shape, row.layout, *share, row.dtype, row.direction


def _times(group: Sequence[Row], contenders: Sequence[str]) -> list[str]:
    found = {row.contender: row for row in group}
    return [_time(found[name]) if name in found else "" for name in contenders]


def _time(row: Row) -> str:
    if not row.correct:
        return "WRONG, not timed"
    if row.median_ms is None:
        return ""
    if row.contender == "ours":
        return f"**{_number(row.median_ms)}**"
    ratio = "" if row.times_ours is None else f" ({_number(row.times_ours)} ×)"
    detail = f", {row.detail}" if row.detail and row.contender != "floor" else ""
    return f"{_number(row.median_ms)}{ratio}{detail}"


def _peak(group: Sequence[Row], contender: str) -> str:
    for row in group:
        if row.contender == contender and row.peak_extra_mib is not None:
            return _number(row.peak_extra_mib)
    return ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _folded(summary: str, table: str) -> str:
    return f"<details markdown>\n<summary>{summary}</summary>\n\n{table}\n</details>\n"
