"""C++ for a CPU, where one pass over memory beats a row of torch's operations. It is compiled when it is first asked
for, which takes seconds, and kept for the next process; without a compiler the plain twins in Python do the work.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from palm_rlhf_pytorch.processor import described

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-std=c++17", "-fPIC", "-shared")
COMPILERS = ("g++", "clang++", "c++")
SWITCH = "PALM_RLHF_NATIVE"  # 0 in the environment: never compile
CACHE = "PALM_RLHF_CACHE"  # where compiled files are kept, else in XDG_CACHE_HOME or ~/.cache

logger = logging.getLogger(__name__)


@cache
def library(name: str) -> ctypes.CDLL | None:
    """`name`.cpp, compiled for this processor; None where that cannot be done, and the log says why."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if os.environ.get(SWITCH) == "0" or compiler is None:
        return None
    try:
        openmp = loaded_openmp()
        if openmp is None:
            return None
        return ctypes.CDLL(str(compiled(Path(__file__).with_name(f"{name}.cpp"), compiler, openmp)))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        logger.warning("%s.cpp could not be compiled (%s); torch's operations are used", name, said.strip()[-300:])
        return None


def compiled(source: Path, compiler: str, openmp: str) -> Path:
    """The shared library made of a source: that of an earlier process, if all that went into it is the same."""
    headers = sorted(source.parent.glob("*.h"))
    ingredients = (*(file.read_text() for file in (source, *headers)), compiler, openmp, *FLAGS, processor())
    key = hashlib.sha256("\0".join(ingredients).encode()).hexdigest()[:16]
    folder = cache_folder()
    made = folder / f"{source.stem}-{key}.so"
    if not made.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        check_owner(folder)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            # linked to the OpenMP that torch runs on: a second pool of threads would fight the first for the cores
            built, parallel = Path(temporary) / made.name, ("-fopenmp", "-c", "-o")
            part = str(built.with_suffix(".o"))
            run(compiler, *FLAGS[:-1], *parallel, part, str(source))
            run(compiler, "-shared", "-o", str(built), part, openmp)
            os.replace(built, made)
    check_owner(folder, made)
    return made


def check_owner(*places: Path) -> None:
    """What others may write to, they could fill with code of theirs."""
    for place in places:
        found = place.stat()
        if found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise PermissionError(f"{place} may be written by others; {CACHE} can name a folder of your own")


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)


def cache_folder() -> Path:
    if own := os.environ.get(CACHE):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "palm_rlhf_pytorch"


def processor() -> str:
    """What code for this very processor may differ by: a home directory can be shared by several machines."""
    about = [line for line in described() if line.startswith(("vendor_id", "model name", "flags", "Features"))]
    return "\n".join([platform.machine(), *sorted(set(about))])


@cache
def loaded_openmp() -> str | None:
    """The file of the OpenMP runtime that torch runs on: its own, or the only one there is; None if that is unclear."""
    torch.get_num_threads()  # the runtime is there from here on
    maps = Path("/proc/self/maps")
    lines = maps.read_text(errors="surrogateescape").splitlines() if maps.exists() else []
    files = {Path(line.split(maxsplit=5)[5]) for line in lines if ".so" in line}
    runtimes = {file for file in files if file.name.startswith(("libgomp", "libiomp5", "libomp"))}
    own = {file for file in runtimes if file.is_relative_to(Path(torch.__file__).parent)} or runtimes
    return str(*own) if len(own) == 1 else None
