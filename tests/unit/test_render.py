"""The view of a plan: exact groups, exact numbers, and nothing that depends on the terminal."""

from __future__ import annotations

import re
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from peftc.compiler.explain import explain, render_explanation
from peftc.compiler.plan.render import plain, render_plan, size
from peftc.graph.groups import grouped, ranges
from tests.unit import plans
from tests.unit.plans import SampleConfig, decoder, planned

numbered = st.tuples(
    st.sampled_from(["a", "b"]), st.integers(0, 6), st.sampled_from(["x", "y"]), st.integers(0, 4)
).map(lambda parts: ".".join(map(str, parts)))


def expanded(pattern: str) -> list[str]:
    """The paths that a braced pattern stands for, as a shell expands it."""
    choices = []
    for part in pattern.split(".") if "{" not in pattern else re.split(r"\.(?![^{]*\})", pattern):
        if not part.startswith("{"):
            choices.append([part])
            continue
        numbers: list[int] = []
        for item in part[1:-1].split(","):
            first, last, step = (
                ([int(n) for n in item.split("..")] * 2 + [1])[:2] + [1] if item.count("..") == 0 else _range(item)
            )
            numbers += range(first, last + 1, step)
        choices.append([str(n) for n in numbers])
    return [".".join(parts) for parts in product(*choices)]


def _range(item: str) -> tuple[int, int, int]:
    first, last, *step = (int(n) for n in item.split(".."))
    return first, last, step[0] if step else 1


@given(st.lists(numbered, unique=True, max_size=40))
def test_groups_stand_for_exactly_the_paths(paths: list[str]) -> None:
    groups = grouped((path, path[0]) for path in paths)
    told = [path for group in groups for path in expanded(group.pattern)]
    assert sorted(told) == sorted(paths)
    assert [group.count for group in groups] == [len(expanded(group.pattern)) for group in groups]
    assert all(group.first in paths for group in groups)


@given(st.sets(st.integers(0, 60), min_size=1))
def test_ranges_lose_nothing(numbers: set[int]) -> None:
    assert {int(p) for p in expanded(ranges(numbers))} == numbers


def test_full_grids_are_one_line() -> None:
    paths = [f"layers.{i}.experts.{j}.up" for i in range(3, 61) for j in range(256)]
    assert [(g.pattern, g.count) for g in grouped((p, 0) for p in paths)] == [
        ("layers.{3..60}.experts.{0..255}.up", 14848)
    ]


def test_a_plan_as_text() -> None:
    text = render_plan(planned(decoder(4), target_modules=["q_proj", "up_proj"], rank_pattern={"layers.3.*q_proj": 2}))
    rows = [line.split() for line in text.splitlines() if line.startswith("model.")]
    assert rows == [
        ["model.layers.{0..2}.self_attn.q_proj", "×3", "8→8", "8×8", "+", "8×8", "384", "q_proj"],
        ["model.layers.{0..3}.mlp.up_proj", "×4", "8→32", "8×8", "+", "32×8", "1,280", "up_proj"],
        ["model.layers.3.self_attn.q_proj", "×1", "8→8", "2×8", "+", "8×2", "32", "q_proj,", "r=2"],
    ]
    assert "1,696 of" in text
    assert "\x1b" not in text


def test_text_is_under_a_hundred_columns_for_usual_models() -> None:
    text = render_plan(planned(decoder(32, width=4096), target_modules="all-linear"))
    assert max(map(len, text.splitlines())) <= 100


def test_warnings_come_last() -> None:
    text = render_plan(planned(decoder(tied=True), target_modules=["lm_head"]))
    assert text.index("warning[PC413]") > text.index("memory")


def test_all_text_goes_through_the_painter() -> None:
    """So that a caller can escape what a file could smuggle onto a terminal."""
    graph = plans.and_modules(decoder(), {"evil\x1b[31m": plans.linear(8, 8)}, name_or_path="na\x1bme")
    config = {"target_modules": ["evil\x1b[31m", "q_proj", "gone\x1b"]}

    def paint(text: str, *styles: str) -> str:
        return text.replace("\x1b", "?")

    assert "\x1b" not in render_plan(planned(graph, **config), paint)
    assert "\x1b" in render_plan(planned(graph, **config), plain)


def test_sizes() -> None:
    assert [size(n) for n in (0, 999, 1000, 999_949, 1_000_000, 2_680_000_000_000)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "999.9 kB",
        "1.0 MB",
        "2.68 TB",
    ]


def explained(path: str, **config: object) -> str:
    made = SampleConfig(**{"target_modules": ["q_proj", "v_proj"], **config})
    return render_explanation(explain(decoder(), "default", made, path, plans.registry()))


def test_an_adapted_module_is_explained() -> None:
    text = explained("model.layers.1.self_attn.q_proj", rank_pattern={"layers.1.*q_proj": 2})
    assert "match_targets meant by `q_proj` (target_modules)" in " ".join(text.split())
    assert "`layers.1.*q_proj` in rank_pattern is in force" in text
    assert "with r = 2" in text
    assert text.rstrip().endswith("Adapted: 32 trainable parameters.")


def test_modules_that_are_not_adapted_are_explained() -> None:
    q = "model.layers.1.self_attn.q_proj"
    assert "excluded by `q_proj`" in explained(q, exclude_modules=["q_proj"])
    assert "layer 1 is not in layers_to_transform" in explained(q, layers_to_transform=[0])
    assert "trained whole" in explained("lm_head", modules_to_save=["lm_head"])
    assert "no entry of `target_modules`" in explained("model.layers.0.mlp.up_proj")
    assert "leaves out the output embedding" in explained("lm_head", target_modules="all-linear")
    assert "linear layers only, and this is norm" in explained("model.norm", target_modules="all-linear")
    assert "does not match its full path" in explained("lm_head", target_modules=r".*q_proj")
    assert "adapted in it: `model.layers.2.self_attn.q_proj`" in explained("model.layers.2")


def test_every_pass_is_named() -> None:
    from peftc.compiler.passes.order import PASSES

    text = " ".join(explained("model.norm").split())
    assert [step.__name__ for step in PASSES if step.__name__ not in text] == []
