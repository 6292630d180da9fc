"""The adapter for lmms-eval without lmms-eval: small stand-ins for the few names it imports."""

import importlib
import sys
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from kit import BEADS, ONE, THREE, TWO, make_model

import xblip
from xblip import lmms
from xblip.errors import ConfigError, InputError, MediaError, PluginError
from xblip.lmms import media_of, wanted
from xblip.sample import Media, Sample

GREEDY = {"do_sample": False}


class Kind:
    """A branch that reads what its function takes."""

    def __init__(self, suffixes=(), takes=lambda source: False):
        self.modality = SimpleNamespace(suffixes=suffixes)
        self.takes = takes

    def read(self, source):
        if not isinstance(source, str) and not self.takes(source):
            raise MediaError(f"not {type(source).__name__}")
        return "read", source


SHAPES = Kind((".obj", ".bin"), lambda source: isinstance(source, np.ndarray) and source.shape[-1] == 3)
GRIDS = Kind((".grid", ".bin"), lambda source: isinstance(source, (np.ndarray, bytes)))
WAVES = Kind((".wave",), lambda source: isinstance(source, tuple))
KINDS = {"shapes": SHAPES, "grids": GRIDS, "waves": WAVES}


class Decoder:
    """As `datasets` gives sound: no dictionary, but something with these keys."""

    def __getitem__(self, key):
        return {"array": [0.5, 0.25], "sampling_rate": 8000}[key]


@pytest.mark.parametrize(
    ("visual", "modality", "source"),
    [
        ("a/b.OBJ", "shapes", "a/b.OBJ"),
        ("http://somewhere/c.wave", "waves", "http://somewhere/c.wave"),
        (b"bytes", "grids", b"bytes"),
        ({"array": [0.5, 0.25], "sampling_rate": 8000.0}, "waves", ([0.5, 0.25], 8000)),
        (Decoder(), "waves", ([0.5, 0.25], 8000)),
        ({"path": "d.wave", "bytes": None}, "waves", "d.wave"),
        ({"path": "d.grid", "bytes": b"inside"}, "grids", b"inside"),
        ({"path": None, "bytes": b"inside"}, "grids", b"inside"),
        ({"type": "grids", "url": "d.wave"}, "grids", "d.wave"),
        (("grids", "f.bin"), "grids", "f.bin"),
    ],
)
def test_a_visual_is_read_by_the_modality_whose_kind_it_is(visual, modality, source):
    assert media_of(visual, KINDS) == Media(modality, ("read", source))


def test_an_object_is_read_by_the_modality_that_takes_it():
    rows = np.zeros((2, 4))
    assert media_of(rows, KINDS).modality == "grids"
    assert media_of(("shapes", np.zeros((2, 3))), KINDS).modality == "shapes"


@pytest.mark.parametrize(
    ("visual", "message"),
    [
        (
            "e.xyz",
            r'No modality of the model is for files that end in "\.xyz", such as e\.xyz\. There are shapes: \.obj',
        ),
        ("e.bin", r'Files that end in "\.bin", such as e\.bin, may be for shapes and grids: .* \("shapes", path\)'),
        (np.zeros((2, 3)), r'of type ndarray may be for shapes and grids: .* such as \("shapes", visual\)'),
        (7, r"No modality of the model reads a visual of type int\. shapes: not int grids: not int"),
        (("wave", 7), r'no branch for "wave", as which a visual is given\. Did you mean "waves"'),
        ({"frames": 3}, r"A visual is a dictionary of frames: expected array and sampling_rate, or path or bytes"),
        ({"path": "e.obj", "video_start": 2.0}, r"asks for a part of 'e\.obj': cut the file beforehand"),
    ],
)
def test_what_no_modality_reads_is_refused(visual, message):
    with pytest.raises(MediaError, match=message):
        media_of(visual, KINDS)


@pytest.mark.parametrize(
    ("settings", "options", "until"),
    [
        ({}, GREEDY, []),
        (
            {"temperature": 0, "top_p": None, "num_beams": 1, "max_new_tokens": 9},
            {"num_beams": 1, "max_new_tokens": 9},
            [],
        ),
        ({"temperature": 0.0, "top_p": 0.9, "do_sample": True}, {}, []),
        ({"temperature": 0.7, "top_p": 0.9}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}, []),
        ({"temperature": 0.7, "do_sample": False}, {}, []),
        ({"do_sample": True}, {"do_sample": True}, []),
        ({"until": ["\n", "", "."], "max_gen_toks": 5}, {"max_new_tokens": 5}, ["\n", "."]),
        ({"until": "END", "repetition_penalty": 1.1}, {"repetition_penalty": 1.1}, ["END"]),
        ({"until": None, "image_aspect_ratio": "pad"}, {}, []),
    ],
)
def test_settings_become_options(settings, options, until):
    before = dict(settings)
    assert wanted(settings) == (GREEDY | options, until)
    assert settings == before, "they are part of the key that lmms-eval's cache keeps an answer under"


def test_settings_of_other_models_are_told(caplog):
    wanted({"image_aspect_ratio": "pad"})
    assert "image_aspect_ratio is for other models" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_token": 5}, 'Unknown generation setting "max_new_token" of a task .* Did you mean "max_new_tokens"'),
        (
            {"visual_cot": True},
            'Unknown generation setting "visual_cot".*leave it out of the task\'s generation_kwargs',
        ),
        ({"streamer": "x"}, 'Unknown generation setting "streamer"'),
        ({"max_length": 50}, "max_length has no place here"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, not 0"),
        ({"num_return_sequences": 2}, "lmms-eval takes one answer to a request; for several give --repeats"),
        ({"until": 3}, "until must be a text or a list of texts that end an answer, not 3"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        wanted(settings)


def test_an_answer_ends_before_the_first_of_its_ends():
    assert wanted({"until": [".", "\n"]}).cut("seven \n. eight") == "seven"


def test_the_entry_point_loads_without_lmms_eval():
    (point,) = [point for point in metadata.entry_points(group="lmms_eval.models") if point.name == "xblip"]
    assert point.load() is lmms.manifest and "lmms_eval" not in sys.modules


@dataclass
class Instance:
    args: tuple


@dataclass
class TokenCounts:
    input_tokens: int
    output_tokens: int


@dataclass
class GenerationResult:
    text: object
    token_counts: TokenCounts | None = None


class Base:
    """As lmms-eval's: what all models have."""

    def __init__(self):
        self.rank = 0
        self.task_dict = {}


DOCS = [
    {"media": [ONE], "question": "what is this ?", "choices": ["red", "one two"], "answer": "red"},
    {
        "media": [BEADS, THREE, TWO],
        "question": "which one is larger ?",
        "choices": ["this", "three", "no"],
        "answer": "no",
    },
    {"media": None, "question": "is one larger ?", "choices": ["yes", "no red"], "answer": "yes"},
]
SAMPLES = [
    Sample("what is this ?", [("toy", ONE)]),
    Sample("which one is larger ?", [("beads", BEADS), ("toy", THREE), ("toy", TWO)]),
    Sample("is one larger ?"),
]


def visuals_of(doc):
    return doc["media"]


@pytest.fixture
def adapter(monkeypatch):
    """`xblip.lmms_model` on the stand-ins."""
    instance = ModuleType("lmms_eval.api.instance")
    instance.GenerationResult, instance.Instance, instance.TokenCounts = GenerationResult, Instance, TokenCounts
    model = ModuleType("lmms_eval.api.model")
    model.lmms = Base
    for module in (ModuleType("lmms_eval"), ModuleType("lmms_eval.api"), instance, model):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    yield importlib.import_module("xblip.lmms_model")
    del sys.modules["xblip.lmms_model"], xblip.lmms_model


@pytest.fixture
def ask(adapter, model, monkeypatch):
    """The adapter's model, which knows the task "demo"."""

    def asked(batch_size=2, with_model=model):
        monkeypatch.setattr(adapter, "load", lambda name, **options: with_model)
        loaded = adapter.XBlipLmms("tiny", batch_size=batch_size)
        loaded.task_dict = {"demo": {"test": DOCS}}
        return loaded

    return asked


def questions(**settings):
    rows = enumerate(DOCS)
    return [Instance((doc["question"], settings, visuals_of, number, "demo", "test")) for number, doc in rows]


def choices(rows=(0, 1, 2)):
    return [
        Instance((DOCS[row]["question"], f" {choice}", visuals_of, row, "demo", "test"))
        for row in rows
        for choice in DOCS[row]["choices"]
    ]


@pytest.mark.parametrize("batch_size", [1, "2", 8])
def test_answers_are_those_of_asking_directly(ask, model, batch_size):
    answers = list(ask(batch_size).generate_until(questions(max_new_tokens=6)))
    direct = [model.generate([sample], max_new_tokens=6, do_sample=False)[0] for sample in SAMPLES]
    assert [answer.text for answer in answers] == [answer.text for answer in direct]
    assert [vars(answer.token_counts) for answer in answers] == [
        {"input_tokens": answer.num_prompt_tokens, "output_tokens": answer.num_new_tokens} for answer in direct
    ]


def test_requests_of_other_settings_are_answered_in_their_order(ask, model):
    short, long = questions(max_new_tokens=1), questions(max_new_tokens=6)
    mixed = [short[0], long[1], long[2], short[1], short[2], long[0]]
    answers = [answer.text for answer in ask(8).generate_until(mixed)]
    told = [(0, 1), (1, 6), (2, 6), (1, 1), (2, 1), (0, 6)]
    assert answers == [model.generate([SAMPLES[row]], max_new_tokens=most)[0].text for row, most in told]


def test_an_answer_is_there_before_the_next_batch_is_read(ask):
    """So that what lmms-eval's cache has taken outlives a run that dies."""
    requests = questions(max_new_tokens=2)
    requests[2] = Instance(("", *requests[2].args[1:]))
    answers = ask(1).generate_until(requests)
    assert next(answers).text and next(answers).text
    with pytest.raises(InputError, match="^demo, document 2: The instruction is empty"):
        next(answers)


def test_one_request_gives_a_list(ask):
    assert len(ask().generate_until(questions()[:1])) == 1
    assert len(ask().loglikelihood(choices([0])[:1])) == 1


def test_a_setting_that_cannot_be_met_is_told_before_anything_is_asked(ask):
    requests = [*questions(), *questions(beams=3)]
    with pytest.raises(ConfigError, match='Unknown generation setting "beams"'):
        ask().generate_until(requests)


def test_an_error_names_the_document(ask):
    requests = questions()
    requests[1] = Instance(("what ?", {}, lambda doc: [ONE, "words.doc"], 1, "demo", "test"))
    with pytest.raises(
        MediaError, match=r'^demo, document 1: No modality of the model is for files that end in "\.doc"'
    ):
        list(ask().generate_until(requests))


def test_an_error_in_a_batch_names_the_document_it_is_about(ask, llm):
    small = make_model(llm, generation={"max_new_tokens": 4})
    requests = questions()
    requests[1] = Instance(("what " * 4000, *requests[1].args[1:]))
    with pytest.raises(InputError, match="^demo, document 1: "):
        list(ask(8, small).generate_until(requests))


@pytest.mark.parametrize("batch_size", [1, 8])
def test_choices_get_the_loss_that_lmms_eval_looks_for_the_lowest_of(ask, model, batch_size):
    results = [result.text for result in ask(batch_size).loglikelihood(choices())]
    scores = model.score(SAMPLES, [doc["choices"] for doc in DOCS])
    assert [-value for value, _ in results] == pytest.approx([value for row in scores for value in row], abs=1e-4)


def test_a_choice_is_greedy_if_the_model_would_say_it(ask, model):
    sample = Sample("describe", [("toy", ONE), ("toy", ONE), ("toy", TWO)])
    (answer,) = model.generate([sample], max_new_tokens=30)
    assert answer.num_new_tokens == len(model.llm.tokenize(answer.text)) < 30, "all it said is in the text"
    candidates = [answer.text, "red", f"{answer.text} red", answer.text.rsplit(" ", 1)[0]]
    rows = [Instance(("describe", text, lambda doc: [ONE, ONE, TWO], 0, "demo", "test")) for text in candidates]
    assert [result.text[1] for result in ask().loglikelihood(rows)] == [True, False, False, False]


def test_an_encoder_decoder_ranks_too(ask, t5_folder):
    from xblip.llm import FrozenLLM, LLMConfig

    model = make_model(FrozenLLM.from_pretrained(LLMConfig(source=str(t5_folder), dtype="float32")))
    results = [result.text[0] for result in ask(8, model).loglikelihood(choices())]
    scores = model.score(SAMPLES, [doc["choices"] for doc in DOCS])
    assert [-value for value in results] == pytest.approx([value for row in scores for value in row], abs=1e-4)


def test_an_answer_of_the_document_gets_its_log_likelihood(ask, model):
    rows = [
        Instance((doc["question"], lambda doc: doc["answer"], visuals_of, number, "demo", "test"))
        for number, doc in enumerate(DOCS)
    ]
    results = [result.text[0] for result in ask().loglikelihood(rows)]
    scores = model.score(SAMPLES, [[doc["answer"]] for doc in DOCS])
    assert results == pytest.approx([row[0] for row in scores], abs=1e-4)


def test_a_choice_that_is_no_text_is_refused(ask):
    row = Instance(("what ?", lambda doc: 3, visuals_of, 0, "demo", "test"))
    with pytest.raises(InputError, match="^demo, document 0: A choice must be text, not 3"):
        list(ask().loglikelihood([row]))


def test_a_pair_is_not_kept_by_the_cache(ask):
    assert not next(iter(ask().loglikelihood(choices()))).text.strip()


def test_mutual_information_is_refused(ask):
    with pytest.raises(
        ConfigError, match="acc_mutual_info takes values as log-likelihoods where acc takes them as losses"
    ):
        ask().loglikelihood([*choices(), Instance(("", "red"))])


def test_rounds_go_on_until_the_task_says_so(ask, model):
    seen = []

    def next_round(doc, previous_output, round_idx, previous_round_info):
        seen.append((round_idx, list(previous_output), previous_round_info))
        if round_idx == 3:
            return None, None, True, previous_output, None
        return [BEADS] if round_idx == 1 else None, "and this ?", False, previous_output, f"round {round_idx}"

    settings = {"max_new_tokens": 3}
    rows = [Instance((DOCS[0]["question"], settings, visuals_of, next_round, 0, "demo", "test"))] * 2
    first, second = ask().generate_until_multi_round(rows)
    expected = [SAMPLES[0], Sample("and this ?", [("beads", BEADS)]), Sample("and this ?")]
    texts = [model.generate([sample], max_new_tokens=3)[0].text for sample in expected]
    assert first == second == texts
    assert seen[:3] == [(1, texts[:1], None), (2, texts[:2], "round 1"), (3, texts, "round 2")]


def test_the_model_is_loaded_as_asked(adapter, model, monkeypatch):
    asked = {}

    def load(name, **options):
        asked.update(options, name=name)
        return model

    monkeypatch.setattr(adapter, "load", load)
    assert adapter.XBlipLmms("tiny", batch_size=4, device="cpu", dtype="float32").batch_size == 4
    assert asked == {"name": "tiny", "device_map": {"": "cpu"}, "dtype": "float32"}
    asked.clear()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    adapter.XBlipLmms("tiny")
    assert asked == {"name": "tiny", "device_map": {"": "cuda:3"}}
    adapter.XBlipLmms("tiny", device_map="auto")
    assert asked == {"name": "tiny", "device_map": "auto"}


def test_what_cannot_be_loaded_is_told(adapter):
    with pytest.raises(ConfigError, match="Which model\\? Name it by --model_args model=NAME"):
        adapter.XBlipLmms()
    for wrong in ("auto", 0, "1.5"):
        with pytest.raises(ConfigError, match="batch_size must be a whole number of at least 1"):
            adapter.XBlipLmms("numerals", batch_size=wrong)
    with pytest.raises(PluginError, match='No model is called "numeral"'):
        adapter.XBlipLmms("numeral")
