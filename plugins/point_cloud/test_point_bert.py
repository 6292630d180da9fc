"""Point-BERT: exact sampling and grouping, the published network, folders, training."""

import time

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel
from xblip_point_bert import PointBertConfig, PointBertModel, farthest_point_sampling, nearest_neighbours

from xblip.frozen import fingerprint

TINY = dict(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
    num_groups=16,
    group_size=8,
    num_points=128,
    pointnet_sizes=(8, 16, 32),
    group_embedding_size=20,
)


@pytest.fixture(scope="module")
def model():
    """A tiny random encoder whose every tensor matters, running statistics of its norms included."""
    torch.manual_seed(0)
    model = PointBertModel(PointBertConfig(**TINY))
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5) if "running_var" in name else tensor.normal_(std=0.3)
    return model.eval()


def clouds(count=3, points=128, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    cloud = torch.rand(count, points, channels, generator=generator)
    cloud[..., :3] = cloud[..., :3] * 2 - 1
    return cloud


def naive_sampling(cloud, count):
    """Farthest point sampling by its definition, in float64."""
    cloud = cloud.double()
    chosen = [int((cloud - cloud.mean(0)).norm(dim=1).argmax())]
    while len(chosen) < count:
        chosen.append(int(torch.cdist(cloud, cloud[chosen]).amin(1).argmax()))
    return chosen


def test_sampling_is_exact():
    batch = clouds(points=200)
    chosen = farthest_point_sampling(batch, 40)
    assert chosen.tolist() == [naive_sampling(cloud, 40) for cloud in batch]


def test_sampling_starts_farthest_from_the_centroid_and_ties_go_to_the_lowest_index():
    square = torch.tensor([[[0.0, 0, 0], [1, 1, 0], [-1, 1, 0], [-1, -1, 0], [1, -1, 0]]])
    assert farthest_point_sampling(square, 4)[0].tolist() == [1, 3, 2, 4]


def test_sampling_repeats_when_distinct_points_run_out():
    cloud = torch.tensor([[[0.0, 0, 0], [0, 0, 0], [3, 0, 0], [0, 1, 0]]])
    chosen = farthest_point_sampling(cloud, 6)[0].tolist()
    assert {tuple(cloud[0, index].tolist()) for index in chosen[:3]} == {(0, 0, 0), (3, 0, 0), (0, 1, 0)}
    assert len(chosen) == 6


def test_neighbours_are_the_nearest_whether_found_at_once_or_in_parts(monkeypatch):
    batch = clouds()
    centres = batch[:, :10]
    expected = torch.cdist(centres.double(), batch.double()).argsort(2)[..., :8].sort(2).values
    for distances_at_once in (2**26, 1):
        monkeypatch.setattr("xblip_point_bert.MAX_DISTANCES", distances_at_once)
        assert torch.equal(nearest_neighbours(batch, centres, 8).sort(2).values, expected)


def reference(weights, cloud, config):
    """One cloud through Point-BERT as its paper describes it, written apart: loops, no attention kernel."""
    centres = cloud[naive_sampling(cloud[:, :3], config.num_groups), :3]
    embeddings = []
    for centre in centres:
        near = (cloud[:, :3] - centre).norm(dim=1).argsort()[: config.group_size]
        points = torch.cat([cloud[near, :3] - centre, cloud[near, 3:]], 1)
        local = perceptron(weights, "encoder.first_conv", points)
        whole = local.max(0).values.expand(len(local), -1)
        embeddings.append(perceptron(weights, "encoder.second_conv", torch.cat([whole, local], 1)).max(0).values)
    groups = linear(weights, "reduce_dim", torch.stack(embeddings))
    tokens = torch.cat([weights["cls_token"][0], groups])
    places = linear(weights, "pos_embed.2", F.gelu(linear(weights, "pos_embed.0", centres)))
    places = torch.cat([weights["cls_pos"][0], places])
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        block = f"blocks.{layer}"
        tokens = tokens + places
        normed = norm(weights, f"{block}.norm1", tokens)
        query, key, value = (normed @ weights[f"{block}.attn.qkv.weight"].T).chunk(3, 1)
        mixed = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = query[:, part] @ key[:, part].T * size**-0.5
            mixed.append(scores.softmax(1) @ value[:, part])
        tokens = tokens + linear(weights, f"{block}.attn.proj", torch.cat(mixed, 1))
        hidden = F.gelu(linear(weights, f"{block}.mlp.fc1", norm(weights, f"{block}.norm2", tokens)))
        tokens = tokens + linear(weights, f"{block}.mlp.fc2", hidden)
    return norm(weights, "norm", tokens)


def linear(weights, name, values):
    return values @ weights[f"{name}.weight"].squeeze(-1).T + weights[f"{name}.bias"]


def norm(weights, name, values):
    return F.layer_norm(values, values.shape[1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-5)


def perceptron(weights, name, points):
    hidden = linear(weights, f"{name}.0", points)
    mean, variance = weights[f"{name}.1.running_mean"], weights[f"{name}.1.running_var"]
    hidden = (hidden - mean) / (variance + 1e-5).sqrt()
    return linear(weights, f"{name}.3", (hidden * weights[f"{name}.1.weight"] + weights[f"{name}.1.bias"]).relu())


def test_it_is_the_published_network(model):
    batch = clouds()
    with torch.no_grad():
        actual = model(batch).last_hidden_state
        expected = torch.stack([reference(model.state_dict(), cloud, model.config) for cloud in batch])
    assert actual.shape == (3, 17, 24)
    assert (actual - expected).abs().max() < 1e-4


def test_default_sizes_have_the_published_number_of_parameters():
    with torch.device("meta"):
        model = PointBertModel(PointBertConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 21_858_816


def pooled_from(model, **settings):
    """The same weights, pooled; a projection, if there is one, is random."""
    pooled = PointBertModel(PointBertConfig(**TINY, output="pooled", **settings))
    pooled.load_state_dict(model.state_dict(), strict=False)
    return pooled.eval()


@pytest.mark.parametrize(("projection_size", "width"), [(None, 48), (10, 10)])
def test_pooled_it_gives_the_published_vector(model, projection_size, width):
    pooled = pooled_from(model, projection_size=projection_size)
    tokens = torch.stack([reference(model.state_dict(), cloud, model.config) for cloud in clouds()])
    expected = torch.cat([tokens[:, 0], tokens[:, 1:].amax(1)], 1)
    if projection_size:
        expected = expected @ pooled.pc_projection
    with torch.no_grad():
        actual = pooled(clouds()).last_hidden_state
    assert actual.shape == (3, 1, width) and pooled.config.width == width
    assert (actual[:, 0] - expected).abs().max() < 1e-4


@pytest.mark.parametrize(("layers", "projection_size", "parameters"), [(12, 512, 21_858_816), (18, 1280, 32_498_688)])
def test_the_projection_is_all_that_pooling_adds_to_the_published_sizes(layers, projection_size, parameters):
    config = PointBertConfig(num_hidden_layers=layers, output="pooled", projection_size=projection_size)
    with torch.device("meta"):
        sizes = {name: parameter.numel() for name, parameter in PointBertModel(config).named_parameters()}
    assert sizes.pop("pc_projection") == 768 * projection_size
    assert sum(sizes.values()) == parameters and config.width == projection_size


def test_two_passes_agree_bit_for_bit_alone_and_among_other_clouds(model):
    for network in (model, pooled_from(model, projection_size=10)):
        for dtype in (torch.float32, torch.bfloat16):
            copy = type(network)(network.config)
            copy.load_state_dict(network.state_dict())
            copy.eval().to(dtype)
            with torch.no_grad():
                together, again = (copy(clouds()).last_hidden_state for _ in range(2))
                alone = torch.cat([copy(cloud).last_hidden_state for cloud in clouds().split(1)])
            assert torch.equal(together, again) and torch.equal(together, alone)


def test_equal_distances_are_decided_the_same_way_every_time(model, monkeypatch):
    """Points of a grid, as voxels are: most distances occur many times."""
    grid = torch.cartesian_prod(*[torch.linspace(-1, 1, 5)] * 3)[None]
    batch = torch.cat([clouds(points=125), grid])
    chosen = farthest_point_sampling(batch, 40)
    assert chosen[-1].tolist() == naive_sampling(grid[0], 40) == farthest_point_sampling(grid, 40)[0].tolist()
    centres = grid[:, chosen[-1]]
    alone = nearest_neighbours(grid, centres, 8)
    monkeypatch.setattr("xblip_point_bert.MAX_DISTANCES", 1)
    among = nearest_neighbours(batch, centres.expand(4, -1, -1), 8)[-1:]
    assert torch.equal(alone, among)
    distances = torch.cdist(centres.double(), grid.double())
    assert torch.equal(distances.gather(2, alone).sort(2).values, distances.sort(2).values[..., :8])


def test_the_order_of_the_points_does_not_matter(model):
    batch = clouds()
    shuffled = batch[:, torch.randperm(128, generator=torch.Generator().manual_seed(1))]
    with torch.no_grad():
        difference = model(batch).last_hidden_state - model(shuffled).last_hidden_state
    assert difference.abs().max() < 1e-4


def test_colour_reaches_encoders_of_six_channels():
    torch.manual_seed(0)
    model = PointBertModel(PointBertConfig(**TINY, in_channels=6)).eval()
    batch = clouds(channels=6)
    other = batch.clone()
    other[..., 3:] = 1 - other[..., 3:]
    with torch.no_grad():
        assert not torch.allclose(model(batch).last_hidden_state, model(other).last_hidden_state)


def test_a_folder_gives_the_same_encoder(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, PointBertModel) and loaded.config.num_points == 128
    with torch.no_grad():
        assert torch.equal(model(clouds()).last_hidden_state, loaded(clouds()).last_hidden_state)


def test_a_fresh_folder_has_no_chance_in_it_but_its_seed(tmp_path):
    for name in ("one", "two"):
        torch.manual_seed(7)
        PointBertModel(PointBertConfig(**TINY)).save_pretrained(tmp_path / name)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_one_folder_serves_both_outputs(model, tmp_path):
    """What a folder pools is decided by its config alone: its projection waits until it is asked for."""
    pooled_from(model, projection_size=10).save_pretrained(tmp_path)
    groups, pooled = (AutoModel.from_pretrained(tmp_path, output=output) for output in ("groups", "pooled"))
    assert fingerprint(groups) == fingerprint(model) != fingerprint(pooled)
    with torch.no_grad():
        assert groups(clouds()).last_hidden_state.shape == (3, 17, 24)
        assert pooled(clouds()).last_hidden_state.shape == (3, 1, 10)


def test_weights_in_half_precision_still_group_in_full(model):
    half = PointBertModel(model.config)
    half.load_state_dict(model.state_dict())
    with torch.no_grad():
        values = half.eval().bfloat16()(clouds()).last_hidden_state
        expected = model(clouds()).last_hidden_state
    assert values.dtype == torch.bfloat16
    assert F.cosine_similarity(values.float().flatten(), expected.flatten(), dim=0) > 0.99


def test_it_learns():
    """Flat or round: a few steps of training with a linear head tell them apart."""
    torch.manual_seed(0)
    model, head = PointBertModel(PointBertConfig(**TINY)).train(), torch.nn.Linear(24, 2)
    batch = F.normalize(torch.randn(32, 128, 3), dim=2)
    batch[::2, :, 2] *= 0.1
    labels = torch.arange(32) % 2
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=3e-3)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(head(model(batch).last_hidden_state[:, 0]), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < 0.5 < losses[0]
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("shape", [(128, 3), (2, 15, 3), (2, 128, 6)])
def test_a_wrong_shape_is_named(model, shape):
    with pytest.raises(ValueError, match=r"expected \(clouds, 16 or more points, 3 channels\)"):
        model(torch.zeros(shape))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"in_channels": 4}, "in_channels is 4; expected 3"),
        ({"num_points": 8}, r"num_points is 8; expected at least num_groups \(16\)"),
        ({"output": "cls"}, 'output is "cls"; expected "groups"'),
        ({"projection_size": 0}, "projection_size is 0; expected 1 or more, or none"),
        ({"num_attention_heads": 5}, "hidden_size 24 is not a multiple of num_attention_heads 5"),
    ],
)
def test_impossible_sizes_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        PointBertConfig(**{**TINY, **setting})


@pytest.mark.slow
def test_sampling_many_points_takes_seconds():
    cloud = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 100_000, 3)))
    started = time.perf_counter()
    farthest_point_sampling(cloud, 8192)
    assert time.perf_counter() - started < 30
