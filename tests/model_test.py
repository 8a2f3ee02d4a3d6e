"""The library's four lines: any backbone, any plugins, every ratio, ids and texts."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_plugin
from tiny_model import BACKBONE, DECODER, ENCODER, PARAMS, PLUGINS, SHAPE, TOKENS, make_plugin

import variator_jax
from variator_jax import VariatorError, VariatorModel, load_backbone, load_plugins
from variator_jax.backbones.t5 import T5, Transformer
from variator_jax.backbones.t5.decoding import beam_decode, greedy_decode
from variator_jax.model import LENGTH_BUCKETS, SplicedModel, _bucketed
from variator_jax.plugin import PluginConfig, splice
from variator_jax.store import Plugin, save_backbone, save_plugin, save_plugins
from variator_jax.store.plugins import by_key


@pytest.fixture(scope="module")
def model():
    return VariatorModel(BACKBONE, PLUGINS)


_EVENTS = []  # JAX calls its listeners for good


def _listen(event, seconds, **kwargs):
    if "compile" in event or "trac" in event:
        _EVENTS.append(event)


@pytest.fixture
def compilations():
    """The traces and compilations of JAX since the fixture was made, of any function."""
    jax.monitoring.register_event_duration_secs_listener(_listen)
    _EVENTS.clear()
    return _EVENTS


def _plugin(**settings):
    config = PluginConfig(**settings)
    return Plugin(config, random_plugin(config, SHAPE))


def _by_hand(plugin, *tokens):
    """Encoder, or logits where decoder tokens are given, of the network itself."""
    method = "encode" if len(tokens) == 1 else "__call__"
    plugin = plugin or Plugin(PluginConfig(1), None)

    @jax.jit
    def run(variables, *tokens):
        with splice(plugin.config, variables, tokens[0] > 0):
            return Transformer(SHAPE).apply({"params": PARAMS}, *tokens, method=method)

    return np.asarray(run(plugin.variables, *tokens))


def _padded(tokens, rows=2):
    """To the buckets of these lengths and rows."""
    length = LENGTH_BUCKETS[0] - tokens.shape[1]
    return np.pad(tokens, ((0, rows - len(tokens)), (0, length)))


class TestSplicedModel:
    def test_hidden_states_have_names_and_an_encoder_alone_has_no_logits(self):
        batch = {"encoder_input_tokens": TOKENS, "decoder_input_tokens": DECODER}
        outputs = SplicedModel(T5(SHAPE)).apply(PARAMS, None, batch)
        shapes = {name: states.shape for name, states in outputs.hidden.items()}
        assert shapes == {"encoder": (2, 6, SHAPE.embed_dim), "decoder": (2, 3, SHAPE.embed_dim)}
        alone = SplicedModel(T5(ENCODER.config))
        assert list(alone.apply(ENCODER.params, None, batch).hidden) == ["encoder"]
        with pytest.raises(VariatorError, match="without a decoder has no logits"):
            alone.logits(ENCODER.params, None, batch)

    def test_an_intervention_runs_around_the_backbone_in_place_of_a_plugin(self):
        seen = []

        @contextlib.contextmanager
        def intervention(valid):
            seen.append(np.asarray(valid))
            yield

        batch = {"encoder_input_tokens": TOKENS}
        SplicedModel(T5(SHAPE), None, intervention).encode(PARAMS, None, batch)
        np.testing.assert_array_equal(seen[0], TOKENS > 0)
        with pytest.raises(VariatorError, match="a plugin or an intervention"):
            SplicedModel(T5(SHAPE), PluginConfig(2), intervention)


class TestBuckets:
    @pytest.mark.parametrize("ratio", [1, 4])
    def test_results_are_the_networks_bit_by_bit_within_a_bucket(self, model, ratio):
        plugin, states = PLUGINS.get(ratio), model.encode(TOKENS, ratio)
        assert states.shape == (2, 6, SHAPE.embed_dim)
        np.testing.assert_array_equal(states, _by_hand(plugin, _padded(TOKENS))[:, :6])
        valid = TOKENS > 0
        np.testing.assert_allclose(states[valid], _by_hand(plugin, TOKENS)[valid], atol=1e-5)
        logits = model.logits(TOKENS, DECODER, ratio)
        assert logits.shape == (2, 3, SHAPE.vocab_size) and logits.dtype == jnp.float32
        targets = np.pad(DECODER, ((0, 0), (0, 1)))  # the bucket of short targets
        np.testing.assert_array_equal(logits, _by_hand(plugin, _padded(TOKENS), targets)[:, :3])

    def test_rows_are_padded_to_a_power_of_two(self, model):
        three = np.concatenate([TOKENS, TOKENS[:1]])
        states = model.encode(three, ratio=4)
        np.testing.assert_array_equal(states, _by_hand(PLUGINS[4], _padded(three, 4))[:3, :6])

    def test_without_buckets_shapes_are_exact(self):
        exact = VariatorModel(BACKBONE, PLUGINS, buckets=None).encode(TOKENS, ratio=4)
        np.testing.assert_array_equal(exact, _by_hand(PLUGINS[4], TOKENS))

    def test_ratio_1_is_the_default_and_ratios_differ(self, model):
        states = [np.asarray(model.encode(TOKENS, ratio=r))[TOKENS > 0] for r in (1, 2, 4)]
        np.testing.assert_array_equal(model.encode(TOKENS)[TOKENS > 0], states[0])
        for one, other in zip(states, states[1:], strict=False):
            assert np.abs(one - other).max() > 1e-3

    def test_where_padding_is_pooled_the_shape_is_exact(self):
        settings = dataclasses.replace(PLUGINS[4].config, pool_padding=True)
        pooled = dataclasses.replace(PLUGINS[4], config=settings)
        states = VariatorModel(BACKBONE, pooled).encode(TOKENS, ratio=4)
        np.testing.assert_allclose(states, _by_hand(pooled, TOKENS), atol=1e-6)

    @pytest.mark.parametrize("length, bucket", [(16, 16), (17, 32), (1024, 1024), (2049, 3072)])
    def test_longer_inputs_take_the_next_bucket_or_a_multiple_of_the_last(self, length, bucket):
        assert _bucketed(np.ones((1, length), np.int32), LENGTH_BUCKETS).shape == (1, bucket)

    def test_padding_before_a_token_would_move_the_groups_and_is_refused(self, model):
        for row in ([0, 5, 6, 1], [5, 0, 6, 1]):
            model.encode([row], ratio=1)
            with pytest.raises(VariatorError, match="padding at position . of row 0, before a tok"):
                model.encode([row], ratio=4)

    @pytest.mark.parametrize("method", ["encode", "logits", "generate"])
    def test_another_length_in_the_same_bucket_compiles_nothing(self, method, compilations):
        model = VariatorModel(BACKBONE, PLUGINS[4])
        arguments = {"logits": (DECODER,), "encode": (), "generate": ()}[method]
        getattr(model, method)(TOKENS, *arguments, ratio=4)
        assert compilations
        compilations.clear()
        for tokens in (TOKENS[:, :4], _padded(TOKENS), np.full((2, 12), 7)):
            getattr(model, method)(tokens, *arguments, ratio=4)
        assert not compilations
        getattr(model, method)(np.pad(TOKENS, ((0, 0), (0, 11))), *arguments, ratio=4)
        assert compilations  # another bucket

    @pytest.mark.parametrize("buckets", [(0, 16), (16, -1)])
    def test_buckets_are_whole_numbers_and_may_be_an_array(self, buckets):
        assert VariatorModel(BACKBONE, buckets=np.arange(16, 65, 16))._buckets == [16, 32, 48, 64]
        with pytest.raises(VariatorError, match="A bucket of lengths is"):
            VariatorModel(BACKBONE, buckets=buckets)

    def test_a_call_inside_a_splice_is_refused_and_leaves_no_trace(self, model):
        tokens = np.full((1, 16), 7)  # a shape that has not run
        plugin, network = PLUGINS[2], T5(SHAPE)
        with splice(plugin.config, plugin.variables, tokens > 0, network.stack()):
            network.encode(PARAMS, tokens)
            with pytest.raises(VariatorError, match="called inside a splice"):
                model.encode(tokens)
        expected = jax.jit(network.encode)(PARAMS, tokens)
        np.testing.assert_array_equal(model.encode(tokens), expected)


class TestPlugins:
    def test_a_ratio_that_is_not_loaded_is_refused_with_the_loaded_ones(self, model):
        for ratio in (3, True, 4.0, "4"):
            with pytest.raises(VariatorError, match=r"is not loaded; expected one of \(1, 2, 4\)"):
                model.encode(TOKENS, ratio=ratio)

    def test_a_plugin_is_asked_for_by_its_name_where_several_have_its_ratio(self):
        plugins = [PLUGINS[4], _plugin(sites=("span all x4",))]
        model = VariatorModel(BACKBONE, plugins)
        assert model.ratios == (1, 4) and model.names == ("ffn_x4", "span_x4")
        alone = VariatorModel(BACKBONE, plugins[1]).encode(TOKENS, ratio=4)
        np.testing.assert_array_equal(model.encode(TOKENS, plugin="span_x4"), alone)
        with pytest.raises(VariatorError, match="have ratio 4: plugin= one of .*span_x4"):
            model.encode(TOKENS, ratio=4)
        with pytest.raises(VariatorError, match="Plugin 'spam_x4' is not loaded.* mean 'span_x4'"):
            model.encode(TOKENS, plugin="spam_x4")

    def test_two_of_the_same_kinds_and_ratio_have_names_of_their_own(self, tmp_path):
        named = _plugin(sites="span all x4 rank=2", given_name="with_adapters")
        save_plugins(tmp_path / "set", by_key([_plugin(sites="span all x4"), named]), BACKBONE)
        model = VariatorModel(BACKBONE, load_plugins(tmp_path / "set"))
        assert set(model.names) == {"with_adapters", "span_x4"}
        with pytest.raises(VariatorError, match="Two plugins are called 'fast'"):
            by_key(_plugin(ratio=ratio, given_name="fast") for ratio in (2, 4))
        one, other = (model.encode(TOKENS, plugin=name) for name in model.names)
        assert (one != other).any()

    def test_a_stranger_is_refused_with_both_fingerprints(self):
        stranger = make_plugin(4, dataclasses.replace(BACKBONE, fingerprint="f" * 64))
        with pytest.raises(VariatorError, match="plugin ffn_x4 belongs to") as error:
            VariatorModel(BACKBONE, {2: PLUGINS[2], 4: stranger})
        assert "f" * 64 in str(error.value) and BACKBONE.fingerprint in str(error.value)

    @pytest.mark.parametrize(
        ("shape", "words"),
        [({"embed_dim": 16}, "has shape"), ({"num_encoder_layers": 2}, "has unexpected")],
    )
    def test_another_shape_is_refused_even_without_a_fingerprint(self, shape, words):
        settings = PluginConfig(4, bottleneck=4)
        variables = random_plugin(settings, dataclasses.replace(SHAPE, **shape))
        with pytest.raises(VariatorError, match=words):
            VariatorModel(BACKBONE, Plugin(settings, variables))

    def test_two_of_a_ratio_and_a_wrong_key_are_refused(self):
        with pytest.raises(VariatorError, match="called 'ffn_x2': 'ffn all x2.* another name"):
            VariatorModel(BACKBONE, [PLUGINS[2], PLUGINS[2]])
        with pytest.raises(VariatorError, match="for ratio 4 has ratio 2"):
            VariatorModel(BACKBONE, {4: PLUGINS[2]})


class TestIds:
    def test_lists_of_unequal_length_are_padded(self, model):
        expected = model.encode(TOKENS, ratio=4)
        ragged = [TOKENS[0].tolist(), TOKENS[1, :3].tolist()]
        rows = (TOKENS[0].astype(np.uint8), jnp.asarray(TOKENS[1, :3]))
        for given in (ragged, rows, jnp.asarray(TOKENS)):
            np.testing.assert_array_equal(model.encode(given, ratio=4), expected)

    @pytest.mark.parametrize(("tokens", "words"), [
        ([5, 6, 1], "a batch of one is a list in it"),
        (np.array([5, 6, 1]), r"shape \(3,\); expected \[batch, length\]"),
        ([[5], []], r"shape \(0,\) in row 1"),
        ([[5, 6], [384]], "id 384 in row 1 at position 0; the vocabulary's ids are 0 to 383"),
        ([[5, -1]], "id -1 in row 0 at position 1"),
        ([[2**80]], "dtype object|not an array of token ids"),
        ([[5.0, 6.0]], "dtype float64"),
        ([[5, [6]]], "not an array of token ids"),
        (None, "dtype object"),
        (["text", [5]], "Texts are mixed with a list"),
    ])  # fmt: skip
    def test_what_is_no_batch_of_ids_is_refused_early(self, model, tokens, words):
        for call in (model.encode, lambda tokens: model.generate(tokens, ratio=2)):
            with pytest.raises(VariatorError, match=words):
                call(tokens)

    def test_the_decoders_ids_are_checked_as_well(self, model):
        with pytest.raises(VariatorError, match="decoder_token_ids holds id 999"):
            model.logits(TOKENS, [[0, 999], [0]])
        with pytest.raises(VariatorError, match="2 rows for the encoder, 1 for the decoder"):
            model.logits(TOKENS, DECODER[:1])

    def test_a_call_within_jit_is_refused_with_the_way_out(self, model):
        with pytest.raises(VariatorError, match="variator_jax.splice"):
            jax.jit(model.encode)(TOKENS)


class TestGenerate:
    @pytest.mark.parametrize("beams", [1, 2])
    def test_it_is_the_search_over_the_spliced_encoding(self, model, beams):
        generated = model.generate(TOKENS, ratio=4, max_length=5, num_beams=beams)
        encoded = _by_hand(PLUGINS[4], _padded(TOKENS))
        arguments = (Transformer(SHAPE), PARAMS, encoded, jnp.asarray(_padded(TOKENS)), 5)
        search = greedy_decode if beams == 1 else beam_decode
        expected = search(*arguments, *([] if beams == 1 else [beams]))
        assert isinstance(generated, np.ndarray) and generated.dtype == np.int32
        np.testing.assert_array_equal(generated, expected)

    def test_lengths_and_beams_are_positive_whole_numbers(self, model):
        for wrong in ({"max_length": 0}, {"num_beams": 1.5}, {"max_length": "9"}):
            with pytest.raises(VariatorError, match="expected a whole number of at least 1"):
                model.generate(TOKENS, **wrong)

    def test_an_encoder_alone_encodes_and_refuses_the_rest(self):
        plugin = make_plugin(4, ENCODER)
        model = VariatorModel(ENCODER, plugin)
        np.testing.assert_array_equal(model.encode(TOKENS), VariatorModel(BACKBONE).encode(TOKENS))
        assert model.encode(TOKENS, ratio=4).shape == (2, 6, SHAPE.embed_dim)
        for method, arguments in {"logits": (TOKENS, DECODER), "generate": (TOKENS,)}.items():
            with pytest.raises(VariatorError, match=f"without a decoder.*no {method}"):
                getattr(model, method)(*arguments)


class TestFolders:
    @pytest.fixture(scope="class")
    def places(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("places")
        save_backbone(folder / "run" / "backbone", SHAPE, PARAMS)
        ours = load_backbone(folder / "run")
        save_plugin(folder / "run" / "plugin", PLUGINS[4].config, PLUGINS[4].variables, ours)
        return folder

    def test_the_four_lines(self, places):
        backbone = variator_jax.load_backbone(places / "run")
        plugins = variator_jax.load_plugins(places / "run")
        model = variator_jax.VariatorModel(backbone, plugins)
        encoded = model.encode(TOKENS, ratio=4)
        assert model.ratios == (1, 4)
        np.testing.assert_array_equal(encoded, _by_hand(PLUGINS[4], _padded(TOKENS))[:, :6])
        assert set(variator_jax.__all__) <= set(dir(variator_jax))
        with pytest.raises(AttributeError, match="has no attribute 'load_backbon'"):
            variator_jax.load_backbon  # noqa: B018

    def test_what_is_not_a_backbone_is_refused_with_what_was_found(self, places, tmp_path):
        (tmp_path / "a.txt").write_text("")
        with pytest.raises(VariatorError, match="it holds a.txt"):
            load_backbone(tmp_path)
        with pytest.raises(VariatorError, match="holds a compression plugin and no backbone"):
            load_backbone(places / "run" / "plugin")
        with pytest.raises(VariatorError, match="variator convert --dtype"):
            load_backbone(places / "run", dtype="bfloat16")
        with pytest.raises(VariatorError, match="is not a plugin"):
            load_plugins(places / "run" / "backbone")
