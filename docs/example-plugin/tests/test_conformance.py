"""Everything that a method must do: one test per check, options and kind of model."""

from peftc.testing import conformance

test_conformance = conformance("LORA_XS")
