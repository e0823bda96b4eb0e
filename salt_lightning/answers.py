"""AnswerTest: what `test` measures of a fine-tuned student besides the loss of its responses.

Generation is greedy and batched, with transformers' KV cache. Choices are compared by the log-likelihood of each as a
whole response, EOS included, in the forward used for training. Prompts are the token ids that training reads.

    B rows of a batch · T tokens of its longest row · N = B * T
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from itertools import combinations, groupby, takewhile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel

from salt_lightning.batches.rows import IGNORE
from salt_lightning.errors import ConfigError, refuse, writing, wrong_kinds
from salt_lightning.losses import token_stats
from salt_lightning.text.documents import Corpus
from salt_lightning.text.encoder import ExampleEncoder, make_encoder
from salt_lightning.text.tokenizer import unknown_ids

Pair = tuple[list[int], list[int]]  # token ids of a prompt and of its response, EOS included


class AnswerTest(pl.Callback):
    """Checks answers to the examples in `test`; does nothing during training.

    Args:
        max_new_tokens: Greedily generate at most this many tokens for each test example, and report how many answers
            match the response exactly. 0: generate nothing.
        extract: Regular expression for the part to compare: its last match, or the first group in that. A text
            without a match is compared whole. GSM8K: '#### *(.+)'.
        choices: Responses as --data.examples writes them (" yes"): report how often the right one is the likeliest.
        max_examples: Use this many test examples, evenly spaced. null: all.

    Raises:
        ConfigError: a setting is out of range, an example's response is not one of the choices, or the strategy
            shards the model that generates.
    """

    def __init__(
        self,
        max_new_tokens: int = 0,
        extract: str | None = None,
        choices: list[str] | None = None,
        max_examples: int | None = None,
    ) -> None:
        refuse(wrong_kinds(AnswerTest.__init__, locals(), "--answers."))
        if max_new_tokens < 0:
            raise ConfigError(f"--answers.max_new_tokens {max_new_tokens} must be 0 or more")
        if max_examples is not None and max_examples < 1:
            raise ConfigError(f"--answers.max_examples {max_examples} must be 1 or more, or null")
        if choices is not None and (
            len(choices) < 2 or len(set(choices)) < len(choices) or not all(map(str.strip, choices))
        ):
            raise ConfigError(f"--answers.choices {choices} must be two or more responses, all different, none blank")
        try:
            self.extract = re.compile(extract) if extract is not None else None
        except re.error as error:
            raise ConfigError(f"--answers.extract {extract!r} is not a regular expression ({error})") from error
        self.max_new_tokens, self.choices, self.max_examples = max_new_tokens, choices or [], max_examples
        self._pairs: dict[int, Pair] = {}  # by example number: this rank's examples

    def check_start(self, trainer: pl.Trainer, data: Any) -> None:
        """Raises ConfigError if a test cannot answer with this strategy or kind of data."""
        if not (self.max_new_tokens or self.choices):
            return
        if not getattr(getattr(data, "examples", None), "given", False):
            raise ConfigError("--answers needs examples; define them with --data.examples")
        if self.max_new_tokens and not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise ConfigError(
                f"--trainer.strategy {type(trainer.strategy).__name__} shards the student, but each device generates "
                "with a whole one; test on one device or with --trainer.strategy ddp, which read the same checkpoint, "
                "or set --answers.max_new_tokens 0"
            )

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if stage != "test" or not (self.max_new_tokens or self.choices):
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        self.check_start(trainer, data)
        rows = data.test_examples
        encoder = make_encoder(Corpus("", (), examples=data.examples), data.tokenizer, 0.0)
        assert isinstance(encoder, ExampleEncoder)
        self._choice_ids = [encoder.response(choice) for choice in self.choices]
        for a, b in combinations(range(len(self.choices)), 2):
            if self._choice_ids[a] == self._choice_ids[b]:
                raise ConfigError(
                    f"--answers.choices {self.choices}: {self.choices[a]!r} and {self.choices[b]!r} are the same "
                    "tokens; give choices, or a --data.tokenizer, that differ in them"
                )
        room = max(map(len, self._choice_ids), default=1)
        pairs = {i: rows.prompt_and_response(i) for i in rows.examples.tolist()}
        fitting = [i for i, (prompt, _) in pairs.items() if len(prompt) + room <= data.block_size]
        for i in fitting if self.choices else []:
            if pairs[i][1] not in self._choice_ids:
                raise ConfigError(
                    f"--answers.choices {self.choices}: none of them is the response of test example {i}, "
                    f"{data.tokenizer.decode(pairs[i][1][:-1])!r}"
                )
        # a special token that no template writes is a part of the answer, e.g. the name of a class
        marks = encoder.template_marks()
        responses = [response for _, response in pairs.values()]
        self._stops = [rows.files.eos_id, *sorted(turn_ends(responses, marks, data.tokenizer.decode))]
        unknown = {*unknown_ids(data.tokenizer)} - {*self._stops}
        self._unknown = [text for i in unknown if (text := data.tokenizer.decode([i]).strip())]
        if lost := sum(not unknown.isdisjoint(response) for response in responses):
            rank_zero_info(
                f"warning: --data.tokenizer has no token for a part of {lost} of {len(responses)} responses; no answer "
                "counts as exact if it is to be equal to such a part"
            )
        count = min(self.max_examples or len(fitting), len(fitting))
        chosen = [fitting[i * len(fitting) // count] for i in range(count)]
        # Ranks take turns; a rank that runs out repeats another's example, so that all have equally many batches.
        turns = range(trainer.global_rank, -(-count // trainer.world_size) * trainer.world_size, trainer.world_size)
        self._pairs = {i: pairs[i] for i in (chosen[turn % count] for turn in turns)}
        rank_zero_info(f"test: answers to {count} of {rows.files.num_documents} examples")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not self._pairs:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        decode = partial(data.tokenizer.decode, clean_up_tokenization_spaces=False)  # with chat markers
        records = {
            i: {"prompt": decode(prompt), "response": decode(_until(self._stops, response))}
            for i, (prompt, response) in self._pairs.items()
        }
        # Shapes differ from batch to batch: each would be compiled anew.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), trainer.precision_plugin.forward_context():
            if self.choices:
                self._choose(pl_module, data.micro_batch_size, records)
            if self.max_new_tokens:
                self._generate(pl_module, data, records, decode)
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(gathered, records)
            records = {i: record for of_rank in gathered for i, record in of_rank.items()}
        records = dict(sorted(records.items()))
        values = figures(list(records.values()), len(self.choices))
        rank_zero_info(summary(values))
        if self.extract is not None and self.max_new_tokens:
            said = (
                f"{sum(bool(found_in(record[name], self.extract)) for record in records.values())} {of}"
                for name, of in (("response", "responses"), ("generated", "generated texts"))
            )
            rank_zero_info(
                f"--answers.extract {self.extract.pattern!r} matches {' and '.join(said)} of {len(records)}; the "
                "others are compared whole"
            )
        pl_module.log_dict({f"test/{name}": value for name, value in values.items()}, sync_dist=True)
        if trainer.is_global_zero:
            file = Path(trainer.default_root_dir) / "test" / "answers.jsonl"
            lines = [json.dumps({"example": i, **record}, ensure_ascii=False) for i, record in records.items()]
            with writing(file):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _choose(self, pl_module: Any, micro_batch: int, records: dict[int, dict[str, Any]]) -> None:
        asked = sorted(self._pairs, key=lambda i: len(self._pairs[i][0]))
        todo = [(i, c) for i in asked for c in range(len(self.choices))]
        likelihoods: dict[tuple[int, int], float] = {}
        for batch in _shown(_cut(todo, micro_batch), "Choosing", pl_module):
            pairs = [(self._pairs[i][0], self._choice_ids[c]) for i, c in batch]
            nll_B = response_nll(pl_module.student, pairs, pl_module.device, pl_module.hparams["logits_budget_gib"])
            likelihoods |= dict(zip(batch, (-nll_B).tolist(), strict=True))
        for i, record in records.items():
            of_choices = [likelihoods[i, c] for c in range(len(self.choices))]
            best = of_choices.index(max(of_choices))
            record["log_likelihood"] = dict(zip(self.choices, of_choices, strict=True))
            record["choice"], record["right"] = self.choices[best], self._choice_ids[best] == self._pairs[i][1]

    def _generate(self, pl_module: Any, data: Any, records: dict[int, dict[str, Any]], decode: Any) -> None:
        # A prompt near the end of the model's positions gets fewer tokens, in a batch of such prompts: the number of
        # tokens depends only on the example.
        room = {i: min(self.max_new_tokens, data.block_size - len(prompt)) for i, (prompt, _) in self._pairs.items()}
        order = sorted(self._pairs, key=lambda i: (room[i], len(self._pairs[i][0])))
        batches = [
            (tokens, batch)
            for tokens, group in groupby(order, key=lambda i: room[i])
            for batch in _cut(list(group), data.micro_batch_size)
        ]
        for tokens, batch in _shown(batches, "Generating", pl_module):
            prompts = [self._pairs[i][0] for i in batch]
            answers = generate(pl_module.student.model, prompts, tokens, self._stops, pl_module.device)
            for i, answer in zip(batch, answers, strict=True):
                record = records[i]
                record["generated"] = decode(answer)
                record["answer"], record["expected"] = (
                    normalized(extracted(record[name], self.extract)) for name in ("generated", "response")
                )
                compared = extracted(record["response"], self.extract)
                known = not any(text in compared for text in self._unknown)
                record["exact"] = known and record["answer"] == record["expected"]


def _cut(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _until(stops: list[int], ids: list[int]) -> list[int]:
    return list(takewhile(lambda i: i not in stops, ids))


def _shown(batches: list[Any], what: str, pl_module: Any) -> Iterable[Any]:
    trainer = pl_module.trainer
    shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
    return tqdm(batches, desc=what, unit=" batches", disable=not shown, leave=False)


# --- of the model ---


def response_nll(student: Any, pairs: list[Pair], device: torch.device, budget_gib: float) -> Tensor:
    """-log p of each response given its prompt, summed over its tokens including EOS: float64, shape B."""
    width = max(len(prompt) + len(response) for prompt, response in pairs) - 1
    ids_BT = torch.zeros((len(pairs), width), dtype=torch.int64)
    labels_BT = torch.full((len(pairs), width), IGNORE)
    for b, (prompt, response) in enumerate(pairs):
        ids = torch.tensor(prompt + response)
        ids_BT[b, : len(ids) - 1] = ids[:-1]
        labels_BT[b, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
    positions_BT = torch.arange(width).repeat(len(pairs), 1)
    labels_N = labels_BT.flatten().to(device)

    def stats(hidden_ND: Tensor, head_VD: Tensor, bias_V: Tensor | None) -> Tensor:
        return token_stats(hidden_ND, head_VD, labels_N, bias_V, logits_budget_gib=budget_gib)[0]

    nll_N = student(ids_BT.to(device), positions_BT.to(device), then=stats)
    return nll_N.view(len(pairs), width).cpu().double().sum(1)


def generate(
    model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int, stops: list[int], device: torch.device
) -> list[list[int]]:
    """Greedy continuations of the prompts, each up to the first of `stops`, which is left out."""
    width = max(map(len, prompts))
    ids_BT = torch.full((len(prompts), width), stops[0])
    mask_BT = torch.zeros_like(ids_BT)
    for b, prompt in enumerate(prompts):  # padded on the left, so all continue at the same position
        ids_BT[b, width - len(prompt) :] = torch.tensor(prompt)
        mask_BT[b, width - len(prompt) :] = 1
    # The model's own settings, e.g. a hub model's temperature and repetition penalty, would apply otherwise.
    own, model.generation_config = model.generation_config, GenerationConfig(eos_token_id=stops, pad_token_id=stops[0])
    try:
        out_BT = model.generate(
            ids_BT.to(device),
            attention_mask=mask_BT.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
        )
    finally:
        model.generation_config = own
    return [_until(stops, answer) for answer in out_BT[:, width:].tolist()]


# --- text and numbers ---


def turn_ends(responses: Iterable[list[int]], marks: set[int], decode: Callable[[list[int]], str]) -> set[int]:
    """The markers that end a turn before EOS: the last marker of each response, if only whitespace and EOS follow it.

    A student need not generate EOS there (Gemma: <end_of_turn>, Phi-3: <|end|>, a new line and EOS). A marker with
    text after it is of another kind (<|message|> of gpt-oss).
    """
    ends = set()
    for response in responses:
        rest = (i for i in reversed(response[:-1]) if i in marks or decode([i]).strip())
        ends |= {next(rest, -1)} & marks
    return ends


def extracted(text: str, pattern: re.Pattern[str] | None) -> str:
    """What the pattern finds in a text; without a pattern, or if it finds nothing, the whole text."""
    return (found_in(text, pattern) if pattern is not None else "") or text


def found_in(text: str, pattern: re.Pattern[str]) -> str:
    """The last match that is not empty: its first group, if that is part of it, or else all of it; "" without one."""
    found = (match[1] if pattern.groups and match[1] is not None else match[0] for match in pattern.finditer(text))
    return next(filter(None, reversed(list(found))), "")


_FULL_STOPS = tuple(".\u3002\u0964\u06d4\u0589\u1362")  # also CJK, Devanagari, Urdu, Armenian, Ethiopic
_BETWEEN = "[,\uff0c\u066c\xa0\u202f\u2009]"  # separators of digit groups
_GROUPED = re.compile(rf"(?<=\d){_BETWEEN}(?=(?:\d{{2,3}}{_BETWEEN})*\d{{3}}(?!\d))")
_POWER = re.compile("[\u2070\xb9\xb2\xb3\u2074-\u207b]+")  # superscript digits and signs

_FRACTION = re.compile("(?<=\\d)(?=[\xbc-\xbe\u2150-\u215e\u2189])")  # 1\xbd is 1 1/2, not 11/2
_VARIANTS = re.compile("[\ufe00-\ufe0f\U000e0100-\U000e01ef]")  # of one character: red or black hearts, forms of names
_TAGS = "\U000e0020"  # they tell the flags of England and Scotland apart


def normalized(text: str) -> str:
    """Normalizes an answer for comparison: NFKC (5² as 5^2), case folded, single spaces, digits of any script as 0-9.

    Removes separators of digit groups (1,000, 1,00,000, and no-break spaces), a final full stop in several scripts,
    and invisible marks of direction, joining and variants.
    """
    text = "".join(c for c in _VARIANTS.sub("", text) if unicodedata.category(c) != "Cf" or c >= _TAGS)
    text = _POWER.sub(lambda power: "^" + power[0], _GROUPED.sub("", text))
    text = unicodedata.normalize("NFKC", _FRACTION.sub(" ", text)).casefold()
    text = text.replace("\u2212", "-").replace("\u2044", "/")
    text = "".join(str(unicodedata.decimal(c)) if unicodedata.category(c) == "Nd" else c for c in text)
    text = " ".join(text.split())
    return (text[:-1].rstrip() if text.endswith(_FULL_STOPS) else "") or text


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927): (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    z = 1.959964
    p, z2 = successes / trials, z * z / trials
    middle, half = p + z2 / 2, z * (p * (1 - p) / trials + z2 / 4 / trials) ** 0.5
    return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))


def figures(records: list[dict[str, Any]], num_choices: int) -> dict[str, float]:
    """The values that `test` reports about the answers.

    exact_match and choice_accuracy are shares of `examples`, each with its 95% interval (NAME_low, NAME_high) and
    NAME_majority, the share of the most frequent right answer; choice_accuracy_chance is that of guessing.
    """
    values = {"examples": float(len(records))}
    for name, hit, right in (("choice_accuracy", "right", "response"), ("exact_match", "exact", "expected")):
        if hit in records[0]:
            hits = sum(record[hit] for record in records)
            values[name] = hits / len(records)
            values[f"{name}_low"], values[f"{name}_high"] = wilson(hits, len(records))
            most = Counter(record[right] for record in records).most_common(1)[0][1]
            values[f"{name}_majority"] = most / len(records)
    return values | ({"choice_accuracy_chance": 1 / num_choices} if num_choices else {})


def summary(values: dict[str, float]) -> str:
    """The values as one line of text."""
    parts = []
    for name in ("choice_accuracy", "exact_match"):
        if name in values:
            share, low, high, most = (values[f"{name}{end}"] for end in ("", "_low", "_high", "_majority"))
            chance = f", chance {values[f'{name}_chance']:.1%}" if f"{name}_chance" in values else ""
            parts.append(
                f"{name.replace('_', ' ')} {share:.1%} (95%: {low:.1%} to {high:.1%}; always the most frequent answer: "
                f"{most:.1%}{chance})"
            )
    return f"test: {values['examples']:.0f} examples, " + "; ".join(parts)


def check_start(trainer: pl.Trainer, data: Any) -> None:
    """What a test's callbacks can refuse before the text is prepared, which takes minutes."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, AnswerTest):
            callback.check_start(trainer, data)
