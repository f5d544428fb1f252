"""Hooks of mkdocs: an API page for each public module, and navigation of the pages that exist."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "splade_fast"

# Other pages stand between these two groups, by name.
FIRST = (
    "index.md",
    "concepts.md",
    "sparse_rows.md",
    "search.md",
    "training.md",
    "recipe.md",
    "negative_cache.md",
    "scaling.md",
)
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
# Packages whose modules have a page each. Any other package has one page.
SPLIT = ("encoders", "integrations", "search")
# Modules without a page: they serve other modules, or the command line.
INTERNAL = {
    *("attention", "batching", "claim_folder", "cli", "echo", "hidden_states", "join_files"),
    *("parquet_rows", "pieces", "pretrained", "sharding", "source_files"),
    "text_encoder",
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
    """Return the dotted names of the public modules and packages."""
    folders = [PACKAGE, *(PACKAGE / name for name in SPLIT)]
    found = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for folder in folders
        for path in sorted(folder.glob("*"))
        if path.suffix == ".py" or (path / "__init__.py").exists()
    ]
    return [module for module in found if is_public(module.rpartition(".")[2])]


def is_public(name: str) -> bool:
    return not name.startswith("_") and name not in INTERNAL | set(SPLIT)


def in_order(pages: list[str]) -> list[str]:
    others = sorted(page for page in pages if page not in FIRST + LAST)
    return [
        *(page for page in FIRST if page in pages),
        *others,
        *(page for page in LAST if page in pages),
    ]
