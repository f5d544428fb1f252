"""Hooks of mkdocs: an API page for each public module, and navigation of the pages that exist."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "splade_fast"

# Pages that are not named here come before the last ones, by name.
FIRST = ("index.md", "concepts.md", "sparse_rows.md", "training.md", "negative_cache.md")
LAST = (
    "kernels.md",
    "screening.md",
    "numerics.md",
    "measured.md",
    "benchmarks.md",
    "limits.md",
    "robustness.md",
    "compatibility.md",
    "contributing.md",
)
# What other modules are made of, and what is no library.
INTERNAL = {
    "checkpoints",
    "cli",
    "demo",
    "distributed",
    "hidden_states",
    "sparse_rows_files",
    "text_encoder",
    "whole_folders",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    modules = api_modules()
    pages = [page.src_uri for page in files.documentation_pages()]
    for module in modules:
        content = f"# {module}\n\n::: {module}\n"
        files.append(File.generated(config, f"api/{module}.md", content=content))
    build_info = "# splade_fast.build_info\n\n::: splade_fast._library\n"
    build_info += "    options:\n      members: [build_info]\n"
    files.append(File.generated(config, "api/splade_fast.build_info.md", content=build_info))
    api = [f"api/{module}.md" for module in modules] + ["api/splade_fast.build_info.md"]
    config.nav = [*in_order(pages), {"API": api}]
    return files


def api_modules() -> list[str]:
    """The public modules of the package and of its integrations, a package counting as one."""
    found = [
        f"{'.'.join(folder.relative_to(ROOT).parts)}.{path.stem}"
        for folder in (PACKAGE, PACKAGE / "integrations")
        for path in sorted(folder.glob("*"))
        if path.suffix == ".py" or (path / "__init__.py").exists()
    ]
    return [module for module in found if is_public(module.rpartition(".")[2])]


def is_public(name: str) -> bool:
    return not name.startswith("_") and name not in INTERNAL | {"integrations"}


def in_order(pages: list[str]) -> list[str]:
    others = sorted(page for page in pages if page not in FIRST + LAST)
    return [
        *(page for page in FIRST if page in pages),
        *others,
        *(page for page in LAST if page in pages),
    ]
