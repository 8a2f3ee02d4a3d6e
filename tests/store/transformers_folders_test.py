"""Folders as users have them: what transformers loads is loaded to the same, or refused by name."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import small_t5
from hf_files import LEFT_OUT, state_dict, write
from small_t5 import refused

from variator_jax.backbones.t5 import Transformer
from variator_jax.store import hugging_face, load_backbone

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GATED = state_dict(small_t5.backbone(small_t5.GATED))
PLAIN = state_dict(small_t5.backbone(small_t5.PLAIN))
TABLE = GATED["shared.weight"]
ENCODER = {k: x for k, x in GATED.items() if not k.startswith(("decoder", "lm_head"))}
NORM = "encoder.final_layer_norm.weight"
TIED = dict(feed_forward_proj="relu", tie_word_embeddings=True)
MT5 = dict(model_type="mt5", architectures=["MT5ForConditionalGeneration"])
OLD_KEYS = dict(output_past=True, n_positions=512, task_specific_params={"a": {"num_beams": 4}})


def renamed(state, old, new):
    return {new if name == old else name: x for name, x in state.items()}


def cast(dtype, state=GATED):
    return {name: x.astype(dtype) for name, x in state.items()}


def norm(dtype):
    return GATED | {NORM: np.arange(1, 17).astype(dtype)}


def folder_of(path, state, changes):
    """A folder whose vocabulary size is that of its table, as transformers requires."""
    return write(path, state, **{"vocab_size": len(TABLE), **changes})


CONFIGS = [
    (PLAIN, TIED | dict(scale_decoder_outputs=None)),
    (PLAIN, TIED | dict(scale_decoder_outputs=False)),
    (PLAIN, TIED | dict(tie_word_embeddings=LEFT_OUT)),
    (PLAIN, TIED | dict(feed_forward_proj=LEFT_OUT)),
    *((PLAIN, TIED | dict(feed_forward_proj=x)) for x in ("gelu_new", "silu", "swish")),
    (PLAIN, TIED | dict(feed_forward_proj="gelu_pytorch_tanh")),
    (PLAIN, TIED | dict(dense_act_fn="silu")),
    (PLAIN, TIED | dict(feed_forward_proj="gated-relu", is_gated_act=False)),
    (PLAIN, dict(feed_forward_proj="relu", tie_word_embeddings=True) | MT5),
    *((GATED, dict(feed_forward_proj=f"gated-{x}")) for x in ("gelu", "gelu_new", "silu", "relu")),
    (GATED, dict(feed_forward_proj="gated-gelu_pytorch_tanh")),
    (GATED, dict(dense_act_fn="gelu_new", is_gated_act=True)),
    (GATED, dict(dense_act_fn="relu")),
    (GATED, dict(feed_forward_proj="relu", is_gated_act=True)),
    (GATED, dict(eos_token_id=[1])),
    (GATED, dict(decoder_start_token_id=None)),
    (GATED, dict(d_model=LEFT_OUT, hidden_size=16)),
    (GATED, dict(d_kv=LEFT_OUT, head_dim=4)),
    (GATED, dict(d_kv=9, head_dim=4)),
    (GATED, dict(num_heads=LEFT_OUT, num_attention_heads=3)),
    (GATED, dict(num_layers=LEFT_OUT, num_hidden_layers=3)),
    (GATED, dict(num_layers=2, num_decoder_layers=LEFT_OUT, num_hidden_layers=3)),
    (GATED, dict(layer_norm_epsilon=1e-5)),
    (GATED, dict(relative_attention_num_buckets=LEFT_OUT)),
    (GATED, dict(unknown=[1], _name_or_path="/x", transformers_version="4", torch_dtype="float32")),
    (GATED, dict(architectures=LEFT_OUT)),
    (GATED, dict(architectures=["T5ForConditionalGeneration", "Other"])),
    (GATED, dict(model_type=LEFT_OUT)),
    (GATED, OLD_KEYS | dict(is_decoder=True, pruned_heads={}, tie_encoder_decoder=False)),
    (GATED, MT5),
    (GATED, MT5 | dict(tie_word_embeddings=LEFT_OUT, feed_forward_proj=LEFT_OUT)),
    (GATED, MT5 | dict(scale_decoder_outputs=True)),
    (ENCODER, dict(architectures=["T5EncoderModel"], is_encoder_decoder=False, use_cache=False)),
    (ENCODER, dict(architectures=["T5EncoderModel"], num_decoder_layers=LEFT_OUT)),
    (ENCODER, dict(architectures=["MT5EncoderModel"], model_type="mt5")),
]
NAMES = [
    (renamed(GATED, "shared.weight", "encoder.embed_tokens.weight"), {}),
    (renamed(GATED, "shared.weight", "decoder.embed_tokens.weight"), {}),
    (GATED | {name: TABLE for name in hugging_face.ALIASES}, {}),
    (GATED | {hugging_face.UNUSED: np.zeros((32, 3), np.float32)}, {}),
    (PLAIN | {"lm_head.weight": PLAIN["shared.weight"]}, TIED),
    (PLAIN | {"lm_head.weight": PLAIN["shared.weight"].astype(np.float64)}, TIED),
    (renamed(PLAIN, "shared.weight", "lm_head.weight"), TIED),
    (ENCODER | {"encoder.embed_tokens.weight": TABLE}, dict(architectures=["T5EncoderModel"])),
    *((norm(dtype), {}) for dtype in ("float64", "int64", "int32", "float16")),
    (cast("float64"), dict(dtype="float32")),
    (cast("float16"), dict(dtype="float32")),
]


def theirs(folder):
    """The model that transformers makes of a folder, from which it must miss nothing."""
    content = json.loads((folder / "config.json").read_text())
    name = (content.get("architectures") or ["T5ForConditionalGeneration"])[0]
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


@functools.cache
def network(config):
    """Our logits, or an encoder's hidden states; compiled once for folders of equal settings."""

    def outputs(params, tokens, targets):
        module, variables = Transformer(config), {"params": params}
        if not config.has_decoder:
            return module.apply(variables, tokens, method="encode")
        return module.apply(variables, tokens, targets, method="forward").logits

    return jax.jit(outputs, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads of torch take longer over arrays this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_equal_outputs(model, backbone):
    tokens, targets = np.arange(2, 9)[None], np.arange(3, 6)[None]
    found = network(dataclasses.replace(backbone.config, name=""))(backbone.params, tokens, targets)
    given = {"decoder_input_ids": torch.tensor(targets)} if backbone.config.has_decoder else {}
    with torch.no_grad():
        expected = model.float()(torch.tensor(tokens), **given)[0]
    np.testing.assert_allclose(found, expected.numpy(), atol=5e-4)


def assert_equal(folder):
    """transformers and this package read the same weights and settings, and compute the same."""
    model, backbone = theirs(folder), load_backbone(folder)
    config, ours, expected = backbone.config, state_dict(backbone), model.state_dict()
    for name, array in ours.items():
        np.testing.assert_array_equal(np.asarray(array, np.float32), expected[name].float(), name)
    used = {name for name in expected if name not in (*hugging_face.ALIASES, "lm_head.weight")}
    assert used == ours.keys() - {"lm_head.weight"}
    inner, first = torch.linspace(-3, 3, 20), config.mlp_activations[0]
    act = {"relu": torch.relu, "silu": torch.nn.functional.silu}.get(first)
    act = act or (lambda x: torch.nn.functional.gelu(x, approximate="tanh"))
    assert torch.allclose(act(inner), model.encoder.block[0].layer[1].DenseReluDense.act(inner))
    assert config.layer_norm_epsilon == model.config.layer_norm_epsilon
    assert config.num_heads == model.encoder.block[0].layer[0].SelfAttention.n_heads
    if config.has_decoder:
        scaled = type(model).__name__ not in MT5["architectures"]
        scaled = scaled and bool(model.config.scale_decoder_outputs)
        assert config.logits_via_embedding == scaled
        head = ours.get("lm_head.weight", ours["shared.weight"])
        np.testing.assert_array_equal(np.asarray(head, np.float32), model.lm_head.weight.detach())
    assert_equal_outputs(model, backbone)


@pytest.mark.parametrize(("state", "changes"), CONFIGS + NAMES)
def test_what_transformers_loads_is_loaded_to_the_same(state, changes, tmp_path):
    assert_equal(folder_of(tmp_path / "hf", state, changes))


def shards(folder, state, named, held):
    """Two files; the index names what is in `named`, the files hold what is in `held`."""
    (folder / "model.safetensors").unlink()
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, file in enumerate(files):
        part = {name: x for name, x in held.items() if len(name) % 2 == i}
        safetensors.numpy.save_file(part, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: files[len(name) % 2] for name in named}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


ALIASED = {name: TABLE for name in hugging_face.ALIASES}


@pytest.mark.parametrize(("state", "more_named", "more_held", "changes"), [
    (GATED, ALIASED, {}, {}),
    (GATED, {}, ALIASED, {}),
    (GATED, ALIASED, ALIASED, {}),
    (PLAIN, {"lm_head.weight": 0}, {}, TIED),
    (PLAIN, {}, {"lm_head.weight": PLAIN["shared.weight"]}, TIED),
    (ENCODER, {"encoder.embed_tokens.weight": 0}, {}, dict(architectures=["T5EncoderModel"])),
])  # fmt: skip
def test_shards_and_an_index_of_other_aliases(state, more_named, more_held, changes, tmp_path):
    folder = folder_of(tmp_path / "hf", state, changes)
    shards(folder, state, [*state, *more_named], {**state, **more_held})
    assert_equal(folder)


def test_expanded_and_integer_tensors_of_a_pickle(tmp_path):
    folder = folder_of(tmp_path / "hf", GATED, {})
    (folder / "model.safetensors").unlink()
    state = {name: torch.tensor(x) for name, x in GATED.items()}
    state[NORM] = torch.tensor([1.5]).expand(16)
    state["decoder.final_layer_norm.weight"] = torch.arange(16)
    state["shared.weight"] = torch.randn(1, 16).expand(len(TABLE), 16)
    torch.save(state, folder / "pytorch_model.bin")
    assert_equal(folder)


PREFIXED = {"module.": "torch's DataParallel", "base_model.model.": "PEFT.*merge_and_unload"}
PREFIXED |= {"_orig_mod.": "torch.compile", "model.": "another model"}
PREFIXED |= {"transformer.": "another model"}


def prefixed(prefix):
    return {prefix + name: x for name, x in GATED.items()}


@pytest.mark.parametrize(("state", "changes", "words"), [
    *((prefixed(x), {}, rf"the weight {x}.*'{x}'.*{y}") for x, y in PREFIXED.items()),
    (GATED | {"teacher.shared.weight": TABLE}, {}, "'teacher.'"),
    (GATED | {"shared.weight": np.array(1, np.float32)}, {}, r"has shape \(\); expected two"),
    (GATED | {"shared.weight": TABLE[0].copy()}, {}, r"has shape \(16,\); expected two axes"),
    (norm("float64") | {NORM: np.full(16, 1e300)}, {}, "encoder_norm/scale as float32 holds"),
    (norm("bool"), {}, f"{NORM} is BOOL"),
    (GATED, dict(quantization_config={"quant_method": "gptq"}), "quantization_config"),
    (GATED, dict(tie_word_embeddings=True), "lm_head.weight differs from the embedding"),
    (GATED, dict(scale_decoder_outputs=True), "lm_head.weight differs from the embedding"),
    (PLAIN, TIED | dict(MT5, model_type="t5"), "'t5' and architectures .'MT5For.*scales"),
    (PLAIN, TIED | dict(model_type="mt5"), "'mt5' and architectures .'T5For.*Correct"),
    # transformers 4 makes a random one, transformers 5 takes the embedding.
    (PLAIN, TIED | dict(tie_word_embeddings=False), "is missing decoder/logits_dense"),
    (PLAIN, TIED | dict(dense_act_fn="gelu"), "dense_act_fn 'gelu'"),
    (PLAIN, TIED | dict(is_gated_act=True), "is missing .*wi_0"),
    (GATED, dict(is_gated_act=False), "is missing .*wi/kernel"),
    (GATED, dict(hidden_size=17), "expected .*17"),
    (GATED, dict(num_hidden_layers=4), "is missing encoder/layers_3"),
    (GATED, dict(num_layers=LEFT_OUT, num_decoder_layers=LEFT_OUT, num_hidden_layers=3),
     "is missing decoder/layers_"),
    *((PLAIN, TIED | dict(feed_forward_proj=x), x) for x in ("tanh", "linear")),
])  # fmt: skip
def test_the_rest_is_refused_by_name(state, changes, words, tmp_path):
    refused(folder_of(tmp_path / "hf", state, changes), words)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "spiece.model"])
def test_a_git_lfs_pointer_is_named(name, tmp_path):
    folder = folder_of(tmp_path / "hf", GATED, {})
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4c2b' * 16}\nsize 9\n"
    (folder / name).write_text(pointer)
    refused(folder, rf"{name} is a git-lfs pointer.*git lfs pull")
