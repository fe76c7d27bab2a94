"""Pages show the code as it is: ``<!-- source: src/leibler/recipes/policy.py grpo -->`` becomes that function.

The docstring is left out, since the text around it says what the function is for. A name that does not exist stops
the build.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r"^<!-- source: (?P<path>\S+) (?P<name>\w+) -->$", re.MULTILINE)


def source(path: str, name: str) -> str:
    """The text of a function or class of a file of the repository, without its docstring."""
    text = (ROOT / path).read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            break
    else:
        raise KeyError(f"{path} defines no {name}")
    lines = text.splitlines()
    start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
    kept = list(range(start, node.end_lineno or start))
    first = node.body[0]
    if len(node.body) > 1 and isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        kept = [i for i in kept if not first.lineno - 1 <= i < (first.end_lineno or 0)]
    return "\n".join(lines[i] for i in kept)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs for every page."""
    return DIRECTIVE.sub(lambda found: f"```python\n{source(found['path'], found['name'])}\n```", markdown)
