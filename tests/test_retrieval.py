"""Retrieval: media and texts compared and ranked, batches that equal singles, folders that come back, and clear errors."""

import json
import sys

import pytest
import torch
import yaml
from kit import BEADS, LONG, MORE_BEADS, NUMBERS, ONE, THREE, TWO, Site
from safetensors.torch import load_file
from torch import nn

from xblip import cli, retrieval
from xblip.branch import Branch, BranchConfig
from xblip.errors import BundleError, ConfigError, InputError, MediaError
from xblip.initial import initialise
from xblip.retrieval import Retriever
from xblip.testing import small_qformer

TEXTS = ["red", "what is the larger number ?", "describe it", "one two three four five"]
MEDIA = {"toy": [ONE, LONG, TWO, THREE], "beads": [BEADS, MORE_BEADS, [[5.0]], [[2.0, 1.0], [3.0]]]}
pytestmark = pytest.mark.usefixtures("toys")


def make(llm_folder, name: str = "toy", **settings) -> Retriever:
    """A retriever with random weights, loud enough for words and media to be heard."""
    bridge = small_qformer(llm_folder, embedding_width=12, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        retriever = Retriever.build(BranchConfig(name, bridge=bridge))
        for parameter in retriever.branch.bridge.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
    return retriever.eval()


@pytest.fixture(params=MEDIA)
def name(request):
    return request.param


@pytest.fixture
def retriever(llm_folder, name):
    return make(llm_folder, name)


class TestScores:
    def test_every_source_is_compared_with_every_text(self, retriever, name):
        scores = retriever.similarity(MEDIA[name], TEXTS[:3])
        assert scores.shape == (4, 3) and scores.abs().max() <= 1 + 1e-6
        assert scores.std(0).min() > 1e-4 and scores.std(1).min() > 1e-4, "sources or texts look all the same"
        assert not scores.requires_grad

    def test_matches_are_probabilities_of_pairs(self, retriever, name):
        scores = retriever.match(MEDIA[name], TEXTS)
        assert scores.shape == (4,) and scores.min() >= 0 and scores.max() <= 1
        others = retriever.match(MEDIA[name], TEXTS[::-1])
        assert (scores - others).abs().max() > 1e-4, "the text does not reach the query tokens"

    @pytest.mark.parametrize("join_segments", [False, True])
    def test_a_batch_equals_singles(self, llm_folder, name, join_segments):
        retriever = make(llm_folder, name, join_segments=join_segments)
        media = MEDIA[name]
        alone = torch.cat(
            [torch.cat([retriever.similarity([source], [text]) for text in TEXTS], 1) for source in media]
        )
        assert torch.allclose(retriever.similarity(media, TEXTS), alone, atol=1e-5)
        pairs = [retriever.match([source], [text]) for source, text in zip(media, TEXTS, strict=True)]
        assert torch.allclose(retriever.match(media, TEXTS), torch.cat(pairs), atol=1e-5)

    def test_segments_lie_side_by_side(self, llm_folder):
        retriever = make(llm_folder, max_segments=0)
        parts = retriever.similarity([ONE, TWO, THREE], TEXTS)
        assert torch.allclose(retriever.similarity([ONE + TWO + THREE], TEXTS)[0], parts.amax(0), atol=1e-5)
        bridge, encode = retriever.branch.bridge, retriever.branch.encode
        with torch.no_grad():
            whole, parts = bridge(encode([ONE + TWO]), TEXTS[:1]), bridge(encode([ONE, TWO]), TEXTS[:1] * 2)
        assert torch.allclose(whole[0], parts.mean(0), atol=1e-5)

    def test_features_that_are_kept_serve_as_sources(self, retriever, name):
        features = retriever.branch.encode(MEDIA[name]).split()
        assert torch.allclose(retriever.similarity(features, TEXTS), retriever.similarity(MEDIA[name], TEXTS))
        assert torch.allclose(retriever.match(features, TEXTS), retriever.match(MEDIA[name], TEXTS))

    def test_of_a_long_text_the_beginning_is_read(self, llm_folder):
        retriever = make(llm_folder, max_instruction_tokens=3)
        scores = retriever.similarity([ONE], ["red one two", "red one two three four", "three four red one two"])[0]
        assert scores[0] == scores[1] != scores[2]

    def test_gradients_reach_all_of_the_bridge_and_nothing_else(self, llm_folder):
        retriever = make(llm_folder).train()
        bridge, features = retriever.branch.bridge, retriever.branch.encode([ONE, LONG])
        contrast = (
            torch.stack([part.mean(0) for part in bridge.embed_media(features)]) @ bridge.embed_texts(TEXTS[:2]).T
        )
        (contrast.trace() + bridge(features, TEXTS[:2])[:, 1].sum()).backward()
        assert all(weight.grad is not None for weight in bridge.parameters())
        assert all(weight.grad is None for weight in retriever.branch.encoder.parameters())


class TestRanking:
    def test_what_is_near_comes_first_and_the_match_is_added_to_the_nearest(self, retriever, name):
        media = MEDIA[name] if name == "beads" else [ONE, TWO[::-1] + ONE, TWO, THREE]  # none is the start of another
        similarity = retriever.similarity(media, TEXTS)
        with torch.no_grad():
            logits = [
                retriever.branch.bridge(retriever.branch.encode([source] * len(TEXTS)), TEXTS)[:, 1] for source in media
            ]
        for found, near, match in (
            (retriever.rank_texts(media, TEXTS, rerank=2), similarity, torch.stack(logits)),
            (retriever.rank_sources(media, TEXTS, rerank=2), similarity.T, torch.stack(logits).T),
        ):
            for places, row, judged in zip(found, near, match, strict=True):
                order = row.argsort(descending=True).tolist()
                nearest = sorted(order[:2], key=lambda index: -(row[index] + judged[index]))
                assert [place.index for place in places] == nearest + order[2:]
                for place in places:
                    is_judged = place.index in nearest
                    assert place.similarity == pytest.approx(row[place.index].item(), abs=1e-5)
                    wanted = judged[place.index].item() if is_judged else None
                    assert place.match == (pytest.approx(wanted, abs=1e-5) if is_judged else None)
                    assert place.score == pytest.approx(place.similarity + (place.match or 0))

    @pytest.mark.parametrize(("top_k", "count"), [(1, 1), (3, 3), (10, 4)])
    @pytest.mark.parametrize("rerank", [0, 1, 128])
    def test_so_many_places_are_returned(self, retriever, name, top_k, count, rerank):
        for rank in (retriever.rank_texts, retriever.rank_sources):
            found = rank(MEDIA[name], TEXTS, top_k=top_k, rerank=rerank)
            assert [len(places) for places in found] == [count] * 4
            assert sum(place.match is not None for place in found[0]) == min(rerank, count)

    def test_small_parts_give_the_same(self, retriever, name, monkeypatch):
        wanted = retriever.rank_texts(MEDIA[name], TEXTS)
        monkeypatch.setattr(retrieval, "BATCH", 3)
        for places, same in zip(retriever.rank_texts(MEDIA[name], TEXTS), wanted, strict=True):
            assert [place.index for place in places] == [place.index for place in same]
            assert [place.score for place in places] == pytest.approx([place.score for place in same], abs=1e-5)

    @pytest.mark.parametrize("way", ["rank_texts", "rank_sources"])
    def test_what_cannot_be_ranked(self, llm_folder, way):
        rank = getattr(make(llm_folder), way)
        with pytest.raises(InputError, match="top_k must be at least 1 and rerank at least 0, not 0 and 128"):
            rank([ONE], ["red"], top_k=0)
        with pytest.raises(InputError, match="top_k must be at least 1 and rerank at least 0, not 10 and -1"):
            rank([ONE], ["red"], rerank=-1)
        with pytest.raises(InputError, match="Expected a list of at least one text"):
            rank([ONE], [])
        for nothing in ("a.txt", []):
            with pytest.raises(InputError, match="Expected a list of at least one source"):
                rank(nothing, ["red"])


class TestCommand:
    @pytest.fixture(scope="class")
    def world(self, llm_folder, tmp_path_factory):
        """An installed modality of numbers in files, a retriever of it, and files."""
        root = tmp_path_factory.mktemp("retrieve")
        site = Site(root / "site")
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(site.folder)
            patch.setenv("XBLIP_PLUGINS", "touch")
            site.install("touch", NUMBERS.format(name="touch"))
            make(llm_folder, "touch").save_pretrained(root / "retriever")
            files = {
                "a.txt": "1 2 3 4",
                "b.txt": "4 3 2 1 0 0 1 1",
                "bad.txt": "words",
                "texts": "red\n\n one two\nblue\n",
            }
            for name, text in (files | {"empty": " \n"}).items():
                (root / name).write_text(text)
            (root / "latin").write_bytes("Käse".encode("latin-1"))
            yield root
            site.close()

    @pytest.fixture
    def run(self, world, monkeypatch, capsys):
        def run(*arguments: str) -> tuple[int, str, str]:
            monkeypatch.chdir(world)
            monkeypatch.setattr(sys, "argv", ["xblip", "retrieve", *arguments])
            capsys.readouterr()
            try:
                cli.main()
                status = 0
            except SystemExit as ended:
                status = ended.code or 0
            return status, *capsys.readouterr()

        return run

    def test_texts_are_ranked_for_each_file(self, run, world):
        status, out, err = run("retriever", "a.txt", "b.txt", "--texts", "texts", "--top-k", "2")
        lines = ["red", "one two", "blue"]
        retriever = Retriever.from_pretrained(world / "retriever")
        ranking = retriever.rank_texts([world / "a.txt", world / "b.txt"], lines, top_k=2)
        expected = []
        for file, places in zip(["a.txt", "b.txt"], ranking, strict=True):
            expected += [file, *(f"  {place.score:8.3f}  {lines[place.index]}" for place in places)]
        assert (status, out.splitlines(), err) == (0, expected, "")

    def test_files_are_ranked_for_each_query(self, run, world):
        options = ["--query", "red", "--query", "one two", "--rerank", "1", "--json"]
        status, out, err = run("retriever", "a.txt", "b.txt", *options)
        retriever = Retriever.from_pretrained(world / "retriever")
        ranking = retriever.rank_sources([world / "a.txt", world / "b.txt"], ["red", "one two"], rerank=1)
        files = ["a.txt", "b.txt"]
        assert (status, err) == (0, "")
        assert json.loads(out) == [
            {"query": query, "found": [{"file": files[place.index], **place._asdict()} for place in places]}
            for query, places in zip(["red", "one two"], ranking, strict=True)
        ]

    def test_a_broken_file_is_told_and_the_others_are_ranked(self, run):
        status, out, err = run("retriever", "bad.txt", "a.txt", "nowhere.txt", "--query", "red")
        assert status == 1 and out.splitlines()[0] == "red" and out.rstrip().endswith("  a.txt")
        first, second = err.splitlines()
        assert first.startswith("error: ") and "bad.txt" in first and "nowhere.txt" in second

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["retriever", "a.txt"], "Say what to look for: either --texts FILE, to rank its lines for each file, or"),
            (["retriever", "a.txt", "--texts", "texts", "--query", "red"], "Say what to look for: either"),
            (["retriever", "a.txt", "--query", " "], "A text is ' ': expected words"),
            (["retriever", "a.txt", "--texts", "none"], 'Cannot read the texts in "none": No such file or directory.'),
            (["retriever", "a.txt", "--texts", "empty"], 'There are no texts in "empty": expected one a line.'),
            (
                ["retriever", "a.txt", "--texts", "latin"],
                'Cannot read the texts in "latin": it is no UTF-8. Save it as',
            ),
            (["retriever", "bad.txt", "--query", "red"], "None of 1 files can be read."),
            (
                ["retriever", "a.txt", "--query", "red", "--top-k", "0"],
                "top_k must be at least 1 and rerank at least 0",
            ),
            (["nowhere", "a.txt", "--query", "red"], 'There is no retriever "nowhere": no such file or folder'),
            (["site", "a.txt", "--query", "red"], "it lacks retriever.yaml"),
        ],
    )
    def test_what_is_wrong_is_one_line(self, run, arguments, message):
        status, out, err = run(*arguments)
        assert (
            (status, out) == (2, "") and message in err.splitlines()[-1] and err.splitlines()[-1].startswith("error: ")
        )


class TestErrors:
    @pytest.mark.parametrize(
        ("texts", "message"),
        [
            ("red", "Expected a list of at least one text, not 'red'"),
            ([], r"Expected a list of at least one text, not \[\]"),
            (["red", " "], "A text is ' ': expected words"),
            ([None], "A text is None: expected words"),
        ],
    )
    @pytest.mark.parametrize("way", ["similarity", "match"])
    def test_texts(self, llm_folder, way, texts, message):
        with pytest.raises(InputError, match=message):
            getattr(make(llm_folder), way)([ONE, TWO], texts)

    @pytest.mark.parametrize("way", ["similarity", "match"])
    def test_sources(self, llm_folder, way):
        retriever = make(llm_folder)
        with pytest.raises(InputError, match="Expected a list of at least one source"):
            getattr(retriever, way)("a.txt", ["red"])
        with pytest.raises(MediaError, match="rows of four numbers"):
            getattr(retriever, way)([[1.0]], ["red"])

    @pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS[:3]], ids=len)
    def test_pairs_must_be_pairs(self, llm_folder, texts):
        with pytest.raises(InputError, match=f"2 sources and {len(texts)} texts are no pairs: give one text for each"):
            make(llm_folder).match([ONE, TWO], texts)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"kind": "linear"}, "A retriever reads by a Q-Former: bridge.kind must be \"qformer\", not 'linear'"),
            ({"instruction_aware": False}, "A retriever's Q-Former reads texts"),
            ({"embedding_width": 0}, "embedding_width must be at least 1, not 0"),
            ({"embeding_width": 8}, 'Did you mean "embedding_width"'),
        ],
    )
    def test_settings(self, llm_folder, settings, message):
        with pytest.raises(ConfigError, match=message):
            Retriever.build(BranchConfig("toy", bridge={**small_qformer(llm_folder), **settings}))


class TestFolders:
    @pytest.fixture
    def folder(self, retriever, tmp_path):
        retriever.save_pretrained(tmp_path / "saved")
        return tmp_path / "saved"

    def test_what_is_saved_comes_back(self, retriever, name, folder, tmp_path):
        folder.rename(tmp_path / "moved")
        loaded = Retriever.from_pretrained(tmp_path / "moved")
        assert not loaded.training
        for way in ("similarity", "match"):
            expected = getattr(retriever, way)(MEDIA[name], TEXTS)
            assert torch.allclose(getattr(loaded, way)(MEDIA[name], TEXTS), expected, atol=1e-6)
        before = {file: file.read_bytes() for file in (tmp_path / "moved").rglob("*.yaml")}
        loaded.save_pretrained(tmp_path / "moved")
        assert {file: file.read_bytes() for file in before} == before
        assert str(tmp_path) not in (tmp_path / "moved" / "retriever.yaml").read_text()
        assert f"xblip retriever: {name}" in (tmp_path / "moved" / "README.md").read_text()

    def test_a_branch_starts_from_it(self, folder, name, llm):
        settings = small_qformer(folder / "tokenizer")
        branch = Branch.build(BranchConfig(name, bridge=settings), llm_width=llm.width)
        taken = initialise(branch.bridge, folder)
        assert taken.fresh == ["projector.weight", "projector.bias"]
        heads = ("media_projection", "text_projection", "matching_head")
        assert set(taken.left_out) == {f"{head}.{part}" for head in heads for part in ("weight", "bias")}
        saved = load_file(folder / "bridge.safetensors")
        assert all(torch.equal(branch.bridge.state_dict()[key], saved[key]) for key in taken.loaded)

    def test_what_is_not_there(self, tmp_path):
        with pytest.raises(BundleError, match=r"There is no retriever in .*: it lacks retriever.yaml"):
            Retriever.from_pretrained(tmp_path)
        for name in (tmp_path / "nowhere", "someone/something"):
            with pytest.raises(BundleError, match='There is no retriever ".*": no such file or folder'):
                Retriever.from_pretrained(name)

    @pytest.mark.parametrize(
        ("missing", "message"),
        [
            ("bridge.safetensors", "The retriever in .*saved lacks its weights, bridge.safetensors"),
            (
                "tokenizer/tokenizer.json",
                "The retriever in .*saved cannot be built. Cannot load the Q-Former's tokenizer",
            ),
        ],
    )
    def test_parts_that_are_not_there(self, folder, missing, message):
        (folder / missing).unlink()
        with pytest.raises(BundleError, match=message):
            Retriever.from_pretrained(folder)

    @pytest.mark.parametrize(
        ("part", "value", "message"),
        [
            ("encoder", None, "retriever.yaml is damaged: it lacks encoder"),
            ("bridge", {"embedding_width": 13}, "does not fit its retriever.yaml: .*media_projection"),
            ("config", {"seed": 7}, "The retriever in .* was trained on an encoder with fingerprint"),
        ],
    )
    def test_what_does_not_fit(self, folder, part, value, message):
        file = folder / "retriever.yaml"
        saved = yaml.safe_load(file.read_text())
        saved[part] = saved[part] | value if value else None
        file.write_text(yaml.safe_dump({key: held for key, held in saved.items() if held is not None}))
        with pytest.raises(BundleError, match=message):
            Retriever.from_pretrained(folder)
