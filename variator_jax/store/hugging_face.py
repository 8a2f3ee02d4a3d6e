"""Hugging Face folders of T5, Flan-T5, mT5 and ByT5: names, settings, reading, writing.

Nothing here needs transformers or torch.
"""

import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from variator_jax.backbones.t5 import T5Config
from variator_jax.backbones.t5.attention import MAX_DISTANCE, NUM_BUCKETS
from variator_jax.backbones.t5.config import with_name
from variator_jax.errors import CheckpointError
from variator_jax.files import atomic_folder, check_folder, wrap_errors, write_json
from variator_jax.store.arrays import SHARD_SIZE, Stored, open_arrays, write_arrays
from variator_jax.store.backbone import VOCABULARY, Leaf, Source, Stream, make_source, stored_config
from variator_jax.store.description import parse, read_json
from variator_jax.store.pickles import open_state_dict

CONFIG, GENERATION = "config.json", "generation_config.json"
_WEIGHTS, _PICKLE, _INDEX = "model.safetensors", "pytorch_model.bin", ".index.json"
_HOLDS = (
    r"generation_config\.json|spiece\.model|model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
)

EMBEDDING, HEAD = "token_embedder/embedding", "decoder/logits_dense/kernel"
# The embedding under other names, written by some versions of transformers.
ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# The released T5 1.0 files hold a bias of the cross-attention that no version ever used.
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
_BIAS = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
_TOP = {
    "shared.weight": EMBEDDING,
    "lm_head.weight": HEAD,
    "encoder.final_layer_norm.weight": "encoder/encoder_norm/scale",
    "decoder.final_layer_norm.weight": "decoder/decoder_norm/scale",
    f"encoder.{_BIAS}": "encoder/relpos_bias/rel_embedding",
    f"decoder.{_BIAS}": "decoder/relpos_bias/rel_embedding",
}


def _layer_names(attentions: Mapping[str, str], norms: Mapping[str, str]) -> dict[str, str]:
    """The names of a layer's weights in transformers, and our paths; the last is the FFN."""
    names = {f"{number}.layer_norm.weight": f"{norm}/scale" for number, norm in norms.items()}
    for module, ours in attentions.items():
        for letter, weight in {"q": "query", "k": "key", "v": "value", "o": "out"}.items():
            names[f"{module}.{letter}.weight"] = f"{ours}/{weight}/kernel"
    for weight in ("wi", "wi_0", "wi_1", "wo"):
        names[f"{max(norms)}.DenseReluDense.{weight}.weight"] = f"mlp/{weight}/kernel"
    return names


_LAYERS = {
    "encoder": _layer_names(
        {"0.SelfAttention": "attention"},
        {"0": "pre_attention_layer_norm", "1": "pre_mlp_layer_norm"},
    ),
    "decoder": _layer_names(
        {"0.SelfAttention": "self_attention", "1.EncDecAttention": "encoder_decoder_attention"},
        {
            "0": "pre_self_attention_layer_norm",
            "1": "pre_cross_attention_layer_norm",
            "2": "pre_mlp_layer_norm",
        },
    ),
}


def path_of(name: str) -> str | None:
    """Our path for a Hugging Face name, None for an alias.

    Raises:
      ValueError: for a name that no T5 has.
    """
    if name in (*ALIASES, UNUSED):
        return None
    match = re.fullmatch(r"(encoder|decoder)\.block\.(\d+)\.layer\.(.+)", name)
    if name not in _TOP and match and match[3] in _LAYERS[match[1]]:
        return f"{match[1]}/layers_{match[2]}/{_LAYERS[match[1]][match[3]]}"
    if name not in _TOP:
        reason = "UMT5's own position bias" if "relative_attention_bias" in name else "no weight"
        raise ValueError(f"{name!r} is {reason} of a T5 in transformers")
    return _TOP[name]


def name_of(path: str) -> str:
    """The Hugging Face name of one of our paths: the inverse of `path_of`."""
    match = re.fullmatch(r"(encoder|decoder)/layers_(\d+)/(.+)", path)
    table, part = (_LAYERS[match[1]], match[3]) if match else (_TOP, path)
    name = next(theirs for theirs, ours in table.items() if ours == part)
    return f"{match[1]}.block.{match[2]}.layer.{name}" if match else name


def is_transposed(path: str) -> bool:
    """True for our paths whose matrix transformers keeps transposed."""
    return path.endswith(("/kernel", "/rel_embedding"))


_ENCODERS = ("T5EncoderModel", "MT5EncoderModel")
_ARCHITECTURES = (
    *(*_ENCODERS, "T5ForConditionalGeneration", "MT5ForConditionalGeneration"),
    *("T5WithLMHeadModel", "T5Model", "MT5Model"),
)
# transformers' defaults, which a config may leave out.
_DEFAULTS = {
    "t5": dict(d_ff=2048, num_layers=6, num_heads=8, feed_forward_proj="relu"),
    "mt5": dict(d_ff=1024, num_layers=8, num_heads=6, feed_forward_proj="gated-gelu"),
}
_SYNONYMS = {"d_model": "hidden_size", "d_kv": "head_dim", "num_layers": "num_hidden_layers"}
_SYNONYMS["num_heads"] = "num_attention_heads"
# T5X's 'gelu' is the tanh approximation, which transformers calls 'gelu_new'; in 'gated-gelu', too.
# transformers' own 'gelu' is the exact one.
_ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}
_ACTIVATIONS |= {"silu": "silu", "swish": "silu"}
_THEIR_ACTIVATIONS = {"relu": "relu", "gelu": "gelu_new", "silu": "silu"}
_FIXED = {  # data and decoding have the token ids built in
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": NUM_BUCKETS,
    "relative_attention_max_distance": MAX_DISTANCE,
}


class _Settings(NamedTuple):
    config: T5Config
    scaled_logits: bool  # by 1 / sqrt(embed), as T5 1.0 does
    tied: bool  # whether a missing output matrix is the embedding


def parse_config(file: str, content: Mapping[str, Any], vocab_size: int) -> _Settings:
    """Reads a config as transformers does.

    Args:
      file: the file, for messages.
      content: the parsed JSON.
      vocab_size: rows of the embedding; configs of resized models may have another number.

    Raises:
      CheckpointError: for another model than a T5, or settings that this network does not have.
    """
    kind = content.get("model_type", "t5")
    if kind not in _DEFAULTS:
        raise CheckpointError(f"{file} describes a {kind!r} model; expected 't5' or 'mt5'.")
    settings = {"d_model": 512, "d_kv": 64, "layer_norm_epsilon": 1e-6, **_DEFAULTS[kind]}
    settings |= {ours: content[theirs] for ours, theirs in _SYNONYMS.items() if theirs in content}
    settings |= content
    for key, expected in _FIXED.items():
        if settings.get(key) not in (None, expected, [expected]):
            raise CheckpointError(f"{file} has {key} {settings[key]!r}; expected {expected}.")

    def number(key: str, kind: type = int) -> Any:
        return parse(kind, settings[key], f"{file}: {key!r}")

    has_depth = settings.get("num_decoder_layers") is not None
    decoder_layers = number("num_decoder_layers" if has_depth else "num_layers")
    tied = content.get("tie_word_embeddings") is not False
    # transformers 5 calls every config tied and keeps the scaling apart; it never scales an mT5.
    scaled = kind == "t5" and content.get("scale_decoder_outputs", tied) is not False
    named = settings.get("architectures") or ["T5ForConditionalGeneration"]
    if not isinstance(named, list) or named[0] not in _ARCHITECTURES:
        raise CheckpointError(f"{file} has architectures {named!r}; expected a T5 or its encoder.")
    with wrap_errors(f"{file} is not usable"):
        config = T5Config(
            name="t5",
            vocab_size=vocab_size,
            embed_dim=number("d_model"),
            num_heads=number("num_heads"),
            head_dim=number("d_kv"),
            mlp_dim=number("d_ff"),
            num_encoder_layers=number("num_layers"),
            num_decoder_layers=0 if named[0] in _ENCODERS else decoder_layers,
            mlp_activations=_activations(file, settings),
            logits_via_embedding=scaled,
            layer_norm_epsilon=number("layer_norm_epsilon", float),
        )
    hint = f"{kind if kind == 'mt5' else ''} {content.get('_name_or_path', '')}"
    return _Settings(with_name(config, hint), scaled, tied)


def _activations(file: str, settings: Mapping[str, Any]) -> tuple[str, ...]:
    named, expected = settings["feed_forward_proj"], settings.get("dense_act_fn")
    match = re.fullmatch(r"(gated-)?(\w+)", str(named))
    act = "gelu_new" if named == "gated-gelu" else match and match[2]
    if match is None or act not in _ACTIVATIONS or expected not in (None, act):
        raise CheckpointError(
            f"{file} has feed_forward_proj {named!r} with dense_act_fn {expected!r}; known are "
            "relu, gelu_new, silu and gated-* of them."
        )
    return (_ACTIVATIONS[act], "linear") if match[1] else (_ACTIVATIONS[act],)


def render_config(config: T5Config) -> dict[str, Any]:
    """The `config.json` of a backbone.

    Raises:
      CheckpointError: for activations that transformers' T5 does not have, or an encoder whose
        feed-forward layers are not as wide as the decoder's.
    """
    first, *others = config.mlp_activations
    if first not in _THEIR_ACTIVATIONS or others not in ([], ["linear"]):
        raise CheckpointError(f"transformers has no T5 with {tuple(config.mlp_activations)}.")
    act = _THEIR_ACTIVATIONS[first]
    if config.has_decoder and config.encoder_mlp != config.mlp_dim:
        widths = f"{config.encoder_mlp} in the encoder and {config.mlp_dim} in the decoder"
        raise CheckpointError(f"transformers' T5 has one d_ff; this backbone has {widths}.")
    scaled = config.logits_via_embedding
    family = "MT5" if config.name.startswith("mt5") and not scaled else "T5"
    head = "ForConditionalGeneration" if config.has_decoder else "EncoderModel"
    return {
        "architectures": [family + head],
        "model_type": family.lower(),
        "_name_or_path": config.name,
        "d_model": config.embed_dim,
        "d_kv": config.head_dim,
        "d_ff": config.encoder_mlp,
        "num_heads": config.num_heads,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers or config.num_encoder_layers,
        "vocab_size": config.vocab_size,
        "feed_forward_proj": f"gated-{first}" if config.gated else act,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "tie_word_embeddings": scaled,
        "scale_decoder_outputs": scaled,
        "is_encoder_decoder": config.has_decoder,
        **_FIXED,
        "dtype": config.param_dtype,
        "torch_dtype": config.param_dtype,
    }


def open_hf(path: str | os.PathLike) -> Source:
    """The leaves of a folder of a T5, Flan-T5, mT5 or ByT5, with a decoder or without.

    Args:
      path: a folder with `config.json` and `model.safetensors` or `pytorch_model.bin`, whole or in
        shards with an index.

    Raises:
      CheckpointError: if anything is missing, damaged or not a T5 of this network.
    """
    folder = check_folder(path)
    content = read_json(folder / CONFIG)
    weights = _open_weights(folder)
    table = _embedding(folder, weights, content.get("tie_word_embeddings") is not False)
    settings = parse_config(str(folder / CONFIG), content, table.shape[0])
    tables = {EMBEDDING: table} | _head(folder, weights, table, settings)
    leaves = [_leaf(path, name_of(path), stored) for path, stored in tables.items()]
    for name, stored in weights.items():
        with wrap_errors(str(folder)):
            our_path = path_of(name)
        if our_path not in (None, EMBEDDING, HEAD):
            leaves.append(_leaf(our_path, name, stored))
    vocabulary = folder / VOCABULARY if (folder / VOCABULARY).is_file() else None
    config = stored_config(settings.config, leaves)
    return make_source(folder, config, leaves, name_of, vocabulary_file=vocabulary)


def _open_weights(folder: pathlib.Path) -> dict[str, Stored]:
    """Every weight of a folder, by name: safetensors before pickles, one file before shards."""
    for file, opener in ((_WEIGHTS, open_arrays), (_PICKLE, open_state_dict)):
        if (folder / file).is_file():
            return opener(folder / file)
        if (folder / f"{file}{_INDEX}").is_file():
            return _open_shards(folder, folder / f"{file}{_INDEX}", opener)
    raise CheckpointError(f"{folder} has no weights: no {_WEIGHTS} and no {_PICKLE}.")


def _open_shards(folder: pathlib.Path, index: pathlib.Path, opener: Any) -> dict[str, Stored]:
    weight_map = parse(dict[str, str], read_json(index).get("weight_map"), f"{index}: 'weight_map'")
    weights: dict[str, Stored] = {}
    for file in sorted(set(weight_map.values())):
        if pathlib.PurePath(file).name != file:
            raise CheckpointError(f"{index} names {file!r}, which is outside of its folder.")
        weights |= opener(folder / file)
    return weights


def _leaf(path: str, name: str, stored: Stored) -> Leaf:
    transposed, double = is_transposed(path), stored.dtype == np.float64

    def read() -> np.ndarray:
        array = stored.read()
        if double:
            array = array.astype(np.float32)
        return np.asarray(array.T if transposed else array, order="C")

    shape = stored.shape[::-1] if transposed else stored.shape
    return Leaf(path, name, shape, np.dtype(np.float32) if double else stored.dtype, read)


def _embedding(folder: pathlib.Path, weights: dict[str, Stored], tied: bool) -> Stored:
    """The table of both stacks, which files keep under one name or several."""
    tables = [name for name in ("shared.weight", *ALIASES) if name in weights]
    if not tables and tied and "lm_head.weight" in weights:
        tables = ["lm_head.weight"]  # a tied model saved with its output matrix alone
    if not tables:
        raise CheckpointError(f"{folder} is missing shared.weight, the embedding.")
    first, *others = tables
    for name in others:
        if not _equal(weights[first], weights[name]):
            raise CheckpointError(f"{folder}: {name} differs from {first}; a T5 has one table.")
    return weights[first]


def _head(
    folder: pathlib.Path, weights: dict[str, Stored], table: Stored, settings: _Settings
) -> dict[str, Stored]:
    """The matrix of the logits by its path, if they do not come from the embedding."""
    head = weights.get("lm_head.weight")
    if not settings.config.has_decoder:
        if head is not None:
            raise CheckpointError(f"{folder} is an encoder alone, but holds lm_head.weight.")
        return {}
    if settings.scaled_logits:
        if head is not None and not _equal(head, table):
            raise CheckpointError(
                f"{folder / CONFIG} has tie_word_embeddings, but lm_head.weight differs from the "
                "embedding. Set it to false if the model is a T5 1.1."
            )
        return {}
    if head is None and not settings.tied:
        raise CheckpointError(f"{folder} is missing lm_head.weight.")
    return {HEAD: table if head is None else head}


def _equal(one: Stored, other: Stored) -> bool:
    return one is other or one[:2] == other[:2] and np.array_equal(one.read(), other.read())


def write(path: str | os.PathLike, stream: Stream, shard_size: int = SHARD_SIZE) -> None:
    """Writes a folder that opens in transformers, atomically, one shard in memory at a time.

    Args:
      path: a new folder, or one that this function wrote, which is replaced.
      stream: a backbone with a decoder, or an encoder alone.
      shard_size: bytes of a file of weights; more of them get an index.

    Raises:
      CheckpointError: if the folder is another one, or transformers has no such T5.
    """
    config = stream.config
    if stream.dtype is None:
        config = stored_config(config, stream.source.leaves)
    content = render_config(config)
    arrays = ((name_of(path), array.T if is_transposed(path) else array) for path, array in stream)
    with atomic_folder(path, replaces=(CONFIG,), holds=_HOLDS) as draft:
        files = write_arrays(draft, "model", arrays, {"format": "pt"}, shard_size)
        if len(set(files.values())) > 1:
            index = {"metadata": {"total_size": stream.bytes}, "weight_map": files}
            write_json(draft / f"{_WEIGHTS}{_INDEX}", index)
        if stream.source.vocabulary_file is not None:
            shutil.copyfile(stream.source.vocabulary_file, draft / VOCABULARY)
        if config.has_decoder:
            tokens = {key: value for key, value in _FIXED.items() if key.endswith("_token_id")}
            write_json(draft / GENERATION, tokens)
        write_json(draft / CONFIG, content)
