"""One seed, one start: a fresh adapter has the reference's random numbers, and leaves the generator where that does.

All methods, with all their examples and the starts that are no identity, on all small models and in half precision. What
differs is here, by name, with the reason; `docs/drop-in.md` says the same to users.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftc
from peftc.registry.manager import default_registry
from peftc.testing.models import MODELS, TinyModel
from peftc.testing.subjects import Subject, quiet, subjects

REGISTRY = default_registry()
#: method -> where its start differs -> why. A key is a part of the subject's name
DIFFERS: Mapping[str, Mapping[str, str]] = {
    "HRA": {"apply_GS=True": "the reference starts from pairs of which Gram-Schmidt leaves nothing: NaN"},
    "HIRA": {"init_weights=gaussian-conv": "the reference leaves the option out on convolutions"},
    "LORA": {
        "use_qalora=True": "the reference leaves the option out on layers that are not GPTQ's",
        "kasa_config": "what the base loses is the same but for rounding: here it is taken away, there the rest is put together",
        "monteclora_config": "the reference draws what it will sample, too, when it starts",
    },
    "BOFT": {"boft_n_butterfly_factor=2": "the reference trains one factor where its extension cannot be built"},
}
#: Layers of the models that the reference cannot adapt, or takes for others: groups, and windows that are no squares.
WITHOUT: Mapping[str, tuple[str, ...]] = {
    "ADALORA": ("grouped",),
    "OFT": ("grouped", "strided"),
    "BOFT": ("grouped", "strided"),
    "HRA": ("grouped", "strided"),
    "HIRA": ("grouped",),
}


#: Subjects that the reference cannot adapt at all, by their names' ends: layers of kinds that it has not for the method, single
#: parameters, and models that must generate where they cannot.
_ELSE = "(?<!defaults)"
ABSENT: Mapping[str, str] = {
    "ADALORA": f"-(conv1d|conv3d|embedding)$|{_ELSE}-(llama|gpt2)$",
    "BOFT": "-(conv1d|conv3d|experts|gpt2)$",
    "FOURIERFT": rf"-(conv\dd|embedding|experts)$|{_ELSE}-(llama|gpt2)$",
    "HIRA": "-experts$",
    "HRA": "-(experts|gpt2)$",
    "IA3": "-(conv1d|experts)$",
    "LOHA": f"-(conv3d|embedding|experts|gpt2)$|{_ELSE}-llama$",
    "LOKR": f"-(conv3d|embedding|experts|gpt2)$|{_ELSE}-llama$",
    "LORA": "alora_invocation_tokens",
    "OFT": "-(conv1d|conv3d|experts|gpt2)$",
    "POLY": "-gpt2$",
    "TRAINABLE_TOKENS": f"{_ELSE}-gpt2$",
    "VERA": rf"-(conv\dd|embedding)$|{_ELSE}-(llama|gpt2)$",
}


def started(library: Any, model: nn.Module, config: Any, adapter: str = "default") -> tuple[dict[str, Tensor], Tensor]:
    """Parameters after a fresh adapter was made from one seed, and the state of the generator."""
    torch.manual_seed(5)
    with quiet():
        made = library.get_peft_model(model, config, adapter)
    return dict(made.named_parameters()), torch.get_rng_state()


def theirs_of(config: Any) -> Any:
    """The same config of the reference. Raises `TypeError` if it has an option that is not there."""
    cls = getattr(peft, type(config).__name__)
    own = {name: value for name, value in config.to_dict().items() if name not in ("peft_type", "peft_version")}
    return cls(**{name: value for name, value in own.items() if name in cls.__dataclass_fields__})


def variants(name: str) -> Iterator[Subject]:
    """Subjects of the kit, each also with every start that is switched off."""
    for s in subjects(REGISTRY.get(name)):
        if s.method.call_tuner is not None:
            continue
        targets = s.targets and tuple(t for t in s.targets if t not in WITHOUT.get(name, ()))
        kept = Subject(s.method, s.options, s.model, targets, s.first, s.foremost, s.parameters, s.part)
        yield kept
        for option, value in s.config().to_dict().items():
            if option.startswith("init") and value is True and s.first and "inference" not in option:
                yield Subject(s.method, {**s.options, option: False}, s.model, targets, False, False, s.parameters)


def models(s: Subject) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    yield "float32", s.build
    if s.first and s.method.adapts_layers and s.model.name in ("mlp", "embedding"):
        yield "bfloat16", lambda: s.build(torch.bfloat16)
        yield "float64", lambda: s.build(torch.float64)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for n in REGISTRY.names if REGISTRY.get(n).call_tuner is None])
def test_one_seed_gives_the_references_start(name: str) -> None:
    compared, wrong = 0, []
    for s in variants(name):
        absent = re.search(ABSENT.get(name, "$^"), str(s)) is not None
        reason = next((why for part, why in DIFFERS.get(name, {}).items() if part in str(s)), None)
        for dtype, build in models(s):
            try:
                theirs, their_state = started(peft, build(), theirs_of(s.config()))
            except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
                wrong += [] if absent else [f"{s} {dtype}: the reference has {error}"]
                continue
            ours, our_state = started(peftc, build(), s.config())
            alike = all(p.shape == theirs[n].shape and torch.equal(p, theirs[n]) for n, p in ours.items())
            compared += 1
            wrong += [f"{s} {dtype}: the reference has it"] if absent else []
            if (alike and torch.equal(our_state, their_state)) is (reason is not None):
                wrong.append(f"{s} {dtype}")
    assert wrong == []
    assert compared > 0


def small(name: str) -> TinyModel:
    return next(model for model in MODELS if model.name == name)


def test_further_adapters_go_on_from_there() -> None:
    found = []
    for library in (peft, peftc):
        torch.manual_seed(2)
        model = library.get_peft_model(small("mlp").build(), library.LoraConfig(target_modules=["lin0", "lin1"]))
        torch.manual_seed(3)
        model.add_adapter("other", library.LoraConfig(target_modules=["lin1"], r=3, init_lora_weights="gaussian"))
        model.add_adapter("third", library.LoraConfig(target_modules=["lin0"], init_lora_weights=False))
        found.append(dict(model.named_parameters()))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(p, found[0][name]) for name, p in found[1].items())


def test_attention_starts_with_others() -> None:
    """The reference makes the adapter of its output layer twice, once before and once after the other's."""

    def made(library: Any) -> Any:
        torch.manual_seed(0)
        base = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
        torch.manual_seed(5)
        return library.get_peft_model(base, library.LoraConfig(target_modules=["attn"], r=4))

    theirs, ours = (dict(made(library).named_parameters()) for library in (peft, peftc))
    assert theirs.keys() == ours.keys()
    assert not all(torch.equal(p, theirs[name]) for name, p in ours.items())


def test_the_start_does_not_depend_on_the_dtype_that_torch_computes_in() -> None:
    values = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(5)
        model = peftc.get_peft_model(small("mlp").build(dtype), peftc.LoraConfig(target_modules=["lin0"]))
        values.append(next(p for n, p in model.named_parameters() if "lora_A" in n).detach().float())
    assert torch.equal(values[0], values[1])


def test_loading_draws_nothing(tmp_path: Any) -> None:
    """Nothing initialises what a file fills."""
    for name in (n for n in REGISTRY.names if REGISTRY.get(n).adapts_layers):
        subject = next(s for s in subjects(REGISTRY.get(name)) if s.model.name == "mlp")
        subject.trained().save_pretrained(tmp_path / name)
        base = subject.build()
        before = torch.get_rng_state()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peftc.PeftModel.from_pretrained(base, tmp_path / name)
        assert torch.equal(torch.get_rng_state(), before), name
