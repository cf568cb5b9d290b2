"""Matching means what it means in the reference, asked on random paths; and it is linear and cannot be hung."""

from __future__ import annotations

import re
import time
from itertools import count, takewhile
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftc import rules
from peftc.compiler.match import Deadline, Layers, Names, Pattern, PatternKeys, matches, shortened
from peftc.diagnostics import PeftcError
from tests.unit import plans

words = st.sampled_from(["q", "k", "qk", "q_proj", "layers", "h", "mlp", "0", "1", "10", "2"])
paths = st.lists(words, min_size=1, max_size=6).map(".".join)
#: Paths as models have them: a list of layers is inside something, never at the root (where the reference is blind).
model_paths = st.tuples(st.sampled_from(["model.text", "base.model"]), paths).map(".".join)
entries = st.lists(words, min_size=1, max_size=3).map(".".join)
#: Regular expressions that are valid and quick, with everything that changes how a key is read.
patterns = st.one_of(
    entries,
    st.sampled_from(
        [r".*q", r"model\.\w+", r"(?:.*\.)?q_proj", r"q|k", r"[hq].*", r"^model.*q$", r".*\.\d+\.q_?", r"a{e}q"]
    ),
)


def reference(**config: Any) -> Any:
    """The reference's answer for a config with these options."""
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    full = {
        "exclude_modules": None,
        "modules_to_save": None,
        "target_parameters": None,
        "target_modules": None,
        **config,
    }

    def meant(path: str) -> bool:
        found = check_target_module_exists(SimpleNamespace(**full), path)
        return bool(found) and not isinstance(found, _ExcludedModule)

    return meant


@given(st.sets(entries, max_size=5), st.lists(paths, min_size=1, max_size=10))
def test_a_list_means_full_paths_and_suffixes_at_a_dot(names: set[str], candidates: list[str]) -> None:
    meant = reference(target_modules=names)
    for path in candidates:
        assert bool(Names(names).find(path)) == meant(path)
        assert matches(names, path) == meant(path)


@given(st.sets(entries, max_size=5), paths)
def test_a_list_tells_every_entry_that_means_a_path(names: set[str], path: str) -> None:
    alone = {name for name in names if reference(target_modules={name})(path)}
    found = Names(names).find(path)
    assert set(found) == alone
    assert list(found) == sorted(found, key=len, reverse=True)


@given(patterns, paths)
def test_a_string_is_a_regular_expression_over_the_full_path(pattern: str, path: str) -> None:
    assert matches(pattern, path) == reference(target_modules=pattern)(path)


@given(st.lists(patterns, max_size=6, unique=True), paths)
def test_the_first_pattern_key_that_matches_the_end_wins(keys: list[str], path: str) -> None:
    from peft.utils.other import get_pattern_key

    told = get_pattern_key(keys, path)
    matched = next((key for key in keys if re.match(rf"(.*\.)?({key})$", path)), None)
    assert PatternKeys(keys, Deadline(), "$").find(path) == matched
    assert matched in (told, None)


@given(
    st.sets(words.filter(str.isalpha), min_size=1),
    st.one_of(st.integers(0, 10), st.lists(st.sampled_from([0, 1, 2, 10]), min_size=1, max_size=3)),
    st.sampled_from([None, [], "layers", "h", ["h", "layers"], ["mlp", "h"]]),
    st.lists(model_paths, min_size=1, max_size=10),
)
def test_layers_are_filtered_by_the_first_number(
    names: set[str], wanted: int | list[int], pattern: str | list[str] | None, candidates: list[str]
) -> None:
    meant = reference(target_modules=names, layers_to_transform=wanted, layers_pattern=pattern)
    layers = Layers([pattern] if isinstance(pattern, str) else pattern or [], Deadline(), "$")
    indices = {wanted} if isinstance(wanted, int) else set(wanted)
    for path in candidates:
        if path in names:
            continue  # a full path is meant exactly, whatever the layer
        assert (bool(Names(names).find(path)) and layers.index(path) in indices) == meant(path)


def test_a_list_of_layers_at_the_root_counts() -> None:
    assert Layers([], Deadline(), "$").index("h.3.attn.q") == 3
    assert not reference(target_modules={"q"}, layers_to_transform=3)("h.3.attn.q")  # where the reference is blind


@given(st.sets(model_paths, min_size=1, max_size=12), st.sets(model_paths, max_size=12))
def test_shortened_lists_are_the_references(targets: set[str], others: set[str]) -> None:
    from peft.tuners.tuners_utils import _find_minimal_target_modules

    others = {path for path in others if not Names(targets).find(path)}
    assert shortened(targets, others) == _find_minimal_target_modules(targets, others)


@given(st.sets(model_paths, min_size=1, max_size=12), st.sets(model_paths, max_size=12))
def test_shortened_lists_mean_the_same(targets: set[str], others: set[str]) -> None:
    others = {path for path in others if not Names(targets).find(path)}
    names = Names(shortened(targets, others))
    assert all(names.find(path) for path in targets)
    assert not any(names.find(path) for path in others)


@pytest.mark.parametrize("model", ["plain", "with_head"])
@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_all_linear_takes_what_the_reference_takes(model: str, task: str | None) -> None:
    import torch
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
    from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

    from peftc.runtime.applying.snapshot import snapshot

    with torch.device("meta"):
        sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
        bert = BertForSequenceClassification(BertConfig(**sizes, vocab_size=10))
        gpt = GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=10, bos_token_id=1, eos_token_id=1))
    made = bert if model == "plain" else gpt
    config = _maybe_include_all_linear_layers(SimpleNamespace(target_modules="ALL-linear", task_type=task), made)
    plan = plans.planned(snapshot(made), {"task_heads": False}, target_modules="All-Linear", task_type=task)
    assert plan.adapters[0].config.target_modules == set(config.target_modules)


@settings(max_examples=200)
@given(st.lists(st.sampled_from(["a.b", "a_b", "a.b.a", "b", "a.a"]), max_size=4, unique=True), paths)
def test_dots_in_plain_keys_match_any_character(keys: list[str], path: str) -> None:
    path = path.replace("q", "a").replace("k", "b")
    matched = next((key for key in keys if re.match(rf"(.*\.)?({key})$", path)), None)
    assert PatternKeys(keys, Deadline(), "$").find(path) == matched


# hostile input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("(unclosed", rules.BAD_PATTERN),
        ("a{2,1}", rules.BAD_PATTERN),
        ("[[:alpha:]]", rules.BAD_PATTERN),
        (r"\p{L}", rules.BAD_PATTERN),
        ("(" * 3000 + ")" * 3000, rules.BAD_PATTERN),
        ("a{99999999999}", rules.LONG_PATTERN),
        ("(((a{100}){100}){100}){100}", rules.LONG_PATTERN),
        ("a" * 10_001, rules.LONG_PATTERN),
    ],
)
def test_patterns_that_are_refused(text: str, rule: rules.Rule) -> None:
    start = time.perf_counter()
    with pytest.raises(PeftcError) as caught:
        Pattern(text, Deadline(), "$.x")
    assert [d.code for d in caught.value.diagnostics] == [rule.code]
    assert len(str(caught.value)) < 1000
    assert time.perf_counter() - start < 1


def test_the_position_of_a_mistake_is_told_in_the_pattern_as_written() -> None:
    with pytest.raises(PeftcError, match=r"unterminated subpattern at character 3"):
        PatternKeys(["ab(c"], Deadline(), "$")


@pytest.mark.parametrize("text", [r"(\w+\w+)+\d!", r"(.*)*(.*)*(.*)*(.*)*=", r"((a|b|[a-z._0-9])+)+X\1"])
def test_catastrophic_patterns_end_in_a_diagnostic(text: str) -> None:
    start = time.perf_counter()
    pattern = Pattern(text, Deadline(0.2), "$.x")
    with pytest.raises(PeftcError) as caught:
        for number in takewhile(lambda _: time.perf_counter() - start < 2, count()):  # however fast the machine is
            pattern.matches(f"model.layers.{number}.self_attention_that_has_a_long_name.query_projection")
    assert [d.code for d in caught.value.diagnostics] == [rules.SLOW_PATTERN.code]
    assert time.perf_counter() - start < 2


def test_a_literal_brace_is_not_fuzzy_matching() -> None:
    assert not matches("q{e<=1}", "k")
    assert matches("q{e<=1}", "q{e<=1}") == bool(re.fullmatch("q{e<=1}", "q{e<=1}"))


def test_thousands_of_keys_cost_what_thousands_of_paths_cost() -> None:
    many = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(20) for j in range(100)]
    start = time.process_time()
    keys = PatternKeys(many, Deadline(), "$")
    assert [keys.find(f"base.{path}") for path in many] == many
    assert time.process_time() - start < 0.5
