"""Former names of weights: paths of today and of published checkpoints, found from either side."""

from __future__ import annotations

import pytest

from peftc.graph.former import FormerLayers, FormerNames, FormerPlace, starred

FUSED = FormerLayers("h.*.mlp.experts", "gate_up_proj", ("h.*.moe.experts.{expert}.w1", "h.*.moe.experts.{expert}.w3"))
ROUTER = FormerLayers("h.*.mlp.gate", "weight", ("h.*.moe.gate",))
NAMES = FormerNames([FUSED, ROUTER])


def test_a_module_is_found_with_its_own_numbers() -> None:
    assert NAMES.of("h.12.mlp.experts") == (
        FormerLayers(
            "h.12.mlp.experts", "gate_up_proj", ("h.12.moe.experts.{expert}.w1", "h.12.moe.experts.{expert}.w3")
        ),
    )
    assert NAMES.of("h.1.mlp") == ()
    assert FUSED.of_experts and not ROUTER.of_experts
    assert FUSED.names == ("w1", "w3")


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("h.3.moe.experts.7.w3", FormerPlace("h.3.mlp.experts", "gate_up_proj", 1, 2, 7)),
        ("h.3.moe.experts.0.w1", FormerPlace("h.3.mlp.experts", "gate_up_proj", 0, 2, 0)),
        ("h.3.moe.gate", FormerPlace("h.3.mlp.gate", "weight", 0, 1, None)),
        ("h.3.moe.experts.7.w2", None),
        ("h.3.mlp.gate", None),
    ],
)
def test_a_former_layer_is_found_where_it_is_now(path: str, found: FormerPlace | None) -> None:
    assert NAMES.find(path) == found


def test_numbers_are_whole_segments() -> None:
    assert starred("0.layers.3.w1.12") == "*.layers.*.w1.*"
