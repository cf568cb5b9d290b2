"""Every causal language model that transformers can build: the plan from its config is the model adapted by it."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import transformers

from peftc.compiler.compile import compile_plan
from peftc.compiler.plan.plan import InjectionPlan
from peftc.config.mixins import TargetsMixin
from peftc.graph.cache import GraphCache
from peftc.graph.locate import locate
from peftc.graph.nodes import LINEAR_KINDS
from peftc.integrations.transformers.graph import graph_of, meta_model
from peftc.model.mapping import get_peft_model
from peftc.registry.manager import default_registry
from peftc.runtime.applying.snapshot import snapshot
from peftc.tuner.maps import MapTuner
from peftc.tuner.method import TunerMethod
from tests.integration import architectures
from tests.integration.architectures import MODEL_TYPES, PAGE

LISTED = set(re.findall(r"^\| `(\S+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
#: the release that the page speaks of
(RELEASE,) = re.findall(r"transformers (\d[\d.]*\d) builds", " ".join(PAGE.read_text(encoding="utf-8").split()))
IS_OF_THE_PAGE = transformers.__version__ == RELEASE
of_the_page = pytest.mark.skipif(not IS_OF_THE_PAGE, reason=f"docs/architectures.md is of transformers {RELEASE}")


def _adapts_linear_layers(method: TunerMethod) -> bool:
    return issubclass(method.config, TargetsMixin) and (
        not isinstance(method.tuner, MapTuner) or bool(method.tuner.supports & LINEAR_KINDS)
    )


METHODS = [m for m in map(default_registry().get, default_registry().names) if _adapts_linear_layers(m)]

Parameter = tuple[tuple[int, ...], str, bool]


def expected_parameters(plan: InjectionPlan) -> dict[str, Parameter]:
    """Shape, dtype and trainability of every parameter that the plan says the model will have, by name."""
    assert plan.graph is not None
    (adapter,) = plan.adapters
    wrapped = Counter(site.path for site in adapter.maps)  # each parameter of a module that is adapted has a wrapper
    expected: dict[str, Parameter] = {}
    for name, tensor in plan.graph.parameters():
        parts, place = name.split("."), ""
        for count, part in enumerate(parts, 1):  # what is inside of a wrapped module is inside of its wrappers
            place += part + ".base_layer" * wrapped[".".join(parts[:count])] + ("." if count < len(parts) else "")
        expected[adapter.root + place] = (tensor.shape, tensor.dtype, False)
    for parameter in plan.parameters():
        expected[parameter.name] = (parameter.shape, parameter.dtype, parameter.trainable)
    return expected


@pytest.mark.parametrize("model_type", [kind for kind in MODEL_TYPES if kind not in LISTED])
@pytest.mark.filterwarnings("ignore")
def test_the_plan_is_the_adapted_model(model_type: str, tmp_path: Path) -> None:
    if not IS_OF_THE_PAGE and (said := architectures.failure(model_type)) is not None:
        pytest.skip(f"transformers {transformers.__version__} does not build it: {said}")
    method = METHODS[MODEL_TYPES.index(model_type) % len(METHODS)]  # each architecture with one, each method with many
    base, cache = architectures.default_base(model_type), GraphCache(tmp_path)
    built = graph_of(base, cache)
    graph = graph_of(base, cache)
    assert graph is not built  # it came from the file
    assert graph == built
    others = {option: [] for option in method.default_targets if option != "target_modules"}  # few models have defaults
    options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **others}
    needed = method.examples[0] if [*method.check(method.least(**options))] else {}  # what it cannot do without
    config = method.least(**{**needed, **options})
    plan = compile_plan(graph, {"default": config})

    model = get_peft_model(meta_model(locate(base)), config)
    found = {
        name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.requires_grad)
        for name, tensor in model.named_parameters()
    }
    assert found == expected_parameters(plan)
    assert plan.counts() == model.get_nb_trainable_parameters()
    assert snapshot(model.get_base_model()).digest == graph.digest


@of_the_page
@pytest.mark.parametrize("model_type", sorted(LISTED))
def test_what_the_page_lists_is_what_transformers_does_not_build(model_type: str) -> None:
    said = architectures.failure(model_type)
    assert said is not None
    assert architectures.row(model_type, said) in PAGE.read_text(encoding="utf-8").splitlines()
    assert not architectures.builds_alone(model_type)


def test_the_page_is_of_the_release_that_is_installed_by_make(root: Path) -> None:
    """Otherwise these tests would be skipped everywhere."""
    pins = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"transformers=={RELEASE}" in pins, "`python -m tests.integration.architectures` writes the page anew"


@of_the_page
def test_the_page_is_as_written_by_its_script() -> None:
    rows = dict(re.findall(r"^\| `(\S+)` \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert PAGE.read_text(encoding="utf-8") == architectures.page(rows)
