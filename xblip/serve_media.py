"""How a request's inputs come in: fetched, read in a worker, known again by content or by what their sender calls them."""

import copy
import dataclasses
import math
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from xblip.decode_pool import DecodePool
from xblip.errors import ConfigError, MediaError, XBlipError, suggest
from xblip.fetch import Fetched, Fetcher
from xblip.modality import Modality
from xblip.reading import ReadMedia
from xblip.serve_intake import Visit
from xblip.serve_schema import Part, wrong

if TYPE_CHECKING:
    from xblip.model import XBlip

MAX_NAMED = 100_000
"""Names (uuid) that are remembered; the least used go first."""
LIMITS = {"max_pixels": 25_000_000, "max_seconds": 600.0, "max_points": 2_000_000}
"""What a server takes at most by default, by the names of modalities' settings; a modality may have less."""


class MediaDoor:
    """Lets inputs in, for many threads at once."""

    def __init__(self, model: "XBlip", *, fetcher: Fetcher, pool: DecodePool):
        self.model = model
        self.fetcher = fetcher
        self.pool = pool
        self._named: OrderedDict[tuple[str, str, str], bytes] = OrderedDict()
        self._lock = Lock()

    def source(self, part: Part, visit: Visit, *, caller: str) -> Any:
        """Returns what a model takes for a part: features that are there already, or what a worker read.

        Args:
          part: of a request.
          visit: that it is read for, as long as somebody waits.
          caller: whose; names are their senders' own.

        Raises:
          InputError, MediaError: it cannot be fetched or read, or nothing is known by its name; `place` says which it was.
        """
        visit.check()
        try:
            if part.url is None and part.data is None:
                return self._known(part, caller)
            with self._fetched(part, visit) as fetched:
                return self._read(part, fetched, visit, caller)
        except XBlipError as error:
            error.place = part.place
            raise

    def take(self, modality: str, path: Path, visit: Visit, *, place: str) -> Any:
        """Returns as `source` does what a model takes for a file that is here already, and stays here.

        Args:
          modality: that reads it.
          path: of the file.
          visit: that it is read for, as long as somebody waits.
          place: what messages call it.

        Raises:
          MediaError: it cannot be read, or is gone; `place` says which it was.
        """
        visit.check()
        part = Part(modality, place)
        try:
            return self._read(part, self.fetcher.found(path), visit, caller="")
        except XBlipError as error:
            error.place = place
            raise

    def _known(self, part: Part, caller: str) -> Any:
        with self._lock:
            key = self._named.get((caller, part.modality, part.uuid))
        features = key and self.model.caches.features.get(key)
        if features is None:
            raise wrong(
                part.place,
                f'{part.place}: nothing is known by the uuid "{part.uuid}", or no more: send the file once with this uuid.',
            )
        return features

    def _fetched(self, part: Part, visit: Visit) -> Fetched:
        modality = self.model.branches[part.modality].modality
        if part.url is not None:
            return self.fetcher.fetch(part.url, modality, check=visit.check)
        return self.fetcher.fetch_base64(part.data, modality, format=part.format)

    def _read(self, part: Part, fetched: Fetched, visit: Visit, caller: str) -> Any:
        content = bytes.fromhex(fetched.digest) + fetched.path.suffix.encode()
        key = self.model.reader.key(part.modality, ReadMedia({}, content))
        if part.uuid is not None:
            with self._lock:
                self._named[caller, part.modality, part.uuid] = key
                self._named.move_to_end((caller, part.modality, part.uuid))
                if len(self._named) > MAX_NAMED:
                    self._named.popitem(last=False)
        features = self.model.caches.features.get(key)
        if features is not None:
            return features
        try:
            tensors = self.pool.load(part.modality, fetched.path, check=visit.check)
        except MediaError as error:
            raise MediaError(_without_path(str(error), fetched, part)) from None
        visit.hold(sum(tensor.nbytes for tensor in tensors.values()))
        return ReadMedia(tensors, content)


def _without_path(message: str, fetched: Fetched, part: Part) -> str:
    """Names a part where a message names the temporary file that it was written to."""
    for shown in (repr(str(fetched.path)), f'"{fetched.path}"', str(fetched.path), fetched.path.name):
        message = message.replace(shown, part.place)
    return message


def limited(model: "XBlip", limits: Mapping[str, Any]) -> dict[str, Modality]:
    """Returns the modalities of a model as a server reads them: each `max_` setting the lower of its own and the server's.

    A setting that is None has no limit of its own.

    Args:
      model: whose.
      limits: by setting, such as "max_seconds", for all modalities, or "<modality>.max_seconds" for one.

    Raises:
      ConfigError: a limit is of no modality here, is no number above 0, or is above what every modality that it is for
        takes itself.
    """
    own: dict[str, float] = {}
    for name, branch in model.branches.items():
        for key, value in vars(branch.modality.config).items():
            if key.startswith("max_") and (value is None or isinstance(value, (int, float))):
                own[f"{name}.{key}"] = math.inf if value is None else value
                own[key] = max(own[f"{name}.{key}"], own.get(key, 0))
    for name, value in limits.items():
        if name not in own and name not in LIMITS:
            raise ConfigError(f'Unknown limit "{name}".{suggest(name, own)}')
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ConfigError(f"The limit {name} must be a number above 0, not {value!r}.")
        if value > own.get(name, value):
            raise ConfigError(
                f"The limit {name}={value:.12g} is above the model's own, {own[name]:.12g}: lower it, or raise "
                f"{name.rpartition('.')[2]} in the config of the model's branch."
            )
    made = {}
    for name, branch in model.branches.items():
        lower = {}
        for key, value in vars(branch.modality.config).items():
            most = limits.get(f"{name}.{key}", limits.get(key, LIMITS.get(key, math.inf)))
            if most < own.get(f"{name}.{key}", 0):
                lower[key] = most if value is None else type(value)(most)
                if not lower[key] > 0:
                    raise ConfigError(f"The limit {key}={most:g} is below 1, and {name} counts in whole numbers.")
        made[name] = copy.copy(branch.modality)
        made[name].config = dataclasses.replace(branch.modality.config, **lower)
    return made
