"""The model: branches, one router, one frozen LLM.

Nothing here knows a modality by name. Inputs of a batch are grouped by modality for the encoders and bridges, laid out
per sample by the router, and run through the LLM together; a sample gets in a batch what it gets alone.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xblip import bundle, plugins
from xblip import config as configs
from xblip.answer import Answer
from xblip.batches import generate
from xblip.branch import Branch
from xblip.caches import Caches
from xblip.context import Context
from xblip.errors import ConfigError, InputError, PluginError, nearest, suggest
from xblip.explain import Asked
from xblip.generation import check_generation_options, generation_option_names
from xblip.llm import FrozenLLM, LLMConfig
from xblip.prefixes import Prefixes
from xblip.prompt_embeds import to_prompt_embeds
from xblip.reading import MediaReader
from xblip.router import Router, RouterConfig
from xblip.sample import Media, Sample, as_parts, by_modality, check_text, from_messages, from_row
from xblip.sharing import share

DEFAULT_GENERATION = {"max_new_tokens": 64}


class XBlip(nn.Module):
    """A frozen LLM with branches.

    Attributes:
      llm: frozen.
      branches: by modality name.
      router: lays out prompts.
      generation: default generation options.
      caches: what `encode` and its contexts keep.
      reader: reads media by these caches.
      prefixes: how prompts begin, in these caches.
    """

    def __init__(
        self,
        *,
        llm: FrozenLLM,
        branches: Mapping[str, Branch],
        router: RouterConfig | Mapping[str, Any] | None = None,
        generation: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.llm = llm
        self.branches = nn.ModuleDict(branches)
        share(branch.bridge for branch in branches.values())
        cues = {name: branch.cue for name, branch in branches.items()}
        settings = vars(router) if isinstance(router, RouterConfig) else router
        self.router = Router(configs.build(RouterConfig, settings, where="router"), llm=llm, cues=cues)
        check_generation_options(generation or {})
        self.generation = {**DEFAULT_GENERATION, **(generation or {})}
        self.caches = Caches()
        self.reader = MediaReader(self.branches, self.caches)
        self.prefixes = Prefixes(llm, self.caches.prefixes)

    @classmethod
    def compose(
        cls,
        *,
        llm: str | Path | LLMConfig | FrozenLLM,
        branches: Mapping[str, str | Path],
        router: RouterConfig | Mapping[str, Any] | None = None,
        generation: Mapping[str, Any] | None = None,
    ) -> "XBlip":
        """Puts branches that were trained apart before one LLM.

        Args:
          llm: folder or hub id, or an LLM that is loaded already.
          branches: the folder of each modality's branch.
          router: how prompts are laid out; as in training.
          generation: default generation options.

        Raises:
          BundleError: a branch is missing, damaged, or was trained for another LLM or encoder.
        """
        if not isinstance(llm, (str, Path, LLMConfig, FrozenLLM)):
            raise InputError(f"llm must be a folder, a hub id, an LLMConfig or a FrozenLLM, not {type(llm).__name__}.")
        if not isinstance(branches, Mapping):
            raise InputError(
                f"branches must name each folder by its modality, such as {{name: folder}}, not {branches!r:.80}."
            )
        if not isinstance(llm, FrozenLLM):
            llm = FrozenLLM.from_pretrained(llm if isinstance(llm, LLMConfig) else LLMConfig(source=str(llm)))
        loaded = bundle.load_branches(branches, llm=llm)
        return cls(llm=llm, branches=loaded, router=router, generation=generation).eval()

    @classmethod
    def from_pretrained(cls, folder: str | Path, **llm_options: Any) -> "XBlip":
        """Loads a bundle's folder or hub id; `llm_options` (dtype, device_map, ...) go to the LLM's own."""
        parts = bundle.read(folder, llm_options)
        return cls.compose(**parts)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a bundle: config, LLM and encoders (copied if they lie in folders, named if on a hub), branches."""
        bundle.write(self, Path(folder))

    @property
    def device(self) -> torch.device:
        return self.llm.device

    def sample(self, value: Sample | Mapping[str, Any]) -> Sample:
        """Makes a checked `Sample` of a sample or a dictionary, `{<modality>: source, "instruction": ...}`."""
        if isinstance(value, Mapping):
            value = from_row(value, modalities=self.branches.keys())
        value = dataclasses.replace(value)  # checks it again, since its lists may have changed
        for media in value.all_media:
            self._require(media.modality)
        return value

    def _samples(self, values: Sequence[Sample | Mapping[str, Any]]) -> list[Sample]:
        return [self.sample(value) for value in self._listed(values)]

    def _listed(self, values: Any) -> Sequence[Sample | Mapping[str, Any]]:
        if not isinstance(values, Sequence) or not all(isinstance(value, (Sample, Mapping)) for value in values):
            raise InputError(
                'Expected a list of samples, each an xblip.Sample or a dictionary such as {"instruction": "..."}, not '
                f"{values!r:.80}."
            )
        return values

    def _require(self, modality: str) -> None:
        if modality not in self.branches:
            if modality in plugins.installed():
                raise PluginError(
                    f'This model has no branch for "{modality}", only for {", ".join(self.branches) or "none"}: '
                    "train one, and compose it with this LLM."
                )
            raise PluginError(
                f'Unknown modality "{modality}".{suggest(modality, self.branches)} '
                f"If it is a plugin: pip install xblip-{modality.replace('_', '-')}."
            )

    def soft_prompts(self, samples: Sequence[Sample]) -> list[list[Tensor]]:
        """Makes the soft prompts of a batch, grouped by modality.

        Returns:
          For each sample, one (L, D_llm) per input in the order of `Sample.all_media`.
        """
        prompts: list[list[Tensor]] = [[None] * len(sample.all_media) for sample in samples]
        for name, inputs in by_modality(samples).items():
            made = self.branches[name]([part.source for part in inputs], [part.instruction for part in inputs])
            for part, prompt in zip(inputs, made, strict=True):
                prompts[part.row][part.column] = prompt
        return prompts

    def forward(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Computes the language-modelling loss of samples with answers.

        Returns:
          `loss`, the mean over the answers' tokens (end of sequence included), `num_tokens`, their number, and
          `num_positions`, what the LLM read.

        Raises:
          InputError: a sample has no answer.
        """
        samples = self._samples(samples)
        if not samples or any(sample.answer is None for sample in samples):
            raise InputError("Training needs samples, each with an answer.")
        batch = self.router.assemble(
            [self.router.pieces(sample) for sample in samples],
            self.soft_prompts(samples),
            answers=[sample.answer for sample in samples],
        )
        likelihood, num_tokens = self.llm.log_likelihood(batch)
        return {
            "loss": -likelihood / num_tokens,
            "num_tokens": num_tokens,
            "num_positions": batch.attention_mask.sum(),
        }

    @torch.no_grad()
    def generate(
        self, samples: Sequence[Sample | Mapping[str, Any]], /, *, return_exceptions: bool = False, **options: Any
    ) -> list[Answer]:
        """Answers a batch of samples, which may differ in modalities and number of inputs.

        Args:
          samples: `Sample`s or dictionaries.
          return_exceptions: the error of a sample that cannot be asked stands in the place of its answer, and the others are
            answered; if not, it is raised.
          options: transformers' generation options.

        Returns:
          One answer per sample, or `num_return_sequences` of them in a row (of an error too).

        Raises:
          InputError, MediaError, PluginError, ConfigError: what is asked, a source, a modality or an option is wrong.
        """
        options = {**self.generation, **options}
        check_generation_options(options)
        return generate(self, self._listed(samples), options, return_exceptions=return_exceptions)

    def ask(
        self, instruction: str, *, media: Sequence[str | Media | tuple[str, Any]] | None = None, **inputs: Any
    ) -> Answer:
        """Asks one question.

        Args:
          instruction: the question or order.
          media: inputs in order, `(modality, source)` each, with text between them if need be.
          inputs: one input per modality by name, in the order given, after `media`; and generation options.

        Returns:
          The answer.
        """
        options = self.take_options(inputs)
        return self._answer(Sample(instruction, self.parts(media, inputs)), options)

    def _answer(self, sample: Sample, options: Mapping[str, Any]) -> Answer:
        self.check_for_one(options)
        asked = Asked.read(self, self.sample(sample))
        [answer] = self.generate([asked.sample], **options)
        return answer.asked_as(lambda: asked)

    def check_for_one(self, options: Mapping[str, Any]) -> None:
        """Raises `ConfigError` for options that a question with one answer cannot have."""
        if {**self.generation, **options}.get("num_return_sequences", 1) != 1:
            raise ConfigError("num_return_sequences: one question has one answer here; for several use `generate`.")
        check_generation_options(options)

    def to_prompt_embeds(
        self, samples: Sequence[Sample | Mapping[str, Any]], /, file: str | Path | None = None
    ) -> list[Tensor]:
        """Gives what the LLM would read of samples, for another server of the same LLM: vLLM's `prompt_embeds`.

        Args:
          samples: `Sample`s or dictionaries.
          file: safetensors to write them into, as "prompt_embeds.0" and on, in the place of what it held.

        Returns:
          (T, D_llm) for each sample, in the LLM's dtype, on the CPU.

        Raises:
          InputError, MediaError, PluginError: what is asked, a source or a modality is wrong; an encoder-decoder LLM.
          BundleError: the file cannot be written.
        """
        return to_prompt_embeds(self, self._listed(samples), file)

    def encode(
        self,
        *,
        media: Sequence[str | Media | tuple[str, Any]] | None = None,
        requery: bool = True,
        instruction: str | None = None,
        **inputs: Any,
    ) -> Context:
        """Encodes inputs once, to ask about them many times.

        Args:
          media, inputs: as for `ask`.
          requery: bridges read the inputs anew in the light of each question, as `ask` does. False keeps the soft prompts of
            one instruction for all questions, and with them what the LLM has read of these.
          instruction: which one; None for the first question.

        Raises:
          InputError, MediaError, PluginError: what is given, a source or a modality is wrong.
        """
        return Context(self, self.parts(media, inputs), requery=requery, instruction=instruction)

    def parts(
        self, media: Sequence[str | Media | tuple[str, Any]] | None, inputs: Mapping[str, Any]
    ) -> list[str | Media]:
        """Returns inputs in order, those of `media` first, checked as far as that goes without reading them."""
        parts = [*as_parts(() if media is None else media), *(Media(name, source) for name, source in inputs.items())]
        for part in parts:
            if isinstance(part, Media):
                self._require(part.modality)
        return parts

    def take_options(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Takes the generation options out of keyword arguments, misspelt ones too."""
        return {name: inputs.pop(name) for name in list(inputs) if self._is_option(name)}

    def _is_option(self, name: str) -> bool:
        """Tells options, misspelt ones too, from modalities."""
        options = generation_option_names()
        modalities = {*self.branches, *plugins.installed()}
        return name not in modalities and nearest(name, modalities | options) in options

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Answer:
        """Answers the last message of a conversation; every input is read in the light of that message.

        Args:
          messages: as `transformers` has them; a part of another type than text is an input,
            `{"type": <modality>, "path": ...}`.
          options: transformers' generation options.
        """
        sample = from_messages(messages, modalities=self.branches.keys())
        if sample.answer is not None:
            raise InputError("The last message is the assistant's: end with a message of role user.")
        return self._answer(sample, options)

    @torch.no_grad()
    def score(
        self,
        samples: Sequence[Sample | Mapping[str, Any]],
        candidates: Sequence[str] | Sequence[Sequence[str]],
        *,
        length_normalised: bool = False,
    ) -> list[list[float]]:
        """Scores candidate answers by their log-likelihood, end of sequence included.

        Args:
          samples: B samples.
          candidates: answers that all samples share, or one list per sample.
          length_normalised: divide by the number of tokens, so that long answers are not at a disadvantage.

        Returns:
          For each sample, one score per candidate; the highest is the best.

        Raises:
          InputError: no candidates, or as many lists as there are not samples.
        """
        samples = self._samples(samples)
        if _are_texts(candidates) and len(candidates):
            candidates = [candidates] * len(samples)
        if not isinstance(candidates, Sequence) or not all(_are_texts(answers) for answers in candidates):
            raise InputError(
                f"Candidates must be a list of texts, or one such list per sample, not {candidates!r:.80}."
            )
        if len(candidates) != len(samples):
            raise InputError(
                f"There are {len(samples)} samples but {len(candidates)} lists of candidates: give one each."
            )
        if not all(candidates):
            raise InputError("A sample has no candidate answers to score: give at least one.")
        for answer in {answer for answers in candidates for answer in answers}:
            check_text(answer, "A candidate")
        scores = []
        for sample, prompts, answers in zip(samples, self.soft_prompts(samples), candidates, strict=True):
            pieces = self.router.pieces(sample)
            batch = self.router.assemble([pieces] * len(answers), [prompts] * len(answers), answers=list(answers))
            likelihoods, mask = self.llm.token_log_likelihoods(batch)
            totals = likelihoods.sum(1) / (mask.sum(1) if length_normalised else 1)
            scores.append(totals.tolist())
        return scores


def _are_texts(value: Any) -> bool:
    return not isinstance(value, str) and isinstance(value, Sequence) and all(isinstance(text, str) for text in value)


def load(name: str | Path, **llm_options: Any) -> XBlip:
    """Loads a model by the name of an installed bundle, a folder, or a hub id.

    Raises:
      PluginError, BundleError: there is none of that name, or it is damaged.
    """
    return XBlip.from_pretrained(bundle.named(name), **llm_options)
