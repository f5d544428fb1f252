import sys

import pytest

from examples.docstrings.corpus import (
    Pair,
    docstring_pairs,
    parse_pairs,
    source_files,
    split_docstring,
)

LONG = "Words that explain the thing at some length, " * 5
SOURCE = f'''
raise SystemExit("imported")

def outer(x):
    """Sort the elements of a list.

    {LONG}
    """
    if x:
        class Inner:
            r"""Hold one sorted list
            in memory.

            {LONG} Inner.
            """

async def waiting():
    """Too short."""
'''
DOCUMENT = " ".join(LONG.split())


def test_pairs_come_from_the_syntax_tree():
    assert parse_pairs(SOURCE, "module") == [
        Pair("module.outer", "Sort the elements of a list.", DOCUMENT),
        Pair("module.outer.Inner", "Hold one sorted list in memory.", DOCUMENT + " Inner."),
    ]


@pytest.mark.parametrize(
    "docstring",
    [
        "Only a summary line.",
        f"Short one.\n\n{LONG}",
        "Sort a list of things.\n\nToo few words follow.",
        f"Sort a List of things.\n\n{LONG} So: sort a\nlist of things.",
    ],
)
def test_docstrings_without_a_question_and_an_answer_are_left_out(docstring):
    assert split_docstring(docstring) is None


@pytest.fixture
def package(tmp_path, monkeypatch):
    root = tmp_path / "someones_package"
    (root / "inner" / "tests").mkdir(parents=True)
    (root / "__init__.py").write_text("raise SystemExit('imported')")
    (root / "b.py").write_text(SOURCE)
    (root / "a.py").write_text("this is not Python")
    (root / "inner" / "c.py").write_text(SOURCE.replace("of a list", "of a tree"))
    (root / "inner" / "tests" / "test_c.py").write_text(SOURCE.replace("list", "test"))
    monkeypatch.syspath_prepend(tmp_path)
    return root.name


def test_packages_are_read_but_never_imported(package):
    assert [name for name, _ in source_files(package)] == [
        package,
        f"{package}.a",
        f"{package}.b",
        f"{package}.inner.c",
    ]
    pairs = docstring_pairs((package, "no_such_package"))
    # inner.c repeats both documents of b, so its queries would have two answers.
    assert [pair.name for pair in pairs] == [f"{package}.b.outer", f"{package}.b.outer.Inner"]
    assert package not in sys.modules


def test_real_packages_give_unique_pairs_in_one_order():
    pairs = docstring_pairs(("networkx",))
    assert len(pairs) > 500
    assert pairs == docstring_pairs(("networkx",), processes=1)
    assert len({pair.query.lower() for pair in pairs}) == len(pairs)
    assert len({pair.document for pair in pairs}) == len(pairs)
    assert not any(pair.query.lower() in pair.document.lower() for pair in pairs)
