"""What not doing needless work can win at published shapes, by counting: no GPU, no weights, a minute.

    python benchmarks/possible.py

Speed: floating-point operations of transformers' step (padding and all logits counted in) over those of the floor. Memory:
what the LLM's forward pass keeps for its backward pass, counted tensor by tensor on the meta device in bfloat16.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from floor import encoder, llm, qformer, step_flops
from pair import FULL_SIZE, QUERIES, Row, make_config, make_rows
from transformers import LlamaForCausalLM

from xblip.activations import keep_less
from xblip.dryrun import _on_meta, _saved_bytes
from xblip.likelihood import log_likelihoods
from xblip.packing import Packing
from xblip.parts import positions_at_once

ROWS = 64


def positions(row: Row) -> int:
    """Of a row before the LLM: soft prompt, beginning of sequence, instruction, answer, end of sequence."""
    return QUERIES + 1 + len(row.instruction.split()) + len(row.answer.split()) + 1


def padded_flops(config, rows: list[Row]) -> float:
    """Of a micro-batch of transformers."""
    text = config.text_config
    longest, asked = max(map(positions, rows)), max(len(row.instruction.split()) for row in rows) + 2
    head = 2 * 2 * longest * text.hidden_size * text.vocab_size
    return len(rows) * (encoder(config.vision_config) + qformer(config, asked) + llm(text, longest) + head)


def kept(model: LlamaForCausalLM, rows: int, columns: int, labelled: int = 0) -> int:
    """Bytes that the LLM keeps; of the loss with all logits, unless only some positions are `labelled`."""

    def run():
        embeds = torch.empty(
            rows, columns, model.config.hidden_size, dtype=model.dtype, device="meta", requires_grad=True
        )
        labels = torch.zeros(rows, columns, dtype=torch.long, device="meta")
        if not labelled:
            return model(inputs_embeds=embeds, attention_mask=labels + 1, labels=labels, use_cache=False).loss
        hidden = model.model(inputs_embeds=embeds, position_ids=labels, use_cache=False).last_hidden_state
        return log_likelihoods(
            hidden.flatten(0, 1)[:labelled], labels.flatten()[:labelled], model.lm_head.forward
        ).sum()

    with _on_meta():
        return _saved_bytes(run, list(model.parameters()))


def _rows_at_once(plan: Packing, model: LlamaForCausalLM) -> int:
    """Of a plan, whose rows are read in parts."""
    config = model.config
    positions = positions_at_once(
        torch.device("meta"), model.dtype, layers=config.num_hidden_layers, width=config.hidden_size
    )
    return min(len(plan.rows), max(1, positions // plan.row_length))


def main() -> None:
    config = make_config(FULL_SIZE, vocabulary=FULL_SIZE.vocabulary, image_token=5)
    with torch.device("meta"):
        theirs, ours = (LlamaForCausalLM(config.text_config).bfloat16().requires_grad_(False) for _ in range(2))
    keep_less(ours)
    print("| stage | micro-batch | speed | with stored features | activations of the LLM | |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for stage in ("generate", "instruct"):
            for size in (8, 16, 32):
                shapes = replace(FULL_SIZE, rows=size, accumulation=ROWS // size)
                rows = make_rows(shapes, Path(folder), stage=stage)
                parts = [rows[start : start + size] for start in range(0, ROWS, size)]
                peer = sum(padded_flops(config, part) for part in parts)
                speeds = [peer / sum(step_flops(config, rows, stored=stored).values()) for stored in (False, True)]
                plans = [
                    Packing.plan([positions(row) for row in part], config.text_config.hidden_size) for part in parts
                ]
                own = max(kept(ours, _rows_at_once(plan, ours), plan.row_length, labelled=size * 15) for plan in plans)
                peers = kept(theirs, size, max(map(positions, rows)))
                cells = [stage, str(size), *(f"{speed:.2f}x" for speed in speeds)]
                cells += [f"{own / 1e9:.1f} of {peers / 1e9:.1f} GB", f"{own / peers:.2f}x"]
                print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
