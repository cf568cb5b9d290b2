"""A pytest plugin (`-p tests.mutation.silence`) that runs a test while the diagnostic it is about is told wrongly.

`PROVOKED` names for each rule a cheap test that provokes it. While that test is called, the rule gives a diagnostic
without its code, text and severity; how the calls end is written to the file that `--silenced` names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peftc import rules
from peftc.diagnostics import Diagnostic, Rule, Severity

_BASES = "tests/integration/test_bases.py::"
_JOBS = "tests/integration/test_cli_jobs.py::"
_MISSING = f"{_JOBS}test_what_is_not_there_ends_in_a_diagnostic"
_UNTRAINABLE = f"{_JOBS}test_what_cannot_be_trained_ends_in_a_diagnostic"
_TRAINING = "tests/integration/test_training.py::"
_DATA = "tests/unit/test_data.py::"
_CONVERSION = "tests/e2e/test_conversion.py::"
_LOCATE = "tests/unit/test_graph_locate.py::"

PROVOKED = {
    "PICKLE_CONTENT": "tests/unit/test_checkpoint_pickled.py::test_what_is_no_plain_adapter_is_refused[a list]",
    "CANNOT_JOIN": "tests/e2e/test_former_layers.py::test_methods_that_cannot_join_layers_say_so[method0]",
    "OPTION_NOT_AVAILABLE": (
        "tests/methods/test_refused_options.py::test_an_option_that_is_for_another_method_is_refused[use_dora]"
    ),
    "NOTHING_TIED": "tests/methods/test_weight_tying.py::test_nothing_tied_is_no_effect[False-rows-no tied modules were found in the model]",
    "NO_REPLICATION": "tests/methods/test_layer_replication.py::test_what_cannot_be_is_refused_with_nothing_changed[beyond]",
    "NO_ROWS": "tests/methods/test_rows_beside.py::test_what_cannot_be_is_refused_with_nothing_changed[2-PC455]",
    "NO_TOKENS": "tests/methods/test_rows_beside.py::test_no_token_is_no_effect[[]]",
    "NOT_IDENTITY": "tests/methods/test_hra.py::test_a_start_that_is_not_the_identity_is_warned_of[options0]",
    "CANNOT_CONVERT": f"{_CONVERSION}test_a_changed_bias_is_not_lost",
    "BIAS_GAINED": "tests/runtime/test_affine.py::test_a_bias_that_was_not_there_is_told",
    "CONVERSION_LOSES": f"{_CONVERSION}test_the_error_is_warned_of",
    "NOT_CONFORMANT": "tests/mutation/test_kit.py::test_check_raises_everything_or_returns_the_report",
    "LAZY_LAYER": "tests/unit/test_snapshot.py::test_lazy_layers_are_all_named",
    "BASE_MISSING": f"{_LOCATE}test_nothing_named",
    "BASE_UNREADABLE": f"{_LOCATE}test_a_config_that_is_too_large",
    "BASE_UNBUILDABLE": f"{_BASES}test_a_task_that_the_architecture_has_no_class_for",
    "DEPENDENCY_MISSING": f"{_LOCATE}test_problems_with_a_distribution",
    "BASE_TOO_LARGE": f"{_LOCATE}test_a_config_that_asks_for_more_than_any_model_has[config0-num_hidden_layers]",
    "REMOTE_CODE": f"{_BASES}test_configs_that_make_no_model[config3-PC306-mine]",
    "GRAPH_INVALID": "tests/unit/test_graph_nodes.py::test_every_mistake_of_a_graph_is_told_with_its_line",
    "QUANTIZER_UNKNOWN": "tests/unit/test_quantize.py::test_all_mistakes_come_at_once_each_with_its_place",
    "QUANTIZER_REFUSES": "tests/integration/test_quantised.py::test_what_needs_an_accelerator_is_refused_without",
    "DATA_UNREADABLE": f"{_DATA}test_files_that_give_nothing[None-code0-No such file]",
    "DATA_LINE": f"{_DATA}test_a_bad_line_is_told_with_its_number[no keys]",
    "DATA_KEYS_UNREAD": f"{_DATA}test_keys_that_nothing_reads_are_warned_of",
    "NO_EXAMPLES": rf"{_DATA}test_files_that_give_nothing[\n \n-code1-holds no examples]",
    "TOO_LONG": f"{_DATA}test_long_examples_are_cut_or_left_out_with_a_warning",
    "NO_CHAT_TEMPLATE": f"{_DATA}test_templates_that_do_not_fit[None-code0-no chat template]",
    "TEMPLATE_REFUSES": (
        f"{_DATA}test_templates_that_do_not_fit[{{{{ messages[-1]['content'] }}}}-code2-rewrites earlier turns]"
    ),
    "BASE_STATE": "tests/runtime/test_functions.py::test_base_weights_that_do_not_fit_are_all_told",
    "KEYS_COLLIDE": "tests/unit/test_checkpoint_keys.py::test_two_keys_may_not_become_one",
    "UNFINISHED_TRAINING": f"{_TRAINING}test_an_unfinished_training_is_not_thrown_away",
    "CANNOT_RESUME": f"{_UNTRAINABLE}[<lambda>-words11-PC718]",
    "DIVERGED": f"{_TRAINING}test_a_loss_that_is_not_finite_stops_the_training",
    "DEVICE_MISSING": f"{_UNTRAINABLE}[<lambda>-words8-PC720]",
    "NO_TOKENIZER": f"{_UNTRAINABLE}[<lambda>-words5-PC721]",
    "FOLDER_TAKEN": f"{_MISSING}[words5-code5]",
    "NOTHING_TO_TRAIN": f"{_UNTRAINABLE}[change-words0-PC723]",
    "NO_PROMPT": f"{_MISSING}[words0-code0]",
    "DEMO_FAILED": f"{_JOBS}test_the_demo_fails_when_too_few_answers_are_right",
    "SCRIPT_MISSING": "tests/unit/test_compat.py::test_a_missing_program_is_told[typo]",
    "NOT_A_LANGUAGE_MODEL": f"{_UNTRAINABLE}[_as_classifier-words4-PC726]",
}

_CODES = {node: getattr(rules, name).code for name, node in PROVOKED.items()}
_ENDED = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--silenced", type=Path, required=True, help="file for how the tests of silenced rules ended")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ENDED] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fixtures are set up before and see the rule as it is: only what the test itself notices counts."""
    code = _CODES[item.nodeid]
    told = Rule.__call__

    def silenced(rule: Rule, what: str, **details: Any) -> Diagnostic:
        found = told(rule, what, **details)
        return replace(found, code="PC000", what="", severity=Severity.WARNING) if rule.code == code else found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rule, "__call__", silenced)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report: Any = yield
    if report.when == "call" or report.failed or report.skipped:
        item.config.stash[_ENDED][item.nodeid] = f"{report.when} {report.outcome}"
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    ended = json.dumps(session.config.stash[_ENDED])
    session.config.getoption("silenced").write_text(ended, encoding="utf-8")
