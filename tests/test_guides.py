"""Do the guides still tell the truth?  Every ```python block runs, and every quoted line still stands.

Fences of a guide:
    python            runs, in order, all blocks of one guide in one namespace; asserts or prints its figures
    py-quote          lines of moddiff/<guide>.py as they stand, in their order; a line `...` leaves some out
    py-quote dit.py   the same of another module
    bash, text        neither runs nor is compared
To see the figures that a guide prints: pytest -s tests/test_guides.py -k solvers
"""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
GUIDES = sorted(path for path in (ROOT / "guides").glob("*.md") if path.stem != "README")
KINDS = ("python", "py-quote", "bash", "text")


def fences(text):
    """(info string, body, line of the body) of each fenced block."""
    blocks, info, start = [], None, 0
    for number, line in enumerate(text.splitlines(), 1):
        if not line.startswith("```"):
            continue
        if info is None:
            info, start = line[3:].strip(), number
        else:
            blocks.append((info, "\n".join(text.splitlines()[start : number - 1]), start))
            info = None
    assert info is None, f"the fence opened at line {start} is never closed"
    return blocks


def without_code(text):
    """The prose: no fenced block, and nothing between single backquotes."""
    return re.sub(r"`[^`\n]*`", "code", re.sub(r"(?ms)^```.*?^```$", "", text))


def lost_lines(quote, source):
    """Lines of a quote that the source does not have, in that order, indentation aside."""
    lines, at, lost = [line.strip() for line in source.splitlines()], 0, []
    for line in filter(None, map(str.strip, quote.splitlines())):
        if line == "...":
            continue
        if line in lines[at:]:
            at = lines.index(line, at) + 1
        else:
            lost.append(line)
    return lost


@pytest.fixture(scope="module", params=GUIDES, ids=lambda path: path.stem)
def guide(request):
    return request.param


def test_every_block_of_a_guide_runs_in_order(guide):
    namespace = {"__name__": guide.stem}
    blocks = [
        (body, line) for info, body, line in fences(guide.read_text(encoding="utf-8")) if info == "python"
    ]
    assert blocks, f"{guide.name} shows no code that runs"
    before = torch.is_grad_enabled()  # which a guide may switch off, as a reader would
    try:
        for body, line in blocks:
            # Blank lines in front, so that a traceback names the guide's line.
            exec(compile("\n" * line + body, str(guide), "exec"), namespace)
    finally:
        torch.set_grad_enabled(before)


def test_every_quoted_line_is_still_in_the_library(guide):
    quotes = [
        (info.split()[1:], body)
        for info, body, _ in fences(guide.read_text(encoding="utf-8"))
        if info.split()[:1] == ["py-quote"]
    ]
    assert quotes, f"{guide.name} quotes none of the lines that matter"
    for name, body in quotes:
        source = ROOT / "moddiff" / (name[0] if name else f"{guide.stem}.py")
        assert not lost_lines(body, source.read_text(encoding="utf-8")), (
            f"{guide.name} quotes lines that {source.name} no longer has"
        )


def test_a_guide_argues_in_one_to_three_pages(guide):
    text = guide.read_text(encoding="utf-8")
    assert {info.split()[0] if info else "" for info, _, _ in fences(text)} <= set(KINDS)
    assert 400 <= len(without_code(text).split()) <= 2000
    titles = "\n".join(re.findall(r"(?m)^## (.*)$", text)).lower()
    for part in (
        "what we chose",
        "what else",
        "what it costs",
        "how it goes wrong",
        "change our mind",
        "see it yourself",
    ):
        assert part in titles, f"{guide.name} has no section {part!r}"


def test_a_guide_links_to_papers_and_names_repositories_only(guide):
    text = without_code(guide.read_text(encoding="utf-8"))
    addresses = re.findall(r"https?://([^/\s)]+)", text)
    assert not [host for host in addresses if host not in ("arxiv.org", "github.com")]
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", text):  # links within the repository
        assert (guide.parent / target).exists() or target.startswith("../notebooks/"), (
            f"{guide.name} links to {target}, which is not there"
        )


def test_a_quoted_line_that_was_changed_is_noticed():
    source = "def f(x):\n    y = x + 1\n    return y\n"
    assert lost_lines("y = x + 1\n...\nreturn y", source) == []
    assert lost_lines("y = x + 2", source) == ["y = x + 2"]
    assert lost_lines("return y\ny = x + 1", source) == ["y = x + 1"]  # out of order


def test_fences_are_read_with_their_place_and_an_open_one_is_noticed():
    assert fences("a\n```python\nx = 1\n```\nb\n```text\nno\n```") == [
        ("python", "x = 1", 2),
        ("text", "no", 6),
    ]
    with pytest.raises(AssertionError, match="line 1 is never closed"):
        fences("```python\nx = 1")
