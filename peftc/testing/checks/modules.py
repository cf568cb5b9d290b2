"""What acts around whole modules: one adapter at a time, names that are the active one's, and calls with a cache."""

from __future__ import annotations

import torch

from peftc.compiler.compile import compile_plan
from peftc.diagnostics import PeftcError
from peftc.model.peft_model import PeftModel
from peftc.testing.compare import objects_of, same, same_names
from peftc.testing.report import broken
from peftc.testing.subjects import Subject, quiet

_FIX = "Compute from the call that `forward` is given, whatever its length."


def plan_of_several_equals_model(s: Subject) -> None:
    """With several adapters the plan says too which parameters the model has, and which of them train."""
    configs = {name: s.config() for name in ("first", "second")}
    plan = compile_plan(s.model.graph, configs, active=["second"])
    base = s.build()
    old = {id(p) for p in base.parameters()}
    with quiet():
        model = PeftModel.from_plan(base, plan)
    live = {name: p.requires_grad for name, p in model.named_parameters() if id(p) not in old}
    rows = [(p.name, p.trainable) for p in plan.parameters() if not p.base]
    planned = dict(rows)
    same_names(live, planned, "Compared with the plan of two adapters, the applied model", "Declare the slots alike.")
    wrong = sorted(name for name, trainable in planned.items() if live[name] != trainable)
    if len(planned) < len(rows):
        raise broken("The plan of two adapters lists tensors of one name twice", "Report this as a bug of peftc.")
    if wrong or model.get_nb_trainable_parameters() != plan.counts():
        raise broken(f"Of two adapters, {wrong or 'the numbers'} are not as planned", "Declare the slots alike.")


def one_acts_at_a_time(s: Subject) -> None:
    """Two adapters cannot both take a module's place: activating them together is refused and changes nothing."""
    model = s.trained("first")
    s.join(model, "second")
    y, objects = s.output(model), objects_of(model)
    try:
        model.set_adapter(["first", "second"])
    except PeftcError:
        if objects_of(model) != objects:
            raise broken("Refusing two adapters changes the model", "Report this as a bug of peftc.") from None
        same(s.output(model), y, "The output after two adapters were refused", "Report this as a bug of peftc.")
        return
    raise broken("Two adapters around one module are active together", "Report this as a bug of peftc.")


def generation_with_a_cache_is_the_same(s: Subject) -> None:
    """Greedy generation with a cache gives the tokens that whole forward passes give one at a time, padded rows too."""
    model, given = s.trained(), s.model.arguments()
    ids, mask = given["input_ids"], given["attention_mask"].clone()
    mask[0, :2] = 0  # padding on the left
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        expected = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options)
        found = model.generate(input_ids=ids, attention_mask=mask, use_cache=True, **options)
    same(found, expected, "What is generated with a cache, compared with step by step,", _FIX)
