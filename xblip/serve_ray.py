"""Runs replicas of a server on Ray Serve: `xblip serve --engine ray`.

Each replica is the whole server, with an engine, caches and workers of its own, and answers by the same application: Ray
passes on what comes in and goes out, starts replicas where there is room, and puts others in the place of those that die.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, Metric, generate_latest

from xblip import bundle
from xblip.errors import ConfigError, XBlipError
from xblip.llm import LLMConfig
from xblip.loading import first_line
from xblip.model import load
from xblip.serve import Server
from xblip.serve_config import RayConfig, ServeConfig
from xblip.serve_metrics import Merged

ADDRESS = "RAY_ADDRESS"
os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # which takes lines of the log that differ in numbers for one
os.environ.setdefault("RAY_COLOR_PREFIX", "0")
if (os.environ.get(ADDRESS) or "local") == "local":
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # all that Ray starts listens to this machine alone
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default, but a server is no work in the background
import ray  # noqa: E402 - it reads the environment
from ray import serve  # noqa: E402
from ray.exceptions import RayError  # noqa: E402
from ray.serve.exceptions import RayServeException  # noqa: E402
from ray.serve.handle import DeploymentHandle  # noqa: E402

NAME = "xblip"
"""Of the application and its one deployment, in the cluster."""
HEALTH_SECONDS = 2.0
METRICS_SECONDS = 5.0
LOGGING = {"log_level": "WARNING", "enable_access_log": False}
ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "xblip.serve_ray_proxy.middlewares",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # 5 by default, in which a busy machine does not start one
}
"""Of the controller and what it starts; what Ray has to say goes to its own log files."""
WHERE = "Ray's own log, ray/session_latest/logs among the temporary files, may say why."
QUOTE = "\N{REPLACEMENT CHARACTER}"
"""Stands before and after the message of a replica that cannot start, in what Ray tells of it."""
log = logging.getLogger("xblip.serve")


class ReplicaServer(Server):
    """A server that tells the metrics of all replicas, as Prometheus reaches but one of them."""

    async def show_metrics(self, request: Request) -> Response:
        self.caller(request)
        broadcast = serve.get_deployment_handle(NAME, NAME).broadcast("metrics")
        told = await broadcast.results_async(timeout_s=METRICS_SECONDS, return_exceptions=True)
        merged = Merged(dict(one for one in told if not isinstance(one, BaseException)))
        return Response(generate_latest(merged), media_type=CONTENT_TYPE_LATEST)


@serve.ingress()
class Replica:
    """One server, as Ray holds it."""

    def __init__(self, model: str, config: ServeConfig):
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.__stderr__)  # not Ray's log
        try:
            self.server = ReplicaServer(load(model), config, name=model)
        except XBlipError as error:
            raise RuntimeError(f"{QUOTE}{error}{QUOTE}") from None

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self.server.app

    def check_health(self) -> None:
        """Called by Ray, which puts another replica in the place of one that raises."""
        if not self.server.is_alive:
            raise RuntimeError("The engine, or every worker that reads media, has died.")

    def metrics(self) -> tuple[str, list[Metric]]:
        """Its name, and what it counted."""
        return serve.get_replica_context().replica_id.unique_id, [*self.server.metrics.registry.collect()]

    async def drain(self, seconds: float) -> None:
        """Takes nothing more, and waits until all is answered, or so many seconds."""
        self.server.leave()
        end = time.monotonic() + seconds
        while not self.server.is_idle and time.monotonic() < end:
            await asyncio.sleep(0.05)


def run_replicas(model: str, config: ServeConfig) -> None:
    """Serves a model by replicas until SIGTERM or SIGINT; then what runs is finished, and nothing new is taken.

    Args:
      model: an installed model's name, a folder, a config, or a hub id; the same on every machine.
      config: settings.

    Raises:
      ConfigError: a setting is wrong, the machine has too little for so many replicas, or they do not start.
      BundleError, PluginError: there is no such model.
    """
    config.check()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    llm = bundle.read_config(bundle.named(model))[0].llm
    with _cluster(config) as is_own:
        gpus = _gpus(config.ray, llm)
        if is_own:
            _check_room(config.ray, gpus)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _leave)
        _start(config, everywhere=not is_own)
        try:
            handle = _deployed(model, config, gpus)
            log.info("%d replicas answer at http://%s:%d", config.ray.replicas, config.host, config.port)
            try:
                while True:
                    signal.pause()
            finally:
                _drain(handle, config.drain_seconds)
        finally:
            serve.delete(NAME)


def _leave(number: int, _: Any) -> None:
    """Leaves in good order; who cannot wait for that sends the signal again."""
    signal.signal(number, signal.SIG_DFL)
    sys.exit(0)


@contextlib.contextmanager
def _cluster(config: ServeConfig) -> Iterator[bool]:
    """The cluster that RAY_ADDRESS names, or one of this machine, which ends with the server; tells whether it is that."""
    address = os.environ.get(ADDRESS) or "local"
    is_own = address == "local"
    if is_own:
        _check_port(config)
    else:
        _check_answers(address)
    try:
        ray.init(address, logging_level=logging.WARNING, **({"include_dashboard": False} if is_own else {}))
    except (ConnectionError, RuntimeError) as cause:
        raise ConfigError(
            f"Ray cannot enter the cluster {address}: {first_line(cause)} If it wants a token, set RAY_AUTH_MODE=token."
        ) from cause
    try:
        yield is_own
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Refuses an address that nobody listens at, which Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or "/" in host:  # a word of Ray's own, such as "auto"
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as cause:
        raise ConfigError(
            f"{ADDRESS} is {address}, and no cluster answers there ({first_line(cause)}) Start one by `ray start --head`, "
            "or unset it for one of this machine alone."
        ) from cause


def _check_port(config: ServeConfig) -> None:
    if not config.port:
        raise ConfigError("Ray listens at a port that is known: set --port.")
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((config.host, config.port))
        except OSError as cause:
            raise ConfigError(
                f"Cannot listen at {config.host}:{config.port}: {cause.strerror}. Set another --port or --host."
            ) from cause


def _start(config: ServeConfig, *, everywhere: bool) -> None:
    """Starts what Ray Serve itself needs, with a proxy on each machine or this one alone, unless that runs already."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(
            proxy_location="EveryNode" if everywhere else "HeadOnly",
            http_options={
                "host": config.host,
                "port": config.port,
                "request_timeout_s": 3 * config.request_seconds,  # to come in, to be read, to be answered
                "keep_alive_timeout_s": 30,
            },
            logging_config=LOGGING,
            controller_options={"runtime_env": {"env_vars": ENVIRONMENT}},
        )
    except (RuntimeError, TimeoutError, RayError) as cause:
        raise ConfigError(f"Ray Serve does not start: {first_line(cause)} {WHERE}") from cause
    if NAME in serve.status().applications:
        raise ConfigError(
            f'The cluster runs an application "{NAME}" already: end that first, by the command that began it.'
        )


def _gpus(config: RayConfig, llm: LLMConfig) -> float:
    """How many accelerators a replica takes."""
    if config.gpus is not None:
        return config.gpus
    wanted = llm.options.get("device_map")
    has_none = not ray.cluster_resources().get("GPU")
    return 0.0 if wanted in (None, "cpu", {"": "cpu"}) or (wanted == "auto" and has_none) else 1.0


def _check_room(config: RayConfig, gpus: float) -> None:
    """Refuses more replicas than there is room for, which Ray would wait for."""
    there = ray.cluster_resources()
    for what, name, each in (("processors", "CPU", config.cpus), ("accelerators", "GPU", gpus)):
        needed, has = config.replicas * each, there.get(name, 0)
        if needed > has:
            raise ConfigError(
                f"{config.replicas} replicas with {each:g} {what} each need {needed:g}, and this machine has {has:g}: give "
                f"fewer --replicas, set ray.{name.lower()}s, or name a larger cluster by {ADDRESS}."
            )


def _deployed(model: str, config: ServeConfig, gpus: float) -> DeploymentHandle:
    """Starts the replicas and waits until they are ready."""
    each = serve.deployment(
        Replica,
        name=NAME,
        num_replicas=config.ray.replicas,
        ray_actor_options={"num_cpus": config.ray.cpus, "num_gpus": gpus},
        max_ongoing_requests=config.max_requests + config.engine.max_rows,
        max_queued_requests=config.max_requests,
        backpressure_config={"status_code": 429},
        request_router_config={"request_router_class": "xblip.serve_ray_proxy.Router"},
        health_check_period_s=HEALTH_SECONDS,
        graceful_shutdown_timeout_s=config.drain_seconds + 5,
        graceful_shutdown_wait_loop_s=0.1,
        max_constructor_retry_count=1,
        logging_config=LOGGING,
    )
    try:
        return serve.run(each.bind(model, config), name=NAME, route_prefix="/")
    except (RuntimeError, ValueError, RayServeException) as cause:
        states = [one.message for app in serve.status().applications.values() for one in app.deployments.values()]
        said = [state.split(QUOTE)[1] for state in states if QUOTE in state]
        message = said[0] if said else f"{first_line(cause)} {WHERE}"
        raise ConfigError(f"The replicas do not start: {message}") from cause


def _drain(handle: DeploymentHandle, seconds: float) -> None:
    """Lets replicas take nothing more, and waits until they have finished what runs."""
    try:
        handle.broadcast("drain", seconds).results(timeout_s=seconds + 5, return_exceptions=True)
    except (RayServeException, TimeoutError) as error:
        log.warning("Not all replicas could be told to finish: %s", error)
