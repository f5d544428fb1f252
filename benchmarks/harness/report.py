"""One Markdown page with the tables and plots of all results."""

import importlib
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from benchmarks import cases, studies
from benchmarks.harness.frames import groups_without_bounds, label_inputs
from benchmarks.harness.plots import draw
from benchmarks.harness.results import Row, read_csv
from benchmarks.harness.tables import format_number, markdown_table
from benchmarks.studies.scale.power_law import exponents

_INTRODUCTION = """\
# Benchmarks

Every table and plot here is made of the CSV files in `benchmarks/results` by
`python -m benchmarks report`. Every row of them names the machine, the versions and the commit it
was measured with. A case is checked against float64 first and not timed if it is wrong; then all
contenders run in turns in one process.

- **ours**: the public function. **eager**: the same formula in plain PyTorch
  (`splade_fast.reference`). **compile**: that through `torch.compile`. **peer**: what the best
  known library does; each section says which.
- **floor**: what no implementation of the formula in full precision avoids: one read of the memory
  at the speed of a copy, or the bare matrix product of the same real tokens, measured in the same
  run.
- Times are medians, with the ratio to ours in brackets; quartiles are in the CSV. Extra memory is
  the peak beyond inputs and outputs.
"""
_LONG = 30  # rows; longer tables are folded


def write_report(results: Path, page: Path) -> None:
    """Write the page, and its plots to a folder of its name beside it.

    Raises:
        FileNotFoundError: there are no results.
    """
    paths = sorted(results.glob("*.csv"))
    if not paths:
        raise FileNotFoundError(f"no CSV in {results}")
    folder = page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    sections = [_INTRODUCTION]
    for path in paths:
        rows = read_csv(path)
        frame = pd.DataFrame([vars(row) for row in rows])
        image = folder / f"{path.stem}.svg"
        draw(frame, image)
        sections += [f"## {path.stem}\n", _description(path.stem.partition("-")[0])]
        sections += [*_tables(frame), *_bounds(rows), *_exponents(rows)]
        sections.append(f"![{path.stem}]({folder.name}/{image.name})\n")
    page.write_text("\n".join(sections), encoding="utf-8")


def _description(name: str) -> str:
    for package in (cases, studies):
        if name in package.names():
            return f"{importlib.import_module(f'{package.__name__}.{name}').__doc__}\n"
    return ""


def _tables(frame: pd.DataFrame) -> Iterator[str]:
    """Yield the provenance, then a table for each part and quantity, contenders side by side."""
    yield f"{_provenance(frame)}.\n"
    for (study, part, quantity), rows in groups_without_bounds(
        frame, ["study", "part", "quantity"]
    ):
        unit = rows.unit.iloc[0]
        title = ", ".join(filter(None, (study, part, f"{quantity}, {unit}".rstrip(", "))))
        yield _folded(title, _side_by_side(rows), is_open=len(rows) <= _LONG)


def _provenance(frame: pd.DataFrame) -> str:
    frame = frame.assign(
        processor=frame.gpu.where(frame.gpu != "", frame.cpu),
        threads=frame.threads.astype(str) + " threads",
        kernels="kernels " + frame.kernels,
        torch="torch " + frame.torch,
        commit="commit " + frame.commit,
        date=frame.date.str.partition("T")[0],
    )
    names = ("processor", "threads", "kernels", "torch", "commit", "date")
    return ", ".join(", ".join(sorted(frame[name].unique())) for name in names)


def _side_by_side(rows: pd.DataFrame) -> str:
    index = ["subject", "dtype", "input"]
    rows = rows.assign(input=label_inputs(rows))
    ours = rows[rows.contender == "ours"].set_index(index).value.to_dict()
    cells = [_cell(row, ours.get((row.subject, row.dtype, row.input))) for row in rows.itertuples()]
    table = rows.assign(cell=cells).pivot_table(
        index=index, columns="contender", values="cell", aggfunc="first", sort=False
    )
    lines = table.fillna("").reset_index()
    return markdown_table(list(lines.columns), lines.to_numpy().tolist())


def _cell(row: pd.Series, ours: float | None) -> str:
    text = format_number(row.value)
    if row.contender == "ours":
        return f"**{text}**"
    ratio = f" ({format_number(row.value / ours)} ×)" if ours else ""
    return f"{text}{ratio}{f', {row.note}' if row.note and row.contender != 'floor' else ''}"


def _bounds(rows: list[Row]) -> Iterator[str]:
    bounded = [row for row in rows if row.verdict]
    if not bounded:
        return
    header = ("part", "subject", "dtype", "quantity", "value", "bound")
    lines = [
        (
            row.part,
            row.subject,
            row.dtype,
            row.quantity,
            f"{row.value:.3g} {row.unit}".strip(),
            row.verdict,
        )
        for row in bounded
    ]
    missed = sum(not row.is_within_bounds for row in bounded)
    yield _folded(
        f"bounds: {len(bounded) - missed} met, {missed} missed", markdown_table(header, lines)
    )


def _exponents(rows: list[Row]) -> Iterator[str]:
    if rows[0].study != "scale":
        return
    header = ("part", "subject", "contender", "quantity", "axis", "exponent", "sizes")
    lines = [
        (*e.curve, e.axis, f"{e.law.exponent:.2f} ± {e.law.standard_error:.2f}", f"{e.sizes}")
        for e in exponents(rows)
    ]
    yield _folded("exponents of the power laws", markdown_table(header, lines), is_open=True)


def _folded(summary: str, table: str, *, is_open: bool = False) -> str:
    opening = "<details open markdown>" if is_open else "<details markdown>"
    return f"{opening}\n<summary>{summary}</summary>\n\n{table}\n</details>\n"
