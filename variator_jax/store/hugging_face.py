"""Hugging Face folders of T5, Flan-T5, mT5 and ByT5: names, settings, reading, writing.

Nothing here needs transformers or torch.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from variator_jax.backbones.t5 import T5Config
from variator_jax.backbones.t5.attention import MAX_DISTANCE, NUM_BUCKETS
from variator_jax.backbones.t5.config import with_name
from variator_jax.errors import CheckpointError
from variator_jax.files import AnyPath, atomic_folder, check_folder, wrap_errors, write_json
from variator_jax.hf_tokenizer import FILES, find_vocabulary
from variator_jax.store import arrays, backbone
from variator_jax.store.description import parse, read_json
from variator_jax.store.pickles import open_state_dict

CONFIG, GENERATION = "config.json", "generation_config.json"
_WEIGHTS, _PICKLE, _INDEX = "model.safetensors", "pytorch_model.bin", ".index.json"
_WRAPPERS = {"module.": "torch's DataParallel", "base_model.model.": "PEFT"}
_WRAPPERS["_orig_mod."] = "torch.compile"
_OWN = r"generation_config\.json|model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
_HOLDS = "|".join([_OWN, *map(re.escape, FILES)])

EMBEDDING, HEAD = "shared.weight", "lm_head.weight"
# The embedding under other names, written by some versions of transformers.
ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# The released T5 1.0 files hold a bias of the cross-attention that no version ever used.
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
_BIAS = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
_TOP = {
    "token_embedder/embedding": EMBEDDING,
    "decoder/logits_dense/kernel": HEAD,
    "encoder/encoder_norm/scale": "encoder.final_layer_norm.weight",
    "decoder/decoder_norm/scale": "decoder.final_layer_norm.weight",
    "encoder/relpos_bias/rel_embedding": f"encoder.{_BIAS}",
    "decoder/relpos_bias/rel_embedding": f"decoder.{_BIAS}",
}
_MODULES = {
    "encoder": {
        "pre_attention_layer_norm": "0.layer_norm",
        "attention": "0.SelfAttention",
        "pre_mlp_layer_norm": "1.layer_norm",
        "mlp": "1.DenseReluDense",
    },
    "decoder": {
        "pre_self_attention_layer_norm": "0.layer_norm",
        "self_attention": "0.SelfAttention",
        "pre_cross_attention_layer_norm": "1.layer_norm",
        "encoder_decoder_attention": "1.EncDecAttention",
        "pre_mlp_layer_norm": "2.layer_norm",
        "mlp": "2.DenseReluDense",
    },
}
_WEIGHT_NAMES = {"query": "q", "key": "k", "value": "v", "out": "o"}


def name_of(path: str) -> str:
    """The Hugging Face name of one of our paths, such as encoder/layers_0/mlp/wo/kernel."""
    if path in _TOP:
        return _TOP[path]
    stack, layer, module, *inner, _ = path.split("/")
    names = [_MODULES[stack][module], *(_WEIGHT_NAMES.get(x, x) for x in inner), "weight"]
    return f"{stack}.block.{layer.removeprefix('layers_')}.layer.{'.'.join(names)}"


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
_SIZES = {
    "embed_dim": "d_model",
    "num_heads": "num_heads",
    "head_dim": "d_kv",
    "mlp_dim": "d_ff",
    "num_encoder_layers": "num_layers",
    "num_decoder_layers": "num_decoder_layers",
}
_FIXED = {  # data and decoding have the token ids built in
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": NUM_BUCKETS,
    "relative_attention_max_distance": MAX_DISTANCE,
}


def parse_config(file: str, content: Mapping[str, Any], vocab_size: int) -> T5Config:
    """Reads a config as transformers does.

    Args:
      file: the file, for messages.
      content: the parsed JSON.
      vocab_size: rows of the embedding; configs of resized models may have another number.

    Returns:
      The shape. `logits_via_embedding` is set where logits are scaled by 1 / sqrt(embed), as in
      T5 1.0.

    Raises:
      CheckpointError: for another model than a T5, or settings that this network does not have.
    """
    named = content.get("architectures") or [None]
    if not isinstance(named, list) or named[0] not in (None, *_ARCHITECTURES):
        raise CheckpointError(f"{file} has architectures {named!r}; expected a T5 or its encoder.")
    family = "mt5" if str(named[0]).startswith("MT5") else "t5"
    kind = content.get("model_type", family)
    if kind not in _DEFAULTS:
        raise CheckpointError(f"{file} describes a {kind!r} model; expected 't5' or 'mt5'.")
    settings = {"d_model": 512, "d_kv": 64, "layer_norm_epsilon": 1e-6, **_DEFAULTS[kind]}
    settings |= content
    for key, expected in (_FIXED | {"quantization_config": None}).items():
        if settings.get(key) not in (None, expected, [expected]):
            raise CheckpointError(f"{file} has {key} {settings[key]!r}; expected {expected}.")
    if settings.get("num_decoder_layers") is None:
        settings["num_decoder_layers"] = settings["num_layers"]
    # transformers sets synonyms last: they win, and the decoder's default depth ignores them.
    settings |= {ours: content[theirs] for ours, theirs in _SYNONYMS.items() if theirs in content}
    if named[0] in _ENCODERS:
        settings["num_decoder_layers"] = 0
    # transformers 5 calls every config tied and keeps the scaling apart; it never scales an mT5.
    scaled = bool(content.get("scale_decoder_outputs", is_tied(content)))
    if scaled and named[0] and kind != family and named[0] not in _ENCODERS:
        hint = "a T5 scales its logits, an mT5 does not. Correct the one that is wrong"
        raise CheckpointError(f"{file} has model_type {kind!r} and architectures {named}; {hint}.")
    scaled = scaled and kind == "t5"
    sizes = {x: parse(int, settings[key], f"{file}: {key!r}") for x, key in _SIZES.items()}
    with wrap_errors(f"{file} is not usable"):
        config = T5Config(
            name="t5",
            vocab_size=vocab_size,
            **sizes,
            mlp_activations=_activations(file, settings),
            logits_via_embedding=scaled,
            layer_norm_epsilon=parse(float, settings["layer_norm_epsilon"], f"{file}: epsilon"),
        )
    hint = f"{kind if kind == 'mt5' else ''} {content.get('_name_or_path', '')}"
    return with_name(config, hint)


def is_tied(content: Mapping[str, Any]) -> bool:
    """Whether a missing output matrix is the embedding."""
    return content.get("tie_word_embeddings") is not False


def _activations(file: str, settings: Mapping[str, Any]) -> tuple[str, ...]:
    named, override = settings["feed_forward_proj"], settings.get("dense_act_fn")
    match = re.fullmatch(r"(gated-)?(\w+)", str(named))
    act = override or ("gelu_new" if named == "gated-gelu" else match and match[2])
    if match is None or act not in _ACTIVATIONS:
        raise CheckpointError(
            f"{file} has feed_forward_proj {named!r} with dense_act_fn {override!r}; known are "
            "relu, gelu_new, silu and gated-* of them."
        )
    gated = settings.get("is_gated_act", match[1])
    return (_ACTIVATIONS[act], "linear") if gated else (_ACTIVATIONS[act],)


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
        **{theirs: getattr(config, ours) for ours, theirs in _SIZES.items()},
        "d_ff": config.encoder_mlp,
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


def open_hf(path: AnyPath) -> backbone.Source:
    """The leaves of a folder of a T5, Flan-T5, mT5 or ByT5, with a decoder or without.

    Args:
      path: a folder with `config.json` and `model.safetensors` or `pytorch_model.bin`, whole or in
        shards with an index.

    Raises:
      CheckpointError: if anything is missing, damaged or not a T5 of this network; also for names
        with a prefix, and for pointers of git-lfs.
    """
    folder = check_folder(path)
    content, weights = read_json(folder / CONFIG), _open_weights(folder)
    _check_prefix(folder, weights)
    weights.pop(UNUSED, None)
    tables = {name: weights.pop(name) for name in (EMBEDDING, *ALIASES) if name in weights}
    head = weights.get(HEAD)
    if not tables and is_tied(content) and head is not None:
        tables[HEAD] = head  # a tied model saved with its output matrix alone
    if not tables:
        raise CheckpointError(f"{folder} is missing {EMBEDDING}, the embedding.")
    table = next(iter(tables.values()))
    shape = table.shape
    if len(shape) != 2:
        raise CheckpointError(f"{folder}: the embedding has shape {shape}; expected two axes.")
    config = parse_config(str(folder / CONFIG), content, shape[0])
    if config.has_decoder and config.logits_via_embedding and head is not None:
        tables[HEAD] = weights.pop(HEAD)
    elif config.has_decoder and not config.logits_via_embedding and is_tied(content):
        weights.setdefault(HEAD, table)
    for name, other in tables.items():
        if other is not table and not np.array_equal(table.read(), other.read()):
            hint = "a T5 1.1 has tie_word_embeddings false in its config.json"
            raise CheckpointError(f"{folder}: {name} differs from the embedding; {hint}.")
    shapes = backbone.leaf_shapes(folder, config, len(weights) + 1)
    paths = {name_of(path): path for path in shapes}
    stored = {paths.get(name, name): x for name, x in {EMBEDDING: table, **weights}.items()}
    leaves = {path: _leaf(folder, path, array) for path, array in stored.items()}
    vocabulary = find_vocabulary(folder)
    if vocabulary is not None:
        arrays.check_downloaded(vocabulary)
    return backbone.make_source(folder, backbone.stored_config(config, leaves), leaves, vocabulary)


def _open_weights(folder: pathlib.Path) -> dict[str, arrays.Stored]:
    """Every weight of a folder, by name: safetensors before pickles, one file before shards."""
    for file, opener in ((_WEIGHTS, arrays.open_arrays), (_PICKLE, open_state_dict)):
        if (folder / file).is_file():
            return opener(folder / file)
        index = folder / f"{file}{_INDEX}"
        if not index.is_file():
            continue
        named = parse(dict[str, str], read_json(index).get("weight_map"), f"{index}: 'weight_map'")
        weights: dict[str, arrays.Stored] = {}
        for name in sorted(set(named.values())):
            if pathlib.PurePath(name).name != name:
                raise CheckpointError(f"{index} names {name!r}, which is outside of its folder.")
            weights |= opener(folder / name)
        return weights
    raise CheckpointError(f"{folder} has no weights: no {_WEIGHTS} and no {_PICKLE}.")


def _check_prefix(folder: pathlib.Path, weights: Mapping[str, arrays.Stored]) -> None:
    """Refuses the names of a T5 inside of another module."""
    for name in weights:
        match = re.match(r"(.+?\.)??(shared|encoder|decoder|lm_head)\.", name)
        if match and match[1]:
            wrapper = _WRAPPERS.get(match[1], "another model")
            raise CheckpointError(
                f"{folder} has the weight {name}: {match[1]!r} before a T5's name is of {wrapper}. "
                "Save the T5 inside of it with save_pretrained, for PEFT after merge_and_unload(), "
                "or remove the prefix from the names."
            )


def _leaf(folder: pathlib.Path, path: str, stored: arrays.Stored) -> arrays.Stored:
    """One of our leaves, which reads the array that transformers keeps."""
    transposed = is_transposed(path)
    # transformers casts these, too.
    dtype = np.dtype("f4") if stored.dtype.name in ("float64", "int64", "int32") else stored.dtype

    def read() -> np.ndarray:
        array = arrays.cast(f"{folder}: {path}", stored.read(), dtype)
        return np.asarray(array.T if transposed else array, order="C")

    return arrays.Stored(stored.shape[::-1] if transposed else stored.shape, dtype, read)


def write(path: AnyPath, stream: backbone.Stream, shard_size: int = arrays.SHARD_SIZE) -> None:
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
        config = backbone.stored_config(config, stream.source.leaves)
    content = render_config(config)
    named = ((name_of(path), array.T if is_transposed(path) else array) for path, array in stream)
    with atomic_folder(path, replaces=(CONFIG,), holds=_HOLDS) as draft:
        files = arrays.write_arrays(draft, "model", named, {"format": "pt"}, shard_size)
        if len(set(files.values())) > 1:
            index = {"metadata": {"total_size": stream.bytes}, "weight_map": files}
            write_json(draft / f"{_WEIGHTS}{_INDEX}", index)
        backbone.copy_vocabulary(stream.source.vocabulary_file, draft)
        if config.has_decoder:
            tokens = {key: value for key, value in _FIXED.items() if key.endswith("_token_id")}
            write_json(draft / GENERATION, tokens)
        write_json(draft / CONFIG, content)
