"""Small defects in the graph's code, each with a test that notices it: the proof that those tests can fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from peftc.diagnostics import PeftcError
from peftc.graph import cache, files, locate, nodes, roles
from peftc.runtime.applying import snapshot
from tests.defects import put_defect
from tests.unit import test_graph_cache as of_cache
from tests.unit import test_graph_locate as of_locate
from tests.unit import test_graph_nodes as of_nodes
from tests.unit import test_snapshot as of_snapshot


def _own_forward() -> None:
    module = of_snapshot.Grouped(4, 4)
    of_snapshot.test_what_only_looks_like_a_kind_is_none_and_says_why(module, "a forward of its own")


def _shared_module() -> None:
    of_snapshot.test_modules_and_parameters_are_those_torch_reports("shared")


def _digest_of_dtypes() -> None:
    of_nodes.test_the_digest_tells_structures_apart(of_nodes.graph(dtype="float32"))


def _key_of_task() -> None:
    base = of_cache.BASE
    of_cache.test_the_key_depends_on_all_that_decides_the_graph(
        replace(base, ref=replace(base.ref, task_type="SEQ_CLS"))
    )


DEFECTS: list[tuple[ModuleType, str, str, Callable[..., None]]] = [
    (snapshot, "if cls.forward is parent.forward or", "if True or", _own_forward),
    (snapshot, "name not in transient", "True", of_snapshot.test_persistent_buffers_count_and_others_do_not),
    (snapshot, "if id(module) in seen:", "if False:", _shared_module),
    (
        snapshot,
        "if len(names) > 1",
        "if len(names) > 2",
        of_snapshot.test_ties_name_the_parameter_that_torch_reports_first,
    ),
    (
        snapshot,
        "module.groups if isinstance(module, _CONVOLUTIONS) else 1",
        "1",
        of_snapshot.test_groups_alone_tell_convolutions_apart,
    ),
    (snapshot, "self.lazy.append(_lazy(path, name))", "pass", of_snapshot.test_lazy_layers_are_all_named),
    (
        snapshot,
        "module = module.original_module",
        "module = module.modules_to_save['default']",
        of_snapshot.test_our_wrappers_are_seen_through,
    ),
    (nodes, "if full not in aliases:", "if True:", of_nodes.test_tied_parameters_count_once),
    (nodes, "for name, tensor in facts.params.items()]", "for name, tensor in ()]", _digest_of_dtypes),
    (
        nodes,
        'del data["model"]["name_or_path"]',
        "pass",
        of_nodes.test_the_digest_does_not_depend_on_where_a_model_came_from_or_what_is_said_of_it,
    ),
    (roles, "if path == self._head and path:", "if False:", of_nodes.test_roles_by_structure),
    (
        files,
        "os.replace(staged, path)",
        "path.write_bytes(content)",
        of_nodes.test_a_failed_write_leaves_the_old_file_and_nothing_else,
    ),
    (
        cache,
        'json.loads(header)["sha256"] != hashlib.sha256(body).hexdigest()',
        "False",
        of_cache.test_every_truncation_and_every_flipped_byte_is_noticed,
    ),
    (
        cache,
        "found = self.get(key)  # another process may have built it meanwhile",
        "",
        of_cache.test_processes_at_a_time_build_once,
    ),
    (cache, '"task_type": base.ref.task_type,', "", _key_of_task),
    (
        cache,
        "warn([rules.CACHE_UNUSABLE",
        "str([rules.CACHE_UNUSABLE",
        of_cache.test_a_folder_that_cannot_be_made_costs_a_warning,
    ),
    (locate, "if key not in _PROVENANCE", "", of_locate.test_the_fingerprint_is_of_the_content),
    (locate, "head + str(size).encode()", "head[:4]", of_locate.test_a_gguf_file_is_known_by_its_head_and_size),
    (locate, "revision=revision)", "revision=None)", of_locate.test_a_hub_model_in_the_local_cache),
    (locate, "if _require_regular(path) > MAX_BASE_CONFIG:", "if False:", of_locate.test_a_config_that_is_too_large),
]


@pytest.mark.parametrize(
    ("module", "before", "after", "test"), DEFECTS, ids=[f"{d[0].__name__}-{d[1][:40]}" for d in DEFECTS]
)
def test_a_defect_is_noticed(
    module: ModuleType,
    before: str,
    after: str,
    test: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    given = {"monkeypatch": monkeypatch, "tmp_path": tmp_path}
    wanted = test.__code__.co_varnames[: test.__code__.co_argcount]
    arguments = {name: given[name] for name in wanted}
    put_defect(monkeypatch, module, before, after)
    with pytest.raises((AssertionError, pytest.fail.Exception, PeftcError)):
        test(**arguments)
