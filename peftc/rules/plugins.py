"""PC2xx: plugins."""

from __future__ import annotations

from peftc.rules.kinds import KeyRule, RuntimeRule

UNKNOWN_TYPE = KeyRule("PC201", "Unknown PEFT type", "No installed plugin registers this type.")
PLUGIN_BROKEN = RuntimeRule(
    "PC202", "Plugin cannot be loaded", "A method is only as good as the plugin that brings it."
)
PLUGIN_CONFLICT = RuntimeRule(
    "PC203", "Two plugins claim one name", "Which one would run must not depend on search order."
)
PLUGIN_INVALID = RuntimeRule(
    "PC204", "Plugin breaks the contract", "The core relies on what a method's record declares."
)
PLUGIN_RAISED = RuntimeRule("PC205", "Plugin function raised", "The method's own code failed; the model is unchanged.")
PLUGIN_BLOCKED = RuntimeRule("PC206", "Plugin is blocked", "The environment variable PEFTC_BLOCK names this plugin.")
NOT_CONFORMANT = RuntimeRule(
    "PC207", "Plugin fails a conformance check", "Those who use a method rely on what every method does."
)
CORE_RAISED = RuntimeRule(
    "PC208",
    "Failure beside a plugin's function",
    "What peftc did for the method failed, not the method's own code; the model is unchanged.",
)
UNKNOWN_VARIANT = KeyRule("PC209", "Unknown variant", "No installed plugin brings this variant of the method.")
