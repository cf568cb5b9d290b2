"""Who may import what: downwards only inside the house, and each layer its own third parties."""

from __future__ import annotations

import sys
from graphlib import CycleError, TopologicalSorter

from tests.architecture.tree import Import, Source, of_every, sources

# Lowest first. A file belongs to the longest prefix that fits; files of one row may import each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("peftc._version", "peftc.limits", "peftc.diagnostics"),
    ("peftc.rules",),
    ("peftc.installed",),
    ("peftc.config", "peftc.graph"),
    ("peftc.tuner",),
    ("peftc.registry",),
    ("peftc.config.files", "peftc.config.spec", "peftc.schema"),
    ("peftc.compiler.plan", "peftc.compiler.match", "peftc.checkpoint.keys", "peftc.checkpoint.named"),
    ("peftc.compiler.passes",),
    ("peftc.compiler",),
    ("peftc.plugin",),
    # the torch line
    ("peftc.ops", "peftc.host"),
    ("peftc.runtime",),
    ("peftc.runtime.bases",),
    ("peftc.runtime.slots",),
    ("peftc.runtime.layer",),
    ("peftc.runtime.around", "peftc.runtime.prompt"),
    ("peftc.runtime.session",),
    ("peftc.runtime.applying",),
    ("peftc.checkpoint",),
    ("peftc.model.parts",),
    ("peftc.model",),
    ("peftc.model.functions",),
    ("peftc.integrations",),
    ("peftc.testing",),
    ("peftc", "peftc.cli", "peftc.compat"),
)
TORCH_LINE = LAYERS.index(("peftc.ops", "peftc.host"))

# Imports that go up, all inside functions, and why. None of them closes a circle of files.
UPWARDS = {
    ("peftc.plugin", "peftc.checkpoint.load"): "functions that a method brings may read adapters",
    ("peftc.plugin", "peftc.checkpoint.save"): "and write them",
    ("peftc.plugin", "peftc.model.functions.conversion"): "and turn adapters of a model into others",
    ("peftc.plugin", "peftc.model.functions.gathering"): "and gather what starts read of a model",
    (
        "peftc.plugin",
        "peftc.integrations.refilling",
    ): "and give its layers other factors, by what a quantised base lost",
    ("peftc.plugin", "peftc.ops.dropping"): "what methods drop in training is drawn by tensors",
    ("peftc.plugin", "peftc.ops.plain"): "and what they write alike is computed from them",
    ("peftc.plugin", "peftc.ops.compressed"): "products that keep less for backward are, too",
    ("peftc.plugin", "peftc.ops.rescaled"): "norms of updated weights too",
    ("peftc.plugin", "peftc.ops.stored"): "what a storage counts is held by tensors",
    ("peftc.tuner.rows", "peftc.ops.plain"): "indices in options become a tensor",
}

# Third parties of each package. Where a package is not named here it uses the standard library alone.
THIRD_PARTIES: dict[str, set[str]] = {
    "peftc.config": {"pydantic", "pydantic_core", "ruamel", "huggingface_hub"},
    "peftc.config.hub": {"huggingface_hub", "yaml"},  # the client reads cards with it, and lets its errors out
    "peftc.graph": {"huggingface_hub"},
    "peftc.registry": {"pluggy"},
    "peftc.registry.origin": {"packaging"},  # versions
    "peftc.installed": {"packaging"},
    "peftc.schema": {"pydantic", "jsonschema"},
    "peftc.compiler": {"regex"},
    "peftc.plugin": {"pydantic"},
    "peftc.compat": {"torch"},
    "peftc.compat.pins": {"packaging"},
    "peftc.cli": {"rich", "torch", "transformers"},
    "peftc.ops": {"torch"},
    "peftc.host": {"accelerate", "deepspeed", "huggingface_hub", "safetensors", "torch", "transformers"},
    "peftc.model": {"torch"},
    "peftc.model.functions.optimizers": {"torch", "bitsandbytes"},
    "peftc.runtime": {"torch"},
    "peftc.runtime.prompt": {"torch", "transformers"},  # tokenizers, and caches of keys and values
    "peftc.checkpoint": {"torch", "safetensors", "huggingface_hub"},
    "peftc.integrations": {"torch", "transformers", "accelerate", "gguf", "huggingface_hub", "jinja2", "safetensors"},
    "peftc.integrations.packages": {"torch", "packaging", "bitsandbytes", "torch_xla"},
    "peftc.integrations.placement": {"torch", "transformers", "accelerate", "deepspeed"},
    "peftc.integrations.quantization": {"torch", "bitsandbytes"},
    "peftc.testing": {"torch", "pytest", "hypothesis", "safetensors"},
}
# Third parties that cost too much at start, and so are imported where they are used, inside a function.
LATE = {"jsonschema", "yaml", "rich", "huggingface_hub", "torch", "transformers"}

PEFTC = sources("peftc")
PLUGINS = sources("plugins")


def layer_of(module: str) -> int:
    """Index of the layer with the longest prefix of `module`."""
    fitting = [(len(p), i) for i, row in enumerate(LAYERS) for p in row if module == p or module.startswith(f"{p}.")]
    return max(fitting)[1]


#: commands and the alias stand at the end of the table, but start as fast as what is above the torch line
ABOVE = [s for s in PEFTC if layer_of(s.module) < TORCH_LINE or s.module.startswith(("peftc.cli", "peftc.compat"))]


def third_parties_of(module: str) -> set[str]:
    fitting = [p for p in THIRD_PARTIES if module == p or module.startswith(f"{p}.")]
    return THIRD_PARTIES[max(fitting, key=len)] if fitting else set()


def outside(source: Source) -> list[Import]:
    """Imports of neither this project nor the standard library."""
    own = {"peftc", "peftc_plugins", "plugins", "__future__"}
    return [
        i for i in source.imports if (top := i.module.split(".")[0]) not in own and top not in sys.stdlib_module_names
    ]


@of_every(PEFTC)
def test_imports_inside_the_house_go_downwards(source: Source) -> None:
    here = layer_of(source.module)
    up = [
        f"{source.name}:{i.line} imports {i.module}"
        for i in source.imports
        if i.module.split(".")[0] == "peftc"
        and layer_of(i.module) > here
        and not (i.deferred and (source.module, i.module) in UPWARDS)
    ]
    assert not up, f"move what is shared to the lower layer: {up}"


def test_no_files_import_each_other_in_a_circle() -> None:
    """Imports inside functions and those for type checkers alone count: they, too, say that one file needs the other."""
    below = {s.module: {i.module for i in (*s.imports, *s.for_types)} - {s.module} for s in PEFTC}
    try:
        TopologicalSorter(below).prepare()
    except CycleError as error:
        circle = " <- ".join(error.args[1])
        raise AssertionError(f"move what is shared down, or ask for it by a protocol: {circle}") from None


@of_every(PEFTC)
def test_the_core_never_imports_the_bundled_methods(source: Source) -> None:
    assert [i for i in source.imports if i.module.split(".")[0] in {"peftc_plugins", "plugins"}] == []


@of_every(PEFTC)
def test_each_layer_uses_its_own_third_parties(source: Source) -> None:
    allowed = third_parties_of(source.module)
    strange = [
        f"{source.name}:{i.line} imports {i.module}" for i in outside(source) if i.module.split(".")[0] not in allowed
    ]
    assert not strange, f"only {sorted(allowed) or 'the standard library'} may be imported here: {strange}"


@of_every(ABOVE)
def test_slow_third_parties_are_imported_where_they_are_used(source: Source) -> None:
    early = [
        f"{source.name}:{i.line} imports {i.module}"
        for i in outside(source)
        if not i.deferred and i.module.split(".")[0] in LATE
    ]
    assert not early


@of_every(PLUGINS)
def test_plugins_import_the_plugin_module_and_heavy_things_inside_functions(source: Source) -> None:
    early = [i for i in outside(source) if not i.deferred]
    assert not early, f"{source.name} imports {early} when it is loaded"
    core = {i.module for i in source.imports if i.module.split(".")[0] == "peftc"} - {"peftc.plugin", "peftc"}
    assert not core, f"{source.name} reaches past `peftc.plugin`: {sorted(core)}"
    early = [i for i in source.imports if i.module.split(".")[0] == "peftc" and not i.deferred]
    lines = [source.text.splitlines()[i.line - 1] for i in early]
    assert lines in ([], ["from peftc import plugin as p"]), f"{source.name} imports more than one name: {lines}"
