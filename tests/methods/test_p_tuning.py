"""P-tuning: the network that makes the virtual tokens, and what is left of it in a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peftc import PeftcWarning, PeftModel, PromptEncoder, PromptEncoderConfig, get_peft_model
from peftc import PromptEncoderReparameterizationType as Network
from peftc.diagnostics import ConfigError
from peftc.testing.models import MODELS

LLAMA = next(model for model in MODELS if model.name == "llama")


def wrapped(**options: object) -> PeftModel:
    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **options)
    return get_peft_model(LLAMA.build(), config)


def test_the_width_of_the_network_is_that_of_the_tokens_unless_it_is_said() -> None:
    assert wrapped().active_peft_config.encoder_hidden_size == 16
    encoder = wrapped(encoder_hidden_size=5).prompt_encoder["default"]
    assert isinstance(encoder, PromptEncoder)
    assert tuple(encoder.get_parameter("mlp_head.2.weight").shape) == (5, 5)


def test_dropout_of_the_recurrent_network_acts_in_training_only() -> None:
    model = wrapped(encoder_reparameterization_type=Network.LSTM, encoder_dropout=0.5)
    encoder = model.train().prompt_encoder["default"]
    assert not torch.equal(encoder(), encoder())
    model.eval()
    assert torch.equal(encoder(), encoder())


@pytest.mark.parametrize("options", [{"encoder_num_layers": 3}, {"encoder_dropout": 0.1}])
def test_options_of_the_other_network_are_told(options: dict[str, object]) -> None:
    with pytest.warns(PeftcWarning, match="has no effect"):
        wrapped(**options)


def test_an_unknown_network_is_refused() -> None:
    with pytest.raises(ConfigError, match="MLP"):
        PromptEncoderConfig(encoder_reparameterization_type="GRU")


def test_what_is_loaded_is_the_table_and_trains_on_from_it(tmp_path: Path) -> None:
    made = wrapped().eval()
    made.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LLAMA.build(), tmp_path, is_trainable=True).eval()
    assert [name for name, p in loaded.named_parameters() if p.requires_grad] == [
        "prompt_encoder.default.embedding.weight"
    ]
    given = LLAMA.arguments()
    assert torch.equal(loaded(**given).logits, made(**given).logits)
    loaded(**given, labels=given["input_ids"]).loss.backward()
    assert loaded.prompt_encoder["default"].embedding.weight.grad.count_nonzero()


def test_loading_over_an_adapter_in_training_gives_the_saved_one(tmp_path: Path) -> None:
    made, other = wrapped().eval(), wrapped().eval()
    made.save_pretrained(tmp_path)
    other.load_adapter(tmp_path, "default", is_trainable=True)
    other.eval()
    assert torch.equal(other(**LLAMA.arguments()).logits, made(**LLAMA.arguments()).logits)
