"""States of a model met by operations: what acts, and what trains, after the active adapter is deleted."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.diagnostics import PeftcWarning
from peftc.model.functions.assistance import delete_adapter
from peftc.model.peft_model import PeftModel
from peftc.runtime.applying.tuner_model import TunerModel
from peftc.testing.compare import same, same_names
from peftc.testing.report import broken
from peftc.testing.subjects import Subject


def another_takes_over(s: Subject) -> None:
    """A server goes on answering, and a training goes on, after the adapter in use is deleted; the last one leaves the base."""
    base, names = s.output(s.build()), _trainable(s.wrap("first"))
    for delete, frozen in (
        (PeftModel.delete_adapter, False),
        (PeftModel.delete_adapter, True),
        (_by_level if s.method.adapts_layers else delete_adapter, False),
    ):
        model = s.trained("first")
        y = s.output(model)
        s.join(model, "second")
        model.set_adapter("second", inference_mode=frozen)
        _tells(partial(delete, model, "second"), "`first` is active now")
        if model.active_adapters != ["first"]:
            raise broken(f"{model.active_adapters} is active after deleting", "Report this as a bug of peftc.")
        same(s.output(model), y, "The output after the active adapter was deleted", "Keep no state beside slots.")
        what = "What trains after the active adapter was deleted"
        same_names(_trainable(model), () if frozen else names, what, "Keep what trains in slots.")
        _tells(partial(delete, model, "first"), "no adapter is left")
        if model.active_adapters:
            raise broken("An adapter is active after the last was deleted", "Report this as a bug of peftc.")
        same(_plain(s, model), base, "The output after the last adapter was deleted", "Act through slots only.")
        same_names(_trainable(model), (), "What trains after the last adapter was deleted", "Act through slots only.")


def _plain(s: Subject, model: PeftModel) -> Tensor:
    """The output of a call that gives nothing for adapters to read."""
    with torch.no_grad():
        out = model(**s.model.arguments())
    return out if isinstance(out, Tensor) else out.logits  # type: ignore[no-any-return]  # as models give it


def _by_level(model: PeftModel, name: str) -> None:
    level = model.base_model
    assert isinstance(level, TunerModel)
    level.delete_adapter(name)


def _trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _tells(act: Callable[[], object], says: str) -> None:
    """Raise unless this warns of what acts from now on."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        act()
    told = [w.message.diagnostic for w in seen if isinstance(w.message, PeftcWarning)]
    if not any(problem.code == rules.ACTIVE_DELETED.code and says in problem.what for problem in told):
        raise broken(f"Deleting the active adapter does not say that {says}", "Report this as a bug of peftc.")
