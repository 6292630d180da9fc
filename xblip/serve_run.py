"""Runs a server by uvicorn, until it is told to stop."""

import logging
import socket
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from xblip import plugins
from xblip.serve import Server
from xblip.serve_config import ServeConfig

if TYPE_CHECKING:
    from xblip.model import XBlip

log = logging.getLogger("xblip.serve")


def server_of(model: "XBlip", config: ServeConfig, *, name: str) -> Server:
    """Returns a server, with the page if `config.ui` wants it; arguments as of `run`."""
    server = Server(model, config, name=name)
    if config.ui:
        from xblip.serve_page import add_page

        add_page(server, examples=plugins.examples(name))
    return server


def run(model: "XBlip", config: ServeConfig, *, name: str) -> None:
    """Serves a model until SIGTERM or SIGINT; then what runs is finished, and nothing new is taken.

    Args:
      model: that answers.
      config: settings.
      name: what clients call the model, if `config.model_name` does not say.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    server = server_of(model, config, name=name)
    settings = uvicorn.Config(
        server.app,
        host=config.host,
        port=config.port,
        access_log=False,
        log_level="info",
        timeout_graceful_shutdown=int(config.drain_seconds) + 5,
        timeout_keep_alive=30,
        server_header=False,
    )
    Runner(settings, server).run()


class Runner(uvicorn.Server):
    """Tells a server that it is to stop as soon as the process is told, and where the page is once it is there."""

    def __init__(self, config: uvicorn.Config, server: Server):
        super().__init__(config)
        self._server = server

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._server.config.ui and self.started:
            host, port = self.config.host, self.servers[0].sockets[0].getsockname()[1]
            log.info("The page: http://%s:%d/", f"[{host}]" if ":" in host else host, port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._server.leave()
        super().handle_exit(sig, frame)
