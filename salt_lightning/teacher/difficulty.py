"""The easy, medium and hard third of the held-out text, by one model's loss on each document.

    RUN/validate/documents.parquet     document int64 · nll float64 · tokens int64     (RUN/test: of the test text)

The verbs `validate` and `test` write it for the model that they evaluate. The teacher's file gives the split that all
runs share, BASELINE too: `--data.difficulty RUN`. It has the sum of nll in nats and the number of labels of each
held-out document in the evaluated rows, and records which text that was; a run on other text refuses it.

Shapes: D held-out documents, N token positions of a batch.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch.utilities import rank_zero_info

from salt_lightning.errors import ConfigError, first_line, printable, program, writing
from salt_lightning.metrics import TokenMetrics
from salt_lightning.run.curves import THIRDS
from salt_lightning.teacher.scores import write_table

_FILE = "documents.parquet"
_VERBS = ("validate", "test")
_SCHEMA = pa.schema({"document": pa.int64(), "nll": pa.float64(), "tokens": pa.int64()})


@dataclass(frozen=True)
class HeldOut:
    """The text that an evaluation reads; all fields must agree with those of a split before that is used."""

    tokens: str  # hash of the held-out tokens and documents, wherever their files lie
    tokenizer: str  # hash of the token -> id map
    block_size: int
    isolate_documents: bool
    num_rows: int  # evaluated


_MEANING = {
    "tokens": "held-out text (--data.source, val_source, test_source, val_fraction)",
    "tokenizer": "--data.tokenizer",
    "block_size": "--data.block_size",
    "isolate_documents": "--data.isolate_documents",
    "num_rows": "--data.val_rows",
}


def thirds(nll_D: np.ndarray, tokens_D: np.ndarray) -> np.ndarray:
    """0 easy, 1 medium, 2 hard for each document, -1 if it has no tokens.

    Documents are sorted by nll / tokens, equal ones by number, and split at one and two thirds of the tokens: a
    document belongs where its middle token lies. Thirds are of the tokens, not of the documents: so the three means
    have equal weight, and many short documents do not make a third of few tokens. `nll_D`: sums of -log p over
    `tokens_D` (int64) tokens.
    """
    third_D = np.full(len(tokens_D), -1, np.int64)
    judged = np.flatnonzero(tokens_D)
    order = judged[np.argsort(nll_D[judged] / tokens_D[judged], kind="stable")]
    twice_the_middle = 2 * np.cumsum(tokens_D[order]) - tokens_D[order]  # in integers: no rounding at the cuts
    third_D[order] = 3 * twice_the_middle // (2 * tokens_D.sum())
    return third_D


def find_files(place: Path, verb: str) -> list[Path]:
    """The files of losses in the folder of a run that `validate` or `test` has evaluated, in its folder of that name,
    or the given file itself. `verb` (fit, validate, test) decides which comes first."""
    verbs = _VERBS[::-1] if verb == "test" else _VERBS
    files = [place] if place.is_file() else [file for v in (*verbs, "") if (file := place / v / _FILE).is_file()]
    if not files:
        raise ConfigError(
            f"--data.difficulty {place}: no validate/{_FILE} in it; to write it, run `{program()} validate "
            f"--run {place} --ckpt_path last` with the teacher's config and the --data settings of this run"
        )
    return files


def read_thirds(place: Path, held_out: HeldOut, verb: str) -> np.ndarray:
    """The third of each held-out document; logs whose loss made the thirds, and their sizes.

    `held_out`: what is evaluated now; `place` and `verb` as in `find_files`.

    Raises:
        ConfigError: the file is missing, damaged, made with other text, or has fewer than three documents.
    """
    problems = []
    for file in find_files(place, verb):
        table, origin, made_on = _read(file)
        differing = [_MEANING[key] for key, value in asdict(held_out).items() if made_on.get(key) != value]
        if not differing:
            break
        problems.append(f"--data.difficulty {file} was made with other {' and '.join(differing)}")
    else:
        raise ConfigError(f"{problems[0]}; validate the teacher with this run's --data settings, or set it to null")
    nll_D, tokens_D = table["nll"].to_numpy(), table["tokens"].to_numpy()
    third_D = thirds(nll_D, tokens_D)
    if (judged := int((third_D >= 0).sum())) < len(THIRDS):
        raise ConfigError(
            f"--data.difficulty {file} has {judged} documents with labels: too few for three thirds; "
            "use more held-out text (e.g. --data.val_fraction) and validate the teacher with it, or set it to null"
        )
    parts = []
    for number, name in enumerate(THIRDS):
        inside_D = third_D == number
        tokens = tokens_D[inside_D].sum()
        parts.append(
            f"{name} {inside_D.sum()} documents"
            + (f" with {tokens} tokens, CE {nll_D[inside_D].sum() / tokens:.4f}" if tokens else "")
        )
    rank_zero_info(f"difficulty by {printable(origin)}: {'; '.join(parts)}")
    return third_D


def _read(file: Path) -> tuple[pa.Table, str, dict[str, Any]]:
    try:
        table = pq.read_table(file, page_checksum_verification=True)
        about = json.loads((table.schema.metadata or {})[b"documents"])
        if table.schema.remove_metadata() == _SCHEMA and not any(column.null_count for column in table.columns):
            return table, str(about["model"]), dict(about["held_out"])
        reason = "unexpected columns"
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        reason = first_line(error)
    raise ConfigError(
        f"--data.difficulty {file} is damaged or was not written by `{program()} validate` ({reason}); run that again"
    )


class DocumentLossWriter(pl.Callback):
    """Writes the loss of each held-out document after a validate or test that read all of them."""

    _metric: TokenMetrics | None = None

    def _begin(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.state.fn in _VERBS:
            documents = trainer.datamodule.held_out_files.num_documents  # type: ignore[attr-defined]
            self._metric = TokenMetrics([""] * documents).to(pl_module.device)

    def _add(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        if self._metric is not None:
            self._metric.update(outputs["nll"], outputs["rank"], batch["documents"].flatten())

    def _end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        metric, self._metric = self._metric, None
        if metric is None:
            return
        with metric.sync_context():
            nll_D, tokens_D = (state.cpu().numpy() for state in (metric.nll_sum_S, metric.tokens_S))
        batches = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
        read, all_batches = sum(batches), len(trainer.datamodule.val_dataloader())  # type: ignore[attr-defined]
        if read < all_batches:
            rank_zero_info(f"{read} of {all_batches} batches were read, so losses per document are not written")
            return
        if not trainer.is_global_zero:
            return
        about = {
            "held_out": asdict(trainer.datamodule.held_out),  # type: ignore[attr-defined]
            "model": str(trainer.ckpt_path or pl_module.student_spec.path),
        }
        file = Path(trainer.default_root_dir) / ("test" if trainer.testing else "validate") / _FILE
        columns = {"document": np.arange(len(tokens_D)), "nll": nll_D.astype(np.float64), "tokens": tokens_D}
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_table(file, pa.table(columns).replace_schema_metadata({"documents": json.dumps(about)}))
        rank_zero_info(f"loss of each of {int((tokens_D > 0).sum())} documents: {file}")

    on_validation_start = on_test_start = _begin
    on_validation_batch_end = on_test_batch_end = _add  # type: ignore[assignment]
    on_validation_epoch_end = on_test_epoch_end = _end
