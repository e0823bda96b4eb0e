"""How much models copy from their context: what they gain at the second reading of the same stretch of text.

    python benchmarks/copying.py valid.jsonl runs/NAME/checkpoints/step-00006400.ckpt ...    seconds for each model

Rows are stretches of documents, each written twice. The gain is the mean CE of the first reading minus that of the
second, in nats per token. The first tokens of both readings are left out: they show too little of the stretch. A model
without induction heads (Olsson et al., arXiv 2209.11895) gains next to nothing. Takes checkpoints with their run's
tokenizer, and Hugging Face folders.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from salt_lightning.hugging_face.spec import ModelSpec
from salt_lightning.models import load_pretrained
from salt_lightning.text.tokenizer import load_tokenizer

STRETCH, SKIPPED = 64, 8  # tokens
OF_A_DOCUMENT, ROWS, BATCH = 2, 256, 32


def stretches(text: Path, tokenizer: Any) -> Tensor:
    """Stretches of tokens (R, STRETCH), evenly spaced over those at the beginning of the documents of a jsonl file."""
    found = []
    with text.open(encoding="utf-8") as lines:
        for line in lines:
            ids = tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
            starts = range(0, len(ids) - STRETCH + 1, STRETCH)[:OF_A_DOCUMENT]
            found += [ids[start : start + STRETCH] for start in starts]
    if not found:
        raise SystemExit(f"{text}: no document has {STRETCH} tokens")
    rows = min(ROWS, len(found))
    return torch.tensor([found[i * len(found) // rows] for i in range(rows)])


@torch.no_grad()
def gain(model: torch.nn.Module, ids_RT: Tensor) -> float:
    """Nats per token that `model` gains at the second reading of stretches (R, T)."""
    first, second = 0.0, 0.0
    for ids_BT in ids_RT.split(BATCH):
        twice_BT = torch.cat([ids_BT, ids_BT], dim=1)
        logits_BVT = model(twice_BT).logits[:, :-1].float().transpose(1, 2)
        nll_BT = torch.nn.functional.cross_entropy(logits_BVT, twice_BT[:, 1:], reduction="none").double()
        length = ids_BT.shape[1]
        first += float(nll_BT[:, SKIPPED : length - 1].sum())
        second += float(nll_BT[:, length + SKIPPED :].sum())
    counted = len(ids_RT) * (ids_RT.shape[1] - 1 - SKIPPED)
    return (first - second) / counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a .jsonl file whose documents the models have not read")
    parser.add_argument("models", nargs="+", help="checkpoints, or Hugging Face folders with a tokenizer")
    args = parser.parse_args()
    print("| model | gain at the second reading, nats per token |\n|---|--:|")
    for path in args.models:
        folder = Path(path).parents[1] / "tokenizer" if path.endswith(".ckpt") else Path(path)
        ids_RT = stretches(args.text, load_tokenizer(str(folder)))
        model = load_pretrained(ModelSpec(path=path), "student", torch.float32).eval()
        print(f"| {path} | {gain(model, ids_RT):.3f} |", flush=True)


if __name__ == "__main__":
    main()
