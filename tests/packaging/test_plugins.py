"""Plugins in distributions of their own: the example and a new one are installed beside peftc's wheel and do the main job."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.tree import ROOT
from tests.packaging.fresh import build_wheel, install, peftc, peftc_each, pip, ran, write_small_job
from tests.unit.chosen import plain_method

EXAMPLE = ROOT / "docs" / "example-plugin"
SOURCE = EXAMPLE / "peftc_lora_xs" / "__init__.py"

#: The library's ways to load an adapter; each prints how it ended. The argument is another type, to load it beside.
LOADING = """
import sys
import torch, transformers
from peftc import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_config, get_peft_model

def base():
    return transformers.AutoModelForCausalLM.from_pretrained("base")

def beside():
    config = get_peft_config({"peft_type": sys.argv[1], "target_modules": ["q_proj"]})
    model = get_peft_model(base(), config, "other", mixed=True)
    model.load_adapter("out", "default")

for way in (lambda: PeftConfig.from_pretrained("out"), lambda: PeftModel.from_pretrained(base(), "out"), beside,
            lambda: AutoPeftModelForCausalLM.from_pretrained("out")):
    try:
        way()
        print("loaded")
    except ValueError as error:
        print("pip install peftc-lora-xs==0.1.0" in str(error))
"""

#: By type alone: trained, saved and loaded are the same, merged too. One process, as importing torch takes the longest.
ROUND_TRIP = """
original = base()
ids = torch.arange(5)[None]
model = PeftModel.from_pretrained(original, "out").eval()
y = model(input_ids=ids).logits
model.save_pretrained("again")
again = PeftModel.from_pretrained(base(), "again").eval()
assert torch.equal(again(input_ids=ids).logits, y)
merged = transformers.AutoModelForCausalLM.from_pretrained("merged").eval()
assert torch.allclose(merged(input_ids=ids).logits, y, atol=1e-5)
fresh = get_peft_model(model.unload(), get_peft_config({"peft_type": "LORA_XS", "r": 2, "target_modules": ["o_proj"]}))
print(fresh.get_nb_trainable_parameters()[0])
"""


def lines_of_code(source: Path) -> int:
    """Lines with code on them: neither blank, nor comments, nor docstrings."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    texts = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = enumerate(source.read_text(encoding="utf-8").splitlines(), start=1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") for n, line in lines if n not in texts)


def test_the_example_is_short() -> None:
    assert lines_of_code(SOURCE) <= 60
    assert "conformance(" in (EXAMPLE / "tests" / "test_conformance.py").read_text(encoding="utf-8")


def built(source: Path, place: Path) -> Path:
    """The wheel of a plugin, from a copy, as building leaves files behind."""
    copy = shutil.copytree(
        source, place / "source", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    )
    return build_wheel(copy, place / "dist")


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's wheel."""
    return built(EXAMPLE, tmp_path_factory.mktemp("example"))


def removed(installed: Path, *distributions: str) -> None:
    pip(sys.executable, "--python", str(installed / "python"), "uninstall", "--yes", *distributions)


@pytest.fixture
def with_example(installed: Path, example: Path) -> Iterator[Path]:
    """The environment with the example's wheel beside peftc's."""
    install(example, installed)
    yield installed
    removed(installed, "peftc-lora-xs")


def test_the_example_does_the_main_job_by_its_type(with_example: Path, tmp_path: Path) -> None:
    write_small_job(tmp_path, "LORA_XS")
    checked, planned, _, _, inspected = peftc_each(
        with_example,
        tmp_path,
        "plugins --check --json",
        "plan spec.json --json",
        "train spec.json --device cpu",
        "merge --adapter out --out merged",
        "inspect out",
    )
    (ours,) = [plugin for plugin in json.loads(checked)["plugins"] if plugin["peft_type"] == "LORA_XS"]
    assert (ours["distribution"], ours["state"]) == ("peftc-lora-xs 0.1.0", "loads")
    assert json.loads(planned)["trainable"] == 2 * 2 * 8 * 8
    assert "Plugin    peftc-lora-xs==0.1.0" in inspected
    python, other = with_example / "python", plain_method().peft_type
    assert ran(python, "-c", LOADING + ROUND_TRIP, other, folder=tmp_path).split() == ["loaded"] * 4 + ["8"]
    removed(with_example, "peftc-lora-xs")
    assert ran(python, "-c", LOADING, other, folder=tmp_path).split() == ["True"] * 4


def test_the_example_and_a_new_plugin_pass_their_tests_at_once(with_example: Path, tmp_path: Path) -> None:
    peftc(with_example, tmp_path, "plugins", "new", "noisy-scale")
    folder = tmp_path / "peftc-noisy-scale"
    install(built(folder, tmp_path / "new"), with_example)
    tests = [shutil.copytree(EXAMPLE / "tests", tmp_path / "of_example"), folder / "tests"]
    command = [with_example / "python", "-m", "pytest", "-v", "-p", "no:cacheprovider", "-x", "--import-mode=importlib"]
    try:
        told = ran(*command, *tests, folder=tmp_path)
        assert "[LORA_XS-" in told and "[NOISY_SCALE-" in told
    finally:
        removed(with_example, "peftc-noisy-scale")


# a variant of a method ------------------------------------------------------------------------------------------------

VARIANT = '''"""Gated updates: each output has a gate of its own over the low-rank update."""

from peftc import plugin as p


class GateOptions(p.ConfigModel):
    start: float = p.Field(default=1.0, gt=0)
    """What gates begin with."""


class Gated(p.MapTuner):
    supports = p.LINEAR_KINDS

    def slots(self, c, layer):
        yield p.module_slot("lora_A", (c.r, layer.in_features))
        yield p.module_slot("lora_B", (layer.out_features, c.r))
        yield p.parameter_slot("lora_gate", (layer.out_features,))

    def init(self, c, layer, slots, init):
        init.kaiming_uniform(slots["lora_A"])
        init.zeros(slots["lora_B"])
        init.fill(slots["lora_gate"], p.variant_options(c, GateOptions).start)

    def scaling(self, c, layer):
        return c.lora_alpha / c.r

    def thin(self, a):
        return a.lora_A, a.lora_B * a.lora_gate.unsqueeze(1), a.scaling


@p.hookimpl
def peftc_variant():
    return p.Variant(
        "LORA", "gated", Gated(), options=GateOptions, layer_names=("lora_gate",), summary="Gates over the update."
    )
'''

PROJECT = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "gated-updates"
version = "0.3.0"

[project.entry-points."peftc.variants"]
"lora.gated" = "gated_updates"

[tool.setuptools]
py-modules = ["gated_updates"]
"""

#: The adapter of the job has the variant's tensors, acts by them, and is merged.
GATED = """
import json, sys, torch, transformers
from safetensors.torch import load_file
from peftc import PeftModel
from peftc.registry.manager import default_registry

assert "gated_updates" not in sys.modules
def base():
    return transformers.AutoModelForCausalLM.from_pretrained("base").eval()

tensors = load_file("out/adapter_model.safetensors")
assert any(key.endswith(".lora_gate") for key in tensors), sorted(tensors)
config = json.load(open("out/adapter_config.json"))
assert (config["variant"], config["variant_options"], config["peftc_plugin"]) == ("gated", {"start": 0.5}, "gated-updates==0.3.0")
ids = torch.arange(5)[None]
model = PeftModel.from_pretrained(base(), "out").eval()
y = model(input_ids=ids).logits
assert not torch.equal(y, base()(input_ids=ids).logits)
merged = transformers.AutoModelForCausalLM.from_pretrained("merged").eval()
assert torch.allclose(merged(input_ids=ids).logits, y, atol=1e-5)
print("acts")
"""

UNKNOWN = """
import transformers
from peftc import PeftModel
try:
    PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained("base"), "out")
except ValueError as error:
    print("pip install gated-updates==0.3.0" in str(error))
"""


def test_a_variant_of_another_package_is_named_in_a_spec(installed: Path, tmp_path: Path) -> None:
    source = tmp_path / "source of it"
    source.mkdir()
    (source / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
    (source / "gated_updates.py").write_text(VARIANT, encoding="utf-8")
    install(built(source, tmp_path / "build"), installed)
    try:
        job = write_small_job(tmp_path, "LORA")
        spec = json.loads(job.read_text(encoding="utf-8"))
        spec["adapters"]["default"] |= {"r": 2, "variant": "gated", "variant_options": {"start": 0.5}}
        job.write_text(json.dumps(spec), encoding="utf-8")
        planned, _, _, checked = peftc_each(
            installed, tmp_path, "plan spec.json --json", "train spec.json --device cpu", "merge --adapter out --out merged",
            "plugins check lora.gated --only begins_as_it_says --only swapping_exchanges_values -q",
        )  # fmt: skip
        assert "lora.gated passes all" in checked
        assert json.loads(planned)["trainable"] == 2 * 2 * (2 * 16 + 2 * 16 + 16)
        assert ran(installed / "python", "-c", GATED, folder=tmp_path).strip() == "acts"
    finally:
        removed(installed, "gated-updates")
    assert ran(installed / "python", "-c", UNKNOWN, folder=tmp_path).strip() == "True"


#: A start of a stranger's: the columns of the weight that have the largest numbers, taken out of the base.
MY_START = {
    "pyproject.toml": """[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"
[project]
name = "peftc-my-start"
version = "0.3.0"
dependencies = ["peftc"]
[project.entry-points."peftc.starts"]
my-start = "peftc_my_start"
[tool.setuptools]
py-modules = ["peftc_my_start"]
""",
    "peftc_my_start.py": '''"""My start: the strongest columns of the weight."""
from peftc import plugin as p


class MyStart(p.Start):
    name = "my-start"
    changes_base = True
    within_rank = True

    def factors(self, s):
        import torch
        chosen = s.weight.norm(dim=0).topk(s.rank).indices
        rows = torch.eye(s.weight.shape[1], dtype=s.weight.dtype)[chosen]
        return p.Begun(rows, s.weight[:, chosen] / s.scaling)


peftc_start = p.starting(MyStart())
''',
}
#: The base as it was, and the trained adapter on it, which is loaded by its type alone.
STARTED = """
import torch, transformers
from peftc import LoraConfig, PeftModel, get_peft_model
base = lambda: transformers.AutoModelForCausalLM.from_pretrained("base").eval()
ids = torch.arange(5)[None]
y = base()(input_ids=ids).logits
fresh = get_peft_model(base(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="my-start")).eval()
layer = fresh.get_base_model().model.layers[0].self_attn.q_proj
print(torch.allclose(fresh(input_ids=ids).logits, y, atol=1e-5), bool(layer.lora_B["default"].weight.any()))
model = PeftModel.from_pretrained(base(), "out").eval()
print(torch.equal(model(input_ids=ids).logits, y))
merged = transformers.AutoModelForCausalLM.from_pretrained("merged").eval()
print(torch.allclose(merged(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5))
with model.disable_adapter():
    print(torch.equal(model(input_ids=ids).logits, y))
"""


def test_a_start_of_a_stranger_serves_every_method_that_it_is_named_in(installed: Path, tmp_path: Path) -> None:
    source = tmp_path / "my_start"
    source.mkdir()
    for name, text in MY_START.items():
        (source / name).write_text(text, encoding="utf-8")
    install(built(source, tmp_path / "wheel"), installed)
    try:
        for peft_type, more in (("LORA", {"r": 2}), ("ADALORA", {"init_r": 2, "target_r": 1, "total_step": 2})):
            folder = tmp_path / peft_type
            folder.mkdir()
            spec_file = write_small_job(folder, peft_type)
            spec = json.loads(spec_file.read_text(encoding="utf-8"))
            spec["adapters"]["default"] |= {"init_lora_weights": "my-start", **more}
            spec_file.write_text(json.dumps(spec), encoding="utf-8")
            listed, planned, *_ = peftc_each(
                installed,
                folder,
                "plugins --check --json",
                "plan spec.json",
                "train spec.json --device cpu",
                "merge --adapter out --out merged",
            )
            (ours,) = [row for row in json.loads(listed)["starts"] if row["start"] == "my-start"]
            assert (ours["distribution"], ours["state"]) == ("peftc-my-start 0.3.0", "loads")
            assert "The start my-start changes the base weights of 4 layers" in " ".join(planned.split())
            told = ran(installed / "python", "-c", STARTED, folder=folder).split()
            assert told == ["True", "True", "False", "True", "True"], peft_type
        assert "my-start passes all" in peftc(installed, tmp_path, "plugins", "check", "my-start", "-q")
    finally:
        removed(installed, "peftc-my-start")


#: A storage of a stranger's: rows of whole numbers with a scale each, in a layer of its own.
MY_STORAGE = {
    "pyproject.toml": """[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"
[project]
name = "peftc-my-storage"
version = "0.4.0"
dependencies = ["peftc"]
[project.entry-points."peftc.storages"]
my-storage = "peftc_my_storage"
[tool.setuptools]
py-modules = ["peftc_my_storage", "my_layers"]
""",
    "my_layers.py": '''"""The library: layers of whole numbers."""
import torch
from torch import nn


class Whole(nn.Module):
    def __init__(self, weight, bias=None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("numbers", None)
        self.register_buffer("scale", None)
        self.numbers, self.scale = whole(weight)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x):
        return nn.functional.linear(x, self.numbers * self.scale, self.bias)


def whole(weight):
    scale = weight.detach().abs().amax(1, keepdim=True).clamp(min=1e-9) / 100
    return (weight.detach() / scale).round().to(torch.int8), scale
''',
    "peftc_my_storage.py": '''"""My storage."""
from peftc import plugin as p


class MyStorage(p.Storage):
    """Whole numbers"""

    name = "my-storage"
    classes = ("my_layers.Whole",)
    held = ("numbers", "scale")

    def facts(self, layer):
        out, into = layer.out_features, layer.in_features
        return p.Packed(self.name, into, out, "float32", out * into + 4 * out)

    def example(self, layer):
        from my_layers import Whole
        return Whole(layer.weight, layer.bias)

    def open(self, layer):
        return layer.numbers * layer.scale

    def pack(self, layer, weight):
        from my_layers import whole
        return dict(zip(self.held, whole(weight)))


peftc_storage = p.storing(MyStorage())
''',
}
#: Adapted, merged and taken out again; the base is packed all the while.
STORED = """
import sys, torch
from torch import nn
from my_layers import Whole
from peftc import get_peft_config, get_peft_model
torch.manual_seed(0)
base = nn.Sequential(Whole(torch.randn(8, 8)), nn.ReLU(), Whole(torch.randn(8, 8)))
config = {"peft_type": sys.argv[1], "target_modules": ["0", "2"], "init_weights" if sys.argv[1] == "LOHA" else "init_lora_weights": False}
model = get_peft_model(base, get_peft_config(config)).eval()
x = torch.randn(4, 8)
y, numbers = model(x), base[0].get_base_layer().numbers
model.merge_adapter()
print(torch.allclose(model(x), y, atol=0.05 * float(y.abs().max())), base[0].get_base_layer().numbers is not numbers)
model.unmerge_adapter()
print(torch.equal(model(x), y), base[0].get_base_layer().numbers is numbers, type(model.merge_and_unload()[0]) is Whole)
"""


def test_a_storage_of_a_stranger_serves_every_method(installed: Path, tmp_path: Path) -> None:
    source = tmp_path / "my_storage"
    source.mkdir()
    for name, text in MY_STORAGE.items():
        (source / name).write_text(text, encoding="utf-8")
    install(built(source, tmp_path / "wheel"), installed)
    try:
        (listed,) = peftc_each(installed, tmp_path, "plugins --check --json")
        (ours,) = [row for row in json.loads(listed)["storages"] if row["storage"] == "my-storage"]
        assert (ours["distribution"], ours["state"]) == ("peftc-my-storage 0.4.0", "loads")
        for peft_type in ("LORA", "LOHA"):
            told = ran(installed / "python", "-c", STORED, peft_type, folder=tmp_path).split()
            assert told == ["True"] * 5, peft_type
        check = ("plugins", "check", "my-storage", "-q", "--only", "merges_into_packed_layers")
        assert "my-storage passes all" in peftc(installed, tmp_path, *check)
    finally:
        removed(installed, "peftc-my-storage")
