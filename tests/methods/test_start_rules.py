"""What is wrong with starts is told, by its rule, and would not be under a defect."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftc
from peftc import LoraConfig, PeftcError, PeftcWarning, plugin, rules
from peftc.compiler.passes import starts as passes
from peftc.config import spec as documents
from peftc.config.spec import load_spec
from peftc.diagnostics import Rule
from peftc.registry import starts as registry
from peftc.runtime.layer import starting
from peftc.runtime.session import starts as session
from peftc.tuner import start as tuner
from tests.defects import put_defect


class Own(plugin.Start):
    """A start of these tests; the cases change what it declares."""

    name: ClassVar[str] = "own-start"

    def factors(self, s: plugin.StartView) -> plugin.Begun:
        return plugin.Begun(s.normal(s.rank, s.weight.shape[1]), s.weight.new_zeros(s.weight.shape[0], s.rank))


class Sparing(Own):
    name: ClassVar[str] = "sparing"
    spares_others: ClassVar[bool] = True


class Reading(Own):
    name: ClassVar[str] = "reading"
    reads: ClassVar[plugin.Reads] = plugin.Reads.INPUTS


class Misshapen(Own):
    name: ClassVar[str] = "misshapen"

    def factors(self, s: plugin.StartView) -> plugin.Begun:
        return plugin.Begun(s.weight, s.weight)


class Forgetful(Own):
    name: ClassVar[str] = "forgetful"
    changes_base: ClassVar[bool] = True
    kept: ClassVar[tuple[str, ...]] = ("A", "C")


class Failing(Own):
    name: ClassVar[str] = "failing"

    def factors(self, s: plugin.StartView) -> plugin.Begun:
        raise KeyError("of its own")


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    made = [cls() for cls in (Own, Sparing, Reading, Misshapen, Forgetful, Failing)]
    for each in made:
        plugin.register_start(each)
    yield
    for each in made:
        plugin.unregister_start(each)
    plugin.default_starts()._broken.clear()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.conv, self.lin = nn.Embedding(10, 8), nn.Conv1d(4, 4, 3), nn.Linear(8, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lin(self.table(ids))


def tied() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=True, **sizes))


def on(start: str, *targets: str, build: Callable[[], nn.Module] = Net, **more: Any) -> Callable[[], object]:
    def act() -> object:
        config = LoraConfig(**{"r": 2, "target_modules": list(targets or ("lin",)), "init_lora_weights": start, **more})
        return peftc.get_peft_model(build(), config)

    return act


def own_record(**changes: Any) -> Callable[[], object]:
    return lambda: plugin.register_start(type("Changed", (Own,), changes)())


@dataclass
class Case:
    rule: Rule
    act: Callable[[], object]
    says: str
    defect: tuple[ModuleType, str, str]


ON_LAYERS = (passes, "        yield from chosen.problems(config, layer, rank, path, option)", "        return")
CASES = {
    "a start that there is not": Case(rules.START_UNKNOWN, on("orthogonl"), "Did you mean `orthogonal`?", (registry, "did_you_mean(key, self.names)", "''")),
    "a start with an argument that means nothing": Case(rules.START_UNKNOWN, on("pissa_niter_x"), "no number of steps", (registry, "            yield from chosen.start.check(config, chosen.argument)", "            pass")),
    "a kind of layer without it": Case(rules.START_UNFIT, on("pissa", "conv"), "is not defined on `conv` (conv1d)", (tuner, "if not self.acts_on(layer):", "if False:")),
    "a kind of layer that is spared": Case(rules.START_SPARED, on("sparing", "conv", "lin"), "begins as without it", (tuner, "            if start.spares_others:", "            if False:")),
    "an odd rank": Case(rules.START_UNFIT, on("orthogonal", r=3), "needs an even rank", ON_LAYERS),
    "more components than there are": Case(rules.START_UNFIT, on("mica", r=7), "at most 6 there", (tuner, "if start.within_rank and rank > layer.rank:", "if False:")),
    "a weight that is not real": Case(rules.START_UNFIT, on("pissa", build=lambda: Net().to(torch.complex64)), "Load the base model unquantised", (tuner, "dtype not in _REAL", "False")),
    "a scaling of zero": Case(rules.START_UNFIT, on("pissa", lora_alpha=0), "divides by the scaling", (passes, "and scaling <= 0:", "and False:")),
    "a weight that others have too": Case(rules.START_UNFIT, on("pissa", "lm_head", build=tied), "which other modules", (passes, "    if found:\n        what = f\"`{chosen.value}` changes", "    if False:\n        what = f\"`{chosen.value}` changes")),
    "an update that does not act for all tokens": Case(rules.START_UNFIT, on("pissa", alora_invocation_tokens=[1], task_type="CAUSAL_LM"), "the update acts for some", (passes, "chosen.start.changes_base and tuner.waits", "False")),
    "a start that reads what is not there": Case(rules.START_DATA, on("reading"), "reads inputs of layers", (session, "    if lacking:", "    if False:")),
    "factors of another shape": Case(rules.PLUGIN_INVALID, on("misshapen"), "gives A of the shape [6, 8], not [2, 8]", (starting, "factor is not None and tuple(factor.shape) != shape", "False")),
    "something kept that is not given": Case(rules.PLUGIN_INVALID, on("forgetful"), "does not give all of A, C", (starting, "if len(kept) < len(chosen.start.kept):", "if False:")),
    "a start that fails": Case(rules.PLUGIN_RAISED, on("failing"), "KeyError: 'of its own'", (starting, 'with boundary(who(self._chosen), "factors", self._site.path):', "if True:")),
    "a name that is none": Case(rules.PLUGIN_INVALID, own_record(name="Own"), "not a text in lower case", (registry, "name != name.lower()", "False")),
    "no kinds": Case(rules.PLUGIN_INVALID, own_record(name="x", kinds=frozenset({"linear"})), "not a frozenset", (registry, "not all(isinstance(kind, Kind) for kind in start.kinds)", "False")),
    "a factor that there is not": Case(rules.PLUGIN_INVALID, own_record(name="x", frozen="C"), "not `A`, `B` or empty", (registry, 'start.frozen not in ("", "A", "B")', "False")),
    "arguments that are one text": Case(rules.PLUGIN_INVALID, own_record(name="x", arguments="niter_4"), "not a tuple of texts", (registry, "not isinstance(start.arguments, tuple)", "False")),
    "options without names": Case(rules.PLUGIN_INVALID, own_record(name="x", needs=("a",)), "not options by name", (registry, "not isinstance(start.needs, Mapping)", "False")),
    "something strange to read": Case(rules.PLUGIN_INVALID, own_record(name="x", reads="all"), "not one of `Reads`", (registry, "not isinstance(start.reads, Reads)", "False")),
    "a name that is taken": Case(rules.PLUGIN_CONFLICT, own_record(name="pissa"), "`pissa` is claimed by", (plugin, "default_starts().register(record, over=False)", "default_starts().register(record)")),
    "no configuration for quantising": Case(rules.CONTRADICTION, on("loftq"), "`loftq_config` must be specified", (registry, "            yield from chosen.start.check(config, chosen.argument)", "            pass")),
    "half a bit": Case(rules.BAD_VALUE, on("loftq", loftq_config={"loftq_bits": 4.5}), "`loftq_config`: `loftq_bits`", (registry, "            yield from chosen.start.check(config, chosen.argument)", "            pass")),
    "bits that there are not": Case(rules.BAD_VALUE, on("loftq", loftq_config={"loftq_bits": 3}), "Use 4 or 8", (registry, "            yield from chosen.start.check(config, chosen.argument)", "            pass")),
    "more gradients than there are": Case(rules.START_UNFIT, on("lora_ga", r=4), "uses 8 singular vectors", ON_LAYERS),
}  # fmt: skip


def failure(case: Case) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            case.act()
        except PeftcError as error:
            found = list(error.diagnostics)
        except Exception as error:  # whatever a defect lets through
            return f"{type(error).__name__}: {error}"
        else:
            found = [told.message.diagnostic for told in caught if isinstance(told.message, PeftcWarning)]
    mine = [d for d in found if d.code == case.rule.code]
    return "" if any(case.says in f"{d.what} {d.fix}" for d in mine) else f"not {case.rule.code}: {found}"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_told(case: Case) -> None:
    assert failure(case) == ""


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_case_fails_under_a_defect(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    put_defect(monkeypatch, *case.defect)
    try:
        assert failure(case)
    finally:
        for name in ("x", "Own"):
            peftc.plugin.default_starts().forget(name)
        if case.rule is rules.PLUGIN_CONFLICT:
            peftc.plugin.default_starts().forget("pissa")


def spec(folder: Path) -> Path:
    path = folder / "spec.yaml"
    path.write_text(
        "version: 1\nbase: {path: nowhere}\nadapters:\n  default:\n    peft_type: LORA\n    init_lora_weights: pisa\n"
    )
    return path


def test_a_document_is_told_of_before_any_model_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PeftcError) as caught:
        load_spec(spec(tmp_path))
    (told,) = caught.value.diagnostics
    assert (told.code, told.where.line) == (rules.START_UNKNOWN.code, 6)
    put_defect(monkeypatch, documents, ", *start_problems(method, config)]", "]")
    load_spec(spec(tmp_path))
