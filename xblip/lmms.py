"""What lmms-eval asks, in the words of xblip: visuals as inputs of a model's modalities, its settings as options.

lmms-eval (`python -m lmms_eval --model xblip`) finds the model by the entry-point group `lmms_eval.models`, which names
`manifest`; the model itself is in `xblip.lmms_model`. Who is to read a visual is asked of the modalities: by their suffixes
for a file, by trying them for an object. So a third party's modality takes part in benchmarks as soon as it is installed.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from xblip.errors import ConfigError, MediaError, suggest
from xblip.sample import Media

if TYPE_CHECKING:
    from xblip.branch import Branch

FOREIGN = ("image_aspect_ratio",)
"""Settings in tasks' generation_kwargs that tell LLaVA how to cut pictures, and say nothing about generating."""
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
"""Settings that mean nothing unless answers are drawn at random."""
CLIP = ("video_start", "video_end")
"""Keys by which a task asks for a part of a file."""

log = logging.getLogger(__name__)


class Wanted(NamedTuple):
    """How answers are wanted: transformers' generation options, and texts that an answer ends before."""

    options: dict[str, Any]
    until: list[str]

    def cut(self, text: str) -> str:
        """Returns an answer as far as the first of `until`."""
        for end in self.until:
            text = text.partition(end)[0]
        return text.strip()


def manifest() -> Any:
    """Tells lmms-eval of the model, without importing it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="xblip", simple_class_path="xblip.lmms_model.XBlipLmms")


def wanted(settings: Mapping[str, Any]) -> Wanted:
    """Makes generation options of a task's `generation_kwargs`, with the command line's `--gen_kwargs` in them.

    As other models of lmms-eval do: answers are greedy unless `do_sample` or a temperature above 0 is asked for, a
    temperature of 0 is greedy, and what is None is not set.

    Raises:
      ConfigError: a setting is unknown or refused, or would give several answers.
    """
    from xblip.generation import check_generation_options, generation_option_names

    if any(name in settings for name in FOREIGN):
        log.warning("%s is for other models: xblip's modalities read media their own way.", ", ".join(FOREIGN))
    options = {name: value for name, value in settings.items() if value is not None and name not in FOREIGN}
    until = options.pop("until", [])
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, list) or not all(isinstance(end, str) for end in until):
        raise ConfigError(f"until must be a text or a list of texts that end an answer, not {until!r:.80}.")
    if "max_gen_toks" in options:
        options["max_new_tokens"] = options.pop("max_gen_toks")
    is_drawn = options.get("do_sample", bool(options.get("temperature"))) and options.get("temperature") != 0
    options["do_sample"] = is_drawn
    if not is_drawn:
        options = {name: value for name, value in options.items() if name not in SAMPLING}
    known = generation_option_names(objects=False)
    for name in options:
        if name not in known:
            raise ConfigError(
                f'Unknown generation setting "{name}" of a task of lmms-eval.{suggest(str(name), known)} They are until, '
                "max_gen_toks and those of transformers' GenerationConfig: leave it out of the task's generation_kwargs, or "
                f"set it to null there."
            )
    check_generation_options(options)
    if options.get("num_return_sequences", 1) != 1:
        raise ConfigError("num_return_sequences: lmms-eval takes one answer to a request; for several give --repeats.")
    return Wanted(options, [end for end in until if end])


def media_of(visual: Any, branches: Mapping[str, "Branch"]) -> Media:
    """Reads a visual by the modality whose kind it is.

    Args:
      visual: what a task's `doc_to_visual` gives: a path; an object such as a PIL image, a list of frames, or sound as
        `datasets` has it ("array" and "sampling_rate"); a file as `datasets` leaves it undecoded ("path", "bytes"); or
        with its modality, as a pair (modality, source) or {"type": modality, "path": ...}.
      branches: those of the model, by modality.

    Returns:
      The input, read.

    Raises:
      MediaError: no modality of the model, or more than one, is for it; it cannot be read; or it asks for a part of a file.
    """
    modality, source, name = _source_of(visual, branches)
    if modality is None and name is not None:
        modality = _by_suffix(name, branches)
    if modality is not None:
        return Media(modality, branches[modality].read(source))
    read, reasons = [], []
    for candidate, branch in branches.items():
        try:
            read.append(Media(candidate, branch.read(source)))
        except MediaError as error:
            reasons.append(f"{candidate}: {error}")
    kind = type(visual).__name__
    if not read:
        raise MediaError(f"No modality of the model reads a visual of type {kind}. {' '.join(reasons)}")
    if len(read) > 1:
        names = " and ".join(media.modality for media in read)
        raise MediaError(
            f"A visual of type {kind} may be for {names}: let the task's doc_to_visual say which, by a pair "
            f'such as ("{read[0].modality}", visual).'
        )
    return read[0]


def _source_of(visual: Any, branches: Mapping[str, "Branch"]) -> tuple[str | None, Any, str | None]:
    """Returns the modality that a visual says it is for, its source, and the name of its file; None for none."""
    if isinstance(visual, tuple) and len(visual) == 2 and isinstance(visual[0], str):
        return _known(visual[0], branches), visual[1], None
    if isinstance(visual, (str, os.PathLike)):
        return None, visual, os.fspath(visual)
    if isinstance(visual, Mapping) and "array" not in visual:
        if any(visual.get(key) is not None for key in CLIP):
            raise MediaError(f"A visual asks for a part of {visual.get('path')!r}: cut the file beforehand.")
        modality = _known(visual["type"], branches) if "type" in visual else None
        source = next((visual[key] for key in ("bytes", "path", "url") if visual.get(key) is not None), None)
        if source is None:
            raise MediaError(
                f"A visual is a dictionary of {', '.join(map(str, visual)) or 'nothing'}: expected array and "
                "sampling_rate, or path or bytes."
            )
        name = next((visual[key] for key in ("path", "url") if isinstance(visual.get(key), str)), None)
        return modality, source, name
    try:
        return None, (visual["array"], int(visual["sampling_rate"])), None
    except (TypeError, KeyError, IndexError):
        return None, visual, None


def _known(modality: Any, branches: Mapping[str, "Branch"]) -> str:
    if modality not in branches:
        raise MediaError(
            f'The model has no branch for "{modality}", as which a visual is given.{suggest(str(modality), branches)}'
        )
    return modality


def _by_suffix(name: str, branches: Mapping[str, "Branch"]) -> str:
    suffix = Path(name).suffix.lower()
    found = [modality for modality, branch in branches.items() if suffix in branch.modality.suffixes]
    if len(found) == 1:
        return found[0]
    if found:
        raise MediaError(
            f'Files that end in "{suffix}", such as {name}, may be for {" and ".join(found)}: let the task\'s '
            f'doc_to_visual say which, by a pair such as ("{found[0]}", path).'
        )
    kinds = "; ".join(f"{modality}: {' '.join(branch.modality.suffixes)}" for modality, branch in branches.items())
    raise MediaError(
        f'No modality of the model is for files that end in "{suffix}", such as {name}. There are {kinds}.'
    )
