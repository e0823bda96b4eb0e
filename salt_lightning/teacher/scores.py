"""A teacher's loss and rank of every token of the training rows, on disk: `predict` writes them, selection reads them.

    RUN/scores.json               what was scored, and by which teacher
    RUN/scores/00000012.parquet   row int64 · nll list<float32>[T] · rank list<uint16>[T]

T is block_size. nll is -log p(label) in nats. rank counts the logits strictly above the label's, at most RANK_CAP;
NO_LABEL marks a position without a label (nll 0). So S(x) for any k up to the cap and either rule needs no teacher.
The rows of a shard do not depend on which process wrote it, so finished shards are kept after a kill.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from salt_lightning.errors import ConfigError, few, first_line, program, writing
from salt_lightning.text.journal import whole, write_json

NO_LABEL = 65535
RANK_CAP = 65534
_AGAIN = "run the same command again: finished shards are kept"
_SHARD_TOKENS, _MAX_SHARDS = 1 << 20, 4096


@dataclass(frozen=True)
class Scored:
    """What was scored; all fields must agree before a shard is added or rows are selected."""

    rows: str  # hash of the training tokens and documents, wherever their files lie
    tokenizer: str  # hash of the token -> id map
    num_rows: int
    block_size: int
    isolate_documents: bool
    teacher: str = ""  # hash of its weights; of a folder, of its config.json and code, too
    precision: str = ""  # the teacher's dtype and the trainer's precision

    @property
    def shard_rows(self) -> int:
        """Rows per shard: about a million tokens, more if that would make over 4096 files; at most all rows."""
        return min(max(1, _SHARD_TOKENS // self.block_size, -(-self.num_rows // _MAX_SHARDS)), self.num_rows)

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.shard_rows)


_MEANING = {
    "rows": "--data.source (other text, or another share of it held out)",
    "tokenizer": "--data.tokenizer",
    "num_rows": "--data.source (another number of rows)",
    "block_size": "--data.block_size",
    "isolate_documents": "--data.isolate_documents",
    "teacher": "--model.teacher.path (other weights, config.json or code)",
    "precision": "--model.teacher.dtype or --trainer.precision",
}


class Scores:
    """The scores in the folder of a `predict` run.

    Raises:
        ConfigError: there are none, or scores.json is damaged; the message starts with `setting`.
    """

    def __init__(self, run: str | Path, setting: str) -> None:
        run = Path(run)
        self.run, self.setting = (run.parent if run.name == "scores.json" else run), setting
        path = self.run / "scores.json"
        if not path.is_file():
            raise ConfigError(
                f"{setting}: {path} does not exist; give the folder of a run of `{program()} predict`, e.g. runs/score"
            )
        try:
            self.manifest: dict[str, Any] = json.loads(path.read_text())
            self.scored = Scored(**self.manifest["scored"])
            kinds = get_type_hints(Scored)
            if odd := [name for name, value in asdict(self.scored).items() if type(value) is not kinds[name]]:
                raise TypeError(f"it has odd values for {few(odd)}")
            if min(self.scored.num_rows, self.scored.block_size) < 1:
                raise ValueError("it has no rows")
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{setting}: {path} is not a manifest of scores ({error}); delete it and run the same predict again"
            ) from error

    @classmethod
    def create(cls, run: Path, scored: Scored, extra: dict[str, Any]) -> Scores:
        """Opens the scores in the folder `run`, or starts them; existing scores of anything else are refused.

        `extra`: more for the manifest (the teacher's path, FLOPs, versions), for people to read.
        """
        with writing(run / "scores"):
            (run / "scores").mkdir(parents=True, exist_ok=True)
        there = cls.require_begun(run, scored)
        for left in (*(run / "scores").glob(".*.tmp"), *run.glob(".scores.json.*.tmp")):  # by a kill
            left.unlink(missing_ok=True)
        if there is None:
            with writing(run / "scores.json"):
                write_json(run / "scores.json", {"scored": asdict(scored), **extra})
        return cls(run, "--run")

    @classmethod
    def require_begun(cls, run: Path, scored: Scored) -> Scores | None:
        """The scores in `run`, None without a shard (nothing to lose); raises ConfigError unless they fit `scored`."""
        there = cls(run, "--run") if (run / "scores.json").exists() else None
        if there is None or len(there.missing()) == there.scored.num_shards:
            return None
        there.require(scored)
        return there

    @property
    def flops_said(self) -> str:
        """What scoring all rows takes, in words."""
        flops = self.manifest.get("scoring_flops")
        return f"{flops:.3g} FLOPs" if flops else "unknown FLOPs"

    def note(self, **more: Any) -> None:
        """Adds to the manifest, for people and `compare` to read."""
        self.manifest |= more
        with writing(self.run / "scores.json", _AGAIN):
            write_json(self.run / "scores.json", self.manifest)

    @property
    def identity(self) -> bytes:
        """Identifies these scores in each of their files."""
        return json.dumps(asdict(self.scored)).encode()

    def require(self, now: Scored) -> None:
        """Refuses scores of something else. A field that `now` leaves empty (the teacher's, in a fit) is not compared.

        Raises:
            ConfigError: names each setting in which they differ.
        """
        before, here = asdict(self.scored), asdict(now)
        keys = [key for key, value in here.items() if value != "" and before[key] != value]
        if "precision" in keys:  # the teacher's hash is of the cast weights, so this may explain it
            keys = [key for key in keys if key != "teacher"]
        other = [_MEANING[key] for key in keys if key != "num_rows" or keys == ["num_rows"]]  # it follows from the rest
        if other:
            score = f"score this data with `{program()} predict` first"
            raise ConfigError(
                f"{self.setting} {self.run} holds scores that do not fit {' and '.join(other)}; "
                f"{'choose another --run' if self.setting == '--run' else score}"
            )

    def path(self, shard: int) -> Path:
        return self.run / "scores" / f"{shard:08d}.parquet"

    def missing(self) -> list[int]:
        """Numbers of the shards that do not exist yet; raises ConfigError if that cannot be known (glob is silent)."""
        folder, names = self.run / "scores", list[str]()
        try:
            names = os.listdir(folder)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ConfigError(
                f"{self.setting}: {folder} cannot be listed ({error.strerror}); let its owner run chmod -R a+rX on it, "
                "or score the rows into another folder"
            ) from error
        there = {int(name[:-8]) for name in names if name.endswith(".parquet") and name[:-8].isdigit()}
        return [shard for shard in range(self.scored.num_shards) if shard not in there]

    def rows(self, shard: int) -> np.ndarray:
        first = shard * self.scored.shard_rows
        return np.arange(first, min(first + self.scored.shard_rows, self.scored.num_rows))

    def write(self, shard: int, nll_RT: np.ndarray, rank_RT: np.ndarray) -> None:
        """Writes one whole shard; the rank is -1 where there is no label."""
        stored_RT = np.where(rank_RT < 0, NO_LABEL, np.minimum(rank_RT, RANK_CAP)).astype(np.uint16)
        width = self.scored.block_size
        columns = {
            "row": pa.array(self.rows(shard)),
            "nll": pa.FixedSizeListArray.from_arrays(nll_RT.astype(np.float32).reshape(-1), width),
            "rank": pa.FixedSizeListArray.from_arrays(stored_RT.reshape(-1), width),
        }
        # use_byte_stream_split groups bytes of equal significance: 4.1 instead of 4.8 bytes per token, 4 x as fast
        table = pa.table(columns).replace_schema_metadata({"scored": self.identity})
        with writing(self.path(shard), _AGAIN):
            write_table(self.path(shard), table, use_byte_stream_split=["nll.list.element", "rank.list.element"])

    def read(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """nll_RT (float32) and rank_RT (uint16) of one shard.

        Raises:
            ConfigError: the file is damaged, or belongs to other scores.
        """
        path = self.path(shard)
        try:
            table = pq.read_table(path, page_checksum_verification=True)
            same = table.schema.metadata[b"scored"] == self.identity
            if same and np.array_equal(table["row"].to_numpy(), self.rows(shard)):
                flat = (table[name].combine_chunks().flatten().to_numpy() for name in ("nll", "rank"))
                nll_RT, rank_RT = (column.reshape(-1, self.scored.block_size) for column in flat)
                return nll_RT, rank_RT
            reason = "from other scores"
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            reason = f"damaged: {first_line(error)}"
        raise ConfigError(f"{self.setting}: {path} is {reason}; delete it and run the same predict again")


def write_table(path: Path, table: pa.Table, **options: Any) -> None:
    """Writes a parquet file with checksums: to a temporary file, synced, then renamed."""
    with whole(path) as file:
        pq.write_table(table, file, compression="zstd", use_dictionary=False, write_page_checksum=True, **options)
