"""variator_jax: small trained compression plugins that make big frozen T5 encoders cheap.

The public API, which is imported when it is first used:

    import variator_jax

    backbone = variator_jax.load_backbone(PATH)  # a Hugging Face, T5X, backbone or run folder
    plugins = variator_jax.load_plugins(PATH)  # a plugin, a set of plugins, or a run folder
    model = variator_jax.VariatorModel(backbone, plugins)
    encoded = model.encode(token_ids, ratio=4)  # [batch, length, embed]
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Backbone": "checkpoints",
    "Lora": "checkpoints",
    "LoraConfig": "backbone",
    "Plugin": "checkpoints",
    "PluginConfig": "plugin",
    "VariatorError": "errors",
    "VariatorModel": "model",
    "load_backbone": "checkpoints",
    "load_lora": "checkpoints",
    "load_official": "checkpoints",
    "load_plugin": "checkpoints",
    "load_plugins": "checkpoints",
    "save_backbone": "checkpoints",
    "save_lora": "checkpoints",
    "save_plugin": "checkpoints",
    "save_plugins": "checkpoints",
    "splice": "plugin",
    "with_lora": "checkpoints",
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
    from variator_jax.backbone import LoraConfig
    from variator_jax.checkpoints import (
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
    from variator_jax.errors import VariatorError
    from variator_jax.model import VariatorModel
    from variator_jax.plugin import PluginConfig, splice


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
