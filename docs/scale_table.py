"""Writes the tables of docs/scale.md: what training costs, by the formulas of xblip/costs.py that `xblip doctor` uses.

python docs/scale_table.py [name=value ...]     # with other assumptions: prints the tables, and writes nothing
"""

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from math import ceil

from scale_model import MEANING, ROOT, Assumed, Case, cases, changed, reports

from xblip.costs import all_gather_bytes, all_reduce_bytes, checkpoint_bytes, total
from xblip.dryrun import Report

GUIDE = ROOT / "docs" / "scale.md"
MEASURED = json.loads((ROOT / "docs" / "scale_measured.json").read_text(encoding="utf-8"))
SAMPLES = (10**6, 10**7, 10**8, 10**9)
GPUS = (1, 8, 64, 512)


def tables(small: Report, large: Report, assumed: Assumed) -> dict[str, str]:
    """All tables, by their names in docs/scale.md."""
    rows = cases(small, assumed)
    models = {"7B": rows, "13B": cases(large, assumed)}
    made = {
        "assumed": _table(("parameter", "value", "what it is"), (1,), _assumptions(assumed)),
        "measured": _measured(),
        "sample": _sample(rows),
        "stages": _stages(rows),
        "storing": _storing(rows),
        "drivers": _drivers(rows),
        "batches": _batches(rows[0]),
        "memory": _memory(models),
        "network": _network(models, assumed),
        "loading": _loading(rows),
    }
    return made | {f"scale {case.name}": _scale(case) for case in rows}


def _assumptions(assumed: Assumed) -> Iterable[str]:
    for name, meaning in MEANING.items():
        value = getattr(assumed, name)
        yield _row(f"`{name}`", f"{value:g}" if isinstance(value, float) else str(value), meaning)


def _measured() -> str:
    found = MEASURED
    lines = [
        ("matrix products, float32", f"{found['matrix_product_flop_per_s'] / 1e9:.0f} GFLOP/s"),
        ("share of it that a small training step reaches", f"{found['training_step_share_of_it']:.0%}"),
        ("stored features read in random order, from the disk", f"{found['disk_read_bytes_per_s'] / 1e6:,.0f} MB/s"),
        ("the same from the page cache", f"{found['cached_read_bytes_per_s'] / 1e6:,.0f} MB/s"),
        ("JPEG pictures of 640×480 read and made tensors", f"{1 / found['image_load_s']:,.0f} a second"),
    ]
    return _table(("what", "here"), (1,), (_row(*line) for line in lines))


def _sample(rows: list[Case]) -> str:
    lines: dict[str, list[str]] = {"file read": [], "segments × tokens × width": [], "LLM positions, with a label": []}
    for case in rows:
        flops = case.flops()
        whole = total(flops)
        lines["file read"].append(f"{_bytes(MEASURED[f'{case.name}_file_bytes'])}")
        lines["segments × tokens × width"].append("×".join(map(str, (case.segments, *case.way.features[1:]))))
        lines["LLM positions, with a label"].append(f"{case.positions}, {case.assumed.answer}")
        for part, work in flops.items():
            for direction, count in work._asdict().items():
                if count or (part, direction) == ("logits", "forward"):
                    shown = f"{count / 1e9:,.3g}" if count < 1e12 else f"{count / 1e9:,.0f}"
                    lines.setdefault(f"{part} {direction}", []).append(shown)
        lines.setdefault("all, GFLOP", []).append(f"**{whole / 1e9:,.0f}**")
        for part, work in flops.items():
            lines.setdefault(f"share of the {part}", []).append(_share(sum(work) / whole))
        for title, stored in (("encoder run", False), ("features stored", True)):
            lines.setdefault(f"ms of a GPU, {title}", []).append(f"{1000 * case.sample_s(stored=stored):.2f}")
        lines.setdefault("features as float16; as int8", []).append(
            f"{_bytes(case.stored('float16'))}; {_bytes(case.stored('int8'))}"
        )
    names = ("", *(case.name for case in rows))
    return _table(names, range(1, len(names)), (_row(title, *cells) for title, cells in lines.items()))


def _stages(rows: list[Case]) -> str:
    columns = (
        "modality",
        "encoder",
        "`align`",
        "gain of stored features",
        "`generate`, `instruct`",
        "gain of stored features",
    )

    def line(case: Case) -> str:
        gains = [case.sample_s(stored=False, align=on) / case.sample_s(stored=True, align=on) for on in (True, False)]
        flops = (case.flops()["encoder"].forward, sum(case.align_flops()), total(case.flops(stored=True)))
        encoder, align, instruct = (f"{count / 1e9:,.0f} GFLOP" for count in flops)
        return _row(case.name, encoder, align, f"{gains[0]:.1f}×", instruct, f"{gains[1]:.2f}×")

    return _table(columns, range(1, 6), map(line, rows))


def _storing(rows: list[Case]) -> str:
    columns = (
        "modality", "features", "to encode 10^6", "to keep them a month", "cheaper from: epochs a month",
        "8 GPUs would read", "quicker from: epochs, 1 GPU", "8 GPUs",
    )  # fmt: skip
    lines = []
    for case in rows:
        for dtype in ("float16", "int8"):
            encoding = 1e6 * case.encoding_s / 3600 * case.assumed.gpu_price
            month = 1e6 * case.stored(dtype) / 1e9 * case.assumed.store_price
            often = f"{max(1, ceil(month / encoding))}"
            pace = 8 * case.stored(dtype) / case.sample_s(stored=True)
            epochs = [case.pays_from(gpus, dtype) for gpus in (1, 8)]
            first = (str(epoch or "never") for epoch in epochs)
            lines.append(
                _row(case.name, dtype, _dollars(encoding), _dollars(month), often, f"{_bytes(pace, 2)}/s", *first)
            )
    return _table(columns, range(2, 8), lines)


def _scale(case: Case) -> str:
    columns = (
        "samples", "stored, int8", "a month of it", "encode once", *(f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in GPUS),
        "price of an epoch",
    )  # fmt: skip
    lines = []
    for samples in SAMPLES:
        size = samples * case.stored("int8")
        hours = [[case.epoch_h(samples, gpus, dtype=dtype) for dtype in ("", "int8")] for gpus in GPUS]
        prices = [hour * 8 * case.assumed.gpu_price for hour in hours[1]]
        shown = (" → ".join(map(_hours, pair)) for pair in hours)
        month = _dollars(size / 1e9 * case.assumed.store_price)
        once = _hours(samples * case.encoding_s / 3600)
        lines.append(_row(_count(samples), _bytes(size), month, once, *shown, " → ".join(map(_dollars, prices))))
    return _table(columns, range(len(columns)), lines)


def _drivers(rows: list[Case]) -> str:
    columns = (
        "modality",
        "features",
        "LLM and logits",
        "encoder",
        "bridge",
        "exchange of gradients",
        "waiting for the store",
    )
    lines = []
    for case in rows:
        for dtype in ("", "float16", "int8"):
            step, exchange = case.step_s(GPUS[-1], dtype=dtype), case.exchange_s(GPUS[-1])
            works = {
                name: case.assumed.batch * sum(part) / case.rate
                for name, part in case.flops(stored=bool(dtype)).items()
            }
            parts = [works["LLM"] + works["logits"], works["encoder"], works["bridge"], exchange]
            parts.append(step - sum(parts))
            lines.append(_row(case.name, dtype or "computed", *(_share(max(part, 0) / step) for part in parts)))
    return _table(columns, range(2, 7), lines)


def _batches(case: Case) -> str:
    columns = ("samples of a GPU", *(f"of {gpus} GPUs" for gpus in GPUS[2:]), "400 Gbit/s", "25 Gbit/s")
    slow = replace(case.assumed, network_gb_per_s=case.assumed.slow_network_gb_per_s)
    lines = []
    for batch in (4, 8, 16, 32, 64, 128):
        shares = []
        for assumed in (case.assumed, slow):
            tried = replace(case, assumed=replace(assumed, batch=batch))
            step = tried.step_s(GPUS[-1], dtype="int8")
            shares.append(_share(1 - tried.exchange_s(GPUS[-1]) / step))
        lines.append(_row(str(batch), *(f"{batch * gpus:,}" for gpus in GPUS[2:]), *shares))
    return _table(columns, range(5), lines)


def _memory(models: dict[str, list[Case]]) -> str:
    columns = (
        "bridge", "fixed", "with encoder", "LLM at once", "a sample: bridge", "batch",
        "LLM in 8 shards", "a sample: LLM", "checkpointed", "batch", "checkpointed",
    )  # fmt: skip
    lines = []
    for size, rows in models.items():
        for case in rows:
            whole = [
                case.fixed_bytes(encoder=False),
                case.fixed_bytes(encoder=True),
                case.part_bytes,
                case.bridge_bytes,
            ]
            sharded = [case.fixed_bytes(encoder=False, shards=8), case.llm_bytes, case.checkpointed_bytes]
            batches = [case.largest_batch(shards=8, checkpointing=checkpointing) for checkpointing in (False, True)]
            cells = [*map(_bytes, whole), _about(case.largest_batch()), *map(_bytes, sharded), *map(_about, batches)]
            lines.append(_row(f"{size} {case.name}", *cells))
    return _table(columns, range(1, 11), lines)


def _about(count: int) -> str:
    return f"{int(float(f'{count:.2g}')):,}"


def _network(models: dict[str, list[Case]], assumed: Assumed) -> str:
    columns = (
        "what, per GPU", "bytes", "in a node", "between nodes", "25 Gbit/s", "samples as long: in a node", "between nodes",
        "25 Gbit/s",
    )  # fmt: skip
    rates = (assumed.link_gb_per_s, assumed.network_gb_per_s, assumed.slow_network_gb_per_s)
    lines = []
    for size, rows in models.items():
        case = rows[0]
        for what, moved in (
            ("gradients of a bridge, each step", all_reduce_bytes(case.trained, GPUS[-1])),
            ("sharded LLM, each micro-batch", all_gather_bytes(case.parts["LLM"].weight_bytes, GPUS[-1])),
        ):
            times = [moved / rate / 1e9 for rate in rates]
            samples = (f"{ceil(seconds / case.sample_s(stored=True)):,}" for seconds in times)
            lines.append(_row(f"{size}: {what}", _bytes(moved), *map(_seconds, times), *samples))
        lines.append(_row(f"{size}: checkpoint", _bytes(checkpoint_bytes(case.trained)), *[""] * 6))
    return _table(columns, range(1, 8), lines)


def _loading(rows: list[Case]) -> str:
    columns = (
        "modality",
        "one core reads",
        "a GPU takes, encoder run",
        "cores",
        "a GPU takes, features stored",
        "cores",
    )

    def line(case: Case) -> str:
        seconds = MEASURED[f"{case.name}_load_s"]
        copying = case.stored("float16") / MEASURED["disk_read_bytes_per_s"]
        shown = [f"{1000 * seconds:.1f} ms"]
        for stored, each in ((False, seconds), (True, copying)):
            pace = 1 / case.sample_s(stored=stored)
            shown += [f"{pace:,.0f} a second", f"{pace * each:.1f}"]
        return _row(case.name, *shown)

    return _table(columns, range(1, 6), map(line, rows))


def _bytes(count: float, digits: int = 3) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5:
            return f"{_rounded(count, digits)} {unit}"
        count /= 1000
    return f"{_rounded(count, digits)} PB"


def _rounded(number: float, digits: int = 2) -> str:
    return f"{float(f'{number:.{digits}g}'):,.10g}"


def _share(part: float) -> str:
    return f"{part:.0%}" if part >= 0.005 else "<1%" if part > 1e-9 else ""


def _hours(hours: float) -> str:
    for unit, length in (("h", 1), ("min", 1 / 60)):
        if hours >= length:
            return f"{_rounded(hours / length)} {unit}"
    return f"{_rounded(3600 * hours)} s"


def _seconds(seconds: float) -> str:
    return f"{_rounded(1000 * seconds)} ms" if seconds < 0.995 else f"{_rounded(seconds)} s"


def _dollars(price: float) -> str:
    return f"${_rounded(price)}" if price >= 1 else f"${price:.2f}"


def _count(number: int) -> str:
    return f"10^{len(str(number)) - 1}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _table(columns: Iterable[str], numbers: Iterable[int], lines: Iterable[str]) -> str:
    columns, numbers = list(columns), set(numbers)
    return "\n".join(
        [_row(*columns), _row(*("---:" if at in numbers else "---" for at in range(len(columns)))), *lines]
    )


def filled(text: str, made: dict[str, str]) -> str:
    """Puts tables between their marks."""

    def put(match: re.Match) -> str:
        return f"<!-- table: {match[1]} -->\n{made[match[1]]}\n<!-- end -->"

    return re.sub(r"<!-- table: ([\w ]+) -->\n.*?<!-- end -->", put, text, flags=re.DOTALL)


def main(settings: list[str]) -> None:
    """Rewrites docs/scale.md in place, or prints its tables for other assumptions."""
    assumed = changed(Assumed(), settings)
    made = tables(*reports(assumed), assumed)
    if settings:
        print("\n\n".join(f"{name}\n{table}" for name, table in made.items()))
        return
    GUIDE.write_text(filled(GUIDE.read_text(encoding="utf-8"), made), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
