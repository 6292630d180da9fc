"""Fixtures of the tests of the point_cloud modality."""

import functools

import pytest
from xblip_point_bert import PointBertConfig, PointBertModel
from xblip_point_cloud import PointCloud

TINY = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
TINY |= dict(num_groups=8, group_size=4, pointnet_sizes=(8, 16, 32), group_embedding_size=16)


@pytest.fixture(scope="session")
def modality(tmp_path_factory):
    """Makes modalities with a tiny encoder of so many points and channels, and this output."""

    @functools.cache
    def folder(**sizes):
        path = tmp_path_factory.mktemp("encoder")
        PointBertModel(PointBertConfig(**TINY, **sizes)).save_pretrained(path)
        return str(path)

    def make(num_points=64, in_channels=3, output="groups", projection_size=None, **config):
        sizes = {"num_points": num_points, "in_channels": in_channels}
        encoder = folder(**sizes, output=output, projection_size=projection_size)
        return PointCloud(PointCloud.Config(encoder=encoder, **config))

    return make
