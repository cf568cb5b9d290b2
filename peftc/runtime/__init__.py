"""Carrying out a plan on a live model. From the ground up, each room using those before it:

`journal` (all or nothing), `call` (what one call knows), `bases` (base layers), `slots` (tensors of adapters), `layer` (one
adapted layer), `around` (modules and calls), `prompt` (virtual tokens), `session` (all that is applied), `applying` (plans).
"""

from peftc.installed.requirements import require

require()  # before anything in here imports a library of another release
