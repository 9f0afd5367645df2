"""What comes next is made while the step under way is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

END = object()


@contextmanager
def prefetched(
    source: Iterable[Any], prepare: Callable[[Any], Any] = lambda item: item, ahead: int = 4
) -> Iterator[Iterator[Any]]:
    """The items of `source`, `prepare`d, in their order: one thread makes up to `ahead` of them before they are asked
    for. What it raises is raised where the item is taken; leaving the context ends it, the item under way included.

    A thread, since a batch is made in about a millisecond: torch's DataLoader would bring processes, each with a copy
    of the data and a random state of its own. Here `source` must only not draw from the global random state.
    """
    items = iter(source)

    def make() -> Any:
        item = next(items, END)
        return END if item is END else prepare(item)

    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as worker:
        waiting = deque(worker.submit(make) for _ in range(ahead))

        def taken() -> Iterator[Any]:
            while (item := waiting.popleft().result()) is not END:
                waiting.append(worker.submit(make))
                yield item

        try:
            yield taken()
        finally:
            worker.shutdown(wait=False, cancel_futures=True)
