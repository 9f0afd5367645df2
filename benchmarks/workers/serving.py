"""The worker's end of `harness.Worker`: a JSON request a line on stdin, a JSON reply a line on stdout.

Standard library and torch only: it runs in the peers' environments, where our package is absent.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def serve(functions: Mapping[str, Callable[..., dict | None]]) -> None:
    """Answer {"do": name, **keywords} with what the function returns, its seconds and its memory, until stdin ends.

    A key of the function's own dict takes the place of ours, so it may time a part of itself. What is printed goes
    to stderr. An exception becomes {"error": ...}, and the worker lives on.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(int(sys.argv[1]))
    imports = host_mib("VmRSS")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = measured(functions[request.pop("do")], request, imports)
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


def measured(function: Callable[..., dict | None], keywords: dict[str, Any], imports: float) -> dict[str, Any]:
    """Call it; seconds, and MiB: after the imports, when the call began, at the call's peak.

    On the GPU what torch has allocated there; else the process's resident memory.
    """
    on_gpu = torch.cuda.is_initialized()
    base = torch.cuda.memory_allocated() / 2**20 if on_gpu else host_mib("VmRSS")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # where the kernel will not forget the peak, it is the process's, an upper bound
        Path("/proc/self/clear_refs").write_text("5")
    started = time.perf_counter()
    own = function(**keywords) or {}
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    if torch.cuda.is_initialized():
        base, imports = base if on_gpu else 0.0, 0.0
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = host_mib("VmHWM")
    return {"seconds": seconds, "imports_mib": imports, "base_mib": base, "peak_mib": peak, **own}


def host_mib(field: str) -> float:
    """Resident memory of this process, now (VmRSS) or at its peak (VmHWM).

    Not `ru_maxrss`, which begins at the parent's resident memory and never comes down; only where there is no /proc.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
