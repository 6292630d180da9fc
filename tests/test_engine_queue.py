"""The engine's queue: who waits, leaves, comes late or is there when it closes."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from kit import eight, make_model
from waiting import ASK, NEW, Held, until

from xblip.decoder import Decoder
from xblip.engine import Engine, EngineConfig
from xblip.errors import BusyError, InputError, LateError, XBlipError
from xblip.llm import FrozenLLM
from xblip.requests import Finished, Request
from xblip.sample import Sample


@pytest.fixture
def model(llm):
    return make_model(llm)


class TestQueue:
    def test_a_full_queue_says_so_at_once(self, model, monkeypatch):
        with Held(model, monkeypatch, max_rows=1, max_waiting=2) as held:
            _, first = held.begin()
            others = [held.submit(Request(ASK, NEW))[1] for _ in range(2)]
            with pytest.raises(BusyError, match="The queue is full, with 2 requests waiting: ask again in a while"):
                held.submit(Request(ASK, NEW))
            assert held.engine.counts["refused"] == 1
            held.may_go.set()
            until(lambda: all(events and isinstance(events[-1], Finished) for events in (first, *others)))

    def test_callers_take_turns(self, model, monkeypatch):
        order = []
        with Held(model, monkeypatch, max_rows=1) as held:
            held.begin()
            for caller, count in (("greedy", 5), ("modest", 1)):
                for _ in range(count):
                    held.engine.submit(
                        Request(ASK, {"max_new_tokens": 1}, caller=caller),
                        lambda event, caller=caller: order.append(caller) if isinstance(event, Finished) else None,
                    )
            held.may_go.set()
            until(lambda: len(order) == 6)
        assert order.index("modest") <= 2, "one may be on its way already"

    def test_rows_are_bounded_by_positions(self, model):
        most = 3 * 60
        with Engine(model, EngineConfig(max_positions=most)) as engine, ThreadPoolExecutor(8) as threads:
            seen = []
            futures = [threads.submit(engine.ask, Request(sample, NEW)) for sample in eight() * 3]
            while not all(future.done() for future in futures):
                seen.append(engine.state["positions"])
                time.sleep(0.001)
        assert 0 < max(seen) <= most
        assert [future.result().answer for future in futures] == model.generate(eight() * 3, **NEW)

    def test_what_can_never_fit_is_refused(self, model):
        with Engine(model, EngineConfig(max_positions=20)) as engine:
            with pytest.raises(
                InputError, match=r"take \d+ positions, and this engine holds 20: give fewer or shorter"
            ):
                engine.ask(Request(ASK, NEW))
            assert engine.ask(Request(Sample("what ?"), {"max_new_tokens": 2})).answer.text

    def test_a_cancelled_request_leaves_its_row(self, model, monkeypatch):
        with Held(model, monkeypatch) as held:
            ticket, events = held.begin()
            ticket.cancel()
            waiting, _ = held.submit(Request(ASK, NEW))
            waiting.cancel()
            held.may_go.set()
            until(lambda: held.engine.state == {"waiting": 0, "rows": 0, "positions": 0})
            until(lambda: held.engine.counts["cancelled"] == 2)
            assert not any(isinstance(event, (Finished, XBlipError)) for event in events) and len(events) <= 2

    def test_leaving_a_stream_cancels_it(self, model, monkeypatch):
        with Held(model, monkeypatch) as held:
            for _ in held.engine.stream(Request(ASK, {"max_new_tokens": 60, "min_new_tokens": 60})):
                break
            held.may_go.set()
            until(lambda: held.engine.state["rows"] == 0 and held.engine.counts["cancelled"] == 1)
            assert held.engine.counts["tokens"] < 5

    def test_a_request_has_its_time(self, model, monkeypatch):
        with Held(model, monkeypatch) as held:
            _, events = held.submit(Request(ASK, {**NEW, "min_new_tokens": 12}, seconds=0.2))
            assert held.stepping.wait(20)
            time.sleep(0.25)
            held.may_go.set()
            until(lambda: events and isinstance(events[-1], LateError))
            assert "was not whole after 0.2 s: ask for less, or give more time" in str(events[-1])
            assert held.engine.counts["late"] == 1 and held.engine.counts["failed"] == 0

    @pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
    def test_who_waits_hears_in_time_that_it_is_too_late(self, model, monkeypatch, options):
        """While another's answer is being said, by steps or in one go."""
        at_work, may_go, real = threading.Event(), threading.Event(), FrozenLLM.generate

        def generate(llm, *given, **settings):
            at_work.set()
            assert may_go.wait(20)
            return real(llm, *given, **settings)

        monkeypatch.setattr(FrozenLLM, "generate", generate)
        with Held(model, monkeypatch, max_rows=1) as held:
            held.submit(Request(ASK, {**NEW, "min_new_tokens": 12, **options}))
            until(lambda: at_work.is_set() or held.stepping.is_set())
            late = [held.submit(Request(ASK, NEW, seconds=0.2))[1] for _ in range(3)]
            until(lambda: all(events and isinstance(events[-1], LateError) for events in late))
            assert held.engine.state["waiting"] == 0 and held.engine.counts["late"] == 3
            may_go.set()

    def test_who_is_being_read_hears_in_time_that_it_is_too_late(self, model, monkeypatch):
        at_work, may_go, real = threading.Event(), threading.Event(), Engine._made

        def made(engine, batch):
            at_work.set()
            assert may_go.wait(20)
            return real(engine, batch)

        monkeypatch.setattr(Engine, "_made", made)
        with Engine(model, EngineConfig(max_rows=1)) as engine:
            told = [[], []]
            engine.submit(Request(ASK, NEW, seconds=0.2), told[0].append)
            assert at_work.wait(20)
            engine.submit(Request(ASK, NEW, seconds=0.2), told[1].append)
            until(lambda: all(told))
            may_go.set()
        assert [[type(event) for event in events] for events in told] == [[LateError], [LateError]]
        assert engine.counts["late"] == 2 and engine.counts["finished"] == 0

    def test_who_waits_hears_in_time_though_both_threads_are_at_work(self, model, monkeypatch):
        """One reads what takes long, the other generates in one go."""
        reads, generates, may_go = threading.Event(), threading.Event(), threading.Event()

        def waiting(at_work, real):
            def work(*given, **settings):
                at_work.set()
                assert may_go.wait(20)
                return real(*given, **settings)

            return work

        with Engine(model, EngineConfig(max_rows=4)) as engine:
            monkeypatch.setattr(FrozenLLM, "generate", waiting(generates, FrozenLLM.generate))
            engine.submit(Request(ASK, {**NEW, "num_beams": 2}), lambda _: None)
            assert generates.wait(20)
            monkeypatch.setattr(engine, "_made", waiting(reads, engine._made))
            engine.submit(Request(ASK, NEW), lambda _: None)
            assert reads.wait(20)
            told = []
            engine.submit(Request(ASK, NEW, seconds=0.2), told.append)
            until(lambda: told)
            may_go.set()
        assert [type(event) for event in told] == [LateError] and engine.counts["finished"] == 2

    def test_a_listener_may_ask_again_and_hold_a_lock_of_its_own(self, model, monkeypatch):
        own, told = threading.Lock(), []

        def listen(event):
            with own:
                told.append(event)
            if isinstance(event, LateError):
                held.engine.submit(Request(ASK, {"max_new_tokens": 1}), told.append)

        with Held(model, monkeypatch, max_rows=1) as held:
            held.begin()
            held.engine.submit(Request(ASK, NEW, seconds=0.1), listen)
            deadline = time.monotonic() + 2
            while not told and time.monotonic() < deadline:
                with own:
                    held.engine.state  # noqa: B018 - it takes the engine's lock
            held.may_go.set()
            until(lambda: any(isinstance(event, Finished) for event in told))
        assert isinstance(told[0], LateError)

    def test_those_who_left_take_no_place_in_the_queue(self, model, monkeypatch):
        with Held(model, monkeypatch, max_rows=1, max_waiting=2) as held:
            held.begin()
            for _ in range(2):
                held.submit(Request(ASK, NEW))[0].cancel()
            _, events = held.submit(Request(ASK, NEW))
            assert held.engine.state["waiting"] == 1
            held.may_go.set()
            until(lambda: events and isinstance(events[-1], Finished) and held.engine.counts["cancelled"] == 2)

    @pytest.mark.parametrize("seconds, told", [(None, None), (0.3, LateError)])
    def test_an_answer_said_in_one_go_is_given_up_like_others(self, model, monkeypatch, seconds, told):
        begun, real = threading.Event(), model.llm.model.forward

        def forward(**given):
            begun.set()
            time.sleep(0.02)
            return real(**given)

        monkeypatch.setattr(model.llm.model, "forward", forward)
        events = []
        with Engine(model) as engine:
            many = {"max_new_tokens": 100, "min_new_tokens": 100, "num_beams": 2}
            ticket = engine.submit(Request(ASK, many, seconds=seconds), events.append)
            assert begun.wait(20)
            if not told:
                ticket.cancel()
            started = time.monotonic()
            until(lambda: not any(engine.state.values()))
            assert time.monotonic() - started < 1.5, "the whole takes 2 s"
            until(lambda: engine.counts["late" if told else "cancelled"] == 1)
            assert [type(event) for event in events] == ([told] if told else [])

    def test_beams_count_in_what_is_held(self, model):
        with Engine(model, EngineConfig(max_positions=60)) as engine:
            assert engine.ask(Request(ASK, NEW)).answer.text
            with pytest.raises(InputError, match=r"take \d+ positions, and this engine holds 60"):
                engine.ask(Request(ASK, {**NEW, "num_beams": 4}))


class TestClosing:
    def test_what_was_taken_is_answered(self, model):
        engine = Engine(model)
        with ThreadPoolExecutor(8) as threads:
            futures = [threads.submit(engine.ask, Request(sample, NEW)) for sample in eight()]
            until(lambda: engine.counts["submitted"] == 8)
            engine.close()
        assert [future.result().answer for future in futures] == model.generate(eight(), **NEW)
        with pytest.raises(BusyError, match="shutting down"):
            engine.ask(Request(ASK, NEW))
        assert not any(thread.is_alive() for thread in engine._threads)

    @pytest.mark.parametrize(
        "kind, work, options",
        [
            (Engine, "_made", {}),
            (Decoder, "join", {}),
            (Decoder, "_say_whole", {"num_beams": 2}),
            (Decoder, "step", {"min_new_tokens": 12}),
        ],
    )
    def test_what_is_worked_on_is_counted_and_given_up_like_all(self, model, monkeypatch, kind, work, options):
        at_work, may_go, events = threading.Event(), threading.Event(), []
        real = getattr(kind, work)

        def held(*given):
            at_work.set()
            assert may_go.wait(20)
            return real(*given)

        monkeypatch.setattr(kind, work, held)
        engine = Engine(model)
        try:
            engine.submit(Request(ASK, {**NEW, **options}), events.append)
            assert at_work.wait(20) and any(engine.state.values())
            engine.close(seconds=0.1)
            assert isinstance(events[-1], BusyError), events
        finally:
            may_go.set()
            engine.close()
        assert isinstance(events[-1], BusyError) and not any(engine.state.values())

    def test_what_takes_too_long_is_given_up(self, model, monkeypatch):
        with Held(model, monkeypatch, max_rows=1) as held:
            events = [held.begin()[1], *(held.submit(Request(ASK, NEW))[1] for _ in range(2))]
            held.engine.close(seconds=0.1)
            for own in events:
                assert isinstance(own[-1], BusyError) and "was shut down before this was answered" in str(own[-1])
