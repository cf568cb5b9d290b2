"""A plugin that imports torch when it is loaded, and is otherwise sound."""

import torch  # noqa: F401 - this is what the kit must catch

from tests.mutation.mutants import peftc_tuner  # noqa: F401 - the hook
