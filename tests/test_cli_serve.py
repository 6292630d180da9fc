"""The command that serves: what it makes of its options and a YAML, and what it refuses before a model is loaded."""

import sys
from types import SimpleNamespace

import pytest
import uvicorn

from xblip import cli_serve, model, serve_run
from xblip.errors import ConfigError
from xblip.serve_config import ServeConfig


@pytest.fixture
def settings_of(monkeypatch, tmp_path):
    """Runs the command by a YAML and options, and returns the settings that a server would get."""
    served = []
    monkeypatch.setattr(model, "load", lambda name: name)
    monkeypatch.setattr(serve_run, "run", lambda model, settings, *, name: served.append(settings))
    monkeypatch.delenv(cli_serve.KEYS, raising=False)

    def run(yaml="", **options):
        (tmp_path / "serve.yaml").write_text(yaml)
        cli_serve.serve("toys", config=tmp_path / "serve.yaml" if yaml else None, **options)
        return served.pop()

    return run


def test_limits_are_added_to_those_of_the_yaml_by_their_names(settings_of):
    yaml = "limits:\n  video.max_seconds: 60\n  max_pixels: 1000\n"
    found = settings_of(yaml, limit=["max_pixels=500", "audio.max_seconds=30"])
    assert found.limits == {"video.max_seconds": 60, "max_pixels": 500, "audio.max_seconds": 30}
    assert settings_of(yaml).limits == {"video.max_seconds": 60, "max_pixels": 1000}
    assert settings_of(limit=["max_pixels=500"]).limits == {"max_pixels": 500}


@pytest.mark.parametrize("limit", ["max_pixels", "max_pixels=many"])
def test_a_limit_that_is_no_number_is_refused(settings_of, limit):
    with pytest.raises(ConfigError, match=f"--limit {limit}: expected NAME=NUMBER"):
        settings_of(limit=[limit])


def test_any_free_port_may_be_asked_for(settings_of):
    assert settings_of("port: 9000", port=0).port == 0
    assert settings_of("port: 9000").port == 9000 and settings_of().port == 8000


def test_the_page_is_told_with_the_port_that_was_free(caplog):
    class Brief(serve_run.Runner):
        async def main_loop(self):
            self.listens_at = self.servers[0].sockets[0].getsockname()[1]

    runner = Brief(
        uvicorn.Config(lambda: None, port=0, lifespan="off", log_config=None),
        SimpleNamespace(config=ServeConfig(ui=True)),
    )
    with caplog.at_level("INFO", "xblip.serve"):
        runner.run()
    assert f"The page: http://127.0.0.1:{runner.listens_at}/" in caplog.messages


def test_lists_replace_those_of_the_yaml(settings_of, monkeypatch):
    yaml = "api_keys: [a, b]\nallowed_media_domains: [a.org]\n"
    found = settings_of(yaml, api_key=["c"], allowed_media_domains=["b.org"])
    assert (found.api_keys, found.allowed_media_domains) == (["c"], ["b.org"])
    monkeypatch.setenv(cli_serve.KEYS, "d,e")
    found = settings_of(yaml)
    assert (found.api_keys, found.allowed_media_domains) == (["d", "e"], ["a.org"])


def test_elsewhere_than_on_linux_it_says_so(settings_of, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="^xblip serve needs Linux, and this is darwin: run it in a container or "):
        settings_of()
