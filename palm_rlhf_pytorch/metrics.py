"""Numbers about a run: kept in memory, in metrics.jsonl, and on accelerate's trackers."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

from accelerate import Accelerator

from palm_rlhf_pytorch.files import atomic_path


class MetricsLog:
    """One dict of numbers a step. The file, where there is one, always equals the history."""

    def __init__(self, path: str | Path | None = None, accelerator: Accelerator | None = None):
        self.path = None if path is None else Path(path)
        self.accelerator = accelerator
        self.history: list[dict[str, float]] = []
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, row: dict[str, float]) -> None:
        if not self.history and self.path is not None:
            self._set_aside()
        self.history.append(row)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if self.accelerator is not None and self.accelerator.log_with:
            self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=int(row["step"]))

    def _set_aside(self) -> None:
        """The file of an earlier run is renamed, not lost."""
        if self.path.exists():
            free = next(n for n in count(1) if not self.path.with_name(f"{self.path.name}.{n}").exists())
            self.path.rename(self.path.with_name(f"{self.path.name}.{free}"))

    def restore(self, history: list[dict[str, float]]) -> None:
        """Go back to what a checkpoint knew: lines written after it are dropped."""
        self.history = list(history)
        if self.path is not None:
            with atomic_path(self.path) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in history), encoding="utf-8")


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
