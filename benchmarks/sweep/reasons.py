"""Why the two sides may differ: every kind of difference with its reason, and how it is seen that the reason is the true one.

A difference without a reason that holds is a mistake of ours, and so is a reason that no difference has any more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

#: Parameter of an adapter -> the module that it is on.
_ROOT = "base_model.model."
_SLOT = re.compile(r"\.(lora_[AB]|ia3_l)\b.*$")
_EXPERTS = re.compile(r"\.experts(\.|$)")
#: An adapter on parameters that hold all experts, as the reference has one in families that it knows.
_FUSED = re.compile(r"\.experts\.(base_layer\.)*(lora_[AB]|ia3_l)\b")
_ROUTER = re.compile(r"\.(gate|router)(\.|$)")


@dataclass(frozen=True)
class Difference:
    """What one label came to on each side, for one type of model.

    `ours` and `theirs` are outcomes as `side` writes them; `noted` says of modules by path which kind of convolution they are,
    or why they only look like a kind of layer.
    """

    model_type: str
    label: str
    ours: Mapping[str, Any]
    theirs: Mapping[str, Any]
    noted: Mapping[str, str] = field(default_factory=dict)

    @property
    def refusal(self) -> str:
        """What the reference says, if it refuses."""
        return str(self.theirs.get("refused", ""))

    @property
    def only_ours(self) -> frozenset[str]:
        return _modules(self.ours, self.theirs)

    @property
    def only_theirs(self) -> frozenset[str]:
        return _modules(self.theirs, self.ours)

    @property
    def both_train(self) -> bool:
        return "trained" in self.ours and "trained" in self.theirs


def _modules(one: Mapping[str, Any], other: Mapping[str, Any]) -> frozenset[str]:
    """Modules with a parameter that the other side does not train in that shape."""
    there = other.get("trained", {})
    names = (name for name, shape in one.get("trained", {}).items() if there.get(name) != shape)
    return frozenset(_SLOT.sub("", name.removeprefix(_ROOT)).removesuffix(".base_layer") for name in names)


@dataclass(frozen=True)
class Reason:
    """A kind of difference. `explains` are the modules that it accounts for; for a refusal it says whether it `holds`."""

    title: str
    why: str
    holds: Callable[[Difference], bool] = lambda difference: False
    explains: Callable[[Difference], frozenset[str]] = lambda difference: frozenset()


def _same_if_told(difference: Difference) -> bool:
    """The reference, asked with the targets that we found, trains the same, experts aside where it does not know them."""
    told = difference.theirs.get("given", {})
    trained = difference.ours.get("trained", {})
    known = {name: shape for name, shape in trained.items() if not _EXPERTS.search(name)}
    return bool(difference.ours.get("resolved")) and told.get("trained") in (trained, known)


def _more_if_told(difference: Difference) -> bool:
    """The reference, asked with a pattern that we found, makes names of it that mean more."""
    told = difference.theirs.get("given", {})
    patterns = [isinstance(x.get("resolved", {}).get("target_modules"), str) for x in (difference.ours, told)]
    trained = difference.ours.get("trained", {}).items()
    return patterns == [True, False] and trained < told.get("trained", {}).items()


def _in_list_at_root(difference: Difference) -> bool:
    at_root = re.compile(r"\w+\.\d+\.")
    return "layers_to_transform" in difference.refusal and all(map(at_root.match, difference.only_ours))


def _lost(difference: Difference) -> frozenset[str]:
    """Layers outside of the routed experts, in a model in which the reference rewrites the targets for those."""
    rewritten = any(_EXPERTS.search(name) for name in difference.theirs.get("trained", {}))
    return frozenset(path for path in difference.only_ours if not _EXPERTS.search(path)) if rewritten else frozenset()


def _unknown(difference: Difference) -> frozenset[str]:
    """Experts and routers, in a model of which the reference adapts none."""
    if any(_FUSED.search(name) for name in difference.theirs.get("trained", {})):
        return frozenset()
    return frozenset(path for path in difference.only_ours if _EXPERTS.search(path) or _ROUTER.search(path))


def _noted(difference: Difference) -> frozenset[str]:
    found = frozenset(path for path in difference.only_theirs if path in difference.noted)
    return found - _convolutions(difference)


def _convolutions(difference: Difference) -> frozenset[str]:
    if difference.label != "all-linear":
        return frozenset()
    return frozenset(path for path in difference.only_theirs if difference.noted.get(path, "").startswith("conv"))


BY_ROLE = Reason(
    "Default by role",
    "No table of the reference knows the type, so it refuses. Here layers with the roles of the tables' entries are adapted; "
    "the reference trains the same when it is given these targets.",
    holds=lambda difference: bool(difference.ours.get("by_role")) and _same_if_told(difference),
)
REASONS: tuple[Reason, ...] = (
    BY_ROLE,
    Reason(
        "Defaults of models with experts",
        "The reference rewrites targets for experts before it looks for the default, finds none, and refuses, although its table "
        "knows the type. Given the targets of its table it trains the same.",
        holds=lambda difference: not difference.ours.get("by_role") and _same_if_told(difference),
    ),
    Reason(
        "Patterns in models with experts",
        "The reference rewrites a pattern as names where experts are fused. Given the pattern for the language model alone that "
        "we found by role, it adapts layers of these names in other parts as well.",
        holds=_more_if_told,
    ),
    Reason(
        "Containers under `all-linear`",
        "The reference spells `all-linear` out as names before it rewrites them for experts; where one of them is also the name "
        "of a container, it raises.",
        holds=lambda difference: (
            difference.label == "all-linear"
            and bool(re.match(r"ValueError: Target module \w+\(\n", difference.refusal))
        ),
    ),
    Reason(
        "Layers at the root",
        "`layers_to_transform` of the reference overlooks a list of layers at the root of the model, so it finds no target.",
        holds=_in_list_at_root,
    ),
    Reason(
        "Weights that kernels read",
        "The reference refuses `out_proj` of state-space models, whose kernels take the weight past the adapter. Here it is "
        "adapted with a warning (PC424): without these kernels, and merged, it acts.",
        holds=lambda difference: "incompatible with Mamba-based models" in difference.refusal,
    ),
    Reason(
        "No input embeddings",
        "The model's own `get_input_embeddings` raises, and the reference does not catch it.",
        holds=lambda difference: difference.refusal.startswith("NotImplementedError: `get_input_embeddings`"),
    ),
    Reason(
        "Layers beside routed experts",
        "Shared experts, dense layers and gates of attention whose names the reference rewrites for the routed experts: its "
        "rewriting loses them. Here both are adapted.",
        explains=_lost,
    ),
    Reason(
        "Experts of families that the reference does not know",
        "transformers fuses the experts of this family or makes its router a module of its own, and the reference has no names "
        "for them: it leaves them out without a word. Here they are adapted.",
        explains=_unknown,
    ),
    Reason(
        "Layers with a forward of their own",
        "A subclass of a linear layer that computes something else, such as a map for each group of heads. The reference takes "
        "it for its parent, and the call fails or means another thing; here it is not adapted.",
        explains=_noted,
    ),
    Reason(
        "Convolutions under `all-linear`",
        "The reference spells `all-linear` out as names before it rewrites them for experts, and convolutions with such a name "
        "are adapted as well. Here `all-linear` means linear layers.",
        explains=_convolutions,
    ),
)


def reasons_of(difference: Difference) -> tuple[Reason, ...]:
    """The reasons that account for all of a difference; none if some of it has no reason."""
    if not difference.both_train:
        return tuple(reason for reason in REASONS if reason.holds(difference))[:1]
    explained = {reason.title: (reason, reason.explains(difference)) for reason in REASONS}
    found = [(reason, modules) for reason, modules in explained.values() if modules]
    covered = frozenset().union(*(modules for _, modules in found))
    complete = covered >= difference.only_ours | difference.only_theirs
    return tuple(reason for reason, _ in found) if complete else ()
