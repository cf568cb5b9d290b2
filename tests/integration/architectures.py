"""Which causal language models transformers builds from a default config on the meta device, and which it does not.

    python -m tests.integration.architectures    writes docs/architectures.md

The test beside this file plans for and adapts every architecture that can be built, and compares the others with the page.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from peftc.diagnostics import PeftcError
from peftc.graph.base_ref import BaseRef
from peftc.graph.locate import locate
from peftc.integrations.transformers.graph import meta_model

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"

#: All model types that transformers has a causal language model for.
MODEL_TYPES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

HEAD = """\
# Architectures

`peftc plan` works for every causal language model that transformers {version} builds from its default config on the meta
device: {built} of {all} model types. For each of them a test compares the plan with the adapted model, parameter by
parameter. The other {failed} are those that transformers itself does not build from their default config; a complete config
of such a model may well work. `python -m tests.integration.architectures` wrote this page.

| model type | what transformers says |
|---|---|
"""


def default_base(model_type: str) -> BaseRef:
    """The base that `config: {{model_type: …}}` names in a spec: every option at its default."""
    return BaseRef(config={"model_type": model_type}, task_type="CAUSAL_LM")


def failure(model_type: str) -> str | None:
    """What transformers says when it does not build the model; None if it does."""
    try:
        meta_model(locate(default_base(model_type)))
    except PeftcError as error:
        return error.diagnostics[0].what
    return None


def builds_alone(model_type: str) -> bool:
    """Whether transformers builds the model without us in between: the oracle for `failure`."""
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type]())
    except Exception:  # whatever it is, the model was not built
        return False
    return True


def row(model_type: str, said: str) -> str:
    """The page's line for a model type; the error is cut where it begins to advise."""
    text = said if len(said) <= 200 else said[:200].rsplit(" ", 1)[0] + " …"
    return f"| `{model_type}` | {text.replace('|', '/')} |"


def page(failures: Mapping[str, str]) -> str:
    """The whole page."""
    count = len(MODEL_TYPES)
    head = HEAD.format(version=transformers.__version__, built=count - len(failures), all=count, failed=len(failures))
    return head + "\n".join(row(kind, said) for kind, said in sorted(failures.items())) + "\n"


def main() -> None:
    """Write the page."""
    transformers.logging.set_verbosity_error()
    said = {kind: failure(kind) for kind in MODEL_TYPES}
    PAGE.write_text(page({kind: text for kind, text in said.items() if text is not None}), encoding="utf-8")


if __name__ == "__main__":
    main()
