"""Augmentation: who may be changed at random and when, what is drawn, and stored views."""

import dataclasses
import io
import itertools
import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from kit import FileToy, registered
from rich.console import Console
from safetensors.torch import load_file
from stores import manifests_of

from xblip import cli, contents, decoding, plugins
from xblip.branch import BranchConfig
from xblip.data import Manifest, Visit
from xblip.encoding import Job
from xblip.errors import BundleError, ConfigError, MediaError
from xblip.examples import Examples, Skipped
from xblip.precompute import precompute, verify
from xblip.store import FeatureStore
from xblip.streaming import Stream, StreamedExamples
from xblip.testing import small_qformer
from xblip.train import open_stores, read_data, train


@dataclass
class Noise:
    """`noise`: added to numbers, at most."""

    noise: float = 0.5


class Noisy(FileToy):
    """Toys from text files that can be changed at random."""

    name = "noisy"

    @dataclass
    class Config(FileToy.Config):
        """`augment`: how much is added."""

        augment: Noise = field(default_factory=Noise)

    def load(self, source):
        with decoding(str(source), "rows of four numbers"):
            return super().load(source)

    def augmented(self, source, draw):
        values = self.load(source)["values"]
        size = self.config.augment.noise
        return {"values": values + torch.from_numpy(draw.uniform(-size, size, values.shape)).float()}


@pytest.fixture
def noisy(files):
    """A config that trains on files which can be changed; eval reads the same files."""
    path = Path(files.data.train)
    path.write_text(path.read_text().replace('"file_toy"', '"noisy"'))
    files.branch.modality = "noisy"
    with registered(Noisy):
        yield files


def examples(config, **options):
    manifest = Manifest(config.data.train, modalities={config.branch.modality: Noisy()})
    return Examples([manifest], stage="instruct", seed=3, **options)


def numbers(sample):
    source = sample.all_media[0].source
    return source["values"] if isinstance(source, dict) else source.values


def test_nothing_is_changed_unless_asked_for(noisy):
    made = examples(noisy)
    rows = [numbers(made[Visit(0, 5, epoch)]) for epoch in range(3)]
    assert all(torch.equal(row, rows[0]) for row in rows)


def test_each_visit_draws_its_own_and_always_the_same(noisy):
    made, again = examples(noisy, augment=True), examples(noisy, augment=True)
    plain = numbers(examples(noisy)[Visit(0, 5, 0)])
    drawn = [numbers(made[Visit(0, 5, epoch)]) for epoch in range(10)]
    assert len({tuple(row.flatten().tolist()) for row in drawn}) == 10
    assert all(0 < (row - plain).abs().max() <= 0.5 for row in drawn)
    for epoch in reversed(range(10)):
        assert torch.equal(numbers(again[Visit(0, 5, epoch)]), drawn[epoch])
    texts = [(s.instruction, s.answer) for s in (made[Visit(0, 5, 0)], examples(noisy)[Visit(0, 5, 0)])]
    assert texts[0] == texts[1]


def test_streams_draw_too(noisy):
    stream = Stream(noisy.data.train, modalities={"noisy": Noisy()})
    taken = []
    for augment in (False, True, True):
        made = Examples([stream], stage="instruct", seed=3, augment=augment)
        batches = itertools.islice(StreamedExamples(made, batch_size=1, seed=0), 70)
        taken.append([numbers(batch[0]) for batch in batches])
    plain, one, other = taken
    assert not any(map(torch.equal, plain, one)) and all(map(torch.equal, one, other))


def test_training_alone_is_augmented(noisy):
    noisy.data.augment = True
    noisy.data.eval = noisy.data.train
    made = [
        read_data(noisy, noisy.data.train, where, {}, augment=augment)
        for where, augment in (("data.train", True), ("data.eval", False))
    ]
    assert [part.augment for part in made] == [True, False]


@pytest.mark.slow
def test_a_run_repeats_itself_and_a_resumed_one_goes_on_as_before(noisy, tmp_path):
    noisy.data.augment = True
    noisy.training |= {"max_steps": 8, "save_steps": 4, "eval_strategy": "no"}
    noisy.data.eval = None
    weights = []
    for name, augment in (("one", True), ("two", True), ("plain", False)):
        noisy.data.augment = augment
        noisy.training["output_dir"] = str(tmp_path / name)
        train(noisy)
        weights.append((tmp_path / name / "bridge.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
    shutil.rmtree(tmp_path / "two" / "checkpoint-8")
    noisy.data.augment, noisy.training["output_dir"] = True, str(tmp_path / "two")
    train(noisy, resume=True)
    assert (tmp_path / "two" / "bridge.safetensors").read_bytes() == weights[0]
    noisy.branch.config = {"augment": {"noise": 0.1}}
    with pytest.raises(ConfigError, match=r"augment"):
        train(noisy, resume=True)


def test_a_modality_without_augmentation_is_refused_before_anything_is_loaded(files):
    files.data.augment = True
    files.llm.source = "nowhere"
    with pytest.raises(
        ConfigError, match=r'"file_toy" has no augmentation: .*augmented\(source, draw\).* data.augment'
    ):
        train(files)


@pytest.mark.slow
class TestViews:
    @pytest.fixture
    def store(self, noisy, tmp_path):
        """Three views of each file beside the file itself, of the first twelve files; eval has all."""
        rows = Path(noisy.data.train).read_text().splitlines()
        Path(noisy.data.train).write_text("\n".join(rows[:48]))
        (tmp_path / "eval.jsonl").write_text("\n".join(rows))
        noisy.data.eval = str(tmp_path / "eval.jsonl")
        self.fill(noisy, tmp_path / "store")
        return tmp_path / "store"

    def job(self, config, folder, **options):
        return Job(
            config.branch, str(folder), **{"dtype": "float32", "views": 3, "seed": 7, "use_cpu": True, **options}
        )

    def manifests(self, config):
        modalities = {"noisy": Noisy()}
        return [Manifest(path, modalities=modalities) for path in (config.data.train, config.data.eval)]

    def fill(self, config, folder, **options):
        learnt, others = self.manifests(config)
        console = options.pop("console", None)
        return precompute(self.job(config, folder, **options), [learnt, others], learnt=[learnt], console=console)

    def test_views_are_stored_of_what_is_learnt_alone(self, noisy, store, tmp_path):
        kept = FeatureStore.open(store)
        assert len(kept) == 16 + 3 * 12
        assert (kept.facts.views.count, kept.facts.views.seed, kept.facts.views.augment) == (3, 7, {"noise": 0.5})
        path = tmp_path / "0.txt"
        plain = kept.features(path).values
        views = [kept.features(view).values for view in kept.views(path)]
        assert len({tuple(values.flatten().tolist()) for values in [plain, *views]}) == 4
        shown = io.StringIO()
        again = self.fill(noisy, store, console=Console(file=shown, width=200))
        assert (again.num_sources, again.num_held, again.num_written) == (52, 52, 0)
        assert "52 sources and views, " in shown.getvalue()

    def test_a_copy_of_a_file_has_the_same_views_and_another_seed_others(self, noisy, store, tmp_path):
        self.fill(noisy, tmp_path / "same", dataloader_num_workers=1)
        self.fill(noisy, tmp_path / "other", seed=8)
        digests = [FeatureStore.open(folder).content_digest() for folder in (store, tmp_path / "same")]
        assert digests[0] == digests[1] != FeatureStore.open(tmp_path / "other").content_digest()
        copy = tmp_path / "copy.txt"
        copy.write_text((tmp_path / "0.txt").read_text())
        kept = FeatureStore.open(store)
        one, other = (kept.view(path, np.random.default_rng(0)).values for path in (copy, tmp_path / "0.txt"))
        assert torch.equal(one, other)

    @pytest.mark.slow
    def test_training_draws_a_view_each_time_and_evaluation_takes_the_file_itself(self, noisy, store, tmp_path):
        kept = FeatureStore.open(store)
        made = examples(noisy, augment=True, features={"noisy": kept})
        path = tmp_path / Path(json.loads(Path(noisy.data.train).read_text().splitlines()[0])["noisy"]).name
        drawn = [numbers(made[Visit(0, 0, epoch)]) for epoch in range(30)]
        views = [kept.features(view).values for view in kept.views(path)]
        which = [[torch.equal(values, view) for view in views].index(True) for values in drawn]
        assert set(which) == {0, 1, 2}
        assert torch.equal(numbers(made[Visit(0, 0, 4)]), drawn[4])
        noisy.data.features, noisy.data.augment = str(store), True
        metrics, FileToy.encoded = [], 0
        for _ in range(2):
            noisy.training["output_dir"] = str(tmp_path / f"run{len(metrics)}")
            metrics.append(train(noisy)["eval_loss"])
        assert FileToy.encoded == 0 and metrics[0] == metrics[1]
        weights = [load_file(tmp_path / f"run{run}" / "bridge.safetensors") for run in (0, 1)]
        assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])

    def test_a_store_without_views_cannot_be_augmented(self, noisy, tmp_path):
        self.fill(noisy, tmp_path / "plain", views=0)
        noisy.data.features, noisy.data.augment = str(tmp_path / "plain"), True
        noisy.llm.source = "nowhere"
        with pytest.raises(ConfigError, match=r"data.augment and data.features: .* xblip precompute --views"):
            train(noisy)
        noisy.data.augment = False
        noisy.branch.config = {"augment": {"noise": 0.1}}
        assert open_stores(noisy), "what is not drawn does not matter"

    def test_views_drawn_by_other_settings_are_refused(self, noisy, store):
        noisy.data.features, noisy.data.augment = str(store), True
        noisy.branch.config = {"augment": {"noise": 0.1}}
        with pytest.raises(BundleError, match=r"drawn by other settings: augment.noise is 0.1 here and 0.5 there"):
            train(noisy)
        with pytest.raises(BundleError, match=r"holds other features: views.augment.noise is 0.1 here and 0.5 there"):
            self.fill(noisy, store)

    def test_a_missing_view_and_a_changed_file_are_told_apart(self, noisy, store, tmp_path, monkeypatch):
        late = tmp_path / "late.txt"
        late.write_text("1 2 3 4")
        with pytest.raises(BundleError, match=r"late.txt, view 0\" is not in the feature store .* --views 3 again"):
            FeatureStore.open(store).check(FeatureStore.open(store).views(late))
        row = json.loads(Path(noisy.data.train).read_text().splitlines()[0])
        unseen = json.loads(Path(noisy.data.eval).read_text().splitlines()[-1])["noisy"]
        with pytest.raises(BundleError, match=r"view 0\" is not in the feature store"):
            FeatureStore.open(store).check(FeatureStore.open(store).views(tmp_path / unseen))
        path = tmp_path / row["noisy"]
        monkeypatch.setattr(contents, "SETTLED_SECONDS", -1)
        self.fill(noisy, store)
        path.write_text("9 9 9 9")
        kept = FeatureStore.open(store)
        with pytest.raises(BundleError, match=r"view 1\" changed since its features were stored"):
            kept.features(kept.views(path)[1])

    def test_verify_encodes_views_again(self, noisy, store, monkeypatch):
        manifests = self.manifests(noisy)
        job = self.job(noisy, store, views=0)
        assert "52 items in" in verify(job, manifests, learnt=manifests[:1])
        monkeypatch.setattr(Noisy, "augmented", lambda self, source, draw: self.load(source))
        with pytest.raises(BundleError, match=r"view \d: its stored features are off by"):
            verify(job, manifests, learnt=manifests[:1])

    def test_a_modality_without_augmentation_has_no_views(self, files, tmp_path):
        manifest = Manifest(files.data.train, modalities={"file_toy": FileToy()})
        with pytest.raises(ConfigError, match="has no augmentation"):
            precompute(Job(files.branch, str(tmp_path / "store"), views=2, use_cpu=True), [manifest], learnt=[manifest])

    def test_a_broken_file_costs_its_views(self, noisy, tmp_path):
        Path(tmp_path / "0.txt").write_text("words")
        noisy.data.eval = noisy.data.train
        learnt, job = self.manifests(noisy)[:1], self.job(noisy, tmp_path / "store")
        with pytest.raises(MediaError, match=r"of 64 sources cannot be encoded, .*0.txt"):
            precompute(job, learnt, learnt=learnt)
        done = precompute(job, learnt, learnt=learnt, max_skipped=0.1)
        assert (done.num_sources, len(done.skipped)) == (64, 4)
        noisy.data.features, noisy.data.augment = str(tmp_path / "store"), True
        read_data(noisy, noisy.data.train, "data.train", open_stores(noisy), augment=True)
        made = examples(noisy, augment=True, features=open_stores(noisy))
        skipped, sample = made.__getitems__([Visit(0, 0, 0)])
        assert isinstance(skipped, Skipped) and "as xblip precompute found" in skipped.reason
        assert numbers(sample).shape == (1, 4, 16)

    def test_the_command(self, noisy, tmp_path, monkeypatch, capsys):
        training = {"output_dir": str(tmp_path / "run"), "seed": 11, "use_cpu": True}
        config = {"branch": {"modality": "noisy"}, "data": {"train": noisy.data.train}, "training": training}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        arguments = [str(tmp_path / "config.yaml"), "--to", str(tmp_path / "store"), "--views", "2"]
        monkeypatch.setattr(sys, "argv", ["xblip", "precompute", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code
        facts = FeatureStore.open(tmp_path / "store").facts
        assert dataclasses.asdict(facts.views) == {"count": 2, "seed": 11, "augment": {"noise": 0.5}}
        assert "48 items" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["image", "video", "audio", "point_cloud"])
@pytest.mark.slow
def test_real_files_train_changed_at_random_and_by_stored_views(config, llm_folder, tmp_path, name):
    (tmp_path / "example").mkdir()
    example = plugins.get("modality", name).example(tmp_path / "example")
    files = [source for source in example.sources if isinstance(source, Path)]
    rows = [json.dumps({name: str(file), "instruction": "what is this ?", "answer": "one"}) for file in files * 4]
    Path(config.data.train).write_text("\n".join(rows))
    config.branch = BranchConfig(name, config=example.config, bridge=small_qformer(llm_folder))
    config.data.augment, config.data.eval = True, None
    config.training |= {"max_steps": 2, "per_device_train_batch_size": 4}
    train(config)
    learnt = manifests_of(config.branch, [config.data.train])
    store = tmp_path / "store"
    precompute(Job(config.branch, str(store), views=2, dtype="float32", use_cpu=True), learnt, learnt=learnt)
    assert len(FeatureStore.open(store)) == 3 * len(files)
    config.data.features, config.training["output_dir"] = str(store), str(tmp_path / "stored")
    train(config)
