"""What the tests of the checkers share: the solution of a notebook's exercise, and a verdict that says no."""

import json
import re
from pathlib import Path


def rejected(verdict, hint):
    """The verdict says no, and its sentence names the mistake."""
    assert verdict.right is False
    assert hint in verdict.text, verdict.text


def solution(notebook, name):
    """The function that the folded solution of a notebook's exercise defines, run as a reader would."""
    path = Path(__file__).parents[1] / "notebooks" / f"{notebook}.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    blocks = [
        block
        for text in texts
        if "<summary>Solution" in text
        for block in re.findall(r"(?ms)^```python\n(.*?)^```", text)
    ]
    namespace = {}
    exec(next(block for block in blocks if f"def {name}(" in block), namespace)
    return namespace[name]
