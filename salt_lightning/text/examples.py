"""Fine-tuning examples: what a row of data asks, and what is learned from it.

    fields of a row  ->  conversation: messages of user and assistant     Examples.conversation
    conversation     ->  examples: segments of text, learned or not       segments

A plain example is also a conversation: its prompt is the user's message, its response the assistant's.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import takewhile
from string import Formatter
from typing import Any, NamedTuple

from salt_lightning.errors import ConfigError, few, one_line, refuse, wrong_kinds

Message = dict[str, Any]  # role, content, and what else a chat template may write (tool_calls)
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys of what the assistant thinks before it answers
Segment = tuple[str, bool]  # text, and whether it is learned
_Heard = tuple[str, bool, bool]  # a role with text; not in the first message; beside tool calls


class Conversation(NamedTuple):
    """A row's messages up to the last one that is learned, and the tools that the assistant may call."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None

    def __str__(self) -> str:
        return str(self.messages)

    def asked(self) -> str:
        """All text before the first answer to a question; it draws the split, so equal beginnings share one."""
        answers = [i for i, message in enumerate(self.messages) if i and _is_learned(message)]
        said = "\0".join(message["content"] for message in self.messages[: answers[0] if answers else 0])
        return said if self.tools is None else f"{said}\0{json.dumps(self.tools, default=str)}"


@dataclass(frozen=True)
class Examples:
    r"""How rows of data become examples for fine-tuning: either `prompt` and `response`, or `messages`.

    Args:
        prompt: Text before the response, with columns in braces: "Question: {question}\nAnswer:" (in YAML, where
            double quotes make \n a new line). {answers[text][0]} is a value inside a column; {label:0=no|1=yes}
            replaces values with words.
        response: Text to learn, in the same form, with the space that separates it from the prompt: " {answer}".
        messages: For the tokenizer's chat template: a column of conversations (lists of role and content), or a list
            of such messages whose contents are templates. What the assistant says is learned.
        tools: Column of tools that the assistant may call, for the chat template: a list of tools, or JSON of one.
            null: no tools, and a column named "tools" is an error; "" ignores such a column.
    """

    prompt: str = ""
    response: str = ""
    messages: str | list[dict[str, str]] = ""
    tools: str | None = None

    def __post_init__(self) -> None:
        refuse(wrong_kinds(Examples, vars(self), "--data.examples."))

    @property
    def given(self) -> bool:
        """Whether rows are examples, not documents."""
        return bool(self.prompt or self.response or self.messages)

    @property
    def chat_column(self) -> str:
        """The column of conversations; "" if `messages` are templates or not set."""
        return self.messages if isinstance(self.messages, str) else ""

    def inputs(self) -> dict[str, Any]:
        """Everything that determines what is learned from a row, as plain data."""
        return asdict(self)

    def problems(self, tokenizer: str) -> list[str]:
        """All that is wrong with the settings, together with --data.tokenizer."""
        if self.messages == []:
            return ["--data.examples.messages [] has no message; give messages of user and assistant, or leave it out"]
        if not self.given:
            return []
        if tokenizer == "train":
            return [
                "--data.tokenizer: 'train' makes a new tokenizer, but examples need the one that the student was "
                "pretrained with; give RUN/tokenizer"
            ]
        if bool(self.messages) == bool(self.prompt or self.response):
            return [
                "--data.examples: give prompt and response, or messages (configs/tasks/chat.yaml), not both; to clear "
                "those of a config, use --data.examples.prompt '' --data.examples.response ''"
            ]
        if self.tools and not self.messages:
            return [f"--data.examples.tools {self.tools!r} needs a chat template; give messages, or leave it out"]
        if self.chat_column:
            return []
        wrong = [problem for setting, template in self._templates() for problem in _problems(setting, template)]
        messages = self.messages if isinstance(self.messages, list) else []
        wrong += [
            f"--data.examples.messages: message {i} has {few(map(repr, others))}, but a message of templates has "
            "only role and content; put what else a chat template reads into a column of conversations"
            for i, message in enumerate(messages, 1)
            if (others := [key for key in message if key not in ("role", "content")])
        ]
        if self.messages and "" in self._roles():
            wrong.append(
                f"--data.examples.messages: message {self._roles().index('') + 1} has no role; give one, e.g. user"
            )
        elif self.messages and self._roles()[-1:] != ["assistant"]:
            wrong.append(f"--data.examples.messages: the last of the roles {self._roles()} must be assistant")
        return wrong

    def columns(self) -> dict[str, str]:
        """Column -> the setting that names it."""
        tools = {self.tools: "examples.tools"} if self.tools else {}
        if self.chat_column:
            return {self.chat_column: "examples.messages", **tools}
        read = {_column(field): setting for setting, template in self._templates() for field, _ in _fields(template)}
        return {**read, **tools}

    def literals(self) -> list[tuple[str, str]]:
        """(setting, what it writes itself) of templates that no chat template reads."""
        if self.messages:
            return []
        parts = ((setting, Formatter().parse(template)) for setting, template in self._templates())
        written = ((setting, text, words or "") for setting, parsed in parts for text, _, words, _ in parsed)
        return [(setting, text + " ".join(re.findall(r"=([^|]*)", words))) for setting, text, words in written]

    def conversation(self, fields: dict[str, Any], of_table: bool = False) -> Conversation | None:
        """A row's example, up to its last response; None if a value is null or nothing is learned.

        Args:
            fields: values by column.
            of_table: the row is from parquet or the hub, where every row has all keys, and every call those of all
                tools: null means that the key is absent.

        Raises:
            ConfigError: a value is neither text nor a number, or a template has no word for it.
        """
        if self.chat_column:
            messages = _messages(fields[self.chat_column], of_table)
        else:
            texts = [_filled(setting, template, fields) for setting, template in self._templates()]
            if None in texts:
                return None
            messages = [{"role": role, "content": str(text)} for role, text in zip(self._roles(), texts, strict=True)]
            for message, (_, template) in zip(messages, self._templates(), strict=True):
                if not any(_fields(template)):  # a fixed answer is a demonstration: do not learn it in every row
                    message["train"] = False
        answers = [i for i, message in enumerate(messages) if _is_learned(message)]
        if not answers:
            return None
        return Conversation(messages[: answers[-1] + 1], _tools(fields[self.tools], of_table) if self.tools else None)

    def _roles(self) -> list[str]:
        return [m.get("role", "") for m in self.messages if isinstance(m, dict)] or ["user", "assistant"]

    def _templates(self) -> list[tuple[str, str]]:
        if isinstance(self.messages, list):
            return [("examples.messages", message.get("content", "")) for message in self.messages]
        return [("examples.prompt", self.prompt), ("examples.response", self.response)]


_WEIGHTS = ("weight", "train")


def _is_learned(message: Message) -> bool:
    """Whether the assistant says something, and neither OpenAI's weight 0 nor axolotl's train: false excludes it."""
    says = message["role"] == "assistant" and (message["content"].strip() or message.get("tool_calls"))
    return bool(says) and 0 not in map(message.get, _WEIGHTS)  # False is 0


def segments(conversation: Conversation, render: Callable[..., Any] | None) -> list[list[Segment]]:
    """Cut the text of a conversation where the assistant's answers begin and end.

    This gives one example, unless the template writes earlier messages differently later on (Qwen3 drops their
    thinking): then another example begins with the text before the next answer, so that each answer is learned after
    the text that generation would see. It gives none if nothing comes before the only answer.

    Args:
        conversation: ends with the assistant.
        render: the chat template, (messages, add_generation_prompt=, tools= if there are any) -> text; None: contents
            are concatenated. What is learned starts where generation would start, and includes the mark that ends
            the turn.

    Raises:
        ConfigError: the chat template refuses the conversation, does not write all of it, begins an answer
            differently from its generation prompt, or writes that where no answer is asked for.
    """
    messages, tools = conversation
    if render is None:
        return [[(message["content"], message["role"] == "assistant") for message in messages]]
    if _always_asks(render):
        raise ConfigError(
            "--data.examples.messages: the tokenizer's chat template writes the beginning of an answer even where "
            "none is asked for, so the student would learn to write it after its answers; put that part of the "
            "template into {% if add_generation_prompt %} ... {% endif %}"
        )
    write = partial(render, tools=tools) if tools else render
    messages = _readable(messages, write)
    text, asked, heard, found = "", 0, set[_Heard](), list[list[Segment]]()
    for i, message in enumerate(messages):
        if not _is_learned(message) or (i == 0 and not _begins(write)):
            continue
        try:
            before, after = _around(messages, i, write)
            dropped = _dropped(messages, range(asked, i + 1), heard, write, (before, after))
            if tools and (before, after) == _around(messages, i, render):
                dropped = "tools"
        except Exception as error:
            if messages[0]["role"] == "assistant":  # no template promises to accept that
                return []
            raise ConfigError(
                f"--data.examples.messages: the chat template fails ({one_line(error)}){_odd_calls(messages)}"
            ) from error
        if dropped:
            raise ConfigError(
                f"--data.examples.messages: the tokenizer's chat template does not write {dropped}; give the tokenizer "
                "a template that does, or leave it out of the data"
            )
        answer = _answer(before, after, messages[i - 1]["content"].strip() if i else "", message["content"].strip())
        if answer is None and i == 0:  # the template writes BOS or a system text before a first message
            continue
        if answer is None:
            raise ConfigError(
                "--data.examples.messages: the tokenizer's chat template begins an answer differently from its "
                f"generation prompt ({before[-20:]!r}), so the assistant's text cannot be located; give the tokenizer "
                "a template whose answers begin with its generation prompt, or use --data.examples.prompt and .response"
            )
        if not (found and before.startswith(text)):
            found, text = [*found, []], ""
        found[-1] += [(before[len(text) :], False), (answer, True)]
        text, asked = before + answer, i + 1
    return found


def _readable(messages: list[Message], render: Callable[..., str]) -> list[Message]:
    """The messages, with arguments of tool calls as objects where the chat template needs that.

    In OpenAI's format they are JSON strings. Some templates take no string (Qwen3.5, GLM) or write it in quotes
    (Llama 3.1, Qwen2.5); DeepSeek's takes only strings.
    """
    texts: list[str] = []
    parsed = [{**m, "tool_calls": _parsed(m["tool_calls"], texts)} if m.get("tool_calls") else m for m in messages]
    with suppress(Exception):
        written = render(messages) if texts else ""
        if not any(json.dumps(text, ensure_ascii=False) in written for text in texts):
            return messages
    return parsed


def _odd_calls(messages: list[Message]) -> str:
    """Names tool calls that are no list of objects, which nearly all chat templates expect; "" if there are none."""
    odd = [calls for message in messages if (calls := message.get("tool_calls")) and not _are_objects(calls)]
    return f"; tool_calls should be a list of objects, not {str(odd[0])[:60]!r}" if odd else ""


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)


def _parsed(part: Any, texts: list[str]) -> Any:
    """Tool calls with JSON arguments parsed, if they are an object; their strings are added to `texts`."""
    if isinstance(part, list):
        return [_parsed(each, texts) for each in part]
    if not isinstance(part, dict):
        return part
    found = {key: _parsed(value, texts) for key, value in part.items()}
    if isinstance(text := part.get("arguments"), str):
        with suppress(ValueError, RecursionError):
            if isinstance(value := json.loads(text), dict):
                found["arguments"] = value
                texts.append(text)
    return found


@lru_cache(8)  # once for each template
def _always_asks(render: Callable[..., str]) -> bool:
    """Whether the chat template ignores add_generation_prompt and always writes the prompt (the first of Llama 3's).

    Others ignore it as well, but write nothing more where an answer is to follow (Mistral's).
    """
    question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
    try:
        asked, not_asked = (render([question], add_generation_prompt=value) for value in (True, False))
        once = render([question, answer], add_generation_prompt=False)
        twice = render([question, answer, question], add_generation_prompt=False)
    except Exception:  # of a template that refuses such a conversation
        return False
    if asked != not_asked or not once.startswith(asked) or twice.startswith(once.rstrip()):
        return False
    shared = takewhile(lambda ends: ends[0] == ends[1], zip(reversed(asked), reversed(once), strict=False))
    length = sum(1 for _ in shared)  # of the mark that ends a turn, and the prompt
    return length > 0 and twice.startswith(once[:-length])  # else it writes turns differently later


def _begins(render: Callable[..., str]) -> bool:
    """Whether the chat template writes text before the first message, so that an answer can be learned there."""
    try:
        return bool(render([], add_generation_prompt=True))
    except Exception:  # many templates read the first message's role
        return False


def _around(messages: list[Message], answer: int, render: Callable[..., str]) -> tuple[str, str]:
    """The text up to where an answer begins, and up to where it ends."""
    before = render(messages[:answer], add_generation_prompt=True)
    return before, render(messages[: answer + 1], add_generation_prompt=False)


def _answer(before: str, after: str, asked: str, said: str) -> str | None:
    """What follows `before` in `after`, without whitespace after the mark that ends it; None: `before` is not in it.

    Mistral v0.3 writes the system text only before the last question: the two texts are equal from that question on.
    """
    if not after.startswith(before):
        before = before[before.rfind(asked) :] if asked and asked in before else ""
        at = after.rfind(before, 0, max(0, after.rfind(said)))  # the answer may quote its question
        before = after[: at + len(before)] if before and at >= 0 else ""
    return after[len(before) :].rstrip() if before else None


def _dropped(
    messages: list[Message], asked: range, heard: set[_Heard], render: Callable[..., str], written: tuple[str, str]
) -> str:
    """A part of an answer, or of the messages before it, that the chat template does not write; "": it writes all.

    If the text is the same without a part, it is not written. `heard`: parts found written before, not checked again.
    """
    for i in asked:
        message, others = messages[i], dict[str, Message]()
        kind = message["role"], i > 0, bool(message.get("tool_calls"))
        if message["content"].strip() and kind not in heard:
            others[f"what the role {message['role']} says"] = {**message, "content": message["content"] + "?"}
            heard.add(kind)
        if calls := message.get("tool_calls"):
            others["tool_calls"] = {key: part for key, part in message.items() if key != "tool_calls"}
            if isinstance(calls, list) and len(calls) > 1:  # gpt-oss's writes only the first
                others["all tool_calls"] = {**message, "tool_calls": calls[:-1]}
        thoughts = [key for key in _THOUGHTS if message.get(key)] if i == asked[-1] else []  # many drop earlier ones
        if thoughts:
            others[thoughts[0]] = {key: part for key, part in message.items() if key not in _THOUGHTS}
        for what, other in others.items():
            if _around([*messages[:i], other, *messages[i + 1 :]], asked[-1], render) == written:
                return what
    return ""


# --- templates ---


def _fields(template: str) -> Iterator[tuple[str, str]]:
    """(column and what follows it in brackets, words) of each field."""
    for _, field, words, conversion in Formatter().parse(template):
        if field is not None:
            yield f"{field}!{conversion}" if conversion else field, words or ""


def _column(field: str) -> str:
    return field.partition("[")[0]


def _problems(setting: str, template: str) -> list[str]:
    where = f"--data.{setting}: {template!r}"
    try:
        fields = list(_fields(template))
    except ValueError as error:
        return [f"{where} is not a template ({error}); write {{column}} for a column, {{{{ and }}}} for braces"]
    if not template.strip():
        return [f"{where} is empty; give a template with at least one {{column}}"]
    wrong = [f for f, _ in fields if not _is_name(_column(f)) or "." in f]
    if wrong or (not fields and setting != "examples.messages"):
        found = f"{{{wrong[0]}}} is not a column" if wrong else "it names no column"
        return [f"{where}: {found}; write {{column}}, {{column[key][0]}} or {{column:value=word|value=word}}"]
    pairs = [pair for _, words in fields for pair in words.split("|") if words and "=" not in pair]
    return [f"{where}: {pairs[0]!r} after the colon has no =; write {{column:value=word|value=word}}"] if pairs else []


def _is_name(column: str) -> bool:
    """Whether it can be the name of a column: a word, or words with a space, a hyphen or a joiner between them."""
    words = re.split("[ \u200c\u200d-]", column)
    return words[0].isidentifier() and all(word and f"_{word}".isidentifier() for word in words)


def _filled(setting: str, template: str, fields: dict[str, Any]) -> str | None:
    """The template filled with a row's values; None if one of them is null."""
    text, formatter = "", Formatter()
    for literal, field, words, _ in formatter.parse(template):
        text += literal
        if field is None:
            continue
        try:
            value, _ = formatter.get_field(field, (), fields)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"--data.{setting}: {{{field}}} is not in the row ({type(error).__name__})") from error
        if value is None:
            return None
        if not isinstance(value, str | int | float):
            hint = "" if "[" in field else f"; name a value inside it, e.g. {{{field}[0]}}"
            raise ConfigError(f"--data.{setting}: {{{field}}} holds {type(value).__name__}, not text or a number{hint}")
        names = dict(pair.split("=", 1) for pair in words.split("|")) if words else {}
        if names and str(value) not in names:
            raise ConfigError(
                f"--data.{setting}: {{{field}}} holds {str(value)[:40]!r}, but has words only for {', '.join(names)}"
            )
        text += names.get(str(value), str(value))
    return text


def _messages(value: Any, of_table: bool) -> list[Message]:
    if value is None:
        return []
    messages: list[Message] = []
    for message in value if isinstance(value, list) else [None]:
        if not isinstance(message, dict):
            raise _no_conversation(value)
        said = {key: _without_nulls(part) if of_table else part for key, part in message.items() if part is not None}
        if "content" not in said and ("content" in message or said.get("tool_calls")):
            if said.get("role") != "assistant":
                return []
            said["content"] = ""
        if not all(isinstance(said.get(key), str) for key in ("role", "content")):
            raise _no_conversation(value)
        for key in _WEIGHTS if said["role"] == "assistant" else ():
            if said.get(key) not in (None, 0, 1) and said[key] == said[key]:  # NaN: a null of pandas
                wrong = f"{key} {said[key]!r} of an answer must be 0 or 1; leave it out"
                raise ConfigError(f"--data.examples.messages: {wrong}")
        messages.append(said)
    return messages


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _tools(value: Any, of_table: bool) -> list[dict[str, Any]] | None:
    """The tools in a column's value; tables often hold JSON, since each tool has other arguments."""
    try:
        value = value.strip() if isinstance(value, str) else value
        tools = json.loads(value) if isinstance(value, str) and value else value or None
    except (ValueError, RecursionError):
        tools = [value]
    if tools and not _are_objects(tools):
        raise ConfigError(
            f"--data.examples.tools: the column must hold a list of tools or JSON of one, not {str(value)[:60]!r}"
        )
    return (_without_nulls(tools) if of_table and not isinstance(value, str) else tools) or None


def _no_conversation(value: Any) -> ConfigError:
    return ConfigError(
        "--data.examples.messages: a conversation must be a list of messages with role and content as text, not "
        f"{str(value)[:60]!r}; docs/fine-tuning.md shows how to convert other forms"
    )
