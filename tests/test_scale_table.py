"""docs/scale.md: its tables are what the cost model says, and the model does what the page says of it."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest

from xblip.doctor import examine

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scale.md"


@pytest.fixture(scope="module")
def table():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import scale_table
    finally:
        sys.path.remove(str(ROOT / "docs"))
    return scale_table


@pytest.fixture(scope="module")
def report():
    return examine("numerals")


@pytest.fixture(scope="module")
def image(table, report):
    return next(case for case in table.cases(report, table.Assumed()) if case.name == "image")


def test_the_tables_are_up_to_date(table):
    assumed = table.Assumed()
    text = PAGE.read_text(encoding="utf-8")
    assert table.filled(text, table.tables(*table.reports(assumed), assumed)) == text, "run python docs/scale_table.py"


def test_the_page_holds_every_table_and_no_other(table, report):
    marks = re.findall(r"<!-- table: ([\w ]+) -->", PAGE.read_text(encoding="utf-8"))
    made = table.tables(report, report, table.Assumed())
    assert sorted(marks) == sorted(made)
    for name, text in made.items():
        widths = {line.count("|") for line in text.splitlines()}
        assert len(widths) == 1, f"the table of {name} has rows of different lengths"
        assert not re.search(r"\de[+-]\d|nan|inf\b", text), name


def test_tables_go_between_their_marks(table):
    text = "a\n<!-- table: one -->\nold\n<!-- end -->\nb\n<!-- table: two -->\n<!-- end -->\n"
    filled = table.filled(text, {"one": "new", "two": "second"})
    assert filled == "a\n<!-- table: one -->\nnew\n<!-- end -->\nb\n<!-- table: two -->\nsecond\n<!-- end -->\n"


def test_every_assumption_is_explained(table):
    assert [field.name for field in dataclasses.fields(table.Assumed)] == list(table.MEANING)


def test_other_assumptions(table):
    changed = table.changed(table.Assumed(), ["gpu=NVIDIA L4", "utilisation=0.2", "batch=8"])
    assert (changed.gpu, changed.utilisation, changed.batch) == ("NVIDIA L4", 0.2, 8)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("utilization=0.2", 'There is no assumption "utilization". Known: gpu, utilisation, '),
        ("batch=many", "batch must be a number, not 'many'."),
        ("gpu=abacus", 'The peak of "abacus" is not known; those of xblip/devices.py are.'),
    ],
)
def test_wrong_assumptions(table, setting, message):
    with pytest.raises(SystemExit) as stop:
        table.changed(table.Assumed(), [setting])
    assert str(stop.value).startswith(message)


def with_store(case, gb_per_s: float):
    return dataclasses.replace(case, assumed=dataclasses.replace(case.assumed, store_gb_per_s=gb_per_s))


def test_a_quick_store_pays_from_the_second_epoch_and_a_slow_one_never(image):
    assert with_store(image, 1e9).pays_from(1, "int8") == 2
    assert with_store(image, 1e-6).pays_from(1, "int8") is None
    slow = with_store(image, 1e-6)
    assert slow.step_s(1, dtype="int8") > slow.step_s(1)


def test_epochs_before_storing_pays_are_those_that_hours_tell(image):
    for store in (0.5, 1, 2, 5, 20):
        case = with_store(image, store)
        epochs = case.pays_from(8, "float16")
        if epochs is None:
            continue
        batch = case.assumed.batch
        once = batch * max(case.encoding_s, case.store_s(8, "float16"))
        gains = [count * (case.step_s(8) - case.step_s(8, dtype="float16")) - once for count in (epochs - 1, epochs)]
        assert gains[0] <= 1e-6 * once and gains[1] > 0


def test_gpus_share_the_work_and_wait_for_each_other(image):
    one, eight, many = (image.epoch_h(10**6, gpus) for gpus in (1, 8, 64))
    assert one / 8 < eight < one and eight / 8 < many < eight
    assert image.epoch_h(10**7, 8) == pytest.approx(10 * eight)


def test_a_batch_that_fits_is_larger_where_the_llm_reads_a_part_at_once(image):
    sharded, checkpointed = (image.largest_batch(shards=8, checkpointing=again) for again in (False, True))
    assert 0 < sharded < checkpointed < image.largest_batch()
    assert (
        image.fixed_bytes(encoder=False, shards=8) < image.fixed_bytes(encoder=False) < image.fixed_bytes(encoder=True)
    )


def test_the_doctor_and_the_page_count_alike(image):
    prompt = image.positions - image.way.soft_prompt[0]
    assert prompt == image.assumed.prompt + image.assumed.answer
    assert image.flops()["encoder"] == image.way.flops["encoder"]


def test_what_was_measured_is_complete(table):
    for name in ("image", "video", "audio", "point_cloud"):
        assert table.MEASURED[f"{name}_load_s"] > 0 and table.MEASURED[f"{name}_file_bytes"] > 0
    assert table.MEASURED["command"] == "python docs/scale_measure.py"
    assert 0.05 < table.MEASURED["training_step_share_of_it"] <= 1
