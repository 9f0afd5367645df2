"""The process keeps freed memory once a model is trained on a CPU, and only where nobody has said otherwise."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from palm_rlhf_pytorch import freed_memory, palm
from palm_rlhf_pytorch.freed_memory import SETTINGS, keep_freed_memory


@pytest.fixture
def said(monkeypatch):
    """What the C library is told, on a machine that has glibc."""
    calls = []
    library = SimpleNamespace(mallopt=lambda *what: calls.append(what) or 1)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(freed_memory.platform, "libc_ver", lambda: ("glibc", "2.36"))
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    return calls


def test_told_the_number_of_bytes(said):
    assert keep_freed_memory.__wrapped__()
    assert said == [(-1, 2**30), (-3, 2**25)]


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_one_s_own_stay(said, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert not keep_freed_memory.__wrapped__() and not said


def test_other_libraries_are_left_alone(said, monkeypatch):
    monkeypatch.setattr(freed_memory.platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory.__wrapped__() and not said


def test_by_a_model_that_learns(monkeypatch):
    calls = []
    monkeypatch.setattr(palm, "keep_freed_memory", lambda: calls.append(1))
    model, ids = palm.PaLM(num_tokens=9, dim=16, depth=1, dim_head=8, heads=2), torch.ones(1, 4, dtype=torch.long)
    with torch.no_grad():
        model(ids)
    model.eval()(ids)
    assert not calls
    model.train()(ids)
    assert calls
