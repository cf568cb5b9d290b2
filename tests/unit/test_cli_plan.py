"""`peftc plan` and `peftc apply` as a person uses them: output, exit codes, lines of mistakes, and what is not imported."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftc import rules
from peftc.cli.main import main
from peftc.compiler.plan.serial import plan_from_text
from peftc.graph.files import write_graph
from peftc.registry.manager import default_registry
from tests.unit.chosen import plain_method
from tests.unit.plans import decoder

TYPE = plain_method().peft_type
CONFIG = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 40,
}  # fmt: skip

SPEC = """\
version: 1
base: {model: some/decoder}
adapters:
  style:
    peft_type: TYPE
    target_modules:
      - q_proj
      - up_proj
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The program, in a folder of its own with an empty cache: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFTC_CACHE", str(tmp_path / "cache"))
    write_graph(decoder(), tmp_path / "graph.json")

    def run(*words: str) -> tuple[int, str, str]:
        code = main(words)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def write(text: str, name: str = "spec.yaml", **values: str) -> str:
    Path(name).write_text(text.replace("TYPE", TYPE), encoding="utf-8")
    return name


def on_a_config(**adapter: Any) -> str:
    """A spec on a real, tiny architecture."""
    options = {"peft_type": TYPE, "target_modules": "all-linear", **adapter}
    spec = {"version": 1, "base": {"config": CONFIG, "task_type": "CAUSAL_LM"}, "adapters": {"default": options}}
    Path("real.yaml").write_text(json.dumps(spec), encoding="utf-8")
    return "real.yaml"


def test_a_plan_as_text(run: Run) -> None:
    code, out, err = run("plan", write(SPEC), "--graph", "graph.json")
    assert (code, err) == (0, "")
    assert "model.layers.{0..2}.self_attn.q_proj" in out
    assert "\x1b" not in out
    assert re.search(r"trainable [\d,]+ of [\d,]+ parameters", out)


@pytest.mark.parametrize("words", [("--json",), ("--format", "json")])
def test_a_plan_as_json(run: Run, words: tuple[str, ...]) -> None:
    code, out, _ = run("plan", write(SPEC), "--graph", "graph.json", *words)
    plan = plan_from_text(out)
    assert code == 0
    assert [site.path for site in plan.adapters[0].maps][:2] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
    ]
    assert plan.base is not None
    assert plan.base.model == "some/decoder"


def test_the_written_plan_is_the_printed_one(run: Run) -> None:
    _, out, _ = run("plan", write(SPEC), "--graph", "graph.json", "--json")
    _, _, err = run("plan", write(SPEC), "--graph", "graph.json", "--out", "plan.json")
    assert Path("plan.json").read_text(encoding="utf-8") == out
    assert err == "Wrote the plan to plan.json\n"


def test_mistakes_have_their_line(run: Run) -> None:
    text = SPEC.replace("- up_proj", "- up_porj").replace("peft_type", "exclude_modules: [gone]\n    peft_type")
    code, out, err = run("plan", write(text), "--graph", "graph.json")
    assert (code, out) == (1, "")
    assert "spec.yaml:9:9 at `$.adapters.style.target_modules.up_porj`" in err
    assert "spec.yaml:5:23 at `$.adapters.style.exclude_modules.gone`" in err
    assert "Did you mean `up_proj`" in err


def test_mistakes_as_json(run: Run) -> None:
    code, out, _ = run(
        "plan", write(SPEC.replace("q_proj", "nothing").replace("up_proj", "no")), "--graph", "graph.json", "--json"
    )
    told = json.loads(out)
    assert (code, told["ok"]) == (1, False)
    assert [d["code"] for d in told["diagnostics"]] == [rules.NO_MATCH.code]
    assert told["diagnostics"][0]["where"]["line"] == 7


def test_a_config_alone_is_lenient_and_has_its_lines(run: Run) -> None:
    config = {"peft_type": TYPE, "base_model_name_or_path": "some/decoder", "target_modules": ["q_proj", "k_proj"]}
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    code, out, _ = run("plan", "adapter", "--graph", "graph.json")
    assert code == 0
    assert "warning[PC408]: No module is called `k_proj`" in out
    assert "adapter/adapter_config.json:6:3 at `$.target_modules.k_proj`" in out
    strict = write(json.dumps(config), "config.json")
    assert run("plan", strict, "--graph", "graph.json")[0] == 1


def test_warnings_are_told_once(run: Run) -> None:
    """Reading and compiling both ask the method about its options."""
    method = default_registry().get(TYPE)
    known = [
        e for e in (*method.examples, {}) if len(list(method.check(method.config(**e, target_modules=["q_proj"]))))
    ]
    text = SPEC + "".join(f"    {key}: {json.dumps(value)}\n" for key, value in (known[0] if known else {}).items())
    _, out, err = run("plan", write(text), "--graph", "graph.json")
    heads = [line for line in (out + err).splitlines() if line.startswith(("warning", "error"))]
    assert len(heads) == len(set(heads))


def test_checks_of_the_spec(run: Run) -> None:
    code, _, err = run("plan", write(SPEC + "checks:\n  expect_modules: 7\n"), "--graph", "graph.json")
    assert code == 1
    assert "adapt 6 modules, not 7" in err
    assert "spec.yaml:10:19" in err
    assert run("plan", write(SPEC + "checks: {expect_modules: 6}\n"), "--graph", "graph.json")[0] == 0


def test_one_module_is_explained(run: Run) -> None:
    code, out, _ = run("plan", write(SPEC), "--graph", "graph.json", "--explain", "model.layers.1.mlp.down_proj")
    assert code == 0
    assert "adapter style" in out
    assert "Not adapted: no entry of `target_modules`" in out
    _, out, _ = run("plan", write(SPEC), "--graph", "graph.json", "--explain", "lm_head", "--json")
    assert json.loads(out)[0]["path"] == "lm_head"
    code, _, err = run("plan", write(SPEC), "--graph", "graph.json", "--explain", "lm_haed")
    assert code == 1
    assert "Did you mean `lm_head`" in err


@pytest.mark.parametrize("place", ["missing/plan.json", "."])
def test_a_plan_that_cannot_be_written(run: Run, place: str) -> None:
    code, _, err = run("plan", write(SPEC), "--graph", "graph.json", "--out", place)
    assert (code, rules.SYSTEM_REFUSED.code in err) == (1, True)


def test_a_graph_that_is_none(run: Run) -> None:
    code, _, err = run("plan", write(SPEC), "--graph", write("[]", "other.json"))
    assert (code, rules.GRAPH_INVALID.code in err) == (1, True)


def test_planning_from_a_graph_imports_neither_torch_nor_transformers(run: Run) -> None:
    run("plan", write(SPEC), "--graph", "graph.json")
    program = (
        "import sys; from peftc.cli.main import main; main(['plan', 'spec.yaml', '--graph', 'graph.json', '--quiet']);"
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, stdout=subprocess.DEVNULL).returncode == 0


# apply ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def planned(run: Run) -> str:
    assert run("plan", on_a_config(), "--out", "plan.json", "--quiet")[0] == 0
    return "plan.json"


def test_a_plan_is_applied_as_it_says(run: Run, planned: str) -> None:
    code, out, _ = run("apply", planned, "--out", "adapter", "--json", "--quiet")
    told, said = json.loads(out), json.loads(Path(planned).read_text(encoding="utf-8"))
    assert code == 0
    assert (told["trainable"], told["total"], told["plan"]) == (said["trainable"], said["total"], said["digest"])
    assert {file.name for file in Path("adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_without_out_nothing_is_saved(run: Run, planned: str) -> None:
    before = set(Path().rglob("*"))
    code, out, _ = run("apply", planned)
    assert (code, "Nothing saved" in out) == (0, True)
    assert set(Path().rglob("*")) == before


def test_the_seed_decides_the_values(run: Run, planned: str) -> None:
    for seed, folder in (("1", "a"), ("1", "b"), ("2", "c")):
        assert run("apply", planned, "--out", folder, "--seed", seed, "--quiet")[0] == 0
    first, again, other = (Path(f, "adapter_model.safetensors").read_bytes() for f in "abc")
    assert first == again
    method = default_registry().get(TYPE)
    assert first != other or method.identity_at_start(method.config())


def test_a_model_that_has_drifted_is_refused(run: Run, planned: str) -> None:
    Path("wider.json").write_text(json.dumps({**CONFIG, "intermediate_size": 64}), encoding="utf-8")
    code, _, err = run("apply", planned, "--base", "wider.json", "--out", "adapter")
    assert code == 1
    assert "error[PC427]: `model.layers.{0..1}.mlp.up_proj` maps 16→64, not 16→32" in err
    assert not Path("adapter").exists()


def test_plans_that_cannot_be_applied(run: Run, planned: str) -> None:
    text = Path(planned).read_text(encoding="utf-8")
    for name, content, rule in (
        ("edited.json", text.replace("q_proj", "o_proj"), rules.PLAN_INVALID),
        ("half.json", text[:100], rules.SYNTAX),
        ("none.json", "[]", rules.PLAN_INVALID),
        ("spec.yaml", "version: 1", rules.PLAN_INVALID),
    ):
        code, _, err = run("apply", write(content, name))
        assert (code, rule.code in err) == (1, True)
    Path("binary.json").write_bytes(b"\xff\xfe\x00")
    assert run("apply", "binary.json")[0] == 1
    code, _, err = run("apply", "missing.json")
    assert (code, "No such file" in err) == (1, True)


@pytest.mark.parametrize("command", ["validate", "plan", "train"])
def test_a_plan_given_for_a_spec_is_known_as_one(command: str, run: Run, planned: str) -> None:
    code, out, err = run(command, planned)
    told = [line for line in (out + err).splitlines() if "error[" in line]
    assert code == 1
    assert told == ["error[PC116]: This is a plan, not a spec"]
    assert "peftc apply" in out + err


def test_a_plan_without_a_base_asks_for_one(run: Run) -> None:
    data = json.loads(run("plan", on_a_config(), "--json")[1])
    from peftc.compiler.plan import serial

    data |= {"base": None, "model": {**data["model"], "name_or_path": None}}
    data["digest"] = serial._digest({key: value for key, value in data.items() if key != "digest"})
    code, _, err = run("apply", write(json.dumps(data), "plan.json"))
    assert (code, "--base" in err) == (1, True)
    assert run("apply", "plan.json", "--base", on_a_config())[0] == 0
