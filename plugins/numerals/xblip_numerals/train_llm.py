"""Train the small LLM of the numerals world from scratch, on text alone.

    python -m xblip_numerals.train_llm --out FOLDER

Telling which input holds which value is a chain of look-ups (description to its cue, question to the cue it names, cue
to the value), and a small model sits at chance until every link is there. So each link is taught by itself: `Guides`
read, from inner layers, whose each token is and which things a question is about. Asked for one of two numbers, the
model is right .98 of the time after 150 steps of 110 questions with them, and .57 after 400 such steps without them.
They fade out and are not saved.
"""

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from torch.nn import functional
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from xblip_numerals.contexts import ALL_VALUES, FACTS, NO_VALUE, Batch, Context, Sampler, pack
from xblip_numerals.kinds import KINDS
from xblip_numerals.language import vocabulary
from xblip_numerals.phrases import MAX_THINGS, MODALITIES

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
STEPS = 4200
TOKENS_PER_STEP = 3800  # about 16 rows
QUESTIONS_PER_CONTEXT = 8
LEARNING_RATE = 2e-3
GUIDED = 0.7  # share of the steps after which the guides have faded out
HELD_OUT_SEED = 2**32
HELD_OUT_PER_KIND = 300


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer: lower-case, marks apart; `<s>` is added only with `add_special_tokens=True`."""
    words = [*SPECIAL_TOKENS, *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", words.index("<s>"))]
    )
    # This decoder joins words with spaces and closes them up before marks; no word here continues another.
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 2.7 M parameters with random weights; it reads up to 512 positions."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


class Guides(nn.Module):
    """Linear readings of inner layers that teach the links of a look-up; they train the layers below them.

    After layer 2, a token of a description tells whose it is, and a token before an answer tells what the question
    speaks of: modalities, fact and value. After layer 3 it tells the things to look at and those that have the value,
    and after layer 4 what the former hold, and which the answer is about.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.parts = (MAX_THINGS, len(MODALITIES), MAX_THINGS)
        self.owner = nn.Linear(width, sum(self.parts))
        self.modality = nn.Linear(width, len(MODALITIES))
        self.fact = nn.Linear(width, len(FACTS))
        self.value = nn.Linear(width, len(ALL_VALUES))
        self.about = nn.Linear(width, MAX_THINGS)
        self.chosen = nn.Linear(width, MAX_THINGS)
        self.held = nn.Linear(width, MAX_THINGS * len(ALL_VALUES))
        self.having = nn.Linear(width, MAX_THINGS)

    def forward(self, hidden: Sequence[torch.Tensor], batch: Batch) -> torch.Tensor:
        """The guides' loss, from the states after each layer (`hidden[0]` are the embeddings)."""

        def read(layer: int, reading: nn.Linear, at: torch.Tensor) -> torch.Tensor:
            states = hidden[layer].flatten(0, 1)[at]
            return reading(functional.rms_norm(states, states.shape[-1:])).float()

        owners = read(2, self.owner, batch.owned).split(self.parts, dim=1)
        loss = 0.2 * sum(functional.cross_entropy(part, batch.owners[:, i]) for i, part in enumerate(owners))
        told = functional.binary_cross_entropy_with_logits
        loss = loss + 0.5 * told(read(2, self.modality, batch.at), batch.modality[batch.question])
        loss = loss + 0.2 * functional.cross_entropy(read(2, self.fact, batch.at), batch.fact[batch.question])
        loss = loss + 0.2 * functional.cross_entropy(read(2, self.value, batch.at), batch.value[batch.question])
        loss = loss + told(read(3, self.about, batch.at), batch.about[batch.question])
        speaks = (batch.value != NO_VALUE).float()[batch.question, None]
        loss = loss + told(read(3, self.having, batch.at), batch.having[batch.question], weight=speaks)
        held = read(4, self.held, batch.at).unflatten(1, (MAX_THINGS, -1)).transpose(1, 2)
        loss = loss + 0.5 * functional.cross_entropy(held, batch.held[batch.question])
        return loss + told(read(4, self.chosen, batch.at), batch.chosen[batch.question])


def read_answers(model: LlamaForCausalLM, batch: Batch) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Logits (answer tokens, vocabulary) where there is something to predict, and the states after each layer."""
    out = model.model(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        use_cache=False,
        output_hidden_states=True,
    )
    return model.lm_head(out.last_hidden_state.flatten(0, 1)[batch.at]).float(), out.hidden_states


def right_answers(logits: torch.Tensor, batch: Batch) -> list[bool]:
    """For each question: is every token of its answer the likeliest? Then greedy decoding gives this answer."""
    misses = (logits.argmax(-1) != batch.targets).float()
    return (torch.zeros(len(batch.kinds)).index_add(0, batch.question, misses) == 0).tolist()


@dataclass
class _Run:
    """All that a run changes; what a checkpoint holds."""

    model: LlamaForCausalLM
    guides: Guides
    optimizers: list[torch.optim.Optimizer]
    sampler: Sampler
    counts: random.Random
    step: int = 0

    def save(self, path: Path, settings: dict[str, int]) -> None:
        state = {
            "settings": settings,
            "modules": [part.state_dict() for part in (self.model, self.guides)],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "random": [rng.getstate() for rng in (self.sampler.rng, self.counts)],
            "step": self.step,
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        part.replace(path)

    def load(self, path: Path, settings: dict[str, int]) -> None:
        """Goes on where a run of the same settings stopped; one of others is left alone, until it is written over."""
        state = torch.load(path, weights_only=True)
        if state["settings"] != settings:
            return
        for part, saved in zip((self.model, self.guides), state["modules"], strict=True):
            part.load_state_dict(saved)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for rng, saved in zip((self.sampler.rng, self.counts), state["random"], strict=True):
            rng.setstate(saved)
        self.step = state["step"]


def train(
    *,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    seed: int,
    checkpoint: Path | None = None,
    log_every: int = 200,
) -> None:
    """Train `model` in place; every question is new, so the accuracies logged are on unseen ones.

    Muon on the matrices inside the layers: after 200 steps it reads nine numbers in ten off the descriptions,
    where AdamW at the same rate reads one in ten.

    Args:
        model: with random weights.
        tokenizer: its tokenizer.
        steps: of the whole run.
        seed: of the questions.
        checkpoint: file to save the run to now and then, and to go on from if it is there.
        log_every: steps between two lines of accuracies.
    """
    guides = Guides(model.config.hidden_size)
    inner = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    outer = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(inner, lr=LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([*outer, *guides.parameters()], lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    sampler = Sampler(tokenizer=tokenizer, seed=seed, noisy=True)
    run = _Run(model, guides, optimizers, sampler, random.Random(seed))
    settings = {"steps": steps, "seed": seed, "words": len(tokenizer)}
    if checkpoint and checkpoint.is_file():
        run.load(checkpoint, settings)
    # Without bfloat16 in hardware, autocast would be slower than float32.
    fast = torch.cpu.get_capabilities().get("avx512_bf16", False)
    results: dict[str, list[bool]] = defaultdict(list)
    model.train()
    progress = tqdm(range(run.step, steps), initial=run.step, total=steps, unit="step")
    for step in progress:
        batch = pack(_contexts(sampler, run.counts, step / steps), tokenizer.pad_token_id)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            logits, hidden = read_answers(model, batch)
            loss = functional.cross_entropy(logits, batch.targets)
            guidance = max(0.0, 1 - step / (GUIDED * steps))
            total = loss + guidance * guides(hidden, batch) if guidance else loss
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * _rate(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        run.step = step + 1
        for kind, right in zip(batch.kinds, right_answers(logits, batch), strict=True):
            results[kind].append(right)
        progress.set_postfix(loss=f"{loss.item():.3f}")
        if run.step % log_every == 0:
            shares = "  ".join(f"{kind} {sum(results[kind]) / len(results[kind]):.2f}" for kind in sorted(results))
            progress.write(f"step {run.step}  loss {loss.item():.3f}  {shares}")
            results.clear()
            if checkpoint:
                run.save(checkpoint, settings)
    model.eval()


def _rate(step: int, steps: int) -> float:
    """Learning rate as a share of its peak: a short rise, a plateau, a straight fall over the second half."""
    return min((step + 1) / 50, 1.0) * min(2 * (1 - step / steps), 1.0)


def _contexts(sampler: Sampler, rng: random.Random, progress: float) -> list[Context]:
    """One batch; single things first, then ever more triples."""
    weights = (max(0.15, 0.7 - 2.2 * progress), 0.4, max(0.1, min(0.45, 1.5 * progress)))
    contexts, tokens = [], 0
    while tokens < TOKENS_PER_STEP:
        count = rng.choices(range(1, MAX_THINGS + 1), weights)[0]
        contexts.append(sampler.context(count=count, questions=QUESTIONS_PER_CONTEXT))
        tokens += len(contexts[-1])
    return contexts


@torch.inference_mode()
def evaluate(
    *, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, per_kind: int
) -> list[dict[str, str | int | float]]:
    """Accuracy of whole answers, for every kind of question and number of things: rows for a table."""
    sampler = Sampler(tokenizer=tokenizer, seed=seed, noisy=False)
    table = []
    for count in range(1, MAX_THINGS + 1):
        for kind in (kind for kind in KINDS if KINDS[kind].things <= count):
            contexts = [sampler.context(count=count, kind=kind) for _ in range(per_kind)]
            right: list[bool] = []
            for start in range(0, per_kind, 80):
                batch = pack(contexts[start : start + 80], tokenizer.pad_token_id)
                right += right_answers(read_answers(model, batch)[0], batch)
            table.append({"kind": kind, "things": count, "n": per_kind, "accuracy": sum(right) / per_kind})
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and accuracy.json")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    start = time.monotonic()
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "checkpoint.pt"
    train(model=model, tokenizer=tokenizer, steps=args.steps, seed=args.seed, checkpoint=checkpoint)
    print(f"trained in {(time.monotonic() - start) / 60:.1f} minutes")
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.half()
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)

    # What is measured is what was saved: fp16 weights, read back into float32.
    model = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    per_kind = min(HELD_OUT_PER_KIND, args.steps)  # a short run is a smoke test, and is measured shortly
    table = evaluate(model=model, tokenizer=tokenizer, seed=HELD_OUT_SEED + args.seed, per_kind=per_kind)
    (args.out / "accuracy.json").write_text(json.dumps(table, indent=1) + "\n")
    checkpoint.unlink(missing_ok=True)
    for row in table:
        print(f"{row['things']}  {row['kind']:20}{row['accuracy']:.3f}  n={row['n']}")


if __name__ == "__main__":
    main()
