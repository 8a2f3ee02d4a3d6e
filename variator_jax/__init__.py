"""variator_jax: small trained compression plugins that make big frozen T5 encoders cheap.

The public API, which is imported when it is first used:

    import variator_jax

    backbone = variator_jax.load_backbone(PATH)  # a Hugging Face, T5X, backbone or run folder
    plugins = variator_jax.load_plugins(PATH)  # a plugin, a set of plugins, or a run folder
    model = variator_jax.VariatorModel(backbone, plugins)
    encoded = model.encode(token_ids, ratio=4)  # [batch, length, embed]
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_HOMES = {
    "Backbone": "store",
    "Lora": "store",
    "LoraConfig": "backbones.lora",
    "Plugin": "store",
    "PluginConfig": "plugin",
    "VariatorError": "errors",
    "VariatorModel": "model",
    "load_backbone": "store",
    "load_lora": "store",
    "load_official": "store",
    "load_plugin": "store",
    "load_plugins": "store",
    "save_backbone": "store",
    "save_lora": "store",
    "save_plugin": "store",
    "save_plugins": "store",
    "splice": "plugin",
    "with_lora": "store",
}

__all__ = [
    "Backbone",
    "Lora",
    "LoraConfig",
    "Plugin",
    "PluginConfig",
    "VariatorError",
    "VariatorModel",
    "load_backbone",
    "load_lora",
    "load_official",
    "load_plugin",
    "load_plugins",
    "save_backbone",
    "save_lora",
    "save_plugin",
    "save_plugins",
    "splice",
    "with_lora",
]

if TYPE_CHECKING:
    from variator_jax.backbones.lora import LoraConfig
    from variator_jax.errors import VariatorError
    from variator_jax.model import VariatorModel
    from variator_jax.plugin import PluginConfig, splice
    from variator_jax.store import (
        Backbone,
        Lora,
        Plugin,
        load_backbone,
        load_lora,
        load_official,
        load_plugin,
        load_plugins,
        save_backbone,
        save_lora,
        save_plugin,
        save_plugins,
        with_lora,
    )


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for, so that the command line starts at once."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
