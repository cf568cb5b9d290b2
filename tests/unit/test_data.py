"""Training data: what is read, what is refused with which line, and exactly which tokens are trained."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from peftc import rules
from peftc.diagnostics import PeftcError, PeftcWarning, Where
from peftc.integrations.transformers import data
from peftc.integrations.transformers.data import (
    IGNORED,
    Collator,
    Encoded,
    Encoder,
    Example,
    pad_id,
    read_examples,
    stop_ids,
)
from peftc.limits import MOST_LINES_TOLD
from tests.integration import tiny

ASKED = {"question": "Why?", "answer": "So."}


def encoder(template: str | None = tiny.TEMPLATE) -> Encoder:
    tokenizer = tiny.tokenizer(template)
    return Encoder(tokenizer, stop_ids(tokenizer, None))


def spoken(encoded: Encoded) -> tuple[str, str]:
    """The text before the first trained token, and the trained text."""
    tokenizer = tiny.tokenizer()
    trained = [token for token in encoded.labels if token != IGNORED]
    before = encoded.input_ids[: next(i for i, label in enumerate(encoded.labels) if label != IGNORED)]
    return tokenizer.decode(before), tokenizer.decode(trained)


def example(*turns: tuple[str, str]) -> Example:
    return Example(Where(line=1), messages=tuple({"role": role, "content": text} for role, text in turns))


# Reading --------------------------------------------------------------------------------------------------------------


def test_all_forms_are_read(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    rows = [ASKED, {"messages": messages}, {"prompt": "2+2=", "completion": "4"}, {"text": "Once."}]
    found = read_examples(tiny.write_lines(tmp_path / "a.jsonl", rows))
    assert found[0].messages == found[1].messages == tuple(messages)
    assert [(e.prompt, e.completion) for e in found[2:]] == [("2+2=", "4"), ("", "Once.")]
    assert [e.where.line for e in found] == [1, 2, 3, 4]


def test_blank_lines_and_a_byte_order_mark_are_skipped_and_lines_still_counted(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf\n\n" + json.dumps(ASKED).encode() + b"\r\n   \n")
    assert [e.where.line for e in read_examples(file)] == [3]


BAD_LINES = [
    ('{"question": "a", "anwser": "b"}', "Did you mean `answer`?"),
    ("[1]", "a list, not an object"),
    ("7", "a number, not an object"),
    ("{", "not JSON"),
    ("[" * 100_000, "nested too deeply"),
    ("9" * 5000, "not JSON"),
    ("{}", "no keys"),
    ('{"question": 3, "answer": "x"}', "`question` is a number, not a string"),
    ('{"question": "a", "answer": "  "}', "`answer` is empty"),
    ('{"text": null}', "`text` is null, not a string"),
    ('{"text": "a", "prompt": "b", "completion": "c"}', "several forms at once"),
    ('{"text": "\\ud800"}', "half of a surrogate pair"),
    ('{"messages": [{"role": "assistant", "content": "a", "x": {"\\udc00": 1}}]}', "half of a surrogate pair"),
    ('{"messages": []}', "an empty list"),
    ('{"messages": "hi"}', "a string, not a list"),
    ('{"messages": [{"role": "user"}]}', "lacks `role` or `content`"),
    ('{"messages": [{"role": "asistant", "content": "x"}]}', "Did you mean `assistant`?"),
    ('{"messages": [{"role": 5, "content": "x"}]}', "`role` cannot be `5`"),
    ('{"messages": [{"role": "assistant", "content": ["x"]}]}', "`content` is a list"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "No message is from the assistant"),
]


@pytest.mark.parametrize(("line", "told"), BAD_LINES, ids=[told for _, told in BAD_LINES])
def test_a_bad_line_is_told_with_its_number(tmp_path: Path, line: str, told: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f"{json.dumps(ASKED)}\n{line}\n", encoding="utf-8")
    with pytest.raises(PeftcError) as raised:
        read_examples(file)
    (problem,) = raised.value.diagnostics
    assert problem.code == rules.DATA_LINE.code
    assert told in str(problem)
    assert (problem.where.file, problem.where.line) == (str(file), 2)


def test_a_pair_of_escapes_is_one_character(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "\\ud83d\\ude00"}\n', encoding="utf-8")
    assert read_examples(file)[0].completion == "\U0001f600"


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, told in (
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path, "a folder"),
        (tmp_path / "a\0b", "null byte"),
    ):
        with pytest.raises(PeftcError, match=told) as raised:
            read_examples(path)
        assert raised.value.diagnostics[0].code == rules.DATA_UNREADABLE.code


def test_a_line_without_an_end_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MAX_DATA_LINE", 40)
    tiny.write_lines(tmp_path / "a.jsonl", [{"text": "short"}, {"text": "long" * 20}])
    with pytest.raises(PeftcError, match="more than 40 bytes") as raised:
        read_examples(tmp_path / "a.jsonl")
    assert raised.value.diagnostics[0].where.line == 2


def test_all_bad_lines_are_told_at_once_up_to_a_limit(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("nope\n" * (MOST_LINES_TOLD + 5), encoding="utf-8")
    with pytest.raises(PeftcError) as raised:
        read_examples(file)
    *told, last = raised.value.diagnostics
    assert [d.where.line for d in told] == list(range(1, MOST_LINES_TOLD + 1))
    assert "5 more lines" in last.what


def test_keys_that_nothing_reads_are_warned_of(tmp_path: Path) -> None:
    file = tiny.write_lines(tmp_path / "a.jsonl", [{**ASKED, "source": "web", "expect": ["so"]}])
    with pytest.warns(PeftcWarning, match=r"`source` is not read") as told:
        read_examples(file)
    (warning,) = [item.message for item in told if isinstance(item.message, PeftcWarning)]
    assert warning.diagnostic.code == rules.DATA_KEYS_UNREAD.code
    assert "`expect`" not in warning.diagnostic.what


@pytest.mark.parametrize(
    ("content", "code", "told"),
    [
        (None, rules.DATA_UNREADABLE, "No such file"),
        (b"\n \n", rules.NO_EXAMPLES, "holds no examples"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', rules.DATA_UNREADABLE, "not UTF-8"),
    ],
)
def test_files_that_give_nothing(tmp_path: Path, content: bytes | None, code: rules.Rule, told: str) -> None:
    file = tmp_path / "a.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(PeftcError, match=told) as raised:
        read_examples(file)
    assert raised.value.diagnostics[0].code == code.code


# Encoding -------------------------------------------------------------------------------------------------------------


def test_the_prompt_is_masked_and_the_stop_token_trained() -> None:
    found = encoder().encode(example(("user", "Why?"), ("assistant", "So.")))
    assert isinstance(found, Encoded)
    before, trained = spoken(found)
    assert before == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert trained == "So.<|im_end|>"
    assert found.labels[-1] == found.input_ids[-1] == tiny.tokenizer().eos_token_id, "nothing after the stop token"


def test_the_tokens_before_an_answer_are_those_that_generation_starts_from() -> None:
    found = encoder().encode(example(("user", "Why?"), ("assistant", "So.")))
    prompt = encoder().prompt([{"role": "user", "content": "Why?"}], Where())
    assert isinstance(found, Encoded) and isinstance(prompt, Encoded)
    assert found.input_ids[: len(prompt.input_ids)] == prompt.input_ids


def test_every_answer_of_a_conversation_is_trained_and_nothing_else() -> None:
    found = encoder().encode(
        example(("system", "Be brief."), ("user", "A?"), ("assistant", "B."), ("user", "C?"), ("assistant", "D."))
    )
    assert isinstance(found, Encoded)
    assert spoken(found)[1] == "B.<|im_end|>D.<|im_end|>"


def test_a_turn_after_the_last_answer_is_left_out() -> None:
    with_more = encoder().encode(example(("user", "A?"), ("assistant", "B."), ("user", "C?")))
    assert with_more == encoder().encode(example(("user", "A?"), ("assistant", "B.")))


def test_a_template_that_ends_no_turn_gets_the_stop_token() -> None:
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    found = encoder(template).encode(example(("user", "A?"), ("assistant", "B.")))
    assert isinstance(found, Encoded)
    assert spoken(found) == ("user: A?\nassistant: ", "B.\n<|im_end|>")


def test_plain_texts() -> None:
    whole = encoder().encode(Example(Where(), completion="Once."))
    pair = encoder().encode(Example(Where(), prompt="2+2=", completion="4"))
    assert isinstance(whole, Encoded) and isinstance(pair, Encoded)
    assert spoken(whole) == ("", "Once.<|im_end|>")
    assert spoken(pair) == ("2+2=", "4<|im_end|>")


@pytest.mark.parametrize(
    ("template", "code", "told"),
    [
        (None, rules.NO_CHAT_TEMPLATE, "no chat template"),
        ("{{ raise_exception('Roles must alternate') }}", rules.TEMPLATE_REFUSES, "Roles must alternate"),
        ("{{ messages[-1]['content'] }}", rules.TEMPLATE_REFUSES, "rewrites earlier turns"),
    ],
)
def test_templates_that_do_not_fit(template: str | None, code: rules.Rule, told: str) -> None:
    rows = [example(("user", "A?"), ("assistant", "B.")), example(("user", "C?"), ("assistant", "D."))]
    with pytest.raises(PeftcError, match=told) as raised:
        encoder(template).encode_all(rows, 100)
    assert [d.code for d in raised.value.diagnostics] == [code.code] * 2


def test_an_answer_to_nothing_is_told() -> None:
    with pytest.raises(PeftcError, match="begins with an answer") as raised:
        encoder().encode_all([example(("assistant", "A."), ("user", "B?"))], 100)
    assert [d.code for d in raised.value.diagnostics] == [rules.TEMPLATE_REFUSES.code]


def test_long_examples_are_cut_or_left_out_with_a_warning() -> None:
    rows = [
        Example(Where(line=1), prompt="ab", completion="cd"),
        Example(Where(line=2), prompt="ab", completion="cdefghij"),
        Example(Where(line=3), prompt="abcdefghij", completion="k"),
    ]
    with pytest.warns(PeftcWarning) as told:
        found = encoder().encode_all(rows, 6)
    assert [len(row.input_ids) for row in found] == [5, 6]
    warned = [item.message.diagnostic for item in told if isinstance(item.message, PeftcWarning)]
    assert [d.code for d in warned] == [rules.TOO_LONG.code] * 2
    messages = [d.what for d in warned]
    assert any("1 example is cut at 6 tokens (line 2)" in message for message in messages)
    assert any("1 example is left out" in message and "(line 3)" in message for message in messages)


def test_nothing_left_to_learn_is_an_error() -> None:
    with pytest.raises(PeftcError, match="No example has anything to learn within 8 tokens"):
        encoder().encode_all([Example(Where(line=1), prompt="abcdefghij", completion="k")], 8)


def test_stops_are_those_of_the_tokenizer_and_of_generation() -> None:
    config = tiny.model().generation_config
    config.eos_token_id = [1, 5]
    assert stop_ids(tiny.tokenizer(), config) == {1, 5}


# Batches --------------------------------------------------------------------------------------------------------------


def test_padding_is_told_by_position_although_its_id_is_the_stop_token() -> None:
    tokenizer = tiny.tokenizer()
    pad = pad_id(tokenizer)
    assert pad == tokenizer.eos_token_id
    rows = [Encoded((7, 8, 9, pad), (IGNORED, 8, 9, pad)), Encoded((7, pad), (IGNORED, pad))]
    batch = Collator(pad)(rows)
    assert batch["labels"].tolist() == [[IGNORED, 8, 9, pad], [IGNORED, pad, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    left = Collator(pad, side="left")(rows)
    assert left["labels"].tolist()[1] == [IGNORED, IGNORED, IGNORED, pad]
    assert left["attention_mask"].tolist()[1] == [0, 0, 1, 1]


def test_padding_does_not_change_the_loss() -> None:
    rows = [encoder().encode(Example(Where(), prompt=p, completion=c)) for p, c in (("ab", "cd"), ("a", "bcdefgh"))]
    encoded = [row for row in rows if isinstance(row, Encoded)]
    model, pad = tiny.model(), pad_id(tiny.tokenizer())
    apart = [model(**Collator(pad)([row])).loss * row.trained for row in encoded]
    together = model(**Collator(pad)(encoded)).loss
    torch.testing.assert_close(together, sum(apart) / sum(row.trained for row in encoded))
