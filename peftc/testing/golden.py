"""Golden cases: an adapter folder with what the implementation that made it computed, to be reproduced number by number.

A case is a folder with the adapter as saved, `case.json` (base model, parameter counts) and `case.safetensors`: inputs,
outputs with and without the adapter, gradients, merged weights. What a case lacks is not checked. `gradient_factors` in
`case.json`: gradients that the writer is wrong about, and how many times its own is right.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peftc.checkpoint.names import WEIGHTS_NAME
from peftc.compiler.compile import compile_plan
from peftc.compiler.plan.plan import InjectionPlan
from peftc.compiler.plan.sites import PROMPT_ROOT, WRAPPED_ROOT
from peftc.config.base import CONFIG_NAME
from peftc.config.files import read_config
from peftc.model.peft_model import PeftModel
from peftc.runtime.applying.snapshot import snapshot
from peftc.testing.report import broken
from peftc.testing.subjects import quiet

#: Differences from rounding: relative to each value, and to the largest of its tensor, as sums over many terms cancel.
RELATIVE, ABSOLUTE = 1e-4, 1e-5
#: Keys of a config that name the version that wrote it.
_OF_THE_WRITER = {"peft_version"}
#: Inputs that only a model with an adapter understands.
_OF_A_PROMPT = ("task_ids",)


@dataclass(frozen=True)
class GoldenCase:
    """One folder."""

    folder: Path

    def __str__(self) -> str:
        return f"{self.folder.parent.name}-{self.folder.name}"

    @property
    def is_complete(self) -> bool:
        """Whether the numbers are there, and not the config alone."""
        return (self.folder / "case.safetensors").is_file()

    @cached_property
    def info(self) -> Mapping[str, Any]:
        info: dict[str, Any] = json.loads((self.folder / "case.json").read_text(encoding="utf-8"))
        return info

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / "case.safetensors")

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose name begins with the prefix, by the rest of it."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def check(self, base: nn.Module) -> None:
        """Load the adapter onto the base model and raise `PeftcError` with everything that comes out otherwise."""
        differences = list(self._differences(base))
        if differences:
            listed = "\n".join(f"- {line}" for line in differences)
            raise broken(f"{self} is not reproduced:\n{listed}", "Compare the method's formulas with the paper's.")

    def _differences(self, base: nn.Module) -> Iterator[str]:
        with torch.no_grad():
            yield from _apart("the bare base model", self._call(base, _OF_A_PROMPT), self.tensors["out.y_base"])
        with quiet():
            fresh = self._fresh(base)
            model = PeftModel.from_pretrained(base, self.folder, is_trainable=True).eval()
        out = self._run(model)
        y = output_of(out)
        yield from _apart("the output", y, self.tensors["out.y"])
        if "out.loss" in self.tensors:
            yield from _apart("the loss", out.loss.reshape(self.tensors["out.loss"].shape), self.tensors["out.loss"])
        (y * self.tensors["grad_seed"]).sum().backward()
        yield from self._gradients(model, fresh)
        counts = model.get_nb_trainable_parameters() if fresh is None else fresh.counts()
        if counts != (self.info["trainable"], self.info["total"]):
            yield f"trainable and total parameters are {counts}, not {self.info['trainable'], self.info['total']}"
        yield from self._saved(model)
        with torch.no_grad():
            # switched off, the base acts, whatever of the adapter the writer leaves in `out.y_disabled`; with the layers
            # that the adapter gave it
            is_deeper = model.session.graph.replication is not None
            disabled = self.tensors["out.y_disabled" if is_deeper else "out.y_base"]
            with model.disable_adapter():
                yield from _apart("the output while disabled", self._call(model), disabled)
            if is_deeper:  # the writer adds the updates of all replicas to the one weight that they share
                yield from _apart("the output after merging", self._call(model.merge_and_unload()), y)
            elif "out.y_merged" in self.tensors:
                yield from self._merged(model)

    def _fresh(self, base: nn.Module) -> InjectionPlan | None:
        """The plan of a new adapter, if that has tensors that are not saved: then a loaded one trains others."""
        config = read_config(self.folder)
        config.inference_mode = False
        loaded, fresh = (
            compile_plan(snapshot(base), {"default": config}, loading=loading) for loading in (True, False)
        )
        return None if list(loaded.parameters()) == list(fresh.parameters()) else fresh

    def _gradients(self, model: PeftModel, fresh: InjectionPlan | None) -> Iterator[str]:
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        expected = self.under("grad.")
        if fresh is not None:
            planned = {p.name: p for p in fresh.parameters() if p.trainable}
            yield from (f"`{name}` is planned, or trained, in vain" for name in sorted({*planned} ^ {*expected}))
            plan = replace(model.session.plans["default"], prompt=None)
            shared = {f"{PROMPT_ROOT}{p.name.removeprefix(WRAPPED_ROOT)}" for p in plan.parameters()}
            expected = {name: gradient for name, gradient in expected.items() if name in shared}
            found = {name: gradient for name, gradient in found.items() if name in shared}
        for name in sorted({*found} ^ {*expected}):
            yield f"`{name}` has {'a' if name in found else 'no'} gradient"
        for name in sorted({*found} & {*expected}):
            right = expected[name] * self.info.get("gradient_factors", {}).get(name, 1)
            yield from _apart(f"the gradient of `{name}`", found[name], right)

    def _saved(self, model: PeftModel) -> Iterator[str]:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            found, expected = load_file(Path(folder, WEIGHTS_NAME)), load_file(self.folder / WEIGHTS_NAME)
            config, wanted = _config(Path(folder)), _config(self.folder)
        for key in sorted({*found} ^ {*expected}):
            yield f"the saved file has {'a' if key in found else 'no'} tensor `{key}`"
        for key in sorted({*found} & {*expected}):
            if found[key].dtype != expected[key].dtype or not torch.equal(found[key], expected[key]):
                yield f"`{key}` is not saved as it was loaded"
        for key in sorted({*config, *wanted}):
            if config.get(key, "missing") != wanted.get(key, "missing"):
                yield f"the saved config has `{key}: {config.get(key, 'missing')}`, not `{wanted.get(key, 'missing')}`"

    def _merged(self, model: PeftModel) -> Iterator[str]:
        merged = model.merge_and_unload(safe_merge=True)
        yield from _apart("the output after merging", self._call(merged), self.tensors["out.y_merged"])
        state = merged.state_dict()
        for name, expected in self.under("merged.").items():
            if name in state:
                yield from _apart(f"`{name}` after merging", state[name], expected)
            else:
                yield f"the merged model has no `{name}`"

    def _run(self, model: nn.Module, without: Iterable[str] = ()) -> Any:
        inputs = {name: tensor for name, tensor in self.under("in.").items() if name not in without}
        return model(inputs["x"]) if set(inputs) == {"x"} else model(**inputs)

    def _call(self, model: nn.Module, without: Iterable[str] = ()) -> Tensor:
        return output_of(self._run(model, without))


def output_of(out: Any) -> Tensor:
    """The tensor that cases compare: logits, start and end logits stacked last, or the last hidden state."""
    if isinstance(out, Tensor):
        return out
    if "start_logits" in out:
        return torch.stack([out.start_logits, out.end_logits], -1)
    found: Tensor = out.logits if "logits" in out else out.last_hidden_state
    return found


def golden_cases(folder: Path) -> list[GoldenCase]:
    """All cases in folders below, sorted."""
    return [GoldenCase(path.parent) for path in sorted(folder.glob("*/*/case.json"))]


def _apart(what: str, found: Tensor, expected: Tensor) -> Iterator[str]:
    if found.shape != expected.shape:
        yield f"{what} has the shape {tuple(found.shape)}, not {tuple(expected.shape)}"
        return
    absolute = ABSOLUTE * max(1.0, float(expected.abs().max()))
    if not torch.allclose(found, expected, rtol=RELATIVE, atol=absolute):
        yield f"{what} differs by up to {float((found - expected).abs().max()):.3g}"


def _config(folder: Path) -> dict[str, Any]:
    """The saved options; lists of names are sets whose order means nothing."""
    data = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    return {key: _unordered(value) for key, value in data.items() if key not in _OF_THE_WRITER}


def _unordered(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value
