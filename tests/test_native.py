"""What is compiled: once, for this processor, on torch's own threads; and what happens where it cannot be."""

import ctypes
import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from palm_rlhf_pytorch import native
from palm_rlhf_pytorch.native import library

SOURCES = sorted(path.stem for path in Path(native.__file__).parent.glob("*.cpp"))
compiles = pytest.mark.skipif(library("swiglu") is None, reason="there is no C++ compiler, or no OpenMP, to be found")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a new process with an empty cache."""
    monkeypatch.setenv(native.CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(native.SWITCH, raising=False)
    return lambda name: library.__wrapped__(name)


@compiles
@pytest.mark.parametrize("name", SOURCES)
def test_compiled_once_and_kept(fresh, tmp_path, monkeypatch, name):
    assert fresh(name) is not None
    (made,) = (tmp_path / "cache").iterdir()
    assert made.suffix == ".so"
    monkeypatch.setattr(native, "run", lambda *command: pytest.fail("compiled again"))
    assert fresh(name) is not None


@compiles
def test_another_processor_or_source_is_another_file(fresh, tmp_path, monkeypatch):
    fresh("swiglu")
    monkeypatch.setattr(native, "processor", lambda: "another")
    fresh("swiglu")
    assert len(list((tmp_path / "cache").iterdir())) == 2


POWERS = """
#include "vectors.h"
extern "C" void of_e(float* x) { store(x, exponential(load<Lanes>(x))); }
extern "C" void of_two(float* x) {
  Lanes both[2] = {load<Lanes>(x), load<Lanes>(x + LANES)};
  powers_of_two(both);
  store(x, both[0]), store(x + LANES, both[1]);
}
extern "C" int lanes() { return LANES; }
"""


@compiles
@pytest.mark.parametrize("name, base, least, most", [("of_e", math.e, -87.0, 88.0), ("of_two", 2.0, -126.0, 127.0)])
def test_powers(tmp_path, name, base, least, most):
    compiler = next(filter(None, map(native.shutil.which, native.COMPILERS)))
    (tmp_path / "powers.cpp").write_text(POWERS)
    made, headers = str(tmp_path / "powers.so"), str(Path(native.__file__).parent)
    native.run(compiler, *native.FLAGS, "-I", headers, "-o", made, str(tmp_path / "powers.cpp"))
    made = ctypes.CDLL(made)
    many = made.lanes() * (2 if name == "of_two" else 1)
    x = torch.cat((torch.linspace(least, most, 4096), torch.linspace(-1, 1, 4096)))
    found = x.clone()
    for i in range(0, len(found), many):
        getattr(made, name)(ctypes.c_void_p(found[i:].data_ptr()))
    expected = base ** x.double()
    assert ((found - expected).abs() / expected).max() < 2e-7
    no_numbers = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # a GPU's first
    few = torch.cat((torch.tensor([-torch.inf, 0.0]), no_numbers)).repeat(8)
    getattr(made, name)(ctypes.c_void_p(few.data_ptr()))
    assert 0 <= few[0] < 2e-38 and few[1] == 1.0 and few[2:4].isnan().all()


@compiles
def test_no_warnings(monkeypatch):
    for name in SOURCES:
        command = (
            native.shutil.which("g++"),
            "-Wall",
            "-Wextra",
            "-Werror",
            *native.FLAGS,
            "-fopenmp",
            "-o",
            "/dev/null",
        )
        if command[0] is not None:
            native.run(*command, str(Path(native.__file__).with_name(f"{name}.cpp")))


@compiles
def test_threads_are_torchs():
    """One OpenMP runtime in the process, or two pools of threads would fight for the cores."""
    code = (
        "from palm_rlhf_pytorch.native import library; library('swiglu');"
        "names = {l.split()[5].rsplit('/')[-1] for l in open('/proc/self/maps') if '.so' in l};"
        "print(len({n for n in names if n.startswith(('libgomp', 'libiomp5', 'libomp'))}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_without_a_compiler(fresh, monkeypatch):
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert fresh("swiglu") is None


def test_without_a_single_openmp(fresh, monkeypatch):
    monkeypatch.setattr(native, "loaded_openmp", lambda: None)
    assert fresh("swiglu") is None


def test_switched_off(fresh, monkeypatch):
    monkeypatch.setenv(native.SWITCH, "0")
    assert fresh("swiglu") is None


@compiles
def test_what_does_not_compile_is_told_and_done_without(fresh, monkeypatch, caplog):
    monkeypatch.setattr(native, "FLAGS", ("-no-such-flag", *native.FLAGS))
    with caplog.at_level(logging.WARNING):
        assert fresh("swiglu") is None
    assert "swiglu.cpp could not be compiled" in caplog.text and "no-such-flag" in caplog.text


@compiles
def test_a_cache_that_cannot_be_made(fresh, monkeypatch, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file")
    assert fresh("swiglu") is None and "could not be compiled" in caplog.text


@compiles
def test_a_cache_that_others_may_write_to_is_not_trusted(fresh, tmp_path, caplog):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    assert fresh("swiglu") is None and "may be written by others" in caplog.text
    (tmp_path / "cache").chmod(0o700)
    assert fresh("swiglu") is not None
    (made,) = (tmp_path / "cache").iterdir()
    made.chmod(0o777)
    assert fresh("swiglu") is None


@compiles
def test_nobodys_home(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    for name in (native.CACHE, native.SWITCH, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(native.Path, "home", homeless)
    assert library.__wrapped__("swiglu") is None
