"""Prompts beside the reference: the same tensors, outputs, losses, gradients, training and generated tokens.

Adapters are made by one library, moved at random, and copied or loaded into the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import peftc
from peftc.host import caches
from peftc.testing.golden import output_of
from peftc.testing.models import seeded
from tests.e2e.pairs import shaken, trainable
from tests.golden.models import base_model

pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass(frozen=True)
class Case:
    """A config class by name, a base model, its task, and options."""

    config: str
    base: str
    task: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.config.removesuffix('Config')}-{self.base}"

    def made_by(self, library: Any, **options: Any) -> nn.Module:
        size = {} if "cpt_token_ids" in self.options else {"num_virtual_tokens": 5}
        config = getattr(library, self.config)(task_type=self.task, **{**size, **self.options, **options})
        with seeded(3):
            model = library.get_peft_model(base_model(self.base), config).eval()
        shaken(model, 0.3)
        return model

    def loaded_by(self, library: Any, folder: Path, **options: Any) -> nn.Module:
        return library.PeftModel.from_pretrained(base_model(self.base), str(folder), **options).eval()

    def inputs(self) -> dict[str, Tensor]:
        with seeded(4):
            ids = torch.randint(3, 90, (2, 7))
            found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if self.task == "SEQ_2_SEQ_LM":
                found["labels"] = torch.randint(3, 90, (2, 5))
        found["attention_mask"][0, -2:] = 0
        if self.task == "CAUSAL_LM":
            found["labels"] = ids
        if self.task == "SEQ_CLS":
            found |= {"labels": torch.tensor([0, 2]), "token_type_ids": (ids > 40).long()}
        if "num_tasks" in self.options:
            found["task_ids"] = torch.tensor([0, 2])
        return found


def shapes(model: nn.Module) -> dict[str, tuple[tuple[int, ...], bool]]:
    return {name: (tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()}


CONTEXT = {"cpt_token_ids": [3, 4, 5, 6, 7, 8, 9, 10], "cpt_tokens_type_mask": [1, 2, 3, 4, 5, 6, 7, 8]}
LSTM = {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 2, "encoder_hidden_size": 6}
CASES = [
    Case("PromptTuningConfig", "gpt2", "CAUSAL_LM"),
    Case("PromptTuningConfig", "t5", "SEQ_2_SEQ_LM"),
    Case("PromptTuningConfig", "bert_cls", "SEQ_CLS"),
    Case("PromptEncoderConfig", "llama", "CAUSAL_LM", {"encoder_hidden_size": 6}),
    Case("PromptEncoderConfig", "gpt2", "CAUSAL_LM", LSTM),
    Case("PromptEncoderConfig", "t5", "SEQ_2_SEQ_LM"),
    Case("PrefixTuningConfig", "llama", "CAUSAL_LM"),
    Case("PrefixTuningConfig", "gpt2", "CAUSAL_LM", {"prefix_projection": True, "encoder_hidden_size": 6}),
    Case("PrefixTuningConfig", "t5", "SEQ_2_SEQ_LM"),
    Case("PrefixTuningConfig", "bert_cls", "SEQ_CLS"),
    Case("MultitaskPromptTuningConfig", "gpt2", "CAUSAL_LM", {"num_tasks": 3, "num_ranks": 2}),
    Case("MultitaskPromptTuningConfig", "t5", "SEQ_2_SEQ_LM", {"num_tasks": 3, "num_ranks": 2}),
    Case(
        "CPTConfig", "gpt2", "CAUSAL_LM", {**CONTEXT, "opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.5}
    ),
    Case("CartridgeConfig", "llama", "CAUSAL_LM", {"num_frozen_tokens": 2}),
    Case("CartridgeConfig", "gpt2", "CAUSAL_LM", {"num_frozen_tokens": 0}),
]


@contextmanager
def reference_asked() -> Iterator[None]:
    """Skip what the reference cannot do on the release at hand."""
    try:
        yield
    except ValueError as error:
        if "does not support past key values" not in str(error):
            raise
        pytest.skip(f"the reference on transformers {transformers.__version__}: {error}")


def pair(case: Case) -> tuple[nn.Module, nn.Module]:
    """The same adapter in both libraries."""
    theirs, ours = case.made_by(peft), case.made_by(peftc)
    state = theirs.state_dict()
    state.pop("word_embeddings.weight")  # the base model's, listed twice
    ours.load_state_dict(state)
    return theirs, ours


@pytest.mark.parametrize("case", CASES, ids=str)
def test_names_counts_outputs_losses_and_gradients_are_alike(case: Case) -> None:
    theirs, ours = pair(case)
    assert shapes(ours) == shapes(theirs)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    outs = []
    for model in (theirs, ours):
        with reference_asked():
            out = model(**case.inputs())
        (out.loss + output_of(out).square().mean()).backward()
        outs.append(out)
    torch.testing.assert_close(output_of(outs[1]), output_of(outs[0]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outs[1].loss.reshape(()), outs[0].loss.reshape(()), rtol=1e-6, atol=1e-6)
    gradients = [
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None} for model in (theirs, ours)
    ]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_goes_the_same_way(case: Case) -> None:
    """Also where a method brings its tensors back after each step."""
    losses: list[list[float]] = []
    for model in pair(case):
        optimiser = torch.optim.SGD([p for _, p in trainable(model)], lr=0.3)
        losses.append([])
        for _ in range(4):
            optimiser.zero_grad()
            with reference_asked():
                loss = model(**case.inputs()).loss
            loss.backward()
            optimiser.step()
            losses[-1].append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][0] != losses[0][-1]


@pytest.mark.parametrize(("writer", "reader"), [(peft, peftc), (peftc, peft)], ids=["peft-to-peftc", "peftc-to-peft"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_reads_what_the_other_saved(case: Case, writer: Any, reader: Any, tmp_path: Path) -> None:
    made = case.made_by(writer)
    made.save_pretrained(str(tmp_path))
    loaded = case.loaded_by(reader, tmp_path)
    with torch.no_grad(), reference_asked():
        expected = output_of(made(**case.inputs()))
        torch.testing.assert_close(output_of(loaded(**case.inputs())), expected, rtol=1e-4, atol=1e-5)
        if reader is peftc:
            training = case.loaded_by(reader, tmp_path, is_trainable=True)
            torch.testing.assert_close(output_of(training(**case.inputs())), expected, rtol=1e-4, atol=1e-5)
            assert training.get_nb_trainable_parameters()[0] > 0
    loaded.save_pretrained(str(tmp_path / "again"))
    again, first = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "again", tmp_path))
    assert again.keys() == first.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in first.items())


# generation -----------------------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {"greedy": {}, "beams": {"num_beams": 2}}
#: The reference leaves the decoder's virtual tokens out when it generates.
GENERATE = [
    case for case in CASES if case.task in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and str(case) != "MultitaskPromptTuning-t5"
]


def asked(case: Case, padded: bool, **way: Any) -> dict[str, Any]:
    """Keywords of `generate`."""
    call = {name: tensor for name, tensor in case.inputs().items() if name != "labels"}
    call["attention_mask"] = torch.ones_like(call["input_ids"])
    if padded:
        call["attention_mask"][0, :3] = 0
        call["input_ids"] = call["input_ids"].masked_fill(call["attention_mask"] == 0, 0)
    return {**call, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **way}


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", GENERATE, ids=str)
def test_the_same_tokens_are_generated(case: Case, way: str, padded: bool, tmp_path: Path) -> None:
    case.made_by(peftc).save_pretrained(str(tmp_path))
    theirs, ours = (case.loaded_by(library, tmp_path) for library in (peft, peftc))
    call = asked(case, padded, **WAYS[way])
    found = ours.generate(**call)
    # With a cache the reference gives other tokens since transformers 5.24: docs/reference-bugs.md. Ours are compared with
    # what forward passes give in test_prompt_generation.py.
    in_cache = ours.prompt_encoder["default"].place.is_cache
    if in_cache and caches.keyword(ours.get_base_model()) != "past_key_values":
        pytest.skip(f"the reference leaves a prefix out when it generates on transformers {transformers.__version__}")
    uncached = {} if in_cache else {"use_cache": False}
    assert found.tolist() == theirs.generate(**call, **uncached).tolist()
    with ours.disable_adapter():
        assert found.tolist() != ours.generate(**call).tolist()


ALL = [*GENERATE, Case("MultitaskPromptTuningConfig", "t5", "SEQ_2_SEQ_LM", {"num_tasks": 3, "num_ranks": 2})]


@pytest.mark.parametrize("way", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_every_cache_gives_the_same_tokens(case: Case, way: dict[str, Any]) -> None:
    """The reference fails on static caches."""
    model = case.made_by(peftc)
    for padded in (False, True):
        expected = model.generate(**asked(case, padded, **way)).tolist()
        for other in ({"use_cache": False}, {"cache_implementation": "static"}):
            assert model.generate(**asked(case, padded, **way, **other)).tolist() == expected, other


@pytest.mark.parametrize("case", [case for case in GENERATE if case.task == "CAUSAL_LM"], ids=str)
def test_a_conversation_goes_on_from_its_cache(case: Case) -> None:
    model = case.made_by(peftc)
    call = {**asked(case, padded=False), "return_dict_in_generate": True}
    first = model.generate(**call)
    longer = torch.cat([first.sequences, torch.full((2, 2), 11)], dim=1)
    call |= {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
    kept = model.generate(**call, past_key_values=first.past_key_values)
    assert kept.sequences.tolist() == model.generate(**call).sequences.tolist()


def test_decoding_by_hand_finds_the_prompt_in_the_cache() -> None:
    for case in (CASES[0], CASES[6]):
        model, ids = case.made_by(peftc), case.inputs()["input_ids"]
        with torch.no_grad():
            whole = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
            out = model(input_ids=ids[:, :-1], use_cache=True)
            mask = torch.ones_like(ids)
            last = model(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=out.past_key_values).logits[:, -1]
        torch.testing.assert_close(last, whole, rtol=1e-4, atol=1e-5)


def test_a_base_model_is_as_before_after_generating() -> None:
    model = CASES[0].made_by(peftc)
    base = model.get_base_model()
    before = sorted(vars(base))
    with pytest.raises(ValueError, match="unknown"):
        model.generate(**asked(CASES[0], padded=False), unknown=1)
    model.generate(**asked(CASES[0], padded=False))
    assert sorted(vars(base)) == before
