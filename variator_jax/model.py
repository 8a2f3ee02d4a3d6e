"""A backbone with its compression plugins, ready to call at any of their ratios.

The few lines that most users need. Training, evaluation and whoever jits larger programs enter
`plugin.splice` themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from variator_jax.backbones.t5 import Transformer
from variator_jax.backbones.t5.decoding import START_TOKEN, beam_decode, greedy_decode
from variator_jax.errors import ConfigError, PluginError
from variator_jax.plugin import PluginConfig, splice
from variator_jax.store.backbone_folder import Backbone
from variator_jax.store.plugin_folder import Plugin, check_belongs, check_shapes
from variator_jax.texts import ByteTokenizer, Tokenizer, load_tokenizer, token_array

#: A text, texts, an integer array [batch, length], or lists of ids of unequal length.
Inputs = Any


class VariatorModel:
    """A frozen backbone that runs compressed at the ratios whose plugins it was given.

    Weights are put on the device once. Each method is compiled once per ratio and shape, so that
    batches of a few fixed lengths run faster than such of every length. A result does not depend on
    how far its batch is padded, except with the official release's plugins, which pool padding.

        model = VariatorModel(load_backbone(PATH), load_plugins(PLUGINS))
        encoded = model.encode(["a text", "another one"], ratio=4)  # [2, length, embed]
    """

    def __init__(
        self,
        backbone: Backbone,
        plugins: Mapping[int, Plugin] | Iterable[Plugin] | Plugin | None = None,
    ) -> None:
        """Checks that the plugins belong to the backbone and puts all weights on the device.

        Raises:
          CheckpointError: if a plugin is another backbone's, with both fingerprints.
          PluginError: if two plugins have the same ratio.
        """
        self.backbone = backbone
        self.plugins = _by_ratio(plugins)
        for ratio, plugin in self.plugins.items():
            what = f"The plugin of ratio {ratio}"
            if "backbone" in plugin.description:
                check_belongs(what, plugin.description, backbone)
            check_shapes(what, plugin, backbone)
        self._module = Transformer(backbone.config)
        self._params = jax.device_put(backbone.params)
        self._variables = {1: None} | {
            ratio: jax.device_put(plugin.variables) for ratio, plugin in self.plugins.items()
        }
        self._encode = self._compiled(_encode)
        self._logits = self._compiled(_logits)
        self._generate = self._compiled(_generate, "max_length", "num_beams")

    @property
    def ratios(self) -> tuple[int, ...]:
        """The compression ratios that can be asked for; 1 is the backbone itself."""
        return tuple(sorted({1, *self.plugins}))

    def encode(self, token_ids: Inputs, ratio: int = 1) -> jax.Array:
        """The encoder's last hidden states, `[batch, length, embed]`.

        Args:
          token_ids: token ids as an integer array `[batch, length]`, 0 on padding, or as lists of
            unequal length; or a text or texts, which end in EOS. All are padded to the longest.
          ratio: the compression ratio; 1 is the backbone itself, bit by bit.

        Raises:
          ConfigError: for inputs that are no tokens of this backbone.
          PluginError: for a ratio that is not loaded.
        """
        return self._encode[self._known(ratio)](
            self._params, self._variables[ratio], self._tokens(token_ids)
        )

    def logits(self, token_ids: Inputs, decoder_token_ids: Inputs, ratio: int = 1) -> jax.Array:
        """The decoder's logits, `[batch, target length, vocab]` float32.

        Args:
          token_ids: as for `encode`.
          decoder_token_ids: the decoder's input tokens, which begin with the start token 0; or
            texts, which are given one: the logits at a position then score the text's token there,
            EOS last.
          ratio: the compression ratio.

        Raises:
          ConfigError: as `encode`, or for a backbone without a decoder.
          PluginError: for a ratio that is not loaded.
        """
        self._check_decoder("logits")
        call = self._logits[self._known(ratio)]
        tokens, decoder = (
            self._tokens(token_ids),
            self._tokens(decoder_token_ids, "decoder_token_ids"),
        )
        if _texts(decoder_token_ids) is not None:
            decoder = np.pad(decoder[:, :-1], ((0, 0), (1, 0)), constant_values=START_TOKEN)
        if len(decoder) != len(tokens):
            raise ConfigError(
                f"token_ids has {len(tokens)} rows, decoder_token_ids has {len(decoder)}."
            )
        return call(self._params, self._variables[ratio], tokens, decoder)

    def generate(
        self, token_ids: Inputs, ratio: int = 1, max_length: int = 64, num_beams: int = 1
    ) -> np.ndarray | str | list[str]:
        """Generates from the decoder: greedily, or the best of several beams.

        Args:
          token_ids: as for `encode`.
          ratio: the compression ratio of the encoder.
          max_length: tokens to generate at the most, EOS included.
          num_beams: beams of the search; 1 is greedy.

        Returns:
          A text for a text, texts for texts; for ids `[batch, max_length]` int32 behind the start
          token, EOS included, 0 behind it.

        Raises:
          ConfigError: as `encode`, or for a backbone without a decoder.
          PluginError: for a ratio that is not loaded.
        """
        self._check_decoder("generate")
        for name, value in (("max_length", max_length), ("num_beams", num_beams)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is a positive whole number; found {value!r}.")
        found = self._generate[self._known(ratio)](
            self._params,
            self._variables[ratio],
            self._tokens(token_ids),
            max_length=max_length,
            num_beams=num_beams,
        )
        found = np.asarray(found)
        if _texts(token_ids) is None:
            return found
        texts = [self.tokenizer.decode(row) for row in found]
        return texts[0] if isinstance(token_ids, str) else texts

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The backbone's vocabulary; ByT5, which has no file of one, takes texts by their bytes.

        Raises:
          ConfigError: if the backbone came without one, or `sentencepiece` is not installed.
        """
        file, config = self.backbone.vocabulary_file, self.backbone.config
        if file is None and not config.name.startswith("byt5"):
            raise ConfigError(
                f"Backbone {config.name!r} came without a vocabulary (spiece.model), "
                "so that it takes token ids only."
            )
        tokenizer = load_tokenizer(file) if file else ByteTokenizer(config.vocab_size)
        if tokenizer.size > config.vocab_size:
            raise ConfigError(
                f"{file or 'The vocabulary of bytes'} has {tokenizer.size} ids; backbone "
                f"{config.name!r} has only {config.vocab_size} embeddings."
            )
        return tokenizer

    def tokenize(self, texts: str | Sequence[str]) -> np.ndarray:
        """The token ids of a text or texts: `[batch, length]` int32, EOS last, 0 behind it."""
        return self._tokens([texts] if isinstance(texts, str) else list(texts))

    def _tokens(self, inputs: Inputs, what: str = "token_ids") -> np.ndarray:
        texts = _texts(inputs)
        rows = inputs if texts is None else [self.tokenizer.encode(text) for text in texts]
        return token_array(what, rows, self.backbone.config.vocab_size)

    def _known(self, ratio: int) -> int:
        if type(ratio) is not int or ratio not in self._variables:
            loaded = ", ".join(map(str, self.plugins)) or "none"
            raise PluginError(
                f"Compression ratio {ratio!r} is not loaded. Loaded are plugins of ratio: "
                f"{loaded}; 1 is the backbone itself."
            )
        return ratio

    def _check_decoder(self, what: str) -> None:
        if not self.backbone.config.has_decoder:
            raise ConfigError(
                f"Backbone {self.backbone.config.name!r} is an encoder without a decoder: it can "
                f"encode, but has no {what}."
            )

    def _compiled(self, function: Callable[..., jax.Array], *static: str) -> dict[int, Any]:
        """The function with this network and each ratio's splice, compiled when it is called."""
        settings = {1: PluginConfig(ratio=1)} | {r: p.config for r, p in self.plugins.items()}
        return {
            ratio: jax.jit(
                functools.partial(function, self._module, config), static_argnames=static
            )
            for ratio, config in settings.items()
        }


def _encode(
    module: Transformer, config: PluginConfig, params: dict, variables: Any, tokens: jax.Array
) -> jax.Array:
    with splice(config, variables, tokens > 0):
        return module.apply({"params": params}, tokens, method="encode")


def _logits(
    module: Transformer,
    config: PluginConfig,
    params: dict,
    variables: Any,
    tokens: jax.Array,
    decoder_tokens: jax.Array,
) -> jax.Array:
    with splice(config, variables, tokens > 0):
        return module.apply({"params": params}, tokens, decoder_tokens)


def _generate(
    module: Transformer,
    config: PluginConfig,
    params: dict,
    variables: Any,
    tokens: jax.Array,
    max_length: int,
    num_beams: int,
) -> jax.Array:
    encoded = _encode(module, config, params, variables, tokens)
    if num_beams == 1:
        return greedy_decode(module, params, encoded, tokens, max_length).tokens
    return beam_decode(module, params, encoded, tokens, max_length, num_beams).tokens


def _texts(inputs: Inputs) -> list[str] | None:
    """The texts, None for ids."""
    if isinstance(inputs, str):
        return [inputs]
    if isinstance(inputs, (list, tuple)) and any(isinstance(item, str) for item in inputs):
        strangers = [item for item in inputs if not isinstance(item, str)]
        if strangers:
            raise ConfigError(f"Texts are mixed with a {type(strangers[0]).__name__}.")
        return list(inputs)
    return None


def _by_ratio(
    plugins: Mapping[int, Plugin] | Iterable[Plugin] | Plugin | None,
) -> dict[int, Plugin]:
    if plugins is None:
        return {}
    if isinstance(plugins, Plugin):
        plugins = [plugins]
    if isinstance(plugins, Mapping):
        for ratio, plugin in plugins.items():
            if plugin.config.ratio != ratio:
                raise PluginError(
                    f"The plugin given for ratio {ratio} is one of ratio {plugin.config.ratio}."
                )
        plugins = plugins.values()
    found: dict[int, Plugin] = {}
    for plugin in plugins:
        if plugin.config.ratio in found:
            raise PluginError(f"Two plugins of ratio {plugin.config.ratio} were given.")
        found[plugin.config.ratio] = plugin
    return {ratio: found[ratio] for ratio in sorted(found) if ratio > 1}
