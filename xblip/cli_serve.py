"""The command that serves: `xblip serve`.

Nothing heavy is imported before the command runs.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from xblip.errors import ConfigError

KEYS = "XBLIP_API_KEYS"


def serve(
    model: Annotated[str, typer.Argument(help="An installed model's name, a folder, a config, or a hub id.")],
    host: Annotated[str | None, typer.Option(help="127.0.0.1 unless given; another needs API keys.")] = None,
    port: Annotated[int | None, typer.Option(help="8000 unless given; 0 for any that is free.")] = None,
    api_key: Annotated[list[str] | None, typer.Option(help=f"May come several times; or {KEYS}, by commas.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="A YAML of settings, see docs/serve.md; options come before it.")
    ] = None,
    allowed_media_domains: Annotated[
        list[str] | None, typer.Option(help="A host that URLs may name; may come several times.")
    ] = None,
    allowed_local_media_path: Annotated[Path | None, typer.Option(help="A folder that file URLs may name.")] = None,
    ui: Annotated[bool, typer.Option("--ui", help="Also show a page to ask on.")] = False,
    limit: Annotated[
        list[str] | None, typer.Option(help="Such as video.max_seconds=60; may come several times.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help='"ray" for replicas on Ray Serve; else "own", which is this process.')
    ] = "own",
    replicas: Annotated[int | None, typer.Option(help="How many, with --engine ray; 1 unless given.")] = None,
) -> None:
    """Serve a model by OpenAI's chat completions, for files of every modality that it has."""
    from xblip import config as configs
    from xblip.loading import first_line
    from xblip.model import load
    from xblip.serve_config import ServeConfig

    if sys.platform != "linux":
        raise ConfigError(
            f"xblip serve needs Linux, and this is {sys.platform}: run it in a container or virtual machine of Linux."
        )
    if engine not in ("own", "ray"):
        raise ConfigError(f'--engine must be "own" or "ray", not "{engine}".')
    if replicas is not None and engine != "ray":
        raise ConfigError("--replicas are of Ray: add --engine ray, or leave it out.")
    extras = "serve,ray" if engine == "ray" else "serve"
    try:
        if engine == "ray":
            from xblip.serve_ray import run_replicas
        else:
            from xblip.serve_run import run
    except ImportError as cause:
        raise ConfigError(
            f"xblip serve needs what an extra brings: pip install 'xblip[{extras}]'. ({first_line(cause)})"
        ) from cause
    given = {
        "ui": ui,
        "host": host,
        "api_keys": api_key or [key for key in os.environ.get(KEYS, "").split(",") if key],
        "allowed_media_domains": allowed_media_domains or [],
        "allowed_local_media_path": allowed_local_media_path,
    }
    values = configs.load_yaml(config) if config else {}
    values |= {name: value for name, value in given.items() if value}
    if port is not None:  # 0 is any that is free
        values["port"] = port
    settings = configs.build(ServeConfig, values, where="serve")
    settings.limits |= _numbers(limit or [])
    if replicas is not None:
        settings.ray.replicas = replicas
    settings.check()
    if settings.ui:
        if engine == "ray":
            raise ConfigError(
                "A page is of one process, whose talks others do not know: leave out --ui, or --engine ray."
            )
        try:
            import xblip.serve_page  # noqa: F401 - before the model is loaded, which takes longer
        except ImportError as cause:
            raise ConfigError(
                f"xblip serve --ui needs what an extra brings: pip install 'xblip[ui]'. ({first_line(cause)})"
            ) from cause
    if engine == "ray":
        run_replicas(model, settings)
    else:
        run(load(model), settings, name=model)


def _numbers(pairs: list[str]) -> dict[str, float]:
    found = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise ConfigError(f'--limit {pair}: expected NAME=NUMBER, such as "video.max_seconds=60".') from None
    return found
