"""What LoRA's variants refuse, each with its diagnostic, and a defect under which it would not be told."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
from peftc_plugins.lora import bdlora, bias, nested, qalora
from torch import nn

from peftc import LoraConfig, PeftcError, PeftcWarning, get_peft_model, rules
from peftc.compiler.passes import sites
from peftc.diagnostics import Rule
from peftc.testing.models import MODELS
from peftc.tuner import limits, maps, variant
from tests.defects import put_defect

BD = {"target_modules_bd_b": ["0"], "nblocks": 2}
EXPERTS = next(model for model in MODELS if model.parameters)


@dataclass(frozen=True)
class Refused:
    """Options, on a layer `0`, with what is told of them, and a defect under which it is not."""

    options: Mapping[str, Any]
    rule: Rule
    says: str
    module: ModuleType
    before: str
    after: str = "if False:"
    layer: Any = None

    def act(self) -> None:
        if self.layer is EXPERTS:
            get_peft_model(EXPERTS.build(), LoraConfig(target_parameters=list(EXPERTS.parameters), **self.options))
            return
        base = nn.Sequential(self.layer or nn.Linear(8, 8))
        get_peft_model(base, LoraConfig(**{"r": 4, "target_modules": ["0"], **self.options}))


_SEVERAL = (rules.CONTRADICTION, "of which only one can act", variant, "if len(chosen) > 1:")
_KIND = (rules.BAD_TARGET, "cannot adapt", sites, "if node.facts.kind not in tuner.supports or", "if")
CASES = {
    "DoRA and a bias": Refused({"use_dora": True, "lora_bias": True}, *_SEVERAL),
    "DoRA and QALoRA": Refused({"use_dora": True, "use_qalora": True}, *_SEVERAL),
    "QALoRA and BD-LoRA": Refused({"use_qalora": True, "use_bdlora": BD}, *_SEVERAL),
    "a bias and BD-LoRA": Refused({"lora_bias": True, "use_bdlora": BD}, *_SEVERAL),
    "VeLoRA and MonteCLoRA": Refused({"velora_config": {}, "monteclora_config": {}}, *_SEVERAL),
    "VeLoRA of a convolution": Refused({"velora_config": {}}, *_KIND, layer=nn.Conv1d(8, 8, 3)),
    "MonteCLoRA of an embedding": Refused({"monteclora_config": {}}, *_KIND, layer=nn.Embedding(8, 8)),
    "a scale of zero": Refused({"velora_config": {"scale": 0.0}}, rules.BAD_VALUE, "`scale` cannot be `0.0`", limits, "if value <= most:"),
    "no samples": Refused({"monteclora_config": {"num_samples": 0}}, rules.BAD_VALUE, "`num_samples` cannot be `0`", limits, "if value <= most:"),
    "DoRA of experts": Refused({"use_dora": True}, *_KIND, layer=EXPERTS),
    "a bias of experts": Refused({"lora_bias": True}, *_KIND, layer=EXPERTS),
    "DoRA of attention": Refused({"use_dora": True}, *_KIND, layer=nn.MultiheadAttention(8, 2)),
    "DoRA of groups": Refused({"use_dora": True}, rules.BAD_TARGET, "2 groups", maps, "if layer.groups > 1 and not self.takes_groups:", layer=nn.Conv2d(4, 4, 3, groups=2)),
    "a bias of an embedding": Refused({"lora_bias": True}, *_KIND, layer=nn.Embedding(8, 8)),
    "a bias that starts otherwise": Refused({"lora_bias": True, "init_lora_weights": "gaussian"}, rules.CONTRADICTION, "`lora_bias` cannot begin", bias, "if c.init_lora_weights not in (True, False):"),
    "QALoRA of a convolution": Refused({"use_qalora": True}, *_KIND, layer=nn.Conv1d(8, 8, 3)),
    "groups that do not divide": Refused({"use_qalora": True, "qalora_group_size": 3}, rules.BAD_TARGET, "no multiple of `qalora_group_size: 3`", qalora, "if layer.in_features % c.qalora_group_size:"),
    "QALoRA without groups": Refused({"use_qalora": True, "qalora_group_size": 0}, rules.BAD_VALUE, "`qalora_group_size` cannot be `0`", limits, "if value <= most:"),
    "blocks of nothing": Refused({"use_bdlora": {}}, rules.BAD_TARGET, "Neither `target_modules_bd_a` nor", bdlora, "elif _options(c).match_strict:", "elif False:"),
    "blocks of both": Refused({"use_bdlora": {"target_modules_bd_a": ["0"], "target_modules_bd_b": ["base.0", ""]}}, rules.BAD_TARGET, "mean `0`", bdlora, "if of_a and of_b:"),
    "blocks told twice": Refused({"use_bdlora": {"target_modules_bd_a": ["0"], "target_modules_bd_b": ["0"]}}, rules.BAD_VALUE, "both have ['0']", nested, "if both:"),
    "blocks that do not divide": Refused({"use_bdlora": {**BD, "nblocks": 3}}, rules.BAD_TARGET, "does not divide rank 4 and outputs 8", bdlora, "if odd:"),
}  # fmt: skip


def told(case: Refused) -> list[str]:
    with pytest.raises(PeftcError) as caught:
        case.act()
    return [d.what for d in caught.value.diagnostics if d.code == case.rule.code and case.says in d.what and d.fix]


@pytest.mark.parametrize("name", CASES)
def test_it_ends_in_its_diagnostic(name: str) -> None:
    assert told(CASES[name])


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].module is not limits])
def test_a_defect_would_be_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    put_defect(monkeypatch, case.module, case.before, case.after)
    try:
        case.act()
    except PeftcError as error:
        assert not [d for d in error.diagnostics if d.code == case.rule.code and case.says in d.what]
    except Exception:  # with the defect anything may happen, except for the diagnostic
        return


def without_bias() -> Any:
    config = LoraConfig(r=4, target_modules=["0"], lora_bias=True)
    return get_peft_model(nn.Sequential(nn.Linear(8, 8, bias=False)), config)


def test_a_bias_beside_a_layer_without_one_is_warned_of_and_cannot_be_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(PeftcWarning, match=f"(?s){rules.CANNOT_MERGE.code}.*gives `0` a bias"):
        model = without_bias()
    with pytest.raises(PeftcError, match="its bias has no place there"):
        model.merge_adapter()
    put_defect(monkeypatch, bias, "if not layer.has_bias:", "if False:")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        without_bias()
