"""Against transformers itself: the same numbers and tokens in both directions, for every family."""

import numpy as np
import pytest
import small_t5
from hf_files import save_hf

from variator_jax.backbones.t5 import Transformer
from variator_jax.backbones.t5.decoding import greedy_decode
from variator_jax.store import load_backbone

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SHAPE = dict(vocab_size=60, d_model=16, d_kv=4, d_ff=24, num_heads=3, num_layers=2)
GENERATOR, MULTILINGUAL = "T5ForConditionalGeneration", "MT5ForConditionalGeneration"
GATED = dict(feed_forward_proj="gated-gelu", untied=True)
FAMILIES = {
    "t5_1_0": (GENERATOR, dict(feed_forward_proj="relu")),
    "t5_1_1": (GENERATOR, GATED),
    "flan": (GENERATOR, GATED | dict(layer_norm_epsilon=1e-5)),
    "mt5": (MULTILINGUAL, dict(untied=True, num_layers=3, num_decoder_layers=1)),
    "byt5": (GENERATOR, GATED | dict(num_layers=3, num_decoder_layers=1)),
    "untrained_t5_1_1": (GENERATOR, GATED | dict(untied=False, tie_word_embeddings=False)),
    "untrained_mt5": (MULTILINGUAL, {}),
    "t5_encoder": ("T5EncoderModel", dict(feed_forward_proj="relu")),
    "silu_encoder": ("T5EncoderModel", dict(feed_forward_proj="gated-silu")),
    "mt5_encoder": ("MT5EncoderModel", {}),
}
LENGTHS = (9, 6, 3)


def random_model(family):
    """A model of transformers with random weights, whose norms are not all ones."""
    name, settings = FAMILIES[family]
    settings = dict(settings)
    untied = settings.pop("untied", False)
    if untied:
        settings["tie_word_embeddings"] = False
    kind = "MT5Config" if name.startswith("MT5") else "T5Config"
    torch.manual_seed(len(family))
    model = getattr(transformers, name)(getattr(transformers, kind)(**{**SHAPE, **settings}))
    with torch.no_grad():
        if untied:  # transformers 5 ties what it makes, and keeps apart what it loads
            model.lm_head.weight = torch.nn.Parameter(torch.randn(SHAPE["vocab_size"], 16))
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """A model, and its folder as transformers saved it."""
    model, folder = random_model(request.param), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


def padded_batch():
    rng, tokens = np.random.default_rng(0), np.zeros((len(LENGTHS), max(LENGTHS)), np.int32)
    for row, length in enumerate(LENGTHS):
        tokens[row, :length] = rng.integers(2, SHAPE["vocab_size"], length)
    return tokens, rng.integers(2, SHAPE["vocab_size"], (len(LENGTHS), 5)).astype(np.int32)


def run(model):
    """Encoder states and, where there is a decoder, logits of the batch."""
    tokens, targets = (torch.tensor(x, dtype=torch.long) for x in padded_batch())
    mask = (tokens > 0).long()
    with torch.no_grad():
        states = model.get_encoder()(tokens, attention_mask=mask).last_hidden_state
        if not model.config.is_encoder_decoder:
            return (states,)
        said = model(tokens, attention_mask=mask, decoder_input_ids=targets)
    return states, said.logits


def test_what_transformers_saved_computes_the_same_here(pair):
    """Encoder states and logits within 1e-4, and the same greedy tokens."""
    model, backbone, (tokens, targets) = pair[0], load_backbone(pair[1]), padded_batch()
    module, valid = Transformer(backbone.config), tokens > 0
    # Not compiled as a whole: what is compiled bit by bit serves all families.
    variables = {"params": backbone.params}
    outputs = module.apply(variables, tokens, targets, method="forward")
    states, *logits = run(model)
    encoded = np.asarray(outputs.hidden["encoder"])[valid]
    np.testing.assert_allclose(encoded, states.numpy()[valid], atol=1e-4, rtol=0)
    assert bool(logits) == backbone.config.has_decoder
    if not logits:
        return
    np.testing.assert_allclose(np.asarray(outputs.logits), logits[0].numpy(), atol=1e-4, rtol=0)
    search = dict(do_sample=False, num_beams=1, max_new_tokens=8, decoder_start_token_id=0)
    ids, mask = (torch.tensor(x, dtype=torch.long) for x in (tokens, valid))
    with torch.no_grad():
        generated = model.generate(ids, attention_mask=mask, **search).numpy()
    ours = greedy_decode(module, backbone.params, outputs.hidden["encoder"], tokens, 8)
    theirs = np.zeros((len(LENGTHS), 8), np.int32)
    theirs[:, : generated.shape[1] - 1] = generated[:, 1:]  # after the start token
    np.testing.assert_array_equal(np.asarray(ours), theirs)
    if not torch.equal(model.lm_head.weight, model.shared.weight):  # else it repeats itself
        assert len(np.unique(theirs)) > 4


def test_what_is_saved_here_is_the_same_there(pair, tmp_path):
    model, folder = pair
    backbone = load_backbone(folder)
    save_hf(tmp_path / "ours", backbone)
    reopened = type(model).from_pretrained(tmp_path / "ours").eval()
    before, after = model.state_dict(), reopened.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name
    assert all(map(torch.equal, run(model), run(reopened)))
    small_t5.assert_same(load_backbone(tmp_path / "ours").params, backbone.params)


def test_auto_classes_and_half_precision(tmp_path):
    backbone = small_t5.backbone(small_t5.GATED, "bfloat16")
    save_hf(tmp_path / "ours", backbone)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert model.dtype == torch.bfloat16
    table = backbone.params["token_embedder"]["embedding"]
    assert np.array_equal(model.shared.weight.float().detach().numpy(), table.astype(np.float32))
