"""What all benchmarks share: workers in processes of their own, runs in turn, medians, tables, RESULTS.md."""

from __future__ import annotations

import json
import os
import platform
import secrets
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "RESULTS.md"


class WorkerError(RuntimeError):
    """A worker failed; the message begins with its name."""


class Worker:
    """`workers/NAME.py` running in some Python, perhaps one that has other packages than ours."""

    def __init__(self, name: str, python: str | Path = sys.executable, threads: int = 1, folder: Path | None = None):
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")  # its stderr: libraries' progress bars and warnings
        script = (folder or HERE / "workers") / f"{name}.py"
        # a peer's own environment must not see our package, so it reads no PYTHONPATH
        switches = ["-E", "-s"] if HERE / ".venvs" in Path(python).parents else []
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [str(python), *switches, str(script), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
        )

    def __call__(self, do: str, **keywords: Any) -> dict[str, Any]:
        """One request and its reply: seconds, imports_mib, base_mib, peak_mib, and what the function gave."""
        try:
            self.process.stdin.write(json.dumps({"do": do, **keywords}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"{self.name}: ended during {do!r}: {self.last_words()}")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"{self.name}: {do!r} failed: {reply['error']}")
        return reply

    def last_words(self) -> str:
        """Its exit status and the last line of its stderr."""
        status = self.process.wait()
        self.errors.seek(0)
        return f"exit status {status}; {(self.errors.read().strip() or 'nothing on stderr').splitlines()[-1]}"

    def close(self) -> None:
        """Close its stdin, which ends it; kill it if that does not."""
        self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Runs:
    """Replies to one request: the warm-up's, then those that count."""

    first: dict[str, Any]
    replies: list[dict[str, Any]]

    def values(self, key: str = "seconds") -> list[float]:
        return [reply[key] for reply in self.replies]

    def median(self, key: str = "seconds") -> float:
        return statistics.median(self.values(key))

    def quartiles(self, key: str = "seconds") -> tuple[float, float]:
        """The values that a quarter and three quarters lie below, interpolated; of one run that run."""
        values = self.values(key)
        if len(values) == 1:
            return values[0], values[0]
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return low, high

    def first_over_median(self) -> float:
        """How many times as long the warm-up took."""
        return self.first["seconds"] / self.median()


def in_turn(
    workers: Mapping[str, Worker], requests: Mapping[str, dict], repeats: int | Mapping[str, int] = 5
) -> dict[str, Runs]:
    """One warm-up of each request, then all in turn, round by round, every other round backwards.

    `repeats` may differ by side: one that has had its share sits out. Labels may share a worker.
    """
    share = {label: repeats if isinstance(repeats, int) else repeats[label] for label in requests}
    runs = {label: Runs(workers[label](**request), []) for label, request in requests.items()}
    for turn in range(max(share.values())):
        labels = [label for label in requests if turn < share[label]]
        for label in labels if turn % 2 == 0 else reversed(labels):
            runs[label].replies.append(workers[label](**requests[label]))
    return runs


@dataclass(frozen=True)
class Limits:
    """What the machine can do: operations a second in a matrix product, bytes read and written a second in a copy."""

    matmul: float
    copy: float

    @property
    def numbers(self) -> str:
        return f"matmul {self.matmul / 1e9:,.0f} GFLOP/s, copy {self.copy / 1e9:,.1f} GB/s"

    def __str__(self) -> str:
        return f"Limits in this run: {self.numbers}."


def in_turn_with_limits(
    workers: Mapping[str, Worker],
    requests: Mapping[str, dict],
    repeats: int | Mapping[str, int],
    device: str,
    dtype: str,
    threads: int,
    copy_mib: int = 1024,
) -> tuple[dict[str, Runs], Limits]:
    """`in_turn`, and in each round what the machine can do just then, of which the medians are the limits: where others
    use its cores too, it may be half as fast a minute later. They come first, so that no side's first run is beside the
    start of their process.
    """
    asked = {
        "matmul": dict(do="matmul", device=device, dtype=dtype),
        "copy": dict(do="copy", device=device, mib=copy_mib),
    }
    share = {label: repeats if isinstance(repeats, int) else repeats[label] for label in requests}
    share |= dict.fromkeys(asked, max(share.values()))
    with Worker("limits", threads=threads) as worker:
        runs = in_turn({**workers, **dict.fromkeys(asked, worker)}, {**asked, **requests}, share)
    best = runs.pop("matmul").median("operations_per_second"), runs.pop("copy").median("bytes_per_second")
    return runs, Limits(*best)


def limits(device: str, dtype: str, threads: int, copy_mib: int = 1024) -> Limits:
    """Measured now, in a process of its own; each the best of its runs. No cache may hold the array that is copied."""
    with Worker("limits", threads=threads) as worker:
        matmul = worker("matmul", device=device, dtype=dtype)["operations_per_second"]
        return Limits(matmul, worker("copy", device=device, mib=copy_mib)["bytes_per_second"])


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows with the same keys -> a Markdown table, aligned for the terminal too; numbers should come as text."""
    header = list(rows[0])
    cells = [header, *([str(row[name]) for name in header] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells)


def three(value: float) -> str:
    """Three significant digits, without an exponent where that is short."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def machine() -> str:
    """Processor and its vectors, cores, last cache, memory, GPU and torch in one line."""
    import torch  # here: the drivers otherwise leave torch to their workers

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    caches = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    processor = names[0] if names else platform.processor()
    parts = [f"{processor} ({torch.backends.cpu.get_cpu_capability()})", f"{os.cpu_count()} cores"]
    parts += [f"last cache {int(caches[-1].read_text().strip()[:-1]) // 1024} MiB"] if caches else []
    parts.append(f"{memory:.0f} GiB")
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join([*parts, f"Python {platform.python_version()}", f"torch {version('torch')}"])


def command() -> str:
    """The command that is running, as it would be typed in the repository's root."""
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(HERE.parent) if HERE.parent in script.parents else script
    return shlex.join(["python", str(shown), *sys.argv[1:]])


def record(section: str, table: str, notes: str = "", path: Path = RESULTS) -> None:
    """Put one section into RESULTS.md, in place of the one of that name if there is one; the others stay."""
    begin, end = f"<!-- begin {section} -->", f"<!-- end {section} -->"
    lines = [begin, f"## {section}", "", f"`{command()}`, {date.today()}; {machine()}", "", table]
    block = "\n".join([*lines, *(["", notes] if notes else []), end])
    text = path.read_text(encoding="utf-8") if path.exists() else "# Results of the benchmarks\n"
    if begin in text:
        before, rest = text.split(begin, 1)
        text = before + block + rest.split(end, 1)[1]
    else:
        text = text.rstrip("\n") + "\n\n" + block + "\n"
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
