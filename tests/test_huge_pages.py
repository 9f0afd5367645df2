"""Large pages are asked for where there are any, and change nothing but speed."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from palm_rlhf_pytorch import huge_pages
from palm_rlhf_pytorch.huge_pages import PAGE, in_huge_pages
from palm_rlhf_pytorch.kv_cache import KVCache


@pytest.fixture
def asked(monkeypatch):
    """(begin, bytes) of what the system is asked for."""
    calls = []
    fake = SimpleNamespace(madvise=lambda begin, count, advice: calls.append((begin.value, count.value)))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: fake)
    monkeypatch.setattr(huge_pages.sys, "platform", "linux")
    return calls


def test_whole_pages_within_the_tensor(asked):
    t = torch.empty(3 * PAGE // 4 + 100)
    assert in_huge_pages(t) is t
    ((begin, count),) = asked
    assert begin % PAGE == 0 and count % PAGE == 0 and count >= 2 * PAGE
    assert t.data_ptr() <= begin and begin + count <= t.data_ptr() + 4 * t.numel()


@pytest.mark.parametrize("kind", ["small", "elsewhere", "meta"])
def test_nothing_is_asked_for_what_has_no_such_pages(asked, monkeypatch, kind):
    if kind == "elsewhere":
        monkeypatch.setattr(huge_pages.sys, "platform", "darwin")
    size, device = (100 if kind == "small" else PAGE), "meta" if kind == "meta" else "cpu"
    in_huge_pages(torch.empty(size, device=device))
    assert not asked


def test_memory_for_weights_and_caches(asked):
    t = huge_pages.empty(3, PAGE // 4)
    assert len(asked) == 1
    cache = KVCache(1, 2, 1, PAGE // 64, 8)
    assert len(asked) == 2 and not cache.memory.any()
    cache.memory.fill_(3.0)
    cache.filled = cache.max_len
    cache.reserve(1)
    assert (
        len(asked) == 3 and (cache.memory[:, :, : PAGE // 64] == 3).all() and not cache.memory[:, :, PAGE // 64 :].any()
    )
    assert t.shape == (3, PAGE // 4) and t.dtype == torch.float32
    assert t.fill_(2.0).sum() == 6 * PAGE // 4
