"""The code of the documentation, taken out of the pages and run.

``python`` fences run one after another in one namespace; in ``console`` fences each line after ``$`` that calls
``leibler`` runs in this process, with the shell variables set before it. A ``text`` fence right after a ``python`` one
is what that one must print; the output of commands that involve no training must be what the page shows.

    python tests/docs/blocks.py docs/cli.md ...      writes what is printed now into those pages, at full size
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(?P<kind>python|console|text)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
SMALLER = {
    r"\bsteps=\d+": "steps=2", r"\bbatch_size=\d+": "batch_size=8", r"\bn=\d+": "n=40",
    r"\btrain=\d{3,}": "train=40", r"\bheldout=\d{3,}": "heldout=16", r"--samples [1-9]\d*": "--samples 2",
    r"\bsave_every=\d+": "save_every=1", r"\bwarmup=\d+": "warmup=0", r"--steps-scale \S+": "--steps-scale 0.001",
}  # fmt: skip
SAME = ("methods", "show", "--help", "--version")
"""Commands whose output depends on nothing but the library."""
COMMANDS = ("methods", "show", "train", "cache", "measure", "report", "--version", "--help")
"""Those that are run; ``verify`` and ``demo`` have tests of their own."""


@dataclass
class Block:
    """A fence of a page."""

    kind: str
    body: str
    start: int
    end: int
    expected: str | None = None
    """What a ``python`` block must print, if the page says so."""


def blocks(text: str) -> Iterator[Block]:
    """The fences of a page, in order."""
    found = list(FENCE.finditer(text))
    for i, fence in enumerate(found):
        block = Block(fence["kind"], fence["body"], fence.start("body"), fence.end("body"))
        after = found[i + 1] if i + 1 < len(found) else None
        if block.kind == "python" and after and after["kind"] == "text":
            between = text[fence.end() : after.start()]
            if not between.strip() and "--8<--" not in after["body"]:
                block.expected = after["body"]
        yield block


def smaller(code: str) -> str:
    """The same with few steps and records."""
    for pattern, replacement in SMALLER.items():
        code = re.sub(pattern, replacement, code)
    return code


def command(line: str, variables: dict[str, str]) -> tuple[str, int]:
    """Run a ``leibler`` command line in this process; its output and exit status."""
    from leibler.cli import main

    words = [re.sub(r"\$(\w+)", lambda m: variables[m[1]], word) for word in shlex.split(line, comments=True)]
    assert words[0] == "leibler"
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main(words[1:])
        except SystemExit as stop:
            status = int(stop.code or 0)
        else:
            status = 0
    # Files are shown as they were named, not where the folder happens to be.
    return out.getvalue().replace(f"{Path.cwd()}/", ""), status


@dataclass
class Session:
    """Runs the blocks of one page.

    Args:
        full: at the sizes on the page, as its reader would.
    """

    full: bool = False

    def __post_init__(self) -> None:
        # A module in sys.modules: dataclasses look up the one that they are defined in.
        self.module = sys.modules["page"] = ModuleType("page")
        self.variables: dict[str, str] = {}

    def python(self, block: Block) -> str:
        """What a block prints; one whose output the page shows runs as it stands."""
        code = block.body if self.full or block.expected is not None else smaller(block.body)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, "<page>", "exec"), vars(self.module))
        return out.getvalue()

    def console(self, body: str) -> Iterator[tuple[str, str, str, int]]:
        """For each command that is run: the line, what the page shows, what was printed, the exit status."""
        parts = re.split(r"^\$ ", body, flags=re.MULTILINE)
        for part in parts[1:]:
            line, _, shown = part.partition("\n")
            assignment = re.fullmatch(r"(\w+)=(\S+)", line)
            if assignment:
                self.variables[assignment[1]] = assignment[2] if self.full else smaller(assignment[2])
                continue
            words = line.split()
            if words[0] != "leibler" or words[1] not in COMMANDS:
                continue
            printed, status = command(line if self.full else smaller(line), self.variables)
            yield line, shown, printed, status


def same(line: str) -> bool:
    """True if the output of a command must be what the page shows."""
    return any(word in SAME for word in line.split()[1:])


def rewrite(page: Path) -> None:
    """Run a page at full size and put what is printed now into it."""
    text, session = page.read_text(encoding="utf-8"), Session(full=True)
    edits: list[tuple[str, str]] = []
    for block in blocks(text):
        if block.kind == "python":
            printed = session.python(block)
            if block.expected is not None:
                fence = block.body + "```\n\n```text\n"
                edits.append((f"{fence}{block.expected}```", f"{fence}{printed}```"))
        elif block.kind == "console":
            body = block.body
            for line, shown, printed, _ in session.console(block.body):
                if shown.strip():
                    clean = "".join(x for x in printed.splitlines(keepends=True) if not x.startswith("train "))
                    body = body.replace(f"$ {line}\n{shown}", f"$ {line}\n{clean.rstrip()}\n", 1)
            edits.append((block.body, body))
    for before, after in edits:
        text = text.replace(before, after, 1)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    import os
    import tempfile

    pages = [Path(name).resolve() for name in sys.argv[1:]]
    sys.path.insert(0, str(Path(__file__).parent))
    for page in pages:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            if page.name != "tutorial.md":
                from prepare import prepare

                prepare(Path(folder))
            rewrite(page)
