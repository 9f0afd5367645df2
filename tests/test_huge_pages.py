"""Large pages are asked for where there are any, and change nothing but speed."""

import mmap
from types import SimpleNamespace

import pytest
import torch

from palm_rlhf_pytorch import huge_pages
from palm_rlhf_pytorch.huge_pages import FEWEST, PAGE
from palm_rlhf_pytorch.kv_cache import KVCache

ENOUGH = FEWEST * PAGE  # bytes


@pytest.fixture
def asked(monkeypatch):
    """The lengths in bytes of what the system is asked for."""
    calls = []

    class Watched(mmap.mmap):
        def madvise(self, advice):
            calls.append((len(self), advice))
            return super().madvise(advice)

    monkeypatch.setattr(huge_pages.mmap, "mmap", Watched)
    return calls


needs_linux = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="only Linux has such pages")


@needs_linux
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_pages_begin_with_the_tensor(asked, dtype):
    like = torch.empty(0, dtype=dtype)
    count = ENOUGH // like.element_size() + 100
    t = huge_pages.zeros(like, 2, count // 2)
    ((size, advice),) = asked
    assert size >= ENOUGH + 2 * PAGE and advice == mmap.MADV_HUGEPAGE  # one to begin at, one for what is over
    assert t.data_ptr() % PAGE == 0 and t.shape == (2, count // 2) and t.dtype == dtype and t.is_contiguous()
    assert not t.any() and t.fill_(2.0).float().sum() == count * 2


@needs_linux
def test_the_memory_lives_as_long_as_a_view_of_it(asked):
    part = huge_pages.zeros(torch.empty(0), ENOUGH // 4)[5:]
    others = [huge_pages.zeros(torch.empty(0), ENOUGH // 4).fill_(7.0) for _ in range(3)]
    assert not part.any() and all((t == 7).all() for t in others)
    part.fill_(1.0)
    assert part.sum() == part.numel()


@needs_linux
def test_a_kernel_without_them(monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, advice):
            raise OSError("Invalid argument")

    monkeypatch.setattr(huge_pages.mmap, "mmap", Refusing)
    assert huge_pages.zeros(torch.empty(0), ENOUGH // 4).fill_(1.0).sum() == ENOUGH // 4


def test_without_so_much_memory(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(huge_pages.mmap, "mmap", refuse)
    assert not huge_pages.zeros(torch.empty(0), ENOUGH // 4).any()


@pytest.mark.parametrize("kind", ["small", "elsewhere", "meta"])
def test_nothing_is_asked_for_what_has_no_such_pages(asked, monkeypatch, kind):
    if kind == "elsewhere":
        monkeypatch.setattr(huge_pages, "sys", SimpleNamespace(platform="darwin"))
    size, device = ENOUGH // 4 - (kind == "small"), "meta" if kind == "meta" else "cpu"
    t = huge_pages.zeros(torch.empty(0, device=device), size)
    assert not asked and t.shape == (size,) and t.device.type == device
    assert kind == "meta" or not t.any()


@needs_linux
def test_caches(asked):
    cache = KVCache(1, 2, 1, ENOUGH // 64, 8)
    assert len(asked) == 1 and not cache.memory.any()
    cache.memory.fill_(3.0)
    cache.filled = cache.max_len
    cache.reserve(1)
    old, new = cache.memory[:, :, : ENOUGH // 64], cache.memory[:, :, ENOUGH // 64 :]
    assert len(asked) == 2 and (old == 3).all() and not new.any()
