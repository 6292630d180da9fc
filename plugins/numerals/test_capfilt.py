"""CapFilt on numerals: its files, without training."""

import json

import pytest
from xblip_numerals.capfilt import STEPS, estimate, manifests, without_written, write_noisy
from xblip_numerals.capfilt_report import TRAINED, capfilt_sections, write_report

from xblip import markdown


@pytest.fixture
def clean(tmp_path):
    path = tmp_path / "captions" / "image-train.jsonl"
    path.parent.mkdir()
    rows = [{"image": f"../world/{place}.png", "caption": f"number {place % 7}"} for place in range(50)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_share_of_wrong_captions_is_exact(clean, tmp_path):
    noisy = tmp_path / "capfilt" / "image" / "0.4" / "noisy.jsonl"
    write_noisy(clean, noisy, "image", share=0.4, seed=0)
    pairs = list(zip(read(clean), read(noisy), strict=True))
    assert sum(one["caption"] != other["caption"] for one, other in pairs) == 20
    assert all(
        (noisy.parent / other["image"]).resolve() == (clean.parent / one["image"]).resolve() for one, other in pairs
    )
    first = noisy.read_text()
    write_noisy(clean, noisy, "image", share=0.4, seed=0)
    assert noisy.read_text() == first


def test_given_captions_can_be_had_without_the_written_ones(tmp_path):
    lines = [
        [("a", "given", 0.9), ("b", "written", 0.8)],
        [("c", "given", 0.1), ("d", "written", 0.8)],
        [("e", "given", 0.1), ("f", "written", 0.2)],
        [("g", "given", 0.7)],
    ]
    said = [[dict(zip(("caption", "whose", "score"), one, strict=True)) for one in line] for line in lines]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps({"captions": line}) + "\n" for line in said))
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps({"image": place}) + "\n" for place in "xyz"))
    (tmp_path / "results.json").write_text('{"threshold": 0.5}')
    without_written(tmp_path, tmp_path / "filtered.jsonl", "image")
    assert read(tmp_path / "filtered.jsonl") == [{"image": "x", "caption": "a"}, {"image": "z", "caption": "g"}]


def test_the_report_tells_what_is_there(clean, tmp_path):
    out = tmp_path / "runs"
    folder = out / "image" / "0.2"
    counts = {"scored": 50, "kept": 38, "right": 40, "kept_right": 37, "precision": 0.97, "recall": 0.925}
    results = {
        "held_out": {"right_kept": 0.95, "wrong_dropped": 0.9},
        "captions": {"given": counts | {"average_precision": None}},
    }
    (folder / "cleaned").mkdir(parents=True)
    (folder / "cleaned" / "results.json").write_text(json.dumps(results))
    for name, manifest in manifests(tmp_path, folder, "image").items():
        manifest.write_text(clean.read_text())
        for seed in (1, 2):
            run = (out / "image" if name == "clean" else folder) / name / str(seed)
            run.mkdir(parents=True)
            (run / "run.json").write_text(json.dumps({"metrics": {"eval_accuracy": 0.5 + seed / 10, "eval_loss": 0.3}}))
    write_report(out, tmp_path / "CAPFILT.md", ["image"], [0.2], steps=STEPS, seeds=2)
    page = (tmp_path / "CAPFILT.md").read_text()
    assert "| image | 20% | given | 50 | 0.800 | 38 | 0.970 | 0.925 | – | 0.950, 0.900 |" in page
    assert "| image | 20% | clean | 50 | 0.650 ± 0.071 | 0.300 ± 0.000 |" in page
    assert all(f"| {label} |" in page for label in TRAINED.values())
    [(_, [(told, kept, _), (_, gained, _)])] = capfilt_sections(tmp_path / "CAPFILT.json")
    assert f"{STEPS['align']} steps" in told and markdown.table(kept) in page and markdown.table(gained) in page
    assert estimate(tmp_path, ["image"], 2, STEPS, 3) > estimate(tmp_path, ["image"], 1, STEPS, 1) > 0
