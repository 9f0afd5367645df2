import threading
from itertools import count, islice

import pytest

from palm_rlhf_pytorch.prefetch import prefetched

PATIENCE = 10.0  # seconds until a test that hangs gives up


def workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("ahead", [1, 4, 50])
def test_everything_comes_in_its_order(ahead):
    with prefetched(range(20), lambda i: i * i, ahead) as items:
        assert list(items) == [i * i for i in range(20)]
        assert next(items, "none") == "none"
    assert not workers()


def test_what_comes_next_is_made_meanwhile():
    made = [threading.Event() for _ in range(3)]

    def source():
        for i, event in enumerate(made):
            event.set()
            yield i

    with prefetched(source(), ahead=2) as items:
        assert next(items) == 0
        assert made[1].wait(PATIENCE) and made[2].wait(PATIENCE)  # nobody has asked for them yet


def test_no_more_than_that_is_made():
    taken = []
    with prefetched((taken.append(i) or i for i in count()), ahead=3) as items:
        assert list(islice(items, 5)) == [0, 1, 2, 3, 4]
    # 3 at the start, one more for each that was asked for
    assert taken == list(range(len(taken))) and 5 <= len(taken) <= 8


def test_it_is_made_in_a_thread_of_its_own():
    with prefetched(threading.get_ident() for _ in range(3)) as items:
        idents = set(items)
    assert len(idents) == 1 and threading.get_ident() not in idents


def test_a_mistake_is_raised_where_the_item_is_taken():
    def source():
        yield 1
        yield 0
        raise KeyError("no more")

    with pytest.raises(KeyError, match="no more"):
        with prefetched(source()) as items:
            assert next(items) == 1 and next(items) == 0
            next(items)
    with pytest.raises(ZeroDivisionError):
        with prefetched([1, 0], lambda i: 1 / i) as items:
            assert list(items)
    assert not workers()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_it_ends_with_whoever_takes_from_it(error):
    with pytest.raises(error):
        with prefetched(count()) as items:
            next(items)
            raise error
    assert not workers()
