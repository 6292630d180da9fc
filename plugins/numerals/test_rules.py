"""The rules by which `xblip augment` asks about numerals' captions, and what the report tells of it."""

import json

from xblip_numerals.language import vocabulary, words_of
from xblip_numerals.rules import make_rules
from xblip_numerals.rules_report import augment_sections

from xblip.agreement import stands_in

FIGURE = {"value": 0.975, "low": 0.9, "high": 1.0, "n": 40, "units": 20}


def test_rules_speak_the_language_and_no_question_tells_its_answer():
    known, rules = set(vocabulary()), make_rules()
    assert {"number", "color"} <= set(rules)
    for rule in rules.values():
        said = [*rule["answers"], *rule["questions"], *rule.get("checks", []), *rule.get("contrasts", [])]
        assert {word for text in said for word in words_of(text.replace("{answer}", ""))} <= known
        assert rule["questions"] or rule["checks"]
        assert not [text for text in rule["questions"] if any(stands_in(value, text) for value in rule["answers"])]


def test_the_report_tells_what_was_kept_and_answered(tmp_path):
    steps = [{"step": "answered alike in the round trip", "kept": 9, "of": 10, "share": 0.9}]
    (tmp_path / "kept.json").write_text(json.dumps({"steps": steps}))
    [(_, [(_, kept, _)])] = augment_sections(tmp_path)
    assert kept == [["step", "kept", "of", "share"], ["answered alike in the round trip", "9", "10", "90.0%"]]
    task = {"kind": "discrn", "rows": 40, "asked": 40, "skipped": 0, "figures": {"soft_prompts: accuracy": FIGURE}}
    (tmp_path / "results.json").write_text(json.dumps({"tasks": {"pairs": task}}))
    [(_, [_, (_, asked, _)])] = augment_sections(tmp_path, tmp_path)
    assert asked[1] == ["pairs", "soft_prompts: accuracy", "97.5", "90.0 to 100.0", "40", "0"]
