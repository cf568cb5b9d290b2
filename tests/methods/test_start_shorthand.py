"""`init: {kind: NAME, …}` is the option that names the start, its nested options and the number of examples that it reads."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

from peftc import PeftcError, PeftConfig, plugin, rules
from peftc.cli.main import main
from peftc.config import files
from peftc.config import spec as documents
from peftc.config.spec import AdapterSpec, load_spec
from peftc.integrations.transformers import jobs
from peftc.registry import shorthand
from peftc.schema.generate import spec_schema
from peftc.schema.structure import structure_problems
from tests.defects import put_defect
from tests.methods.test_spec_optimizers import written
from tests.packaging.fresh import write_small_job

LORA = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]}
#: shorthand -> the same in the reference's options
SAME: list[tuple[Any, dict[str, Any]]] = [
    ("pissa", {"init_lora_weights": "pissa"}),
    ({"kind": "pissa_niter_4"}, {"init_lora_weights": "pissa_niter_4"}),
    ({"kind": "gaussian"}, {"init_lora_weights": "gaussian"}),
    ({"kind": "EVA", "samples": 64}, {"init_lora_weights": "EVA"}),
    (
        {"kind": "eva", "samples": 64, "rho": 1.0, "whiten": True},
        {"init_lora_weights": "eva", "eva_config": {"rho": 1.0, "whiten": True}},
    ),
    ({"kind": "loftq", "loftq_bits": 8}, {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 8}}),
    ({"kind": "lora_ga", "scale": "unit"}, {"init_lora_weights": "lora_ga", "lora_ga_config": {"scale": "unit"}}),
    (None, {}),
]


def described(adapter: dict[str, Any], folder: Path, **train: Any) -> Path:
    return written(folder, train, adapter)


@pytest.mark.parametrize(("short", "options"), SAME, ids=[str(short)[:40] for short, _ in SAME])
def test_it_means_the_options_that_it_stands_for(short: Any, options: dict[str, Any], tmp_path: Path) -> None:
    spec, told = load_spec(described({**LORA, "init": short}, tmp_path))
    long, _ = load_spec(described({**LORA, **options}, tmp_path))
    assert spec.adapters["default"] == long.adapters["default"] and not told
    samples = short.get("samples", 256) if isinstance(short, dict) else 256
    assert spec.samples_of("default") == samples and long.samples_of("default") == 256
    data = json.loads(described({**LORA, "init": short}, tmp_path).read_text())
    assert not list(structure_problems(data, spec_schema(documents.default_registry())))
    made = AdapterSpec(**data)
    assert made.adapters["default"] == spec.adapters["default"] and made.samples_of("default") == samples


def test_a_config_alone_has_it_too_and_is_written_as_the_reference_does(tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**LORA, "init": {"kind": "eva", "tau": 0.5}}), encoding="utf-8")
    config = PeftConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    stored = json.loads(file.read_text(encoding="utf-8"))
    assert "init" not in stored and stored["init_lora_weights"] == "eva" and stored["eva_config"]["tau"] == 0.5


def test_other_methods_have_it_by_their_own_option(tmp_path: Path) -> None:
    adapter = {"peft_type": "HIRA", "target_modules": ["q_proj"], "init": {"kind": "orthogonal"}}
    spec, _ = load_spec(described(adapter, tmp_path))
    assert spec.adapters["default"].to_dict()["init_weights"] == "orthogonal"
    with pytest.raises(PeftcError, match=rules.UNKNOWN_KEY.code):
        load_spec(described({"peft_type": "IA3", "init": {"kind": "orthogonal"}}, tmp_path))


class Own(plugin.Start):
    """A start of another package, with options that the method has."""

    name: ClassVar[str] = "own-start"
    reads: ClassVar[plugin.Reads] = plugin.Reads.INPUTS
    can_wait: ClassVar[bool] = True
    options: ClassVar[str] = "loftq_config"
    seen: ClassVar[list[int]] = []

    class Options(plugin.ConfigModel):
        width: int = plugin.Field(default=1, ge=1)

    how = Options

    def factors(self, s: plugin.StartView) -> plugin.Begun:
        return plugin.Begun(None, s.weight.new_zeros(s.weight.shape[0], s.rank))

    def prepare(self, model: Any, c: Any, batches: Any) -> Any:
        self.seen.append(sum(len(batch["input_ids"]) for batch in batches))
        return c


@pytest.mark.filterwarnings("ignore")
def test_a_strangers_start_has_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = plugin.register_start(Own())
    try:
        file = write_small_job(tmp_path, "LORA")
        spec = json.loads(file.read_text())
        spec["adapters"]["default"]["init"] = {"kind": "own-start", "samples": 1, "width": 3}
        file.write_text(json.dumps(spec))
        config = load_spec(file)[0].adapters["default"].to_dict()
        assert config["init_lora_weights"] == "own-start" and config["loftq_config"] == {"width": 3}
        assert main(["plan", str(file)]) == 0
        assert "data goes through the model before training" in " ".join(capsys.readouterr().out.split())
        assert main(["train", str(file), "--device", "cpu", "--quiet"]) == 0
        assert Own.seen == [1]
    finally:
        plugin.unregister_start(start)
        Own.seen.clear()


@pytest.mark.filterwarnings("ignore")
def test_training_begins_as_with_the_long_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for short in (True, False):
        torch.manual_seed(0)
        folder = tmp_path / str(short)
        folder.mkdir()
        file = write_small_job(folder, "LORA")
        spec = json.loads(file.read_text())
        adapter = spec["adapters"]["default"]
        adapter["r"] = 2
        if short:
            adapter["init"] = {"kind": "eva", "samples": 1, "tau": 0.5, "rho": 1}
        else:
            adapter |= {"init_lora_weights": "eva", "eva_config": {"tau": 0.5, "rho": 1}}
            spec["train"]["start_samples"] = 1
        file.write_text(json.dumps(spec))
        assert main(["train", str(file), "--device", "cpu", "--quiet"]) == 0
        results.append(load_file(folder / "out" / "adapter_model.safetensors"))
    one, other = results
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.filterwarnings("ignore")
def test_a_training_is_not_resumed_with_other_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    file = write_small_job(tmp_path, "LORA")
    spec = json.loads(file.read_text())
    spec["train"] |= {"save_steps": 1, "steps": 3}
    adapter = spec["adapters"]["default"]
    adapter |= {"r": 2, "init": {"kind": "eva", "samples": 1, "tau": 0.5, "rho": 1}}
    file.write_text(json.dumps(spec))

    def stop(step: Any) -> None:
        if step.number == 2:
            raise KeyboardInterrupt

    real = jobs.train
    monkeypatch.setattr(jobs, "train", lambda *given, **named: real(*given, **{**named, "progress": stop}))
    assert main(["train", str(file), "--device", "cpu", "--quiet"]) == 130
    monkeypatch.setattr(jobs, "train", real)
    adapter["init"]["samples"] = 2
    file.write_text(json.dumps(spec))
    spec_now, _ = load_spec(file)
    base = jobs.load(spec_now.base_ref, torch.device("cpu"))
    rows = jobs.encoded(base, spec_now.resolve("data.jsonl"), 64)
    assert spec_now.train is not None
    how = spec_now.train.model_copy(update={"device": "cpu"})
    with pytest.raises(PeftcError, match=r"`starts.default` was 1 and is now 2"):
        model = jobs.fresh_adapter(base, spec_now, 0, rows, 2)
        jobs.train(model, base, rows, how, tmp_path / "out", resume=True, samples=jobs.read_by_starts(spec_now))


# what is wrong --------------------------------------------------------------------------------------------------------

AT = "$.adapters.default"
#: the shorthand, other options, what is told, and the defect under which it would not be
CASES: dict[str, tuple[Any, dict[str, Any], list[tuple[str, str]], tuple[ModuleType, str, str]]] = {
    "a number": (
        3,
        {},
        [(rules.BAD_VALUE.code, f"{AT}.init")],
        (shorthand, "if not isinstance(given, Mapping):", "if isinstance(given, int):\n        return\n    if False:"),
    ),
    "no kind": (
        {"samples": 4},
        {},
        [(rules.MISSING_KEY.code, f"{AT}.init.kind")],
        (shorthand, "rules.MISSING_KEY(what, fix=fix)", "rules.BAD_VALUE(what, fix=fix)"),
    ),
    "kind of another type": (
        {"kind": True},
        {},
        [(rules.BAD_VALUE.code, f"{AT}.init.kind")],
        (shorthand, "elif not isinstance(given[KIND], str):", "elif False:"),
    ),
    "samples of another type": (
        {"kind": "eva", "samples": 0},
        {},
        [(rules.BAD_VALUE.code, f"{AT}.init.samples")],
        (shorthand, "or samples < 1)", "or samples < 0)"),
    ),
    "unknown start": (
        {"kind": "eav", "samples": 4, "rho": 1},
        {},
        [(rules.START_UNKNOWN.code, f"{AT}.init.kind")],
        (documents, "at if shorthand is None else shorthand.place(at)", "at"),
    ),
    "both": (
        {"kind": "eva"},
        {"init_lora_weights": "eva"},
        [(rules.CONTRADICTION.code, f"{AT}.init_lora_weights")],
        (shorthand, "if data.get(method.start_option) is not None:", "if False:"),
    ),
    "options twice": (
        {"kind": "eva", "rho": 1},
        {"eva_config": {"tau": 0.5}},
        [(rules.CONTRADICTION.code, f"{AT}.eva_config")],
        (shorthand, "and own and data.get(start.options):", "and False:"),
    ),
    "no data": (
        {"kind": "pissa", "samples": 4},
        {},
        [(rules.CONTRADICTION.code, f"{AT}.init.samples")],
        (shorthand, "start is None or start.reads is Reads.NOTHING):", "False):"),
    ),
    "another start's option": (
        {"kind": "pissa", "rho": 1},
        {},
        [(rules.UNKNOWN_KEY.code, f"{AT}.init.rho")],
        (shorthand, "for key in own.keys() - known:", "for key in ():"),
    ),
    "misspelt and wrong": (
        {"kind": "eva", "sample": 4, "tau": 2, "rho": "x"},
        {"r": 0},
        [
            (rules.BAD_VALUE.code, f"{AT}.r"),
            (rules.UNKNOWN_KEY.code, f"{AT}.init.sample"),
            (rules.BAD_VALUE.code, f"{AT}.init.tau"),
            (rules.BAD_VALUE.code, f"{AT}.init.rho"),
        ],
        (files, "return None, [*found, *(replace(problem,", "return None, [*(replace(problem,"),
    ),
    "what the start says": (
        {"kind": "loftq", "loftq_bits": 5},
        {},
        [(rules.BAD_VALUE.code, f"{AT}.init")],
        (documents, "at if shorthand is None else shorthand.place(at)", "at"),
    ),
    "a mapping's model": (
        {"kind": "loftq", "loftq_bit": 4},
        {},
        [(rules.UNKNOWN_KEY.code, f"{AT}.init.loftq_bit")],
        (shorthand, "for key in own.keys() - known:", "for key in ():"),
    ),
    "two numbers of samples": (
        {"kind": "eva", "samples": 4},
        {},
        [(rules.CONTRADICTION.code, f"{AT}.init.samples")],
        (documents, "if general is not None and general != samples:", "if False:"),
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_what_is_wrong_is_told_with_its_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short, others, wanted, defect = CASES[case]
    train = {"start_samples": 8} if case == "two numbers of samples" else {}
    file = described({**LORA, **others, "init": short}, tmp_path, **train)

    def told() -> list[tuple[str, str]]:
        assert main(["validate", str(file), "--json"]) == 1
        found = json.loads(capsys.readouterr().out)["files"][0]["diagnostics"]
        lines = file.read_text(encoding="utf-8").splitlines()
        for one in found:
            parts = one["where"]["path"].split(".")
            line = lines[one["where"]["line"] - 1]
            assert any(f'"{part}"' in line for part in parts[-2:])
        return [(one["code"], one["where"]["path"]) for one in found]

    assert told() == wanted
    put_defect(monkeypatch, *defect)
    with pytest.raises((AssertionError, PeftcError, TypeError, AttributeError)):
        assert told() == wanted


def test_the_nearest_names_are_offered(tmp_path: Path) -> None:
    for short, near in (({"kind": "eva", "sample": 4}, "`samples`"), ({"kind": "pisa"}, "`pissa`")):
        with pytest.raises(PeftcError, match=f"Did you mean.*{near}"):
            load_spec(described({**LORA, "init": short}, tmp_path))


def test_samples_without_a_training_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = described({**LORA, "init": {"kind": "eva", "samples": 4}}, tmp_path)
    data = json.loads(file.read_text())
    del data["train"]
    file.write_text(json.dumps(data))
    assert [told.code for told in load_spec(file)[1]] == [rules.WITHOUT_EFFECT.code]
    alone = tmp_path / "adapter_config.json"
    alone.write_text(json.dumps({**LORA, "init": {"kind": "eva", "samples": 4}}), encoding="utf-8")

    def refused() -> None:
        with pytest.raises(PeftcError, match=rules.UNKNOWN_KEY.code):
            PeftConfig.from_pretrained(tmp_path)

    refused()
    put_defect(monkeypatch, files, "if shorthand.samples is not None:", "if False:")
    with pytest.raises(pytest.fail.Exception):
        refused()


def test_a_start_says_what_its_options_are(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Own):
        name: ClassVar[str] = "wrong"
        how = dict  # type: ignore[assignment]

    with pytest.raises(PeftcError, match="`how` is"):
        plugin.register_start(Wrong())
