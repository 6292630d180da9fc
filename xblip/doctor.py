"""The doctor: what loads on this machine and what does not and why; and of a config all that can be known beforehand.

It changes nothing and downloads nothing, and it starts where torch does not: nothing that may fail is imported before it
is tried.
"""

import importlib
import platform
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from xblip import plugins
from xblip.errors import ConfigError, in_units, suggest

if TYPE_CHECKING:
    from xblip.dryrun import Report

PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "huggingface_hub", "numpy", "omegaconf")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class Check:
    """Something that is needed.

    Attributes:
      group: what needs it: "xblip", or a plugin's name.
      name: what it is.
      version: or state; "" where it does not load.
      error: why it does not load.
    """

    group: str
    name: str
    version: str = ""
    error: str = ""


def environment() -> list[Check]:
    """Tries what xblip and its plugins need on this machine."""
    checks = [Check("xblip", "python", platform.python_version())]
    checks += [_check("xblip", name, lambda name=name: _version(name)) for name in PACKAGES]
    checks.append(_check("xblip", "accelerator", accelerators))
    for plugin in plugins.survey():
        if plugin.error:
            checks.append(Check(plugin.name, plugin.distribution, error=plugin.error))
            continue
        checks.append(Check(plugin.name, plugin.distribution, ", ".join(plugin.offers)))
        for kind, name in (offer.split() for offer in plugin.offers):
            if kind == "modality":
                checks += _diagnosed(plugin.name, plugins.get("modality", name).diagnose)
    return checks


def _diagnosed(group: str, diagnose: Callable[[], dict[str, Callable[[], str]]]) -> list[Check]:
    try:
        needs = diagnose()
    except Exception as error:
        return [Check(group, "diagnose", error=f"{type(error).__name__}: {_reason(error)}")]
    return [_check(group, name, needed) for name, needed in needs.items()]


def _check(group: str, name: str, needed: Callable[[], str]) -> Check:
    """Tries something; whatever it raises is its fault, and is told."""
    try:
        return Check(group, name, needed())
    except Exception as error:
        return Check(group, name, error=_reason(error))


def _reason(error: Exception) -> str:
    """The first line of an error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _version(name: str) -> str:
    importlib.import_module(name)
    return metadata.version(name)


def accelerators() -> str:
    """Names what torch can compute on beside the CPU.

    Raises:
      RuntimeError: torch was built for CUDA, and finds no device.
    """
    import torch

    if torch.version.cuda and not torch.cuda.is_available():
        try:
            torch.cuda.init()
        except RuntimeError as error:
            reason = _reason(error).split(". ")[0].rstrip(".")
            raise RuntimeError(
                f"torch is built for CUDA {torch.version.cuda}, but finds no device: {reason}."
            ) from error
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    names = [f"{device.name} ({in_units(device.total_memory)})" for device in found]
    names += ["Apple GPU"] if torch.backends.mps.is_available() else []
    return ", ".join(names) or "none: this torch is built for the CPU alone"


def examine(
    config: str | Path, overrides: Sequence[str] = (), *, batch_size: int | None = None, dtype: str = ""
) -> "Report":
    """Tries a config on the meta device.

    Args:
      config: a model config, a training config, or a bundle by its name or folder.
      overrides: "key.sub=value" each.
      batch_size: None for that of a training config, and 1 of any other.
      dtype: of LLM and encoders; "" for what the config says.

    Raises:
      XBlipError: something in the config is wrong, or its parts do not fit each other.
    """
    if dtype and dtype not in DTYPES:
        raise ConfigError(f'Unknown dtype "{dtype}".{suggest(dtype, DTYPES)}')
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, not {batch_size}.")
    from xblip.blueprint import draw, read_plan
    from xblip.dryrun import dry_run

    plan = read_plan(config, overrides)
    with draw(plan, dtype=dtype) as blueprint:
        return dry_run(blueprint, batch_size=batch_size or plan.batch_size)


def environment_table(checks: Sequence[Check]) -> Table:
    """Shows what loads, and why something does not."""
    table = _table("Environment", "for", "what", "state")
    shown = ""
    for check in checks:
        state = f"[red]fails: {escape(check.error)}[/red]" if check.error else escape(check.version)
        table.add_row("" if check.group == shown else check.group, escape(check.name), state)
        shown = check.group
    return table


def report_tables(report: "Report") -> Iterable[Table | Text | str]:
    """Shows a dry run: parts, ways, memory, and what is missing."""
    table = _table("Parts", "part", "network", "frozen >", "trained >", "dtype", "memory >")
    for part in report.parts:
        if part.shares:
            table.add_row(part.name, f"that of {part.shares.split()[0]}", "", "", "", "")
            continue
        counts = [f"{count:,}" if count else "" for count in (part.frozen, part.trained)]
        network = re.sub(r"(Model|Transformer|For\w+)$", "", part.network)
        dtype = part.dtype.replace("bfloat", "bf").replace("float", "fp")
        table.add_row(part.name, network, *counts, dtype, in_units(part.weight_bytes))
    totals = [
        f"{sum(counts):,}" for counts in zip(*((part.frozen, part.trained) for part in report.parts), strict=True)
    ]
    table.add_section()
    table.add_row("all", "", *totals, "", in_units(sum(part.weight_bytes for part in report.parts)))
    yield table
    table = _table("The way of one input", "input", "as tensors", "features", "soft prompt", "1000 files >")
    for name, way in report.ways.items():
        loaded = "\n".join(f"{key} {_shape(shape)}" for key, shape in way.loaded.items())
        if way.error:
            table.add_row(name, loaded, "[red]unknown[/red]")
        else:
            table.add_row(name, loaded, _shape(way.features), _shape(way.soft_prompt), in_units(way.features_bytes))
    about = "about " if report.is_estimate else ""
    if report.ways:
        yield table
    yield from (f"[red]{name}: {escape(way.error)}[/red]\n" for name, way in report.ways.items() if way.error)
    yield (
        f"[red]{escape(report.error)}[/red]\n"
        if report.error
        else (
            f"A prompt with one input of each: {about}{report.prompt_positions} positions, {report.soft_positions} of them "
            f"soft; logits {_shape(report.logits)}.\n"
        )
    )
    table = _table(
        f"Memory at batch size {report.batch_size}",
        *("", "weights >", "gradients, AdamW >", "bridge keeps >", "LLM keeps >", "cache >", "all >"),
    )
    if asking := report.asking_bytes:
        cache = asking["keys and values"] + asking["logits"]
        table.add_row("ask", in_units(asking["weights"]), "", "", "", in_units(cache), in_units(sum(asking.values())))
    for name, way in report.ways.items():
        if way.error:
            continue
        table.add_row(
            f"train {name}", *map(in_units, way.training_bytes.values()), "", in_units(sum(way.training_bytes.values()))
        )
    if table.row_count:
        yield table
    beams = f" by {report.num_beams} beams" if report.num_beams > 1 else ""
    yield (
        f"For answers of {report.num_new_tokens} tokens{beams}. An estimate from below: weights, gradients and AdamW are "
        "exact; bridge and LLM keep what the backward pass needs, with fused attention, the LLM of the part of a batch that "
        "it reads at once. What is used for a moment is not in it.\n"
    )
    table = _table("Products of training on one sample", *("", "encoder >", "bridge >", "LLM >", "logits >", "all >"))
    for name, way in report.ways.items():
        if way.flops:
            parts = [sum(part) for part in way.flops.values()]
            table.add_row(f"train {name}", *map(in_flops, (*parts, sum(parts))))
    if table.row_count:
        yield table
        yield "With stored features the encoder's are left out. Formulas: xblip/costs.py; what follows: docs/scale.md.\n"
    there = sum(source.is_here for source in report.sources)
    yield f"[italic]Files[/italic]\n{there} of {len(report.sources)} sources are here."
    for source in report.sources:
        if not source.is_here:
            yield f"{source.state}: {escape(source.name)} ({', '.join(source.used_for)})"
            yield Text(f"    {source.get or 'put it in its place'}", no_wrap=True, overflow="ignore")


def _table(title: str, *columns: str) -> Table:
    """A table; a column whose name ends in ">" is of numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        name = column.removesuffix(" >")
        table.add_column(name, overflow="fold", justify="left" if name == column else "right", no_wrap=name != column)
    return table


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def in_flops(count: float) -> str:
    """Floating-point operations in the largest unit that they fill."""
    for unit in ("", "k", "M", "G"):
        if count < 1000:
            return f"{count:.3g} {unit}FLOP"
        count /= 1000
    return f"{count:,.2f} TFLOP"
