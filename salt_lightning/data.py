"""SALTDataModule: the data as the trainer sees it.

text/ turns text into token files, once; batches/ cuts these into rows and determines which rows each step reads.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from transformers import PreTrainedTokenizerBase

from salt_lightning import preflight
from salt_lightning.batches.example_rows import ExampleRows, open_examples
from salt_lightning.batches.mixture import Mixture, Shares, make_order, shares_of
from salt_lightning.batches.order import Order
from salt_lightning.batches.rows import (
    Batches,
    EvalBatches,
    Loader,
    PackedRows,
    ShardBatches,
    TrainBatches,
    counts_nll,
    require_text,
    spread,
    text_ids,
)
from salt_lightning.batches.stretches import Stretches, go_on, one_stretch, rows_before, steps_of, where, with_past
from salt_lightning.command.settings import seed_or_global, wrong_data
from salt_lightning.errors import ConfigError, counted, raised, refuse, wrong_kinds
from salt_lightning.fit.cadence import accumulation, phase1_steps, place, set_cadence
from salt_lightning.selection import KeepRule, Plan, check_repeats, plan, scores_of
from salt_lightning.storage.kinds import plain
from salt_lightning.teacher.difficulty import HeldOut, find_files, read_thirds
from salt_lightning.teacher.scores import Scored, Scores
from salt_lightning.text.documents import Corpus
from salt_lightning.text.examples import Examples
from salt_lightning.text.prepare import look_inside, prepare_tokenizer, prepare_tokens, token_folder, trained_tokenizer
from salt_lightning.text.sources import Group, Hub, each_file, entries, resolve
from salt_lightning.text.token_files import TokenFiles, digest
from salt_lightning.text.tokenizer import changed_words, kept_text, load_tokenizer, num_ids, tokenizer_fingerprint


class SALTDataModule(LightningDataModule):
    """Text, tokenized once, in packed rows, in an order that depends only on the settings and the step."""

    def __init__(  # noqa: PLR0913 (the constructor is the schema)
        self,
        source: str | list[str] = "",
        val_source: str | list[str] | None = None,
        test_source: str | list[str] | None = None,
        split: str = "train",
        subset: str | None = None,
        revision: str | None = None,
        text_column: str | list[str] = "text",
        source_column: str | None = None,
        source_per_file: bool = False,
        source_weights: list[float] | None = None,
        bad_lines: Literal["refuse", "skip"] = "refuse",
        tokenizer: str = "train",
        vocab_size: int = 16384,
        block_size: int = 1024,
        global_batch_size: int = 64,
        micro_batch_size: int = 8,
        val_fraction: float = 0.01,
        val_rows: int | None = None,
        difficulty: str | None = None,
        seed: int | None = None,
        isolate_documents: bool = True,
        cache_dir: str = "cache",
        prepare_workers: int = 0,
        num_workers: int = 0,
        selection: str | None = None,
        keep: KeepRule = KeepRule(),  # noqa: B008 (frozen)
        examples: Examples = Examples(),  # noqa: B008 (frozen)
    ) -> None:
        """Check the settings; no file is opened yet.

        Args:
            source: Training text: a file, folder, glob (``**`` matches subfolders), hub data set (owner/name,
                owner/name:split, owner/name:subset:split, each also with owner/name@revision; a split may have a slice
                of rows, train[10:5000]), or a list of these. Each row of a .jsonl or .parquet file is a document; any
                other file is one document. .gz, .bz2, .xz and .zst are unpacked; .json, .jsonlines and .ndjson are read
                as .jsonl. In a folder with .jsonl or .parquet files, only the more common kind is read, and only one
                split (FOLDER:split, FOLDER:subset:split); the log says what is left out. It is an error if plain text
                is more common.
            val_source: Validation text, in the same forms. Without it, `val_fraction` of the documents of `source`.
            test_source: Text for the test verb, in the same forms. Without it, the validation text.
            split: Split of each hub data set, or of a folder with the same layout, that names none itself.
            subset: Configuration of each hub data set that names none itself.
            revision: Branch, tag or commit of each hub data set that names none itself.
            text_column: Column that holds the text; of a list, in each row the first that is there and not null.
            source_column: Column that names a row's source, for the validation loss by source. Without
                it, each entry of `source` is one source.
            source_per_file: Each file is a source, named after the file, for the validation loss by file.
            source_weights: Share of each entry of `source` in the rows that are read, in any unit ([7, 3], [0.7, 0.3]);
                each share is at least 1 in 10,000. Without it, all rows are read equally often.
            bad_lines: What to do with a line (of a .txt: a file) that is not UTF-8, not a JSON object, or lacks its
                text: refuse stops and names file and line; skip leaves it out and counts it in log and manifest.
            tokenizer: Folder or hub name (owner/name@revision) of a tokenizer; "train" trains a byte-level BPE on the
                training text.
            vocab_size: Vocabulary size of a tokenizer to train.
            block_size: Tokens per row.
            global_batch_size: Rows per optimizer step, over all devices and accumulated micro-batches.
            micro_batch_size: Rows per micro-batch on each device.
            val_fraction: Share of documents kept for validation, chosen by a hash of their text.
            val_rows: Validate, or test, on at most this many rows, evenly spaced.
            difficulty: Folder of a run (the teacher's) in which `validate` or `test` has measured the same held-out
                text: its loss splits the documents into an easy, a medium and a hard third (val/ce/easy ...).
            seed: Seed for the order of the training rows. null: the one of seed_everything.
            isolate_documents: Documents in one row do not see each other; positions restart at each document.
            cache_dir: Folder for prepared text and trained tokenizers.
            prepare_workers: Processes that tokenize. 0: one per core; 1: no extra process.
            num_workers: Processes that load training batches. 0 (the training process loads them) is the fastest
                unless the token files are on a slow disk.
            selection: Folder of a predict run (or its scores.json). Phase 1, the steps before --kd.steps, reads
                the rows that `keep` selects by their scores; phase 2 reads all rows (SALT_DS).
            keep: Which of the scored rows phase 1 reads.
            examples: Fine-tuning: rows are prompts and responses; only the responses are learned.

        Raises:
            ConfigError: a setting is out of range.
        """
        refuse(wrong_kinds(SALTDataModule.__init__, locals(), "--data."))
        super().__init__()
        self.source, self.val_source, self.test_source = map(entries, (source, val_source, test_source))
        self.hub = Hub(split, subset, revision)
        self.text_column, self.source_column, self.source_per_file = text_column, source_column, source_per_file
        # plain: Lightning and JSON know no numbers of numpy
        self.tokenizer_name, self.trained_vocab_size = tokenizer, plain(vocab_size)
        self.block_size, self.isolate_documents = plain((block_size, isolate_documents))
        self.global_batch_size, self.micro_batch_size = plain((global_batch_size, micro_batch_size))
        self.val_fraction, self.val_rows, self.seed = plain((val_fraction, val_rows, seed_or_global(seed)))
        self._unset_seed = self.seed if seed is None else None
        self.cache_dir = Path(os.path.expanduser(cache_dir))
        self.prepare_workers, self.num_workers = prepare_workers, num_workers
        self.difficulty, self.selection = (name and os.path.expanduser(name) for name in (difficulty, selection))
        self.source_weights, self.bad_lines, self.keep, self.examples = source_weights, bad_lines, keep, examples
        refuse(wrong_data(self) + examples.problems(tokenizer))
        self.accumulate, self.num_train_rows, self.num_train_tokens = 1, 0, 0
        self.source_names: list[str] = []
        self.text: dict[str, Any] = {}  # what the training text is, for checkpoints
        self._groups: dict[str, tuple[Group, ...]] = {}
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._train: PackedRows | ExampleRows | None = None
        self.stretches: Stretches = one_stretch(self.global_batch_size, self.block_size, None)
        self._selected: Plan | None = None
        self._order: Order | Mixture | None = None
        self._shards: tuple[list[int], bool] | None = None
        self._eval: PackedRows | ExampleRows | None = None
        self._thirds_D: np.ndarray | None = None
        self._train_loader: Loader | None = None

    # --- text and tokenizer (need no trainer) ---

    def prepare_data(self) -> None:
        """Tokenize what is not in the cache yet, and compute row scores from token scores; in one process per node."""
        self._groups.clear()  # files may have been added since an earlier fit, and the tokenizer replaced
        self._tokenizer = None
        fraction, workers = self._val_share, self.prepare_workers
        corpora = self.require_files()  # all of them first: tokenizing one may take hours
        look_inside(corpora, self._folder, workers, fraction("source") if self._fits else 0.0)
        # called before hours of work
        check_models = getattr(getattr(self.trainer, "lightning_module", None), "check_token_ids", lambda: None)
        for setting, corpus in corpora.items():
            if setting == "source" and self.tokenizer_name == "train":
                prepare_tokenizer(corpus, self.trained_vocab_size, fraction(setting), self.cache_dir, workers)
            prepare_tokens(corpus, self.tokenizer, fraction(setting), self.cache_dir, workers, check_models)
        if self._fits and not self.keep.is_own and (scores := scores_of(self.selection, self.keep)):
            self.keep.score_all(scores)

    def require_files(self, but: Iterable[str] = ()) -> dict[str, Corpus]:
        """Find what every setting names, without reading the text; return the documents of each source setting, `but`
        of those (data.source ...) that are not the user's.

        Raises:
            ConfigError: something is missing or damaged; lists all of it.
        """
        given = [s for s in ("source", "val_source", "test_source") if getattr(self, s) and f"data.{s}" not in but]
        looks: list[Callable[[], object]] = [partial(self._corpus, setting) for setting in given]
        looks += [lambda: self.tokenizer] if self.tokenizer_name != "train" else []
        looks += [partial(find_files, Path(self.difficulty), "fit")] if self.difficulty else []
        looks += [partial(scores_of, self.selection, self.keep)] if self._fits else []  # predict only reports by a rule
        refuse(raised(looks))
        return {setting: self._corpus(setting) for setting in given}

    @property
    def _fits(self) -> bool:
        return self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; one that is trained exists only after `prepare_data`."""
        if self._tokenizer is None:
            name, share = self.tokenizer_name, self._val_share("source")
            if name == "train":
                name = trained_tokenizer(self._corpus("source"), self.trained_vocab_size, share, self.cache_dir)
            self._tokenizer = load_tokenizer(name)
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return num_ids(self.tokenizer)

    def doubts(self) -> list[preflight.Finding]:
        """Reasons why the held-out text may be a bad measure."""
        files, words, trained, part = self.held_out_files, self.tokenizer, [], (0, 0.0)
        with suppress(ConfigError):  # setup alone, in Python, may find no training text any more
            held_out = [self._corpus(setting) for setting in ("val_source", "test_source") if getattr(self, setting)]
            trained = [name for corpus in held_out for name in self._corpus("source").shared_with(corpus)]
            if self.source and self.held_out_by != "source" and getattr(self.trainer, "is_global_zero", True):
                part = files.part_in(TokenFiles(self._folder("source"), "train"))
        seen = preflight.seen_in_training(trained, *part, self.examples.given, is_over=not self._fits)
        found = [*preflight.of_training(self._train), seen, preflight.marks_as_text(self.examples.literals(), words)]
        found.append(preflight.unread_text(kept_text(words, files)) or preflight.changed_text(changed_words(words)))
        if self._train is not None and self.held_out_by == "source":
            found += preflight.of_split(self._train, self._eval, self._eval_rows(), self.val_fraction)
        return [finding for finding in found if finding]

    @property
    def train_fingerprint(self) -> str:
        """Hash of the training tokens."""
        return "none" if self._train is None else self._train.files.fingerprint

    @property
    def selection_fingerprint(self) -> str:
        """Hash of the sources' shares and of the rows that phase 1 reads; "none" if all rows are read alike."""
        return self._order.fingerprint if self._order else "none"

    @property
    def tokenizer_fingerprint(self) -> str:
        """Hash of the token -> id map."""
        return tokenizer_fingerprint(self.tokenizer)

    def _corpus(self, setting: str) -> Corpus:
        """The documents of a source setting."""
        if setting not in self._groups:  # find files once: thousands take seconds
            groups = resolve(f"--data.{setting}", getattr(self, setting), self.hub)
            self._groups[setting] = each_file(groups) if self.source_per_file else groups
        how = self.text_column, self.source_column, self.bad_lines == "skip", self.examples
        return Corpus(f"--data.{setting}", self._groups[setting], *how)

    def _val_share(self, setting: str) -> float:
        """The share of a source setting's documents that goes to its `val` split."""
        return 1.0 if setting != "source" else 0.0 if self.val_source else self.val_fraction

    def _folder(self, setting: str) -> Path:
        return token_folder(self._corpus(setting), self.tokenizer, self._val_share(setting), self.cache_dir)

    def _open(self, setting: str, split: str) -> PackedRows | ExampleRows:
        files = TokenFiles(self._folder(setting), split)
        require_text(files, split, None if self.examples.given else self.block_size, self.val_fraction)
        if self.examples.given:
            return open_examples(setting, files, self.block_size, self.isolate_documents)
        return PackedRows(files, self.block_size, self.isolate_documents)

    def _open_training(self, fits: bool) -> None:
        train = self._train = self._open("source", "train")
        self.num_train_rows, self.num_train_tokens = train.num_rows, train.files.num_tokens
        hub = [group.hub_name for group in self._corpus("source").groups if group.hub_name]
        text = {"source": self.source, "weights": self.source_weights, "val_share": self._val_share("source")}
        how = {"part": vars(self.hub), "hub": hub, "cuts": shares.cuts if fits and (shares := self._shares()) else {}}
        self.text = text | how | train.size | {"examples": self.examples.inputs()}

    def _open_held_out(self, stage: str | None) -> None:
        tested = "test_source" if stage == "test" and self.test_source else ""
        setting = tested or ("val_source" if self.val_source else "source")
        self._eval, self.held_out_by = self._open(setting, "val"), setting
        self.source_names = self._eval.files.manifest["sources"]
        if (read := len(self._eval_rows())) < (there := self._eval.num_rows) and stage in ("validate", "test"):
            rank_zero_info(f"data: reads {read} of {there} rows; for all of them, set --data.val_rows null")
        if self.difficulty:
            self._thirds_D = read_thirds(Path(self.difficulty), self.held_out, stage or "fit")

    @property
    def test_examples(self) -> ExampleRows:
        """The examples that the test verb uses."""
        assert isinstance(self._eval, ExampleRows), "call setup('test') first"
        return self._eval

    # --- Lightning's hooks, in its order ---

    def setup(self, stage: str | None = None) -> None:
        """Open the prepared files that a stage needs; give the trainer its accumulation and cadence.

        Raises:
            ConfigError: batch sizes do not divide or conflict with the trainer's settings, or the text is too short.
        """
        self.seed = seed_or_global(self.seed, self._unset_seed)
        if self.trainer is not None:  # prepare_data has found the files in one process per node: share them
            self._groups = (self._groups, self.trainer.strategy.broadcast(self._groups))[self.trainer.local_rank > 0]
        fits = stage in (None, "fit")
        if fits:
            self.set_trainer()
        if fits or stage == "predict":
            self._open_training(fits)
        if stage != "predict":
            self._open_held_out(stage)
        if fits:
            self.stretches = self._one_stretch()
            self._order, self._train_loader = self._plan_order(), None
        if stage == "fit":
            self._log()
        asked = self.trainer.state.fn if self.trainer else stage  # check also sets up a fit, but reports them itself
        for finding in self.doubts() if stage == asked and stage in ("fit", "validate", "test") else ():
            finding.require()

    def train_dataloader(self) -> Loader:
        """All micro-batches of the run as one epoch; without a trainer, one pass over the rows."""
        assert self._train is not None and self._order is not None, "call setup('fit') first"  # noqa: PT018
        steps = self.trainer.max_steps if self.trainer else -(-self._train.num_rows // self.global_batch_size)
        if self._train_loader is None:  # not earlier: a checkpoint may say what was read before
            self._say_plan(self._order, steps)
        sizes, before = (self.global_batch_size, self.micro_batch_size), partial(rows_before, self.stretches)
        batches = TrainBatches(self._train, self._order, sizes, place(self.trainer), before)
        loader = self._loader(batches, steps * batches.accumulate, partial(self._batches_done, batches.accumulate))
        loader.num_workers, self._train_loader = self.num_workers, loader
        return loader

    def val_dataloader(self) -> Loader:
        """Validation rows in order, with the bytes and source of every label."""
        assert self._eval is not None, "call setup first"
        batches = EvalBatches(self._eval, self._eval_rows(), self.micro_batch_size, place(self.trainer), self._thirds_D)
        return self._loader(batches, len(batches))

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> Loader:
        """All training rows in order, shard by shard, or the shards that `score_only` names."""
        assert self._train is not None, "call setup('predict') first"
        scored, (rank, world) = self.scored(), place(self.trainer)
        shards, company = self._shards or (list(range(rank, scored.num_shards, world)), True)
        batches = ShardBatches(self._train, shards, (scored.shard_rows, self.micro_batch_size), company)
        return self._loader(batches, len(batches))

    def score_only(self, shards: list[int], company: bool) -> None:
        """Set the shards that this rank's predict_dataloader reads; `company`: whether any rank has one."""
        self._shards = shards, company

    def scored(self, teacher: str = "", precision: str = "") -> Scored:
        """Identity of the rows that scores belong to; teacher and precision stay empty if not given."""
        assert self._train is not None, "call setup first"
        rows, size = self._train.files.fingerprint, (self._train.num_rows, self.block_size)
        return Scored(rows, self.tokenizer_fingerprint, *size, self.isolate_documents, teacher, precision)

    def decode_row(self, row: int) -> str:
        """The text of a training row."""
        assert self._train is not None, "call setup first"
        return str(self.tokenizer.decode(text_ids(self._train, row)))

    def describe_batches(self, first: int, count: int) -> str:
        """Number, source and first words of the rows that micro-batches `first` to `first + count - 1` read.

        Micro-batches are counted over the run and all ranks, one after the other in the order of the rows.
        """
        assert self._train is not None and self._order is not None, "call setup('fit') first"  # noqa: PT018
        files, size = self._train.files, self.micro_batch_size
        step, part = divmod(first, self.global_batch_size // size)
        rows = self._order(rows_before(self.stretches, step) + part * size + np.arange(count * size))
        sources = [files.manifest["sources"][s] for s in files.doc_sources[self._train.first_documents(rows[:4])]]
        shown = [f"{row} ({s}: {self.decode_row(row)[:40]!r})" for row, s in zip(rows[:4], sources, strict=True)]
        return ", ".join(shown + [str(row) for row in rows[4:64]]) + (" ..." if len(rows) > 64 else "")

    @property
    def data_wait_s(self) -> float:
        """Seconds that training has waited for batches so far."""
        return self._train_loader.wait_s if self._train_loader else 0.0

    @property
    def held_out_files(self) -> TokenFiles:
        """The token files that validation (or test) reads; `held_out` says which of their rows."""
        assert self._eval is not None, "call setup first"
        return self._eval.files

    @property
    def held_out(self) -> HeldOut:
        """Identity of the text that validation (or test) reads."""
        fingerprints = self.held_out_files.fingerprint, self.tokenizer_fingerprint
        return HeldOut(*fingerprints, self.block_size, self.isolate_documents, len(self._eval_rows()))

    @property
    def difficulty_fingerprint(self) -> str:
        """Hash of the third of each held-out document; "none" where they are not known."""
        return "none" if self._thirds_D is None else digest(self._thirds_D.tolist())

    # --- implementation ---

    def _batches_done(self, per_step: int) -> int:
        return self.trainer.global_step * per_step if self.trainer else 0

    def _loader(self, batches: Batches, length: int, start: Callable[[], int] = int) -> Loader:  # int() is 0
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return Loader(batches, length, start, pin_memory=on_gpu)

    def _eval_rows(self) -> np.ndarray:
        assert self._eval is not None
        count = min(self.val_rows or self._eval.num_rows, self._eval.num_rows)
        return np.arange(count) * self._eval.num_rows // count

    def _shares(self) -> Shares | None:
        """Each entry's first row and weight; None without `source_weights`."""
        if self.source_weights is None:
            return None
        assert isinstance(self._train, PackedRows)
        names = list(dict.fromkeys(group.name for group in self._corpus("source").groups))
        now = shares_of(names, self.source_weights, self._train.source_tokens(names), self.block_size)
        return with_past(now, self.stretches)

    def _one_stretch(self) -> Stretches:
        return one_stretch(self.global_batch_size, self.block_size, self._shares(), self.train_fingerprint)

    def go_on_from(self, checkpoint: dict[str, Any]) -> None:
        """Continue with the row at which a run stopped, even with another batch size or other shares."""
        self.stretches = go_on(checkpoint, self._one_stretch())
        if len(self.stretches) > 1:
            self._order = self._plan_order()
        rank_zero_info(f"data: {where(self.stretches, checkpoint, self.text['cuts'])}")

    def _plan_order(self) -> Order | Mixture:
        """The order of the training rows; with a selection, phase 1 has its own rows."""
        if not self.selection:
            return make_order(self._shares(), Order(self.seed, self.num_train_rows))
        self._selected = self.plan_selection(final=False)
        return self._selected.order

    def plan_selection(self, final: bool = True) -> Plan:
        """Plan which rows phase 1 reads, by the scores in `selection`. `final`: also check how often it reads a row.

        Raises:
            ConfigError: scores are incomplete or damaged, rows are too few, or a kept row would be read too often.
        """
        scores = Scores(str(self.selection), "--data.selection")
        scores.require(self.scored())
        steps = phase1_steps(self.trainer) if self.trainer else 0
        found = plan(scores, self.keep, self.seed, rows_before(self.stretches, steps), self._shares())
        if final:
            check_repeats(found.order, self.keep)
        return found

    def set_trainer(self) -> None:
        """Give the trainer its accumulation and cadence.

        Raises:
            ConfigError: batch sizes do not divide, or conflict with the trainer's settings.
        """
        self.accumulate = accumulation(self.global_batch_size, self.micro_batch_size, place(self.trainer)[1])
        if self.trainer is not None:
            set_cadence(self.trainer, self.accumulate)

    def _log(self) -> None:
        rank_zero_info(
            f"data: {self.num_train_rows} rows of {self.block_size} tokens, from {self.text['tokens']} tokens in "
            f"{counted(self.text['documents'], 'document')}; {counted(len(self._eval_rows()), 'validation row')}; "
            f"vocabulary size {self.vocab_size}"
        )

    def _say_plan(self, order: Order | Mixture, steps: int) -> None:
        if self._selected:
            check_repeats(order, self.keep)
            self._selected.say()
        reads = self.reads(steps)
        rank_zero_info(f"data: {reads.said}" + (f" ({reads.remedy})" if reads.remedy else ""))

    # --- for checks before the first step ---

    def reads(self, max_steps: int) -> preflight.Finding:
        """How often a run reads the text, or each source if sources have weights."""
        now, rows, shares = self.stretches, rows_before(self.stretches, max_steps), self._shares()
        if shares is None:
            return preflight.rows(self.num_train_rows, rows, steps_of(now, max_steps), len(now) == 1)
        return preflight.shares(shares.names, shares.reads(rows), shares.rows_S, (max_steps, rows, shares.alike))

    def samples(self, rows: int) -> Iterator[dict[str, torch.Tensor]]:
        """Batches of `rows` validation rows, in predict training rows, from all over, with enough labels to judge a
        model by."""
        read = self._eval or self._train
        assert read is not None, "call setup first"
        return spread(read, rows, preflight.ENOUGH_LABELS)

    def counts_nll(self, labels_N: torch.Tensor) -> float:
        """Mean -log p of labels in nats, where p is the frequency of a token in the training text."""
        assert self._train is not None, "call setup first"
        return counts_nll(self._train.files.tokens, labels_N.numpy())
