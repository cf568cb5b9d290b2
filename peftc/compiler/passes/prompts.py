"""The pass that adds a prompt: its sizes from the model, its slots, and what a checkpoint holds of it.

Sizes are facts of the model. Where keys and values are given, they are the widest layer's heads; elsewhere the width of the
input embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from peftc import rules
from peftc.compiler.passes.draft import Context, Draft, option
from peftc.compiler.passes.sites import all_of, check_slots
from peftc.compiler.plan.sites import PromptSite
from peftc.config.prompt import PromptLearningConfig
from peftc.config.types import TaskType
from peftc.diagnostics import Diagnostic, PeftcError, Severity
from peftc.registry.boundary import boundary
from peftc.tuner.prompt import PromptTuner

#: Where every prompt's table is in a checkpoint.
PROMPT_KEY = "prompt_embeddings"
#: Whether the models of a task are encoder-decoders, where it decides that.
_ENCODER_DECODER = {TaskType.SEQ_2_SEQ_LM: True, TaskType.CAUSAL_LM: False}


def add_prompt(draft: Draft, context: Context) -> Draft:
    """The prompt encoder's slots, after sizes left out were taken from the model."""
    tuner = context.method.tuner
    if not isinstance(draft.config, PromptLearningConfig) or not isinstance(tuner, PromptTuner):
        return draft
    model = context.graph.model
    if model.input_embeddings is None:
        what = f"`{model.cls}` has no input embeddings that prompts could go before"
        return draft.told(rules.NO_EMBEDDINGS(what, fix="Use a method that adapts layers."))
    task, translates = draft.config.task_type, _translates(draft.config)
    if translates is not None and translates != model.is_encoder_decoder:
        right = TaskType.SEQ_2_SEQ_LM if model.is_encoder_decoder else TaskType.CAUSAL_LM
        what = f"`{model.cls}` is {'an' if model.is_encoder_decoder else 'no'} encoder-decoder; `{task}` is for the other kind"
        fix = f"Set `task_type` to `{right}`."
        return draft.told(rules.TASK_MISFIT(what, fix=fix, where=context.where("task_type")))
    given = draft.config
    config = given.model_copy(update=_sizes(given, tuner, context))
    draft = draft.told(*_corrections(given, tuner, context)).but(config=config)
    missing = next((name for name in _needed(tuner) if option(config, name) is None), None)
    if missing is not None:
        fix = "Set it, e.g. to 20." if missing == "num_virtual_tokens" else "Set it to that of the model."
        return draft.told(rules.PROMPT_SIZE(f"`{missing}` is not set", fix=fix, where=context.where(missing)))
    try:
        declare = tuner.encoded if context.options.loading or config.inference_mode else tuner.slots
        with boundary(context.method.peft_type, declare.__name__):
            slots = all_of(iter(declare(config, model.dims)))
        with boundary(context.method.peft_type, "extra"):
            extra = tuple(dict(tuner.extra(config, model.dims)).items())
        check_slots(slots, context, None)
    except PeftcError as error:
        return draft.failed(error)
    shape = table_shape(config, tuner)
    return draft.but(prompt=PromptSite(slots, "float32", PROMPT_KEY, shape, model.input_embeddings, tuner.place, extra))


def _translates(config: PromptLearningConfig) -> bool | None:
    """Whether the task is one of encoder-decoders; None if any model may have it."""
    return None if config.task_type is None else _ENCODER_DECODER.get(config.task_type)


def table_shape(config: PromptLearningConfig, tuner: PromptTuner[PromptLearningConfig]) -> tuple[int, int]:
    """`(rows, width)` of the table, for a config whose sizes are known."""
    tokens, width = config.num_virtual_tokens or 0, config.token_dim or 0
    if tuner.place.is_cache:
        return tokens, (config.num_layers or 0) * 2 * width
    return tokens * (config.num_transformer_submodules or 1), width


def _needed(tuner: PromptTuner[PromptLearningConfig]) -> tuple[str, ...]:
    more = ("num_layers", "num_attention_heads") if tuner.place.is_cache else ()
    return ("num_virtual_tokens", "token_dim", *more)


def _sizes(
    config: PromptLearningConfig, tuner: PromptTuner[PromptLearningConfig], context: Context
) -> Mapping[str, int | None]:
    """Sizes that the config leaves out, and those in which it is corrected."""
    dims = context.graph.model.dims
    facts = _facts(tuner, context)
    found: dict[str, int | None] = {
        "token_dim": facts.get("token_dim"),
        "num_layers": dims.get("num_hidden_layers"),
        "num_attention_heads": dims.get("num_attention_heads"),
        "num_transformer_submodules": 2 if config.task_type is TaskType.SEQ_2_SEQ_LM else 1,
        "encoder_hidden_size": facts.get("token_dim"),
    }
    if tuner.place.is_cache and "num_decoder_layers" in dims:  # as many as either half has: only the decoder's are used
        found["num_layers"] = max(dims["num_decoder_layers"], dims.get("num_hidden_layers", 0))
    known = {name: value for name, value in found.items() if name in type(config).model_fields}
    missing = {name: value for name, value in known.items() if option(config, name) is None}
    return missing | (facts if tuner.place.is_cache else {})


def _facts(tuner: PromptTuner[PromptLearningConfig], context: Context) -> dict[str, int]:
    """What the model leaves no choice about."""
    graph = context.graph
    dims = graph.model.dims
    if not tuner.place.is_cache:
        width = graph.by_path[graph.model.input_embeddings or ""].facts.out_features or dims.get("hidden_size")
        return {} if width is None else {"token_dim": width}
    layout = kv_layout(dims)
    return {} if layout is None else {"token_dim": layout[0] * layout[1], "num_attention_heads": layout[0]}


def kv_layout(dims: Mapping[str, int]) -> tuple[int, int] | None:
    """Heads and width of a head of keys and values, those of the widest layer where layers differ; None if not known.

    >>> kv_layout({"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2})
    (2, 8)
    """
    queries = dims.get("num_attention_heads")
    heads = dims.get("num_global_key_value_heads") or dims.get("num_key_value_heads") or queries
    width = dims.get("global_head_dim") or dims.get("head_dim")
    if width is None and queries and "hidden_size" in dims:
        width = dims["hidden_size"] // queries
    return None if heads is None or width is None else (heads, width)


def _corrections(
    config: PromptLearningConfig, tuner: PromptTuner[PromptLearningConfig], context: Context
) -> Iterator[Diagnostic]:
    """Sizes that the config gives otherwise than the model has them: wrong for embeddings, corrected for keys."""
    severity = Severity.WARNING if tuner.place.is_cache else Severity.ERROR
    for name, value in _facts(tuner, context).items():
        given = option(config, name)
        if given is not None and given != value:
            what = f"`{name}` is {given}, but the model's is {value}"
            yield rules.PROMPT_SIZE(what, fix="Leave it out.", where=context.where(name), severity=severity)
