"""Run the Python code blocks of Markdown files, each file's in one namespace, in a scratch directory.

    python tests/run_readme.py README.md docs/design.md

A block that is not meant to run (sizes for a GPU, say) is marked ```python no-run.
"""

import os
import re
import sys
import tempfile
import time
from pathlib import Path

BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def code_blocks(text: str) -> list[tuple[int, str]]:
    """(line of its first statement, code) of each runnable block."""
    return [(text[: match.start(1)].count("\n") + 1, match[1]) for match in BLOCK.finditer(text)]


def run_file(path: Path) -> int:
    """Run a file's blocks in order; the number of them."""
    namespace: dict = {"__name__": "__readme__"}
    blocks = code_blocks(path.read_text(encoding="utf-8"))
    for line, code in blocks:
        started = time.perf_counter()
        # keeps line numbers, so that a traceback points into the Markdown file
        exec(compile("\n" * (line - 1) + code, str(path), "exec"), namespace)
        print(f"{path}:{line} ran in {time.perf_counter() - started:.1f} s")
    return len(blocks)


def main(names: list[str]) -> None:
    paths = [Path(name).resolve() for name in names]
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        count = sum(run_file(path) for path in paths)
        os.chdir(paths[0].parent)
    print(f"{count} code blocks ran")


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    main(sys.argv[1:])
