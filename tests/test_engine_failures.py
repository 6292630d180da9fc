"""What goes wrong in an engine is told to who asked, and to nobody else."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kit import BEADS, ONE, TWO, make_model
from waiting import ASK, NEW, Held, until

from xblip.engine import Engine, EngineConfig
from xblip.errors import ConfigError, InputError, MediaError, XBlipError
from xblip.requests import Finished, Request, late
from xblip.sample import Sample
from xblip.steps import Stepper
from xblip.text_stream import TextStream


@pytest.fixture
def model(llm):
    return make_model(llm)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"do_sample": True, "temperature": 1e-40},
            "scores for the next token are no numbers .* higher temperature",
        ),
        ({"do_sample": True, "repetition_penalty": 1e-40}, "scores for the next token are no numbers"),
    ],
)
def test_what_cannot_be_drawn_fails_alone(model, monkeypatch, options, message):
    with Held(model, monkeypatch) as held:
        _, first = held.begin()
        _, wrong = held.submit(Request(ASK, {**NEW, "min_new_tokens": 12, **options}))
        held.may_go.set()
        until(lambda: isinstance(first[-1], Finished) and isinstance(wrong[-1], XBlipError))
    assert isinstance(wrong[-1], InputError)
    with pytest.raises(InputError, match=message):
        raise wrong[-1]
    assert first[-1].answer == model.generate([ASK], **NEW, min_new_tokens=12)[0]


def test_a_text_that_cannot_be_made_fails_alone(model, monkeypatch):
    real = TextStream.add

    def add(stream, ids, **settings):
        if "bad" in stream._stop:
            raise ZeroDivisionError
        return real(stream, ids, **settings)

    monkeypatch.setattr(TextStream, "add", add)
    with Held(model, monkeypatch) as held:
        _, first = held.begin()
        _, wrong = held.submit(Request(ASK, NEW, stop=["bad"]))
        held.may_go.set()
        until(lambda: isinstance(first[-1], Finished) and wrong)
    assert type(wrong[-1]) is XBlipError and held.engine.counts["failed"] == 1


def test_who_cannot_join_fails_alone(model, monkeypatch):
    """As when there is no memory for one prompt more."""
    real = Stepper.read

    def read(stepper, prompts, past=None):
        if len(prompts[0].units) > 70:
            raise torch.OutOfMemoryError
        return real(stepper, prompts, past)

    monkeypatch.setattr(Stepper, "read", read)
    with Held(model, monkeypatch) as held:
        _, first = held.begin()
        _, wrong = held.submit(Request(Sample("what ? " * 40), NEW))
        held.may_go.set()
        until(lambda: isinstance(first[-1], Finished) and wrong)
    assert type(wrong[-1]) is XBlipError
    assert first[-1].answer == model.generate([ASK], **NEW, min_new_tokens=12)[0]


def test_who_cannot_be_kept_alone_is_told_and_the_engine_goes_on(model, monkeypatch):
    with monkeypatch.context() as broken, Held(model, broken) as held:
        ticket, _ = held.begin()
        _, other = held.submit(Request(ASK, {**NEW, "min_new_tokens": 12}))
        broken.setattr(Stepper, "keep", lambda *_: 1 / 0)
        held.may_go.set()
        until(lambda: held.engine.state["rows"] == 2)
        ticket.cancel()
        until(lambda: other and type(other[-1]) is XBlipError)
        broken.undo()
        assert held.engine.is_alive
        assert held.engine.ask(Request(ASK, NEW)).answer == model.generate([ASK], **NEW)[0]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"seconds": "5"}, "seconds must be a number above 0"),
        ({"seconds": 0}, "seconds must be a number above 0"),
        ({"stop": [5]}, "stop must be texts"),
        ({"top_log_probabilities": -1}, "top_log_probabilities must be a whole number"),
    ],
)
def test_settings_that_cannot_be_are_refused_when_they_are_given(settings, message):
    with pytest.raises(InputError, match=message):
        Request(ASK, NEW, **settings)


def test_one_stop_string_may_come_alone_and_more_likelihoods_than_there_are_words(engine):
    whole = engine.ask(Request(ASK, NEW))
    stop = whole.answer.text.split()[1]
    assert engine.ask(Request(ASK, NEW, stop=stop)) == engine.ask(Request(ASK, NEW, stop=[stop]))
    told = engine.ask(Request(ASK, NEW, top_log_probabilities=10**6)).drawn[0].top
    assert len(told) == engine.model.llm.model.config.vocab_size


def test_likelihoods_of_what_is_said_in_one_go_are_refused(engine):
    with pytest.raises(InputError, match="Log-probabilities are told .* say them one by one"):
        engine.submit(Request(ASK, {**NEW, "num_beams": 2}, top_log_probabilities=0), print)


def test_beams_among_the_llm_s_own_settings_count_and_give_way(model, monkeypatch):
    monkeypatch.setattr(model.llm.model.generation_config, "num_beams", 3)
    with Engine(model, EngineConfig(max_positions=80)) as engine:
        assert engine.ask(Request(ASK, {**NEW, "num_beams": 1}, top_log_probabilities=0)).drawn
        with pytest.raises(InputError, match=r"take \d+ positions, and this engine holds 80"):
            engine.ask(Request(ASK, NEW))


def test_what_transformers_refuses_is_told_without_objects(engine):
    with pytest.raises(ConfigError, match="These generation options are refused") as told:
        engine.ask(Request(ASK, {**NEW, "num_beams": 2, "num_beam_groups": 5}))
    assert "lambda" not in str(told.value) and "num_beams=2" in str(told.value)


def test_a_length_among_the_llm_s_own_settings_changes_nothing(model, monkeypatch):
    """`max_length` stands in many a published generation_config.json, and gives way to max_new_tokens."""
    monkeypatch.setattr(model.llm.model.generation_config, "max_length", 4096)
    with Engine(model) as engine:
        assert engine.ask(Request(ASK, {**NEW, "min_new_tokens": 3})).drawn


@pytest.mark.parametrize(
    "sample, error",
    [
        (Sample("what ?", [("toy", [])]), MediaError),
        (Sample("what ? " * 200), InputError),
        ({"toy": ONE}, InputError),
    ],
)
def test_what_fails_fails_alone(model, engine, sample, error):
    samples = [ASK, sample, Sample("which one ?", [("beads", BEADS), ("toy", TWO)])]
    with ThreadPoolExecutor(3) as threads:
        first, wrong, last = [threads.submit(engine.ask, Request(own, NEW)) for own in samples]
    with pytest.raises(error):
        wrong.result()
    assert [first.result().answer, last.result().answer] == model.generate([samples[0], samples[2]], **NEW)
    assert engine.counts["failed"] == 1


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"temperatur": 2.0}, {"num_return_sequences": 2}])
def test_wrong_options_are_refused_at_once(engine, options):
    with pytest.raises(ConfigError):
        engine.submit(Request(ASK, options), print)


def test_values_that_transformers_refuses_are_refused_at_once(engine):
    with pytest.raises(ConfigError, match="These generation options are refused, .*temperature=-1.0"):
        engine.submit(Request(ASK, {"do_sample": True, "temperature": -1.0}), print)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, ZeroDivisionError])
def test_a_failure_of_the_model_is_told_without_its_insides_and_the_engine_goes_on(
    model, engine, monkeypatch, error, options
):
    def forward(*_):
        raise error("in kernel.cu")

    expected = engine.ask(Request(ASK, {**NEW, **options}))
    with monkeypatch.context() as broken:
        broken.setattr(model.llm.model.get_output_embeddings(), "forward", forward)
        with pytest.raises(XBlipError, match="The model failed at this request; the server's log says why") as told:
            engine.ask(Request(ASK, {**NEW, **options}))
        assert type(told.value) is XBlipError and "kernel" not in str(told.value)
        with pytest.raises(error):
            model.generate([ASK], **NEW, **options)
    assert engine.ask(Request(ASK, {**NEW, **options})) == expected


@pytest.mark.parametrize("seconds, told", [(0.2, "0.2 s"), (59.9734, "59.9734 s"), (3600, "3600 s")])
def test_a_time_is_told_in_seconds(seconds, told):
    assert f"was not whole after {told}:" in str(late(seconds))


def test_a_listener_that_fails_is_given_up(engine):
    engine.submit(Request(ASK, {**NEW, "min_new_tokens": 12}), lambda event: 1 / 0)
    until(lambda: engine.counts["cancelled"] == 1)
    assert engine.ask(Request(ASK, NEW)).answer.text
