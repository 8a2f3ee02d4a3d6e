"""The plugin against the official classes, and a whole T5 student against the official model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import backbone, load, relative_error, under

from variator_jax.backbones.t5 import T5
from variator_jax.model import SplicedModel
from variator_jax.plugin import PluginVariables
from variator_jax.plugin.compression import compress, decompress
from variator_jax.plugin.groups import to_groups
from variator_jax.store.other_plugins import plugin_from_state_dict
from variator_jax.train.losses import cross_entropy, hidden_mse

TOLERANCE = 2e-5


@pytest.mark.parametrize("name", ["plugin_11_2_d32_b16", "plugin_11_4_d32_b64"])
def test_compression_and_decompression_match_the_official_layer(name):
    golden = load(name)
    state = {f"mux_layer.0.{k}": v for k, v in golden.items() if k[0] in "md" and "." in k}
    config, plugin = plugin_from_state_dict(state, output_scale=1.0)
    arrays = plugin.params["encoder/layers_0/mlp"]
    x = to_groups(jnp.asarray(golden["x"]), config.ratio)
    members = jnp.ones(x.shape[:3], bool)

    merged = compress(arrays["compression"], x, members)
    assert relative_error(merged, golden["mux_out"]) < TOLERANCE

    ffn_out = jnp.asarray(golden["ffn_out"])
    z = decompress(arrays["decompression"], ffn_out, x, jnp.float32(1.0))
    assert relative_error(z.reshape(golden["demux_out"].shape), golden["demux_out"]) < TOLERANCE


def _run(config, params, plugin_config, plugin, inputs):
    ids = {"encoder": inputs["input_ids"], "decoder": inputs["decoder_input_ids"]}
    batch = {f"{stack}_input_tokens": jnp.asarray(tokens) for stack, tokens in ids.items()}
    return SplicedModel(T5(config), plugin_config).apply(params, plugin, batch)


def _official_loss(student, teacher, inputs):
    """The official mean counts padding, ours does not: rescale the sums by its count."""
    masks = {"encoder": "attention_mask", "decoder": "decoder_attention_mask"}
    return [
        hidden_mse(student.hidden[stack], teacher.hidden[stack], inputs[mask])[0]
        / student.hidden[stack].size
        for stack, mask in masks.items()
    ]


@pytest.mark.parametrize("version", ["1_0", "1_1"])
@pytest.mark.parametrize("batch,outputs", [("full/", "full/"), ("pad/", "pad/official/")])
def test_t5_student_losses_and_gradients_match_the_official_model(version, batch, outputs):
    golden = load(f"t5_t5_{version}_4")
    config, params = backbone(golden, version)
    plugin_config, plugin = plugin_from_state_dict(under(golden, "plugin/"), output_scale=1.0)
    inputs, expected = under(golden, batch), under(golden, outputs)
    valid = dict.fromkeys(("dec", "logits"), inputs["decoder_attention_mask"] > 0)
    valid |= {"enc": inputs["attention_mask"] > 0}

    def loss_fn(trained):
        variables = PluginVariables(trained, plugin.output_scales)
        student = _run(config, params, plugin_config, variables, inputs)
        encoder, decoder = _official_loss(student, teacher, inputs)
        return encoder + decoder, (student, encoder, decoder)

    teacher = jax.jit(lambda: _run(config, params, None, None, inputs))()
    grads, (student, encoder, decoder) = jax.jit(jax.grad(loss_fn, has_aux=True))(plugin.params)
    for name, run in [("teacher", teacher), ("student", student)]:
        hidden = {"enc": run.hidden["encoder"], "dec": run.hidden["decoder"]}
        for part, found in [*hidden.items(), ("logits", run.logits)]:
            at = valid[part]
            error = relative_error(np.asarray(found)[at], expected[f"{name}.{part}"][at])
            assert error < TOLERANCE, (name, part)
    assert relative_error(encoder, expected["loss.enc_mse"]) < TOLERANCE
    assert relative_error(decoder, expected["loss.dec_mse"]) < TOLERANCE

    labels = inputs["labels"]
    total, count = cross_entropy(student.logits, np.maximum(labels, 0), labels >= 0)
    assert relative_error(total / count, expected["loss.task_ce"]) < TOLERANCE

    _, official_grads = plugin_from_state_dict(under(expected, "grad."))
    errors = jax.tree.map(relative_error, grads, official_grads.params)
    assert all(error < TOLERANCE for error in jax.tree.leaves(errors))


def test_the_official_scale_is_an_output_scale_of_100():
    golden = load("scale100_t5_1_0_4")
    # The official norm's epsilon of 1e-6 acts on a residual stream 1/100 as large: 1e-6 * 100^2.
    config, params = backbone(golden, "1_0", layer_norm_epsilon=1e-2)
    plugin_config, plugin = plugin_from_state_dict(under(golden, "plugin_official/"))
    student = jax.jit(lambda: _run(config, params, plugin_config, plugin, golden))()
    assert relative_error(student.hidden["encoder"], golden["student.enc"]) < TOLERANCE
    assert relative_error(student.hidden["decoder"], golden["student.dec"]) < TOLERANCE
    assert relative_error(student.logits, golden["student.logits"]) < TOLERANCE
