"""Every kind of diagnostic, declared once; `docs/diagnostics.md` is generated from these files.

Codes are stable: PC1xx documents and configs, PC2xx plugins, PC3xx graphs and base models, PC4xx targets and plans,
PC5xx running models, PC6xx checkpoints, PC7xx commands and training, PC8xx the alias `peft` and the packages beside
peftc. A code is never reused for another meaning.
"""

from __future__ import annotations

from peftc.rules.bases import *
from peftc.rules.checkpoints import *
from peftc.rules.commands import *
from peftc.rules.documents import *
from peftc.rules.models import *
from peftc.rules.packages import *
from peftc.rules.plans import *
from peftc.rules.plugins import *
