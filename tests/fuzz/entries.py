"""The ways into peftc that take what others wrote, each with whole examples and how they are damaged."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from peftc import PeftModel
from peftc.compiler.compile import compile_plan
from peftc.compiler.of_spec import compile_spec
from peftc.compiler.plan.cost import cost_of, file_bytes
from peftc.compiler.plan.drift import differences
from peftc.compiler.plan.files import read_plan
from peftc.compiler.plan.render import render_plan
from peftc.compiler.plan.serial import plan_to_json, plan_to_text
from peftc.config.base import CONFIG_NAME
from peftc.config.spec import load_spec
from peftc.graph.base_ref import BaseRef
from peftc.graph.cache import GraphCache
from peftc.graph.files import write_graph
from peftc.integrations.transformers.data import Encoder, read_examples
from peftc.integrations.transformers.graph import graph_of
from peftc.registry.manager import default_registry
from peftc.runtime.applying.apply import apply_plan
from peftc.testing.subjects import Subject, quiet, subjects
from tests.fuzz import mutate
from tests.fuzz.runner import TOLD, Bad, Entry, command
from tests.integration import tiny

PLAN, WEIGHTS = "peftc_plan.json", "adapter_model.safetensors"
BASES: tuple[dict[str, Any], ...] = (
    {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
     "num_key_value_heads": 2, "vocab_size": 98},
    {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50},
    {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
     "vocab_size": 40, "architectures": ["BertModel"]},
    {"model_type": "t5", "d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 16, "vocab_size": 40},
)  # fmt: skip
ROWS: tuple[dict[str, Any], ...] = (
    {"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"},
                  {"role": "assistant", "content": "yes"}]},
    {"question": "a?", "answer": "b", "expect": ["b"]},
    {"prompt": "p", "completion": "c"},
    {"text": "some text"},
)  # fmt: skip
TRAIN = {
    "data": "data.jsonl",
    "steps": 4,
    "batch_size": 2,
    "learning_rate": 1e-3,
    "scheduler": "cosine",
    "device": "cpu",
}
CHECKS = {"expect_modules": 2, "expect_trainable": "9.2M", "allow_dead_targets": ["x"]}
#: What describes a file and not an adapter.
_OF_FILES = ("peft_version", "auto_mapping", "inference_mode", "base_model_name_or_path", "revision")


class Examples:
    """Whole examples: an adapter of every method as it is saved, specs, a graph, a cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        os.environ["PEFTC_CACHE"] = str(folder / "cache")
        self.keys = mutate.labels()
        self.adapters = [self._saved(name) for name in default_registry().names]
        self.configs = [json.loads((saved / CONFIG_NAME).read_text()) for _, saved in self.adapters]
        self.specs = [self._spec(config) for config in self.configs]
        self.graph = folder / "graph.json"
        self.base = BaseRef(config=BASES[0], task_type="CAUSAL_LM")
        write_graph(graph_of(self.base), self.graph)
        (self.cached,) = (folder / "cache" / "graphs").glob("*.graph.json")
        self.simple = folder / "simple.json"
        simple = next(s for s in self.specs if "target_modules" in s["adapters"]["default"])
        self.simple.write_text(json.dumps({key: value for key, value in simple.items() if key != "checks"}))

    def _saved(self, name: str) -> tuple[Subject, Path]:
        found = subjects(default_registry().get(name))
        subject = next((s for s in found if s.model.is_language_model), found[0])
        place = self.folder / "adapters" / name
        with quiet():
            subject.trained().save_pretrained(str(place))
        return subject, place

    def _spec(self, config: dict[str, Any]) -> dict[str, Any]:
        options = {k: v for k, v in config.items() if v not in (None, [], {}) and k not in _OF_FILES}
        if "target_modules" in options:
            options["target_modules"] = ["q_proj", "v_proj"]
        base = {"config": BASES[0], "task_type": "CAUSAL_LM", "dtype": "float32"}
        adapters = {"default": options, "other": options}
        return {
            "version": 1,
            "base": base,
            "adapters": adapters,
            "train": TRAIN,
            "checks": CHECKS,
            "active": ["default"],
        }

    def document(self, rng: random.Random, place: Path) -> Path:
        """A damaged spec or config."""
        is_config = rng.random() < 0.35
        data = mutate.changed(rng.choice(self.configs if is_config else self.specs), rng, self.keys, gently=0.3)
        file = place / (CONFIG_NAME if is_config else rng.choice(["spec.json", "spec.yaml"]))
        raw = mutate.as_json(data, rng)
        if file.suffix == ".yaml" and rng.random() < 0.5:
            raw = _yaml(data, rng) or raw
        file.write_bytes(mutate.mangled(raw, rng) if rng.random() < 0.35 else raw)
        return file

    def damaged(self, rng: random.Random, place: Path, parts: tuple[str, ...]) -> tuple[Subject, Path]:
        """A copy of an adapter's folder with one of these parts, or all, changed."""
        subject, source = rng.choice(self.adapters)
        target = place / "adapter"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        for part in parts if rng.random() < 0.2 else (rng.choice(parts),):
            file = target / part
            if part == WEIGHTS:
                file.write_bytes(mutate.weights(file.read_bytes(), rng, self.keys))
            elif file.exists():
                data = mutate.changed(json.loads(file.read_text()), rng, self.keys, gently=0.7)
                raw = mutate.as_json(mutate.signed(data) if part == PLAN and rng.random() < 0.9 else data, rng)
                file.write_bytes(mutate.mangled(raw, rng) if rng.random() < 0.05 else raw)
        return subject, target


def _yaml(data: Any, rng: random.Random) -> bytes:
    try:
        return yaml.safe_dump(data, default_flow_style=rng.choice([None, True, False])).encode("utf-8", "surrogatepass")
    except yaml.YAMLError:
        return b""


def entries(folder: Path) -> list[Entry]:
    """All entries, over whole examples that are made in the folder."""
    found = Examples(folder)
    return [
        Entry("validate", _in(folder, lambda rng, place: _validate(found, rng, place)), 6),
        Entry("plan", _in(folder, lambda rng, place: _plan(found, rng, place)), 5),
        Entry("inspect", _in(folder, lambda rng, place: _inspect(found, rng, place)), 6),
        Entry("load", _in(folder, lambda rng, place: _load(found, rng, place)), 6),
        Entry("data", _in(folder, lambda rng, place: _data(rng, place)), 5),
        Entry("plan file", _in(folder, lambda rng, place: _plan_file(found, rng, place)), 6),
        Entry("graph file", _in(folder, lambda rng, place: _graph_file(found, rng, place)), 4),
        Entry("cache", _in(folder, lambda rng, place: _cache(found, rng, place)), 3),
        Entry("python", _in(folder, lambda rng, place: _python(found, rng)), 5),
        # building a thousand layers, which a config may ask for, takes transformers many seconds
        Entry("base", _in(folder, lambda rng, place: _base(found, rng, place)), 1, seconds=40, hang=120),
    ]


def _in(folder: Path, prepare: Callable[[random.Random, Path], Callable[[], object]]) -> Any:
    """With a folder that is there."""

    def made(rng: random.Random, place: Path) -> Callable[[], object]:
        place.mkdir(exist_ok=True)
        return prepare(rng, place)

    return made


def _validate(found: Examples, rng: random.Random, place: Path) -> Callable[[], object]:
    file = found.document(rng, place)
    words = ["--json"] if rng.random() < 0.3 else []
    return lambda: command("validate", file, *words)


def _plan(found: Examples, rng: random.Random, place: Path) -> Callable[[], object]:
    spec = copy.deepcopy(rng.choice(found.specs))
    spec["adapters"] = mutate.changed(spec["adapters"], rng, found.keys, gently=0.5)
    del spec["checks"]
    if rng.random() < 0.2:
        spec["checks"] = mutate.changed(CHECKS, rng, found.keys)
    file = place / "spec.json"
    file.write_bytes(mutate.as_json(spec, rng))
    words = rng.choice([[], [], ["--json"], ["--explain", rng.choice(["lm_head", "x" * 500, ""])]])
    return lambda: command("plan", file, "--graph", found.graph, *words)


def _inspect(found: Examples, rng: random.Random, place: Path) -> Callable[[], object]:
    _, target = found.damaged(rng, place, (CONFIG_NAME, WEIGHTS, PLAN))
    words = rng.choice([[], [], ["--json"], ["--header-only"]])
    return lambda: command("inspect", target, *words)


def _load(found: Examples, rng: random.Random, place: Path) -> Callable[[], object]:
    subject, target = found.damaged(rng, place, (CONFIG_NAME, WEIGHTS))
    base = subject.build()
    before = _state(base)

    def act() -> None:
        try:
            PeftModel.from_pretrained(base, str(target))
        except Exception as error:
            if _state(base) != before:
                raise Bad(f"the base model is changed by a load that was refused: {error}") from error
            raise

    return act


def _state(model: nn.Module) -> str:
    """All that a load may change."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        digest.update(
            f"{name} {id(module)} {type(module).__name__} {module.training} {len(module._forward_hooks)}".encode()
        )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {id(tensor)} {tensor.requires_grad} {tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(-1).double().numpy().tobytes())
    return digest.hexdigest()


@cache
def _encoders() -> tuple[Encoder, ...]:
    return tuple(Encoder(tiny.tokenizer(template), frozenset({1})) for template in (tiny.TEMPLATE, tiny.TEMPLATE, None))


def _data(rng: random.Random, place: Path) -> Callable[[], object]:
    keys = ["messages", "role", "content", "text", "prompt", "completion", "question", "answer", "expect"]
    number = rng.choice([1, 2, 5])
    rows = [
        mutate.changed(rng.choice(ROWS), rng, keys) if rng.random() < 0.5 else rng.choice(ROWS) for _ in range(number)
    ]
    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file = place / "data.jsonl"
    file.write_bytes(mutate.mangled(raw, rng) if rng.random() < 0.4 else raw)
    encoder, length = rng.choice(_encoders()), rng.choice([8, 64])
    return lambda: encoder.encode_all(read_examples(file), length)


def _plan_file(found: Examples, rng: random.Random, place: Path) -> Callable[[], object]:
    subject, target = found.damaged(rng, place, (PLAN,))
    base = subject.build() if rng.random() < 0.3 else None

    def act() -> None:
        plan = read_plan(target / PLAN)
        _used(plan)
        if base is not None:
            apply_plan(base, plan)

    return act


def _used(plan: Any) -> None:
    """All that is done with a plan without its model."""
    render_plan(plan)
    cost_of(plan)
    list(plan.parameters())
    for adapter in plan.adapters:
        file_bytes(adapter, plan.model)
    plan_to_text(plan)


def _graph_file(found: Examples, rng: random.Random, place: Path) -> Callable[[], object]:
    raw = mutate.as_json(mutate.changed(json.loads(found.graph.read_text()), rng, found.keys, gently=0.8), rng)
    file = place / "graph.json"
    file.write_bytes(mutate.mangled(raw, rng) if rng.random() < 0.2 else raw)
    spec = place / "spec.json"
    spec.write_text(json.dumps({key: value for key, value in rng.choice(found.specs).items() if key != "checks"}))
    return lambda: command("plan", spec, "--graph", file)


def _cache(found: Examples, rng: random.Random, place: Path) -> Callable[[], object]:
    _, _, body = found.cached.read_bytes().partition(b"\n")
    body = mutate.as_json(mutate.changed(json.loads(body), rng, found.keys, gently=0.8), rng)
    header = {"label": "x", "sha256": hashlib.sha256(body).hexdigest()}
    raw = json.dumps(mutate.changed(header, rng, found.keys) if rng.random() < 0.2 else header).encode() + b"\n" + body
    graphs = place / "cache" / "graphs"
    graphs.mkdir(parents=True, exist_ok=True)
    (graphs / "key.graph.json").write_bytes(mutate.flipped(raw, rng) if rng.random() < 0.1 else raw)
    spec, _ = load_spec(found.simple)

    def act() -> object:
        cache = GraphCache(place / "cache")
        cache.entries()
        graph = cache.get("key")
        if graph is None:
            return TOLD  # it would be built again
        plan = compile_spec(spec, graph, strict=False)
        _used(plan)
        return differences(plan, graph)

    return act


def _python(found: Examples, rng: random.Random) -> Callable[[], object]:
    """A config that is made in Python, of values that no document can hold, and planned."""
    odd: list[Any] = [
        object(),
        b"bytes",
        {1: 2},
        {1, "a"},
        (1, "a"),
        frozenset({"q_proj"}),
        range(3),
        len,
        int,
        10**5000,
    ]
    round_ = [1]
    round_.append(round_)  # type: ignore[arg-type]  # a list that holds itself
    config = rng.choice(found.configs)
    options = {key: value for key, value in config.items() if key not in ("peft_type", "peft_version")}
    for _ in range(rng.choice([1, 1, 2, 3])):
        key = rng.choice(list(config) if rng.random() < 0.9 else found.keys)
        values = (
            [*odd, round_, *mutate.VALUES]
            if rng.random() < 0.6
            else [1, 2, 0.5, True, None, "all-linear", ["q_proj"], {}]
        )
        options[key] = rng.choice(values)
    cls = default_registry().get(config["peft_type"]).config

    def act() -> None:
        plan = compile_plan(_graph(str(found.graph)), {"default": cls(**options)})
        plan_to_json(plan)
        render_plan(plan)

    return act


@cache
def _graph(file: str) -> Any:
    from peftc.compiler.plan.files import read_graph

    return read_graph(file)


def _base(found: Examples, rng: random.Random, place: Path) -> Callable[[], object]:
    config = mutate.changed(rng.choice(BASES), rng, found.keys, gently=0.6)
    task = rng.choice([None, "CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION"])
    options = {**json.loads(found.simple.read_text())["adapters"]["default"], "target_modules": "all-linear"}
    spec = {"version": 1, "base": {"config": config, "task_type": task}, "adapters": {"a": options}}
    file = place / "spec.json"
    file.write_bytes(mutate.as_json(spec, rng))
    return lambda: command("plan", file)
