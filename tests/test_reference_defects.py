"""Defects of X-InstructBLIP's released code, by their numbers in our notes: one test each that fails if we had it.

Where the test of a part says it already, it is named here and not repeated. The ninth (labels that are swapped without their
inputs) is about evaluation on DisCRn.
"""

import ast
import dataclasses
import json
from pathlib import Path

import lavis
import pytest
import torch
from kit import KINDS, ONE, Beads, make_branch, make_model
from safetensors.torch import load_file, save_file

from xblip import bridge as bridges
from xblip import checkpoint, plugins
from xblip.branch import Branch, BranchConfig
from xblip.convert import convert
from xblip.errors import BundleError, InputError
from xblip.initial import initialise
from xblip.model import XBlip
from xblip.router import Bos
from xblip.sample import Sample
from xblip.testing import ToyModality, small_qformer

ROOT = Path(__file__).parents[1]
SOURCES = [
    path for path in [*ROOT.glob("xblip/*.py"), *ROOT.glob("plugins/**/*.py")]
    if not path.name.startswith(("test_", "conftest"))
]  # fmt: skip

ELSEWHERE = {
    "5 answers of a batch laid to other questions": [
        "tests/test_examples.py::test_5_answers_of_a_batch_are_laid_to_other_rows",
        "tests/test_forms.py::test_several_questions_of_one_record_keep_their_own_answers",
    ],
    "6 frames in BGR": ["plugins/video/test_video_readers.py::test_colours_are_rgb"],
    "6 frames beyond the end of a video": [
        "plugins/video/test_video.py::test_middles_of_equal_parts",
        "plugins/video/test_video_readers.py::test_both_readers_give_exactly_the_frames_asked_for",
    ],
    "7 sound shorter than a clip": ["plugins/audio/test_audio.py::test_the_shortest_sounds_are_one_frame"],
    "7 sound of several channels": ["plugins/audio/test_audio.py::test_channels_are_averaged"],
    "7 sound of any length, without a mask": [
        "plugins/audio/test_audio.py::test_the_mask_tells_which_patches_hear_something",
        "plugins/audio/test_audio_encoders.py::test_a_long_sound_is_heard_clip_by_clip_and_to_its_end",
    ],
    "8 sampling of points by chance": [
        "plugins/point_cloud/test_point_bert.py::test_two_passes_agree_bit_for_bit_alone_and_among_other_clouds",
        "plugins/point_cloud/test_point_bert.py::test_sampling_starts_farthest_from_the_centroid_and_ties_go_to_the_lowest_index",
    ],
    "8 fewer points than the encoder reads": [
        "plugins/point_cloud/test_point_cloud.py::test_fewer_points_are_repeated_in_turn"
    ],
    "8 one token for a whole cloud": [
        "plugins/point_cloud/test_point_cloud.py::test_the_encoder_gives_a_token_for_each_group"
    ],
    "10 ranking without regard to length": [
        "tests/test_model.py::test_normalising_by_length_changes_who_wins",
        "tests/test_model.py::test_it_is_the_log_likelihood_by_hand",
    ],
    "11 a file that cannot be read is skipped": [
        "tests/test_examples.py::test_another_row_of_the_source_takes_the_place_and_it_is_told",
    ],
    "13 a model that imports its tasks": ["tests/test_house.py::test_imports_run_strictly_downward"],
}


@pytest.mark.parametrize("defect", ELSEWHERE)
def test_a_part_has_its_own_test_of(defect):
    for place in ELSEWHERE[defect]:
        file, _, name = place.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text(), f"{place} is gone: say here which test has taken its place"


@torch.no_grad()
@pytest.mark.parametrize(("batch", "clips", "wrong"), [(8, 2, 14), (4, 5, 12), (2, 2, 2)])
def test_1_instructions_of_a_batch_are_laid_to_other_rows(llm, toy, batch, clips, wrong):
    """At the released recipes' sizes, with as many wrong rows as the original's `repeat` gives."""
    branch = make_branch(ToyModality, llm)
    instructions = [f"what is {word} ?" for word in "one two three four five six seven eight".split()][:batch]
    sources = [[float(row + place) for place in range(4)] * clips for row in range(batch)]
    together = branch(sources, instructions)
    tiled = [instructions[row % batch] for row in range(batch * clips)]
    theirs = branch([source[:4] for source in sources for _ in range(clips)], tiled)
    for row, source in enumerate(sources):
        assert torch.allclose(together[row], branch([source], [instructions[row]])[0], atol=1e-5)
    assert sum(tiled[row] != instructions[row // clips] for row in range(batch * clips)) == wrong
    ours = branch(
        [source[:4] for source in sources for _ in range(clips)],
        [text for text in instructions for _ in range(clips)],
    )
    assert sum(bool((left - right).abs().max() > 1e-3) for left, right in zip(ours, theirs, strict=True)) == wrong


@pytest.mark.parametrize("router", [{}, {"prefix": "question :", "postfix": "answer :", "bos": Bos.every}], ids=str)
def test_2_a_soft_prompt_stands_twice_in_training_and_once_in_answers(llm, router, monkeypatch):
    """Learning, answering and scoring give the LLM one and the same prompt, in which each soft prompt stands once."""
    model = make_model(llm, **router)
    assemble, seen = model.router.assemble, []

    def spy(pieces, softs, **options):
        batch = assemble(pieces, softs, **options)
        seen.append((batch, softs))
        return batch

    monkeypatch.setattr(model.router, "assemble", spy)
    sample = Sample("what is this ?", [("toy", ONE), ("beads", [[1.0, 2.0]])], "red")
    model([sample])
    model.generate([sample], max_new_tokens=1)
    model.score([sample], ["red"])
    prompts = []
    for batch, softs in seen:
        rows = batch.inputs_embeds[0][batch.attention_mask[0].bool()]
        for soft in softs[0]:
            places = [at for at in range(len(rows)) if torch.allclose(rows[at : at + 1], soft[:1], atol=1e-5)]
            assert len(places) == 1
            assert torch.allclose(rows[places[0] :][: len(soft)], soft, atol=1e-5)
        prompts.append(rows if batch.labels is None else rows[: -len(batch.labels[batch.labels != -100])])
    assert len(prompts) == 3 and all(torch.allclose(prompt, prompts[0], atol=1e-5) for prompt in prompts)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_3_parts_that_a_file_lacks_are_passed_over(llm, toy, tmp_path, kind):
    """Whichever part a bridge's weights lack, a branch does not load; checkpoints of others: `test_convert.py`."""
    settings = small_qformer(llm.config.source) if "qformer" in kind else {}
    branch = Branch.build(BranchConfig("toy", bridge={**settings, **KINDS[kind], "kind": kind}), llm_width=llm.width)
    branch.save(tmp_path, llm=llm)
    file = tmp_path / "bridge.safetensors"
    weights = load_file(file)
    for part in {name.split(".")[0] for name in weights}:
        save_file({name: value for name, value in weights.items() if name.split(".")[0] != part}, file)
        with pytest.raises(BundleError, match=rf"does not fit its branch\.yaml: Missing key.*\"{part}"):
            Branch.load(tmp_path, llm=llm)


def test_4_what_starts_afresh_is_not_told(llm_folder, wanted, tmp_path):
    """Of BLIP-2 a modality of another width takes all but what reads its features; the original drops all attention."""
    shapes = lavis.bridge(width=24, llm_width=32, **lavis.SMALL) | {"itm_head.bias": (2,)}
    first = {name: value for name, value in lavis.values(shapes).items() if "llm_proj" not in name}
    wanted.llm = ""
    convert(lavis.saved(tmp_path / "blip2.pth", first), tmp_path / "blip2", wanted)
    own = dict(
        tokenizer=str(tmp_path / "blip2" / "tokenizer"), hidden_size=64, num_hidden_layers=3, num_attention_heads=1,
        intermediate_size=96, num_query_tokens=4,
    )  # fmt: skip
    bridge = bridges.QFormerBridge(bridges.QFormerBridge.Config(**own), encoder_width=16, llm_width=32)
    taken = initialise(bridge, tmp_path / "blip2")
    afresh = {f"{part}.{kind}" for part in ("layer_norm", "projector") for kind in ("weight", "bias")}
    afresh |= {
        f"qformer.encoder.layer.{layer}.crossattention.attention.{part}.weight"
        for layer in (0, 2)
        for part in ("key", "value")
    }
    assert set(taken.fresh) == afresh and taken.left_out == ["matching_head.bias"]
    assert set(taken.loaded) | set(taken.fresh) == set(bridge.state_dict())
    for part in ("layer_norm (2)", "projector (2)", "layer.crossattention.attention.key (2)"):
        assert part in str(taken)


def test_5_several_answers_are_laid_to_other_questions():
    """A sample has one answer; what is no text is refused and not counted among the batch's."""
    with pytest.raises(InputError, match=r"An answer must be text, not \['red', 'blue'\]"):
        Sample("what ?", [("toy", ONE)], ["red", "blue"])


@pytest.mark.slow
def test_11_errors_are_swallowed():
    """No bare `except`, and whoever catches everything raises something, but where the error is what is told."""
    silent = set()
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        for function in [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]:
            for handler in [node for node in ast.walk(function) if isinstance(node, ast.ExceptHandler)]:
                assert handler.type is not None, f"{path.name}: a bare except"
                is_broad = ast.unparse(handler.type) in ("Exception", "BaseException")
                ends = any(isinstance(node, ast.Raise) for node in ast.walk(handler)) or "exit" in ast.unparse(handler)
                if is_broad and not ends:
                    silent.add(f"{path.stem}.{function.name}")
    told_to_who_asked = {"engine._answer", "engine._made", "decoder.tell", "decoder.join", "decoder._say"}
    told_to_who_asked |= {"decode_worker.main", "decode_worker._work", "serve.complete", "serve_talk.answers"}
    told = {"doctor._check", "doctor._diagnosed", "pictures._turned", "testing.run_contract"}
    assert silent == told | told_to_who_asked


def test_12_a_file_is_read_that_nothing_is_taken_from(llm, llm_folder, toys, wanted, tmp_path, monkeypatch):
    """A conversion reads its source once; branches read their own weights once, and no one else's."""
    reads: list[str] = []

    def counted(module, name):
        whole = getattr(module, name)

        def read(file, *args, **options):
            reads.append(str(file))
            return whole(file, *args, **options)

        monkeypatch.setattr(module, name, read)

    counted(checkpoint.torch, "load")
    path = lavis.saved(tmp_path / "toy.pth", lavis.values(lavis.bridge(**lavis.TOY, **lavis.SMALL)))
    convert(path, tmp_path / "toy", wanted)
    assert reads == [str(path)]
    make_branch(Beads, llm).save(tmp_path / "beads", llm=llm)
    import safetensors.torch

    reads.clear()
    counted(safetensors.torch, "load_file")
    XBlip.compose(llm=llm, branches={"toy": tmp_path / "toy", "beads": tmp_path / "beads"})
    assert sorted(Path(file).parent.name for file in reads) == ["beads", "toy"]


@pytest.mark.slow
def test_14_defaults_and_settings_that_are_given_are_written_into(llm, toy):
    """Building twice from one config gives the same, the config stays as it was, and no two configs share a value."""
    config = BranchConfig("toy", config={"width": 8}, bridge=small_qformer(llm.config.source))
    before = json.dumps(dataclasses.asdict(config))
    defaults = dict(ToyModality.bridge)
    shapes = [
        {name: value.shape for name, value in Branch.build(config, llm_width=llm.width).bridge.state_dict().items()}
        for _ in range(2)
    ]
    assert shapes[0] == shapes[1] and json.dumps(dataclasses.asdict(config)) == before
    assert ToyModality.bridge == defaults
    for bridge in plugins.names("bridge"):
        first, second = (vars(plugins.get("bridge", bridge).Config()) for _ in range(2))
        shared = [
            name for name, value in first.items() if isinstance(value, (list, dict, set)) and value is second[name]
        ]
        assert not shared
    for path in SOURCES:
        for function in [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]:
            written = [*function.args.defaults, *function.args.kw_defaults]
            assert not any(isinstance(value, (ast.List, ast.Dict, ast.Set)) for value in written), function.name
