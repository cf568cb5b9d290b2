"""Every method passes the conformance kit on the layers of every library that is installed, and whose storage packs an example."""

from __future__ import annotations

import pytest

from peftc.registry.manager import default_registry
from peftc.registry.storages import default_storages
from peftc.testing.kit import cases_on, report_of
from peftc.tuner.storage import Storage
from tests.bases.made import installed

STORAGES = [s for s in default_storages().load_all() if type(s).example is not Storage.example]


@pytest.mark.parametrize("peft_type", default_registry().names)
@pytest.mark.parametrize("storage", STORAGES, ids=lambda storage: storage.name)
def test_a_method_does_on_packed_layers_what_it_does_on_plain_ones(storage: Storage, peft_type: str) -> None:
    if storage.package and not installed(storage.package.replace("-", "_")):
        pytest.skip(f"{storage.name}: the package {storage.package} is not installed")
    report_of(cases_on(storage, peft_type)).require()
