"""The one place where a backbone and a plugin run together, and the API for users on top of it.

`SplicedModel` is pure: parameters are arguments, and it is called inside `jit`. `VariatorModel`
owns the weights of one backbone and its plugins, tokenises, pads to buckets and compiles.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from variator_jax import mesh as meshes
from variator_jax.backbones.base import Backbone as Network
from variator_jax.backbones.base import Batch, Outputs
from variator_jax.backbones.t5 import T5
from variator_jax.backbones.t5.decoding import START_TOKEN
from variator_jax.errors import ConfigError, PluginError, check_known, check_whole, did_you_mean
from variator_jax.plugin import PluginConfig, PluginVariables, splice
from variator_jax.plugin.splice import check_not_spliced
from variator_jax.store.backbone import Backbone
from variator_jax.store.plugins import Key, Plugin, by_key, check_plugin
from variator_jax.texts import (
    ByteTokenizer,
    Tokenizer,
    check_padding,
    load_tokenizer,
    text_ids,
    token_array,
)

#: A text, texts, an integer array [batch, length], or lists of ids of unequal length.
Inputs = Any
Plugins = Mapping[Key, Plugin] | Iterable[Plugin] | Plugin | None
#: Token mask [batch, length] -> a context in which the backbone runs, in place of a plugin.
Intervention = Callable[[jax.Array], AbstractContextManager[None]]
#: Lengths to which inputs are padded; longer ones to a multiple of the last.
LENGTH_BUCKETS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_SHORT = (1, 2, 4, 8)  # lengths of targets, below those buckets
# The compiled methods of `SplicedModel`, and their arguments that compile again.
_METHODS = {"encode": (), "logits": (), "generate": ("max_length", "num_beams")}


@dataclasses.dataclass(frozen=True)
class SplicedModel:
    """A backbone unmodified, spliced with a plugin, or under another intervention.

    Attributes:
      backbone: the network.
      plugin: the plugin's settings; None or ratio 1 for the backbone itself, bit by bit.
      intervention: a control or a baseline in place of a plugin.
    """

    backbone: Network
    plugin: PluginConfig | None = None
    intervention: Intervention | None = None

    def __post_init__(self) -> None:
        if self.plugin is not None and self.intervention is not None:
            raise ConfigError("A model has a plugin or an intervention in its place; found both.")

    def apply(
        self,
        params: dict,
        variables: PluginVariables | None,
        batch: Batch,
        dropout_rng: jax.Array | None = None,
        capture: Collection[str] = (),
    ) -> Outputs:
        """Hidden states of each stack and logits, for a batch in T5X's names.

        Args:
          params: the backbone's parameters.
          variables: the plugin's arrays; None without one.
          batch: `encoder_input_tokens` and, with a decoder, `decoder_input_tokens`, each
            `[batch, length]` int; `*_segment_ids` of packed rows.
          dropout_rng: of the backbone's dropout, None for none.
          capture: paths of modules whose results are among the hidden states, too.
        """
        with self._spliced(variables, batch):
            return self.backbone.apply(params, batch, dropout_rng, capture)

    def encode(self, params: dict, variables: PluginVariables | None, batch: Batch) -> jax.Array:
        """The encoder's last hidden states, `[batch, length, embed]`."""
        segments = batch.get("encoder_segment_ids")
        with self._spliced(variables, batch):
            return self.backbone.encode(params, batch["encoder_input_tokens"], segments)

    def logits(self, params: dict, variables: PluginVariables | None, batch: Batch) -> jax.Array:
        """The decoder's logits, `[batch, target length, vocab]` float32."""
        logits = self.apply(params, variables, batch).logits
        if logits is None:
            raise ConfigError("An encoder without a decoder has no logits.")
        return logits

    def generate(
        self,
        params: dict,
        variables: PluginVariables | None,
        batch: Batch,
        max_length: int,
        num_beams: int = 1,
    ) -> jax.Array:
        """Generates from a compressed encoding; one beam is greedy: `[batch, max_length]` int32."""
        # [batch, length, embed]
        encoded = self.encode(params, variables, batch)
        tokens = batch["encoder_input_tokens"]
        return self.backbone.generate(params, encoded, tokens, max_length, num_beams)

    def _spliced(
        self, variables: PluginVariables | None, batch: Batch
    ) -> AbstractContextManager[None]:
        mask = self.backbone.masks(batch)["encoder"]
        if self.intervention is not None:
            return self.intervention(mask.valid)
        if self.plugin is None:
            return contextlib.nullcontext()
        return splice(self.plugin, variables, mask, stack=self.backbone.stack("encoder"))


class VariatorModel:
    """A frozen backbone that runs compressed at the ratios whose plugins it was given.

    Weights are put on the device, or on the mesh, once. Inputs are padded to buckets of lengths and
    batch sizes, and each method is compiled once for each ratio and bucket. Results have the
    inputs' own length, for no text is cut; they are equal bit by bit within a bucket and to 1e-5
    across buckets. The official release's plugins pool padding, so their inputs keep their shape.

        model = VariatorModel(load_backbone(PATH), load_plugins(PLUGINS))
        encoded = model.encode(["a text", "another one"], ratio=4)  # [2, length, embed]
    """

    def __init__(
        self,
        backbone: Backbone,
        plugins: Plugins = None,
        mesh: Mesh | None = None,
        buckets: Sequence[int] | None = LENGTH_BUCKETS,
    ) -> None:
        """Checks that the plugins belong to the backbone and puts all weights on the device.

        Args:
          backbone: a loaded backbone.
          plugins: its plugins, with ratios or names that differ.
          mesh: where the weights go; None for the first device.
          buckets: lengths to which inputs are padded; None compiles for every shape.

        Raises:
          CheckpointError: if a plugin is another backbone's, with both fingerprints.
          PluginError: if two plugins have the same name.
        """
        self.backbone, self.plugins = backbone, _by_key(plugins)
        self._buckets, self._mesh = sorted(() if buckets is None else map(int, buckets)), mesh
        for bucket in self._buckets:
            check_whole("A bucket of lengths", bucket)
        for plugin in self.plugins.values():
            check_plugin(plugin, backbone)
        self._params = meshes.place_parameters(backbone.params, backbone.config, mesh)
        self._variables: dict[Key, PluginVariables | None] = {1: None}
        settings: dict[Key, PluginConfig] = {1: PluginConfig(ratio=1)}
        for key, plugin in self.plugins.items():
            self._variables[key] = meshes.place_everywhere(plugin.variables, mesh)
            settings[key] = plugin.config
        self._compiled = {
            (key, name): meshes.compile_on(
                mesh, getattr(SplicedModel(T5(backbone.config), config), name), static
            )
            for key, config in settings.items()
            for name, static in _METHODS.items()
        }

    @property
    def ratios(self) -> tuple[int, ...]:
        """The compression ratios of the plugins; 1 is the backbone itself."""
        return tuple(sorted({1, *(plugin.config.ratio for plugin in self.plugins.values())}))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the plugins, such as 'span_x4'."""
        return tuple(plugin.config.name for plugin in self.plugins.values())

    def encode(
        self, token_ids: Inputs, ratio: int | None = None, plugin: str | None = None
    ) -> jax.Array:
        """The encoder's last hidden states, `[batch, length, embed]`.

        Args:
          token_ids: token ids as an integer array `[batch, length]`, 0 on padding, or as lists of
            unequal length; or a text or texts, which end in EOS. All are padded to the longest.
          ratio: the compression ratio; 1, the default, is the backbone itself, bit by bit.
          plugin: in place of a ratio, the name of a plugin, such as 'span_x4'.

        Raises:
          ConfigError: for inputs that are not tokens of this backbone.
          PluginError: for a ratio or name that is not loaded, or a ratio that several plugins have.
        """
        tokens = self._tokens(token_ids)
        # [batch bucket, length bucket, embed]
        encoded = self._run("encode", self._key(ratio, plugin), {"encoder_input_tokens": tokens})
        return _cut(encoded, *tokens.shape)

    def logits(
        self,
        token_ids: Inputs,
        decoder_token_ids: Inputs,
        ratio: int | None = None,
        plugin: str | None = None,
    ) -> jax.Array:
        """The decoder's logits, `[batch, target length, vocab]` float32.

        Args:
          token_ids: as for `encode`.
          decoder_token_ids: the decoder's input tokens, which begin with the start token 0; or
            texts, which are given one: the logits at a position then score the text's token there,
            EOS last.
          ratio: the compression ratio.
          plugin: in place of a ratio, the name of a plugin.

        Raises:
          VariatorError: as `encode`, or for a backbone without a decoder.
        """
        tokens = self._tokens(token_ids)
        decoder = self._tokens(decoder_token_ids, "decoder_token_ids")
        if _texts(decoder_token_ids) is not None:
            decoder = np.pad(decoder[:, :-1], ((0, 0), (1, 0)), constant_values=START_TOKEN)
        if len(decoder) != len(tokens):
            raise ConfigError(
                f"Found {len(tokens)} rows for the encoder, {len(decoder)} for the decoder."
            )
        batch = {"encoder_input_tokens": tokens, "decoder_input_tokens": decoder}
        # [batch bucket, target bucket, vocab]
        return _cut(self._run("logits", self._key(ratio, plugin), batch), *decoder.shape)

    def generate(
        self,
        token_ids: Inputs,
        ratio: int | None = None,
        max_length: int = 64,
        num_beams: int = 1,
        plugin: str | None = None,
    ) -> np.ndarray | str | list[str]:
        """Generates from the decoder: greedily, or the best of several beams.

        Args:
          token_ids: as for `encode`.
          ratio: the compression ratio of the encoder.
          max_length: tokens to generate at the most, EOS included.
          num_beams: beams of the search; 1 is greedy.
          plugin: in place of a ratio, the name of a plugin.

        Returns:
          A text for a text, texts for texts; for ids `[batch, max_length]` int32 behind the start
          token, EOS included, 0 behind it.

        Raises:
          VariatorError: as `encode`, or for a backbone without a decoder.
        """
        lengths = {"max_length": max_length, "num_beams": num_beams}
        for name, value in lengths.items():
            check_whole(name, value)
        tokens = self._tokens(token_ids)
        # [batch bucket, max_length]
        batch, key = {"encoder_input_tokens": tokens}, self._key(ratio, plugin)
        generated = self._run("generate", key, batch, **lengths)
        generated = np.asarray(generated)[: len(tokens)]
        if _texts(token_ids) is None:
            return generated
        texts = [self.tokenizer.decode(row) for row in generated]
        return texts[0] if isinstance(token_ids, str) else texts

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The backbone's vocabulary; ByT5, which has no file of one, takes texts by their bytes.

        Raises:
          ConfigError: if the backbone came without one, or `sentencepiece` is not installed.
        """
        file, config = self.backbone.vocabulary_file, self.backbone.config
        if file is None and not config.name.startswith("byt5"):
            raise ConfigError(f"Backbone {config.name!r} has no vocabulary; it takes ids only.")
        size = config.vocab_size
        tokenizer = load_tokenizer(file, size) if file else ByteTokenizer(size)
        if tokenizer.size > size:
            ids = f"{file or 'The vocabulary of bytes'} has {tokenizer.size} ids"
            raise ConfigError(f"{ids}; backbone {config.name!r} has only {size} embeddings.")
        return tokenizer

    def tokenize(self, texts: str | Sequence[str]) -> np.ndarray:
        """The token ids of a text or texts: `[batch, length]` int32, EOS last, 0 behind it."""
        return self._tokens([texts] if isinstance(texts, str) else list(texts))

    def _tokens(self, inputs: Inputs, what: str = "token_ids") -> np.ndarray:
        texts = _texts(inputs)
        rows = inputs if texts is None else [text_ids(self.tokenizer, text) for text in texts]
        return token_array(what, rows, self.backbone.config.vocab_size)

    def _key(self, ratio: int | None, name: str | None) -> Key:
        """The key of the plugin that has this ratio or this name; 1 for the backbone itself."""
        if name is None and (ratio is None or (type(ratio) is int and ratio == 1)):
            return 1
        if name is not None and ratio is not None:
            raise PluginError(f"Give a ratio or a plugin's name; found {ratio!r} and {name!r}.")
        asked = {
            key: plugin.config.name
            for key, plugin in self.plugins.items()
            if (type(ratio) is int and plugin.config.ratio == ratio) or plugin.config.name == name
        }
        if len(asked) > 1:
            names = tuple(asked.values())
            raise PluginError(f"Several plugins have ratio {ratio}: plugin= one of {names}.")
        if not asked:
            what = f"Plugin {name!r}" if name else f"Ratio {ratio!r}"
            expected = f"{self.ratios}, or plugin= one of {self.names}"
            near = did_you_mean(str(name or ratio), self.names)
            raise PluginError(f"{what} is not loaded; expected one of {expected}.{near}")
        return next(iter(asked))

    def compile(
        self,
        method: str,
        batch: Batch,
        ratio: int | None = None,
        plugin: str | None = None,
        **lengths: int,
    ) -> jax.ShapeDtypeStruct:
        """Compiles 'encode', 'logits' or 'generate' ahead for a batch's bucket; returns its shape.

        `batch` has T5X's names, `lengths` are those of 'generate'. On a mesh it is a `ConfigError`.
        """
        if self._mesh is not None:
            raise ConfigError("A model on a mesh is not compiled ahead: call its method.")
        check_not_spliced()
        check_known("No method of a model is named", method, _METHODS)
        key = self._key(ratio, plugin)
        arguments = self._params, self._variables[key], self._to_buckets(method, key, batch)
        lowered: Any = self._compiled[key, method].lower(*arguments, **lengths)  # type: ignore[attr-defined]
        lowered.compile()
        return lowered.out_info

    def _run(self, method: str, key: Key, batch: Batch, **lengths: int) -> jax.Array:
        """Calls a compiled method with `[rows, length]` arrays, padded to their buckets."""
        check_not_spliced()
        batch = self._to_buckets(method, key, batch)
        if key != 1 and not self.plugins[key].config.pool_padding:
            check_padding(batch["encoder_input_tokens"])
        return self._compiled[key, method](self._params, self._variables[key], batch, **lengths)

    def _to_buckets(self, method: str, key: Key, batch: Batch) -> Batch:
        config = self.backbone.config
        if method != "encode" and not config.has_decoder:
            raise ConfigError(f"Backbone {config.name!r} is without a decoder: it has no {method}.")
        if self._buckets and (key == 1 or not self.plugins[key].config.pool_padding):
            buckets = {"decoder_input_tokens": sorted({*_SHORT, *self._buckets})}
            batch = {k: _bucketed(ids, buckets.get(k, self._buckets)) for k, ids in batch.items()}
        return batch


def _bucketed(tokens: np.ndarray, buckets: Sequence[int]) -> np.ndarray:
    """`[rows, length]` filled up with 0 to a power of two and a bucket of lengths."""
    rows, length = tokens.shape
    fitting = (bucket for bucket in buckets if bucket >= length)
    bucket = next(fitting, -(-length // buckets[-1]) * buckets[-1])
    return np.pad(tokens, ((0, (1 << (rows - 1).bit_length()) - rows), (0, bucket - length)))


def _cut(array: Any, rows: int, length: int) -> jax.Array:
    """The first rows and positions; on the host: each new slice on the device compiles."""
    if isinstance(array, jax.Array) and array.shape[:2] == (rows, length):
        return array
    return jax.device_put(np.asarray(array)[:rows, :length])


def _texts(inputs: Inputs) -> list[str] | None:
    """The texts, None for ids."""
    if isinstance(inputs, str):
        return [inputs]
    if isinstance(inputs, (list, tuple)) and any(isinstance(item, str) for item in inputs):
        if others := [type(item).__name__ for item in inputs if not isinstance(item, str)]:
            raise ConfigError(f"Texts are mixed with a {others[0]}.")
        return list(inputs)
    return None


def _by_key(plugins: Plugins) -> dict[Key, Plugin]:
    """The plugins in rising order of their ratios; ratio 1 needs none."""
    keyed = plugins if isinstance(plugins, Mapping) else {}
    single = isinstance(plugins, Plugin | os.PathLike | str)
    listed: list[Any] = [plugins] if single else list(keyed.values() or plugins or ())  # type: ignore[arg-type]
    if not all(isinstance(plugin, Plugin) for plugin in listed):
        raise PluginError(f"Expected plugins, as load_plugins returns; found {plugins!r}.")
    for key, plugin in keyed.items():
        if key not in (plugin.config.ratio, plugin.config.name):
            raise PluginError(f"The plugin for ratio {key} has ratio {plugin.config.ratio}.")
    return by_key(plugin for plugin in listed if plugin.config.ratio > 1)
