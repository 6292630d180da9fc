"""The page of the numerals model, used in a browser as a visitor does."""

import time
from urllib.parse import urlsplit

import pytest
from served import running
from test_docs import needs_numerals
from visits import HINT, Visit, needs_a_browser, opened
from waiting import until

import xblip

pytestmark = [pytest.mark.slow, needs_numerals, needs_a_browser]

FILES = {"image": "six.png", "video": "one.mp4", "audio": "four.wav", "point_cloud": "six.obj"}


@pytest.fixture(scope="module")
def browser():
    with opened() as found:
        yield found


@pytest.fixture
def visit(browser, numerals):
    """A visit to that page."""
    found = Visit(browser, f"{numerals.url}/")
    yield found
    found.page.close()


@pytest.fixture(scope="module")
def demo():
    import xblip_numerals

    return xblip_numerals.EXAMPLES.parent


@pytest.fixture(scope="module")
def numerals():
    with running(xblip.load("numerals"), "numerals", ui=True) as found:
        yield found


def test_a_conversation_about_a_file_of_each_kind(numerals, demo, visit):
    files = {name: demo / name / file for name, file in FILES.items()}
    for name, file in files.items():
        visit.give(name, file)
    for shown in ("img[src*='six.png']", "video[src*='one.mp4']", "#waveform", "img[src*='six.obj.preview.webp']"):
        visit.page.wait_for_selector(f"#uploads {shown}")
    question = "Which number is larger, the image or the audio?"
    assert visit.ask(question) == numerals.server.model.ask(question, **files).text == "the image"
    assert visit.page.query_selector("#upload-image .file-preview") is None, "what was asked about is in the talk"
    assert visit.page.query_selector("#talk img[src*='six.png']") and visit.page.query_selector("#talk video")
    assert visit.ask("Which one is red?") == "the video"
    assert visit.answers == ["the image", "the video"] and question in visit.talk
    assert visit.asked_of - {""} == {urlsplit(numerals.url).netloc}, "it needs nothing from elsewhere"
    visit.page.click("#new")
    visit.page.wait_for_function("document.querySelectorAll('#talk .message').length == 0")
    assert "six" not in visit.ask("Which number is in the image?"), "it is forgotten"


def test_a_bad_file_is_a_sentence_and_the_conversation_goes_on(demo, visit, tmp_path):
    assert "Which" not in visit.talk
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    visit.give("image", bad)
    visit.page.wait_for_selector("#uploads .wrong")
    assert "Cannot read image 'bad.png'" in visit.page.inner_text("#uploads .wrong")
    told = visit.ask("Which number is in the image?")
    assert "Not answered" in told and "Cannot read image bad.png: it is damaged" in told
    assert str(tmp_path) not in visit.page.content() and "Traceback" not in visit.talk
    assert visit.page.input_value(HINT) == "Which number is in the image?", "it may be asked again"
    visit.page.click("#upload-image [aria-label=Clear]")
    visit.page.wait_for_selector("#upload-image .file-preview", state="detached")
    visit.give("image", demo / "image" / "six.png")
    assert visit.ask() == "six"


def test_an_example_fills_in_question_and_files(visit):
    visit.page.click("#examples button:has-text('Which input shows the larger number?')")
    visit.page.wait_for_selector("#upload-image .file-preview")
    visit.page.wait_for_selector("#upload-audio .file-preview")
    assert visit.page.input_value(HINT) == "Which input shows the larger number?"
    assert visit.ask() == "the audio"


def test_several_files_of_one_kind_are_read_in_their_order(numerals, demo, visit):
    files = [demo / "image" / name for name in ("six.png", "two.jpg")]
    visit.give("image", *files)
    question = "What is the sum?"
    expected = numerals.server.model.ask(question, media=[("image", file) for file in files]).text
    assert visit.ask(question) == expected


def test_without_a_question_nothing_is_asked(numerals, visit):
    before = numerals.server.engine.counts["submitted"]
    visit.page.click("#question .submit-button")
    visit.page.wait_for_selector("text=Write a question first.")
    assert numerals.server.engine.counts["submitted"] == before
    assert visit.ask("Which number is in the image?"), "it goes on"


@pytest.mark.parametrize("leaves", [False, True])
def test_who_stops_or_leaves_gives_the_answer_up(numerals, visit, monkeypatch, leaves):
    engine = numerals.server.engine
    monkeypatch.setitem(engine.model.generation, "max_new_tokens", 60)
    monkeypatch.setitem(engine.model.generation, "min_new_tokens", 60)
    step = engine._decoder.step
    monkeypatch.setattr(engine._decoder, "step", lambda: (time.sleep(0.2), step())[1])
    before = engine.counts["cancelled"]
    visit.page.fill(HINT, "Which number is in the image?")
    visit.page.click("#question .submit-button")
    visit.page.wait_for_selector("#talk .message.bot")
    if leaves:
        visit.page.close()
    else:
        visit.page.click("#question .stop-button")
    until(lambda: engine.counts["cancelled"] == before + 1 and not engine.state["rows"], seconds=8)
    if not leaves:
        visit.page.wait_for_selector("#question .submit-button")
