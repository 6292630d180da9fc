"""What docs/scale.md assumes, and what follows from it by the formulas of xblip/costs.py."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from xblip.costs import BYTES_OF_TRAINING, Flops, QFormerCost, all_reduce_bytes, step_flops, stored_bytes, total
from xblip.devices import device_peak
from xblip.doctor import examine
from xblip.dryrun import Part, Report, Way

ROOT = Path(__file__).parents[1]
CONFIG, LARGE = "xinstructblip-vicuna-7b", "xinstructblip-vicuna-13b"


@dataclass(frozen=True)
class Assumed:
    """What no formula gives, and what each number means; all of it may be set on the command line."""

    gpu: str = "NVIDIA H100 80GB HBM3"
    utilisation: float = 0.4
    gpus_of_a_node: int = 8
    batch: int = 64
    text: int = 16
    prompt: int = 20
    answer: int = 13
    caption: int = 32
    audio_segments: int = 2
    gpu_price: float = 2.5
    store_price: float = 0.02
    link_gb_per_s: float = 300.0
    network_gb_per_s: float = 35.0
    slow_network_gb_per_s: float = 2.5
    store_gb_per_s: float = 2.0


MEANING = {
    "gpu": "the accelerator; its peak is the maker's (xblip/devices.py)",
    "utilisation": "share of that peak that encoder, bridge and LLM reach. **No GPU was measured**",
    "gpus_of_a_node": "GPUs with a fast link between them",
    "batch": "samples of one GPU in a step",
    "text": "tokens of an instruction, as the Q-Former reads it",
    "prompt": "positions of the LLM beside soft prompt and answer: beginning, cue, instruction",
    "answer": "tokens of an answer, its end among them; these have labels",
    "caption": "tokens of a text in `align`",
    "audio_segments": "clips of a sound of ten seconds (`max_clips`); other inputs are the modality's example",
    "gpu_price": "dollars for an hour of one GPU, its share of the machine included",
    "store_price": "dollars for a month of one gigabyte",
    "link_gb_per_s": "that a GPU gets from others of its node",
    "network_gb_per_s": "that a GPU gets from other nodes, each GPU with 400 Gbit/s of its own",
    "slow_network_gb_per_s": "the same, each GPU with 25 Gbit/s of Ethernet",
    "store_gb_per_s": "that a node reads and writes of features: a parallel file system, or one disk of its own",
}


@dataclass(frozen=True)
class Case:
    """Training one modality's bridge.

    Attributes:
      name: of the modality.
      way, parts: what the doctor says of it.
      segments: of a sample.
      positions_at_once: of the LLM, in training.
      assumed: see there.
    """

    name: str
    way: Way
    parts: dict[str, Part]
    segments: int
    positions_at_once: int
    assumed: Assumed

    @property
    def rate(self) -> float:
        """FLOP/s of one GPU."""
        peak = device_peak(self.assumed.gpu)
        assert peak, f"the peak of {self.assumed.gpu} is not known"
        return peak.flops * self.assumed.utilisation

    @property
    def trained(self) -> int:
        return self.parts[f"{self.name} bridge"].trained

    @property
    def positions(self) -> int:
        return (
            self.segments * self.way.soft_prompt[0] // self.way.features[0] + self.assumed.prompt + self.assumed.answer
        )

    def flops(self, **options: bool) -> dict[str, Flops]:
        """Of training on one sample."""
        return step_flops(
            self.way.costs,
            segments=self.segments,
            tokens=self.way.features[1],
            text=self.assumed.text,
            positions=[self.positions],
            labels=self.assumed.answer,
            **options,
        )

    def align_flops(self) -> Flops:
        """Of the bridge in `align`, for one sample."""
        bridge = self.way.costs.bridge
        assert isinstance(bridge, QFormerCost)
        lengths = {"segments": self.segments, "tokens": self.way.features[1], "samples": 1}
        return bridge.align_flops(**lengths, text=self.assumed.caption)

    @property
    def encoding_s(self) -> float:
        return self.flops()["encoder"].forward / self.rate

    def sample_s(self, *, stored: bool, align: bool = False) -> float:
        """Seconds of one GPU for one sample."""
        flops = sum(self.align_flops()) if align else total(self.flops(stored=True))
        return flops / self.rate + (0 if stored else self.encoding_s)

    def exchange_s(self, gpus: int) -> float:
        """Seconds in which the bridge's gradients are exchanged. They come last, so that nothing hides them."""
        is_node = gpus <= self.assumed.gpus_of_a_node
        speed = self.assumed.link_gb_per_s if is_node else self.assumed.network_gb_per_s
        return all_reduce_bytes(self.trained, gpus) / speed / 1e9

    def store_s(self, gpus: int, dtype: str) -> float:
        """Seconds in which a GPU gets the features of one sample, if it shares a node's store with others."""
        return self.stored(dtype) * min(gpus, self.assumed.gpus_of_a_node) / self.assumed.store_gb_per_s / 1e9

    def step_s(self, gpus: int, *, dtype: str = "") -> float:
        """Seconds of one step, features stored in `dtype` or computed; reading hides behind work, or work behind it."""
        work = self.assumed.batch * self.sample_s(stored=bool(dtype)) + self.exchange_s(gpus)
        return max(work, self.assumed.batch * self.store_s(gpus, dtype)) if dtype else work

    def pays_from(self, gpus: int, dtype: str) -> int | None:
        """Epochs after which storing has saved time, encoding and writing included; None if it never does."""
        once = max(self.encoding_s, self.store_s(gpus, dtype))
        saved = (self.step_s(gpus) - self.step_s(gpus, dtype=dtype)) / self.assumed.batch
        return int(once / saved + 1e-6) + 1 if saved > 0 else None

    def epoch_h(self, samples: int, gpus: int, *, dtype: str = "") -> float:
        """Hours of one epoch."""
        return samples / (self.assumed.batch * gpus) * self.step_s(gpus, dtype=dtype) / 3600

    @property
    def bridge_bytes(self) -> float:
        """Kept of one sample for the backward pass of the bridge."""
        return self.way.training_bytes["bridge's activations"] * self.segments / self.way.features[0]

    @property
    def llm_bytes(self) -> float:
        """Kept of one sample for that of the LLM: the example's, for as many positions as are assumed."""
        example = self.way.soft_prompt[0] + self.assumed.prompt + self.assumed.answer
        return self.way.training_bytes["LLM's activations"] * self.positions / example

    @property
    def part_bytes(self) -> float:
        """Kept of the samples that the LLM reads at once."""
        return self.llm_bytes * max(1, self.positions_at_once // self.positions)

    @property
    def checkpointed_bytes(self) -> float:
        """Of the LLM and one sample, with gradient checkpointing."""
        return self.way.costs.llm.activation_bytes(self.positions, self.llm_bytes)

    def fixed_bytes(self, *, encoder: bool, shards: int = 1) -> float:
        """Of weights, gradients and AdamW; of an LLM in shards a GPU holds its own and two layers at once."""
        llm = self.parts["LLM"].weight_bytes
        held = llm if shards == 1 else llm / shards + 2 * llm / self.way.costs.llm.layers
        parts = self.parts[f"{self.name} encoder"].weight_bytes if encoder else 0
        return held + parts + self.parts[f"{self.name} bridge"].weight_bytes + BYTES_OF_TRAINING * self.trained

    def largest_batch(self, *, shards: int = 1, checkpointing: bool = False) -> int:
        """Samples that fit a GPU of which a tenth is left free, features stored; an LLM in shards reads all at once."""
        room = 0.9 * device_peak(self.assumed.gpu).memory - self.fixed_bytes(encoder=False, shards=shards)
        if shards == 1:
            return max(0, int((room - self.part_bytes) / self.bridge_bytes))
        of_llm = self.checkpointed_bytes if checkpointing else self.llm_bytes
        return max(0, int(room / (self.bridge_bytes + of_llm)))

    def stored(self, dtype: str) -> int:
        """Bytes of one sample's features."""
        return stored_bytes(self.segments, *self.way.features[1:], dtype)


def cases(report: Report, assumed: Assumed) -> list[Case]:
    """The modalities of a config."""
    parts = {part.name: part for part in report.parts}
    segments = {"audio": assumed.audio_segments}
    shared = {name: part.shares for name, part in parts.items() if part.shares}
    parts |= {name: parts[owner] for name, owner in shared.items()}
    assert report.positions_at_once, "the LLM reads a whole batch at once"
    return [
        Case(name, way, parts, segments.get(name, way.features[0]), report.positions_at_once, assumed)
        for name, way in report.ways.items()
    ]


def changed(assumed: Assumed, settings: Iterable[str]) -> Assumed:
    """Assumptions with `name=value` settings.

    Raises:
      SystemExit: there is no such assumption, or the value is no number.
    """
    for setting in settings:
        name, _, value = setting.partition("=")
        kinds: dict[str, Callable] = {field.name: type(getattr(assumed, field.name)) for field in fields(assumed)}
        if name not in kinds:
            raise SystemExit(f'There is no assumption "{name}". Known: {", ".join(kinds)}.')
        try:
            assumed = replace(assumed, **{name: kinds[name](value)})
        except ValueError as cause:
            raise SystemExit(f"{name} must be a number, not {value!r}.") from cause
    if device_peak(assumed.gpu) is None:
        raise SystemExit(f'The peak of "{assumed.gpu}" is not known; those of xblip/devices.py are.')
    return assumed


def reports(assumed: Assumed) -> tuple[Report, Report]:
    """What the doctor says of both sizes, for answers as long as is assumed."""
    settings = [f"generation.max_new_tokens={assumed.answer}", "llm.dtype=bfloat16"]
    small, large = (examine(ROOT / "configs" / "model" / f"{name}.yaml", settings) for name in (CONFIG, LARGE))
    return small, large
