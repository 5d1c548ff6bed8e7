# SPDX-License-Identifier: Apache-2.0
"""Reading ahead and writing behind: order, bounds, errors, and an end without hanging."""

import threading
import time
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_jax.calibration import pipeline

PATIENCE = 20  # seconds until a test calls something hung


class Boom(Exception):
    pass


def _threads() -> list[str]:
    names = ("read-ahead", "write-behind")
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(names)]


@pytest.fixture(autouse=True)
def no_thread_left():
    yield
    assert not _threads()


def _wait_until(condition) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@given(st.lists(st.integers() | st.none()), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_order_is_kept(items, depth):
    with pipeline.read_ahead(iter(items), depth) as ahead:
        assert list(ahead) == items
        assert list(ahead) == []


def test_any_iterable():
    with pipeline.read_ahead(range(3)) as ahead:
        assert [next(ahead), next(ahead), next(ahead), next(ahead, "end")] == [0, 1, 2, "end"]


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_depth_is_respected_and_used(depth):
    """While the consumer has one item, the source is asked for `depth` more and no further one."""
    begun = []

    def source():
        for number in range(20):
            begun.append(number)
            yield number

    with pipeline.read_ahead(source(), depth) as ahead:
        for number in range(10):
            _wait_until(lambda: len(begun) >= number + depth)  # noqa: B023
            time.sleep(0.01)
            assert len(begun) == number + depth
            assert next(ahead) == number


def test_the_source_runs_beside_the_consumer():
    """Each waits for the other's thread: in one thread this would hang."""
    reading, may_read = threading.Event(), threading.Event()

    def source():
        yield 0
        reading.set()
        assert may_read.wait(PATIENCE)
        yield 1

    with pipeline.read_ahead(source()) as ahead:
        assert next(ahead) == 0
        assert reading.wait(PATIENCE)
        may_read.set()
        assert next(ahead) == 1


@pytest.mark.parametrize("depth", [1, 3])
def test_the_sources_error_is_met_in_its_place(depth):
    def source():
        yield 1
        yield 2
        raise Boom("read")

    with pipeline.read_ahead(source(), depth) as ahead:
        assert [next(ahead), next(ahead)] == [1, 2]
        with pytest.raises(Boom, match="read"):
            next(ahead)
        assert next(ahead, "end") == "end"


def test_an_error_that_nobody_meets_ends_quietly():
    def source():
        yield 1
        raise Boom

    with pipeline.read_ahead(source(), 3) as ahead:
        assert next(ahead) == 1


def _endless(closed: threading.Event):
    try:
        while True:
            yield 0
    finally:
        closed.set()


@pytest.mark.parametrize("taken", [0, 1, 3])
@pytest.mark.parametrize("depth", [1, 3])
def test_leaving_early_closes_the_source(taken, depth):
    closed = threading.Event()
    with pipeline.read_ahead(_endless(closed), depth) as ahead:
        for _ in range(taken):
            next(ahead)
        assert not closed.is_set()
    assert closed.is_set()
    assert not _threads()


def test_the_consumers_error_passes_and_closes_the_source():
    closed = threading.Event()
    with pytest.raises(Boom, match="consumer"), pipeline.read_ahead(_endless(closed), 2) as ahead:
        next(ahead)
        raise Boom("consumer")
    assert closed.is_set()


@pytest.mark.parametrize("depth", [1, 3])
def test_leaving_waits_for_the_item_being_read(depth):
    """The source is in the middle of a read when the consumer gives up; it reads no further."""
    reading, gave_up, log = threading.Event(), threading.Event(), []

    def source():
        try:
            yield 0
            reading.set()
            assert gave_up.wait(PATIENCE)
            log.append("read")
            yield 1
            log.append("read on")
            yield 2
        finally:
            log.append("closed")

    with pytest.raises(Boom), pipeline.read_ahead(source(), depth) as ahead:
        next(ahead)
        assert reading.wait(PATIENCE)
        threading.Timer(0.02, gave_up.set).start()
        raise Boom
    assert log == ["read", "closed"]


def test_an_error_while_closing_is_not_lost():
    def source():
        try:
            yield 0
            yield 1
        finally:
            raise Boom("close")

    with pytest.raises(Boom, match="close"), pipeline.read_ahead(source()) as ahead:
        next(ahead)


def test_items_that_are_done_are_let_go():
    """While the next item is waited for, the last one's memory is free."""

    class Item:
        pass

    may_read = threading.Event()

    def source():
        yield Item()
        assert may_read.wait(PATIENCE)
        yield Item()

    with pipeline.read_ahead(source()) as ahead:
        first = weakref.ref(next(ahead))
        waiting = threading.Thread(target=lambda: next(ahead))
        waiting.start()
        try:
            _wait_until(lambda: first() is None)
        finally:
            may_read.set()
            waiting.join()


@pytest.mark.parametrize("context", [pipeline.write_behind, lambda d: pipeline.read_ahead([1], d)])
def test_depth_must_be_positive(context):
    with pytest.raises(ValueError, match="`depth` is 0; expected 1 or more"), context(0):
        pass


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_calls_run_in_order(depth):
    done = []
    with pipeline.write_behind(depth) as write:
        for number in range(50):
            write(done.append, number)
    assert done == list(range(50))


def test_calls_run_in_one_other_thread():
    names = []
    with pipeline.write_behind() as write:
        for _ in range(4):
            write(lambda: names.append(threading.current_thread().name))
    assert len(set(names)) == 1
    assert names[0].startswith("write-behind")


@pytest.mark.parametrize("depth", [1, 3])
def test_outstanding_calls_are_bounded(depth):
    """A submit that would be one too many waits; those before it did not."""
    may_write, submitted, done = threading.Event(), [], []

    def call(number):
        assert may_write.wait(PATIENCE)
        done.append(number)

    def submit_all():
        with pipeline.write_behind(depth) as write:
            for number in range(depth + 2):
                write(call, number)
                submitted.append(number)

    thread = threading.Thread(target=submit_all)
    thread.start()
    _wait_until(lambda: len(submitted) == depth)
    time.sleep(0.02)
    assert len(submitted) == depth
    may_write.set()
    thread.join(PATIENCE)
    assert done == list(range(depth + 2))


def _fail():
    raise Boom("write")


def test_a_later_submit_raises_the_error():
    with pytest.raises(Boom, match="write"), pipeline.write_behind(1) as write:
        write(_fail)
        write(print)
        pytest.fail("the submit before this line raises")


def test_a_finished_error_does_not_wait_for_a_full_queue():
    failed = threading.Event()

    def fail():
        failed.set()
        _fail()

    def submit_until_raised(write):
        for _ in range(100):
            time.sleep(0.002)
            write(int)
        pytest.fail("a submit after the error raises it")

    with pytest.raises(Boom, match="write"), pipeline.write_behind(10_000) as write:
        write(fail)
        assert failed.wait(PATIENCE)
        submit_until_raised(write)


def test_leaving_raises_the_error_and_drops_the_rest():
    may_write, done = threading.Event(), []

    def fail():
        assert may_write.wait(PATIENCE)
        _fail()

    def slow():
        time.sleep(0.2)
        done.append("slow")

    with pytest.raises(Boom, match="write"), pipeline.write_behind(10) as write:
        write(fail)
        write(slow)  # may have begun when the error is noticed
        for number in range(5):
            write(done.append, number)
        may_write.set()
    assert done in ([], ["slow"])


def test_an_error_in_the_body_drops_what_has_not_begun():
    begun, may_write, done = threading.Event(), threading.Event(), []

    def first():
        begun.set()
        assert may_write.wait(PATIENCE)
        done.append("first")

    with pytest.raises(Boom, match="body"), pipeline.write_behind(10) as write:
        write(first)
        for number in range(5):
            write(done.append, number)
        assert begun.wait(PATIENCE)
        threading.Timer(0.05, may_write.set).start()
        raise Boom("body")
    assert done == ["first"]  # it was running, and was waited for


def test_the_bodys_error_goes_before_a_calls():
    with pytest.raises(Boom, match="body"), pipeline.write_behind(10) as write:
        write(_fail)
        raise Boom("body")


def test_both_at_once():
    """As a compression uses them: what is read is written, in order, each in its thread."""
    written = []
    with pipeline.read_ahead(range(30), 2) as ahead, pipeline.write_behind() as write:
        for item in ahead:
            write(written.append, item)
    assert written == list(range(30))
