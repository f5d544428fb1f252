"""Passages and titles of documentation packages."""

from benchmarks.inputs import documentation

PAGE = """<html><head><title>x</title></head><body><nav>menu menu</nav>
<p>Before any title.</p><h1 class="a">1.2 The first&nbsp;title</h1><p>{0}</p><ul><li>{1}</li></ul>
<!-- comment --><script>var x = 1;</script><h2>Second title here</h2><p>too <b>sh</b>ort</p>"""
FIRST, SECOND = " ".join(["w&lt;"] * 40), " ".join(["<i>it</i>em"] * 130)


def test_sections_are_cut_into_passages(monkeypatch):
    page = PAGE.format(FIRST, SECOND)
    monkeypatch.setattr(documentation, "_pages", lambda package: [page, page])
    passages, titles = documentation.passages_and_titles(["package"])
    assert passages == [" ".join(["w<"] * 40 + ["item"] * 60), " ".join(["item"] * 70)]
    assert titles == ["The first title"]  # that of a section without passages is left out


def test_some_texts_are_drawn():
    texts = [str(number) for number in range(50)]
    drawn = documentation.shuffled(texts, 20)
    assert drawn == documentation.shuffled(texts, 20)
    assert len(set(drawn)) == 20
    assert sorted(documentation.shuffled(texts, 99)) == sorted(texts)
