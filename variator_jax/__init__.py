"""variator_jax: small trained compression plugins that make big frozen T5 encoders cheap.

The public API, which is imported when it is first used:

    import variator_jax

    backbone = variator_jax.load_backbone(PATH)  # a Hugging Face, T5X, backbone or run folder
    plugins = variator_jax.load_plugins(PATH)  # a plugin, a set of plugins, or a run folder
    model = variator_jax.VariatorModel(backbone, plugins)
    encoded = model.encode(token_ids, ratio=4)  # [batch, length, embed]
"""

import importlib
from typing import Any

__version__ = "0.2.0"

_STORE = (
    "Backbone", "Lora", "Plugin", "load_backbone", "load_lora", "load_official", "load_plugin",
    "load_plugins", "save_backbone", "save_lora", "save_plugin", "save_plugins", "with_lora",
)  # fmt: skip
# The module that defines each public name.
_HOMES = dict.fromkeys(_STORE, "store") | {
    "Ffn": "plugin",
    "KeyValue": "plugin",
    "LoraConfig": "backbones.lora",
    "PluginConfig": "plugin",
    "PluginError": "errors",
    "Span": "plugin",
    "SplicedModel": "model",
    "VariatorError": "errors",
    "VariatorModel": "model",
    "splice": "plugin",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that the command line starts at once."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
