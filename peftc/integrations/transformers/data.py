"""Training data: JSON Lines become conversations or texts, these become token ids with labels, these become batches.

A label is -100 (not trained) for the prompt, the padding, and whatever the chat template puts after the stop token. The stop
token itself is trained, also where it is the padding token as well. Every bad line is reported, with its number, at once.
"""

from __future__ import annotations

import errno
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peftc import rules
from peftc.config.json_text import has_surrogate
from peftc.diagnostics import Collector, Diagnostic, PeftcError, Where, did_you_mean, warn
from peftc.limits import MAX_DATA_LINE, MOST_LINES_TOLD

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

#: Label of a position that is not trained; what PyTorch's cross entropy ignores.
IGNORED = -100
EXPECT = "expect"
ROLES = ("system", "user", "assistant", "tool")
#: A line has the keys of one of these forms.
#: Besides, any line may have `expect`: words that a right answer holds. Training does not read it.
FORMS: tuple[tuple[str, ...], ...] = (("messages",), ("question", "answer"), ("prompt", "completion"), ("text",))

Message = Mapping[str, str]

_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class Example:
    """One line of data. `messages` is a conversation for the chat template; otherwise `prompt` and `completion` are plain text.

    With an empty `prompt` the whole text is trained.
    """

    where: Where
    messages: tuple[Message, ...] = ()
    prompt: str = ""
    completion: str = ""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids and as many labels, -100 where nothing is to be learnt."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def trained(self) -> int:
        """Number of tokens that are learnt. The first position has no prediction and never counts."""
        return sum(label != IGNORED for label in self.labels[1:])


# Reading --------------------------------------------------------------------------------------------------------------


def read_examples(path: str | Path) -> list[Example]:
    """The examples of a JSON Lines file: one object a line, blank lines skipped.

    A line is `{"messages": [{"role", "content"}, …]}`, `{"question", "answer"}`, `{"prompt", "completion"}` or `{"text"}`.
    Raises `PeftcError` with every bad line if the file cannot be read or any line cannot be used. Warns of keys that are
    not read.
    """
    problems = Collector()
    examples: list[Example] = []
    unread: Counter[str] = Counter()
    for where, text in _lines(Path(path)):
        found = _parse_line(text, where, told=len(problems) < MOST_LINES_TOLD)
        if isinstance(found, Diagnostic):
            problems.add(found)
        else:
            examples.append(found[0])
            unread.update(found[1])
    if problems.errors:
        raise PeftcError(capped(problems.errors, str(path)))
    if not examples:
        raise PeftcError(
            rules.NO_EXAMPLES(f"`{path}` holds no examples", fix=_forms_told(), where=Where(file=str(path)))
        )
    if unread:
        warn([_unread(unread, str(path))])
    return examples


def capped(problems: Sequence[Diagnostic], file: str) -> Iterator[Diagnostic]:
    """The first problems, and one more that says how many there are besides."""
    yield from problems[:MOST_LINES_TOLD]
    if len(problems) > MOST_LINES_TOLD:
        more = len(problems) - MOST_LINES_TOLD
        yield rules.DATA_LINE(
            f"{more:,} more {'line' if more == 1 else 'lines'} of `{file}` cannot be used",
            fix="Mend those above first; the others are often of the same kind.",
            where=Where(file=file),
        )


def _lines(path: Path) -> Iterator[tuple[Where, str]]:
    number = 0
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is a folder" if path.is_dir() else "it is not a regular file")
        with path.open("rb") as file:
            for number, raw in enumerate(iter(partial(file.readline, MAX_DATA_LINE + 1), b""), start=1):
                if len(raw) > MAX_DATA_LINE:
                    what = f"A line of `{path}` has more than {MAX_DATA_LINE:,} bytes"
                    place = Where(file=str(path), line=number)
                    raise PeftcError(rules.DATA_UNREADABLE(what, fix="Write one example a line.", where=place))
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield Where(file=str(path), line=number), text
    except PeftcError:
        raise
    except UnicodeDecodeError as error:
        where = Where(file=str(path), line=number)
        problem = rules.DATA_UNREADABLE(f"`{path}` is not UTF-8: {error.reason}", fix="Save it as UTF-8.", where=where)
        raise PeftcError(problem) from None
    except (OSError, ValueError) as error:  # the latter of a NUL in the name
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        what = f"`{path}` cannot be read: {reason}"
        fix = "Check `train.data` of the spec; a relative path starts at the spec's folder."
        raise PeftcError(rules.DATA_UNREADABLE(what, fix=fix, where=Where(file=str(path)))) from None


def _parse_line(text: str, where: Where, told: bool = True) -> Diagnostic | tuple[Example, set[str]]:
    """The example and the keys that nothing reads, or what is wrong with the line, with hints if it is `told`."""
    try:
        data = json.loads(text)
    except RecursionError:
        return rules.DATA_LINE("The line is nested too deeply", fix=_forms_told(), where=where)
    except json.JSONDecodeError as error:
        place = Where(file=where.file, line=where.line, column=error.colno)
        return rules.DATA_LINE(f"The line is not JSON: {error.msg}", fix="Write one JSON object a line.", where=place)
    except ValueError as error:  # a number of more digits than Python converts
        return rules.DATA_LINE(f"The line is not JSON: {error}", fix="Write one JSON object a line.", where=where)
    if has_surrogate(text) or (_ESCAPED.search(text) and _halves(data)):
        what = "The line holds half of a surrogate pair, which is not a character"
        return rules.DATA_LINE(what, fix="Correct the escape, or leave the character out.", where=where)
    if not isinstance(data, dict):
        return rules.DATA_LINE(f"The line is {_kind(data)}, not an object", fix=_forms_told(), where=where)
    fitting = [form for form in FORMS if set(form) <= data.keys()]
    if len(fitting) != 1:
        return _no_form(data, fitting, where, told)
    made = (
        _conversation(data["messages"], where) if fitting[0] == ("messages",) else _text_pair(data, fitting[0], where)
    )
    return made if isinstance(made, Diagnostic) else (made, data.keys() - {*fitting[0], EXPECT})


def _halves(data: Any) -> bool:
    """Whether any text in the data has half of a surrogate pair; a whole pair of escapes is one character by now."""
    if isinstance(data, str):
        return has_surrogate(data)
    if isinstance(data, dict):
        return any(_halves(part) for item in data.items() for part in item)
    return isinstance(data, list) and any(map(_halves, data))


def _no_form(data: Mapping[str, Any], fitting: Sequence[tuple[str, ...]], where: Where, told: bool) -> Diagnostic:
    if fitting:
        forms = " and ".join(_form_told(form) for form in fitting)
        return rules.DATA_LINE(f"The line is of several forms at once: {forms}", fix="Keep one of them.", where=where)
    known = [key for form in FORMS for key in form]
    shown = list(data)[:8] if told else []
    hints = [hint for key in shown if key not in known and (hint := did_you_mean(key, known))]
    keys = ", ".join(f"`{key}`" for key in list(data)[:8]) or "no keys"
    return rules.DATA_LINE(
        f"The line has {keys}, which is no form of example", fix=" ".join([*hints, _forms_told()]), where=where
    )


def _text_pair(data: Mapping[str, Any], form: tuple[str, ...], where: Where) -> Example | Diagnostic:
    for key in form:
        value = data[key]
        if not isinstance(value, str) or not value.strip():
            told = "empty" if isinstance(value, str) else f"{_kind(value)}, not a string"
            return rules.DATA_LINE(f"`{key}` is {told}", fix=f"Give `{key}` a text.", where=_at(where, key))
    if form == ("question", "answer"):
        question, answer = (
            {"role": role, "content": data[key]} for role, key in zip(("user", "assistant"), form, strict=True)
        )
        return Example(where, messages=(question, answer))
    if form == ("text",):
        return Example(where, completion=data["text"])
    return Example(where, prompt=data["prompt"], completion=data["completion"])


def _conversation(value: object, where: Where) -> Example | Diagnostic:
    if not isinstance(value, list) or not value:
        fix = 'Write `[{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]`.'
        return rules.DATA_LINE(
            f"`messages` is {_kind(value)}, not a list of messages", fix=fix, where=_at(where, "messages")
        )
    for index, message in enumerate(value):
        place = _at(where, f"messages[{index}]")
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            return rules.DATA_LINE("The message lacks `role` or `content`", fix="Give every message both.", where=place)
        role, content = message["role"], message["content"]
        if role not in ROLES:
            hint = did_you_mean(role, ROLES) if isinstance(role, str) else ""
            fix = hint or f"Roles are {', '.join(ROLES)}."
            return rules.DATA_LINE(f"`role` cannot be `{json.dumps(role)}`", fix=fix, where=place)
        if not isinstance(content, str):
            return rules.DATA_LINE(f"`content` is {_kind(content)}, not a string", fix="Give it a text.", where=place)
    if not any(message["role"] == "assistant" and message["content"].strip() for message in value):
        fix = "Add the answer that is to be learnt as a message of the role `assistant`."
        return rules.DATA_LINE("No message is from the assistant", fix=fix, where=_at(where, "messages"))
    return Example(where, messages=tuple({"role": m["role"], "content": m["content"]} for m in value))


def _unread(unread: Mapping[str, int], file: str) -> Diagnostic:
    names = ", ".join(f"`{name}`" for name in sorted(unread)[:8])
    return rules.DATA_KEYS_UNREAD(
        f"{names} {'is' if len(unread) == 1 else 'are'} not read", fix=_forms_told(), where=Where(file=file)
    )


def _at(where: Where, key: str) -> Where:
    return Where(file=where.file, line=where.line, path=f"$.{key}")


def _form_told(form: Sequence[str]) -> str:
    return "`{" + ", ".join(f'"{key}"' for key in form) + "}`"


def _forms_told() -> str:
    *first, last = (_form_told(form) for form in FORMS)
    return f"A line is {', '.join(first)} or {last}."


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    if value == []:
        return "an empty list"
    return kinds.get(type(value), "a number")


# Encoding -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Encoder:
    """Turns examples into token ids and labels with one tokenizer.

    `stops` are the ids that end an answer: those the model stops at when it generates.
    """

    tokenizer: PreTrainedTokenizerBase
    stops: frozenset[int]

    def encode_all(self, examples: Iterable[Example], max_length: int) -> list[Encoded]:
        """All examples, cut at `max_length` tokens. Warns of those that are cut or left with nothing to learn.

        Raises `PeftcError` with every example that the chat template refuses, and if none is left.
        """
        problems = Collector()
        encoded: list[Encoded] = []
        cut: list[Where] = []
        lost: list[Where] = []
        file = ""
        for example in examples:
            file = example.where.file or file
            found = self.encode(example)
            if isinstance(found, Diagnostic):
                problems.add(found)
                continue
            if len(found.input_ids) > max_length:
                found = Encoded(found.input_ids[:max_length], found.labels[:max_length])
                (cut if found.trained else lost).append(example.where)
            if found.trained:
                encoded.append(found)
        if problems.errors:
            raise PeftcError(capped(problems.errors, file))
        if not encoded:
            raise PeftcError(_nothing_left(max_length, file))
        warn(_cut_told(cut, lost, max_length, file))
        return encoded

    def encode(self, example: Example) -> Encoded | Diagnostic:
        """One example, whole; a diagnostic if the chat template does not fit it."""
        if not example.messages:
            return self._encode_text(example.prompt, example.completion)
        if self.tokenizer.chat_template is None:
            return rules.NO_CHAT_TEMPLATE(
                "The tokenizer has no chat template, and the example is a conversation",
                fix='Use an instruct model, or write the data as `{"prompt", "completion"}` or `{"text"}`.',
                where=example.where,
            )
        turns = self._turns(example.messages)
        if isinstance(turns, str):
            return _refused(turns, example.where)
        ids: list[int] = []
        labels: list[int] = []
        for text, is_answer in turns:
            part = self._ids(text)
            ids += part
            labels += self._answer_labels(part) if is_answer else [IGNORED] * len(part)
        while labels[-1] == IGNORED:  # what the template puts after the last stop token
            labels.pop()
        if labels[-1] not in self.stops:  # a template that ends no turn
            labels.append(self._stop)
        return Encoded((*ids[: len(labels)], *labels[len(ids) :]), tuple(labels))

    def prompt(self, messages: Sequence[Message], where: Where) -> Encoded | Diagnostic:
        """The tokens before an answer, exactly as in training; a diagnostic if the chat template refuses them."""
        from jinja2.exceptions import TemplateError

        try:
            ids = self._ids(self._render(messages, for_answer=True))
        except TemplateError as error:
            return _refused(f"The chat template refuses the conversation: {error.message}", where)
        return Encoded(tuple(ids), (IGNORED,) * len(ids))

    def _turns(self, messages: Sequence[Message]) -> list[tuple[str, bool]] | str:
        """The rendered conversation in pieces, each with whether it is an answer; or what the template says against it.

        Each piece is tokenised by itself, so that the tokens before an answer are those that `generate` starts from.
        """
        from jinja2.exceptions import TemplateError

        pieces: list[tuple[str, bool]] = []
        done = ""
        try:
            for index, message in enumerate(messages):
                if message["role"] != "assistant":
                    continue
                if index == 0:
                    return "The conversation begins with an answer, and nothing comes before it"
                for text, is_answer in (
                    (self._render(messages[:index], for_answer=True), False),
                    (self._render(messages[: index + 1], for_answer=False), True),
                ):
                    if not text.startswith(done):
                        return "The chat template rewrites earlier turns, so the answer cannot be told from the prompt"
                    pieces.append((text[len(done) :], is_answer))
                    done = text
        except TemplateError as error:
            return f"The chat template refuses the conversation: {error.message}"
        return pieces

    def _render(self, messages: Sequence[Message], *, for_answer: bool) -> str:
        text = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=for_answer
        )
        assert isinstance(text, str)
        return text

    def _encode_text(self, prompt: str, completion: str) -> Encoded:
        before = list(self.tokenizer(prompt)["input_ids"]) if prompt else []
        after = list(self.tokenizer(completion, add_special_tokens=not prompt)["input_ids"])
        if not after or after[-1] not in self.stops:
            after.append(self._stop)
        if before and before[-1] in self.stops:  # a tokenizer that ends every text
            before.pop()
        return Encoded((*before, *after), (*[IGNORED] * len(before), *after))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _answer_labels(self, ids: Sequence[int]) -> list[int]:
        """The ids up to and including the last stop token; what follows (a newline) is not trained."""
        last = max((index for index, token in enumerate(ids) if token in self.stops), default=len(ids) - 1)
        return [token if index <= last else IGNORED for index, token in enumerate(ids)]

    @property
    def _stop(self) -> int:
        end = self.tokenizer.eos_token_id
        return end if isinstance(end, int) else min(self.stops)


def _refused(what: str, where: Where) -> Diagnostic:
    return rules.TEMPLATE_REFUSES(what, fix="Leave out or reorder messages until the template takes them.", where=where)


def _nothing_left(max_length: int, file: str) -> Diagnostic:
    return rules.NO_EXAMPLES(
        f"No example has anything to learn within {max_length:,} tokens",
        fix="Raise `train.max_length`, or shorten the prompts.",
        where=Where(file=file or None),
    )


def _cut_told(cut: Sequence[Where], lost: Sequence[Where], max_length: int, file: str) -> Iterator[Diagnostic]:
    for places, told in ((cut, "cut at"), (lost, "left out: their prompts alone fill")):
        if places:
            count = f"{len(places):,} {'example is' if len(places) == 1 else 'examples are'}"
            lines = ", ".join(str(place.line) for place in places[:8]) + (", …" if len(places) > 8 else "")
            yield rules.TOO_LONG(
                f"{count} {told} {max_length:,} tokens (line {lines})",
                fix="Raise `train.max_length`, or shorten them.",
                where=Where(file=file or None),
            )


def stop_ids(tokenizer: PreTrainedTokenizerBase, generation_config: Any | None) -> frozenset[int]:
    """The ids that end an answer: the tokenizer's end token and whatever the model stops generating at."""
    found = [tokenizer.eos_token_id]
    configured = None if generation_config is None else generation_config.eos_token_id
    found += configured if isinstance(configured, (list, tuple)) else [configured]
    return frozenset(token for token in found if isinstance(token, int))


# Batches --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads a batch to its longest row. Where the padding lies is told by position, never by the padding token's id."""

    pad_id: int
    side: Literal["left", "right"] = "right"

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels`, each of shape `(rows, longest)` and of type int64."""
        import torch

        longest = max(len(row.input_ids) for row in rows)

        def padded(values: Sequence[int], fill: int) -> list[int]:
            padding = [fill] * (longest - len(values))
            return [*padding, *values] if self.side == "left" else [*values, *padding]

        return {
            "input_ids": torch.tensor([padded(row.input_ids, self.pad_id) for row in rows]),
            "attention_mask": torch.tensor([padded([1] * len(row.input_ids), 0) for row in rows]),
            "labels": torch.tensor([padded(row.labels, IGNORED) for row in rows]),
        }


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with; any will do, since padding is masked."""
    return tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else tokenizer.eos_token_id or 0
