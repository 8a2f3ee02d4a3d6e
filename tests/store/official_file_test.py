"""Plugins of the official release: read in every layout, to the same results; never executed."""

import copyreg
import pickle
import struct
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
import torch_files
from golden_vectors import backbone, load, relative_error, under
from torch_files import WRITERS, Call, Id, Name, dumps, legacy

from variator_jax import VariatorModel, load_official, load_plugins, save_plugins
from variator_jax.errors import CheckpointError
from variator_jax.store.backbone_folder import Backbone
from variator_jax.store.arrays import fingerprint
from variator_jax.store.official import plugin_from_state_dict
from variator_jax.store.torch_pickle import read_state_dict

GOLDEN = load("scale100_t5_1_0_4")
STATE = under(GOLDEN, "plugin_official/")
NAME = "plugin-t5_base-mux_4.pkl"


@pytest.fixture(scope="module")
def golden_backbone():
    # The official norm's epsilon of 1e-6 acts on a residual stream 1/100 as large: 1e-6 * 100^2.
    config, params = backbone(GOLDEN, "1_0", layer_norm_epsilon=1e-2)
    return Backbone(config, params, fingerprint(params))


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_is_read_to_the_same_plugin(tmp_path, golden_backbone, layout):
    WRITERS[layout](tmp_path / NAME, STATE)
    plugin = load_official(tmp_path / NAME, golden_backbone)
    config, variables = plugin_from_state_dict(STATE)
    assert plugin.config == config
    for found, expected in zip(
        jax.tree.leaves(plugin.variables), jax.tree.leaves(variables), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_an_official_file_reproduces_the_official_student(tmp_path, golden_backbone):
    torch_files.save_zip(tmp_path / NAME, STATE)
    plugin = load_official(tmp_path / NAME, golden_backbone)
    assert (plugin.config.ratio, plugin.config.pool_padding) == (4, True)
    assert {float(a) for a in plugin.variables.output_scales.values()} == {100.0}
    model = VariatorModel(golden_backbone, plugin)
    tokens, decoder = GOLDEN["input_ids"], GOLDEN["decoder_input_ids"]
    assert relative_error(model.encode(tokens, ratio=4), GOLDEN["student.enc"]) < 2e-5
    assert relative_error(model.logits(tokens, decoder, ratio=4), GOLDEN["student.logits"]) < 2e-5
    # Without the factor it would be another model.
    other = VariatorModel(golden_backbone, load_official(tmp_path / NAME, golden_backbone, 1.0))
    assert relative_error(other.encode(tokens, ratio=4), GOLDEN["student.enc"]) > 1e-2


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_are_read_as_float32(tmp_path, golden_backbone, layout, dtype):
    WRITERS[layout](tmp_path / NAME, {name: array.astype(dtype) for name, array in STATE.items()})
    plugin = load_official(tmp_path / NAME, golden_backbone)
    kernel = plugin.variables.params["layers_1"]["compression"]["kernel"]
    expected = STATE["mux_layer.1.mux_layer.weight"].astype(dtype).astype(np.float32).T
    np.testing.assert_array_equal(kernel, expected)
    assert kernel.dtype == np.float32


def test_files_that_torch_itself_writes_are_read(tmp_path, golden_backbone):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(array.copy()) for name, array in STATE.items()}
    torch.save(state, tmp_path / "zip.pkl")
    torch.save(state, tmp_path / "legacy.pkl", _use_new_zipfile_serialization=False)
    with (tmp_path / "plain.pkl").open("wb") as file:
        pickle.dump(state, file)
    module = torch.nn.Linear(3, 5).to(torch.bfloat16)
    torch.save({"model": module.state_dict(), "epoch": 3, "optimizer": "Adam"}, tmp_path / "m.bin")
    parameters = {"a": module.weight.T, "b": module.bias}  # parameters, one of them transposed
    torch.save(parameters, tmp_path / "p.bin", _use_new_zipfile_serialization=False)
    for name in ("zip", "legacy", "plain"):
        found = read_state_dict(tmp_path / f"{name}.pkl")
        assert list(found) == list(STATE)
        for key, array in STATE.items():
            np.testing.assert_array_equal(found[key], array)
        load_official(tmp_path / f"{name}.pkl", golden_backbone)
    weight = module.weight.detach().float().numpy()
    np.testing.assert_array_equal(read_state_dict(tmp_path / "m.bin")["weight"], weight)
    np.testing.assert_array_equal(read_state_dict(tmp_path / "p.bin")["a"], weight.T)


def test_our_files_are_files_of_torchs(tmp_path):
    """A control: what the tests above write without torch, torch reads."""
    torch = pytest.importorskip("torch")
    for name in ("zip", "legacy"):
        WRITERS[name](tmp_path / name, STATE)
        found = torch.load(tmp_path / name, weights_only=True)
        for key, array in STATE.items():
            np.testing.assert_array_equal(found[key].numpy(), array)
    torch_files.save_plain_torch(tmp_path / "plain", STATE)
    with (tmp_path / "plain").open("rb") as file:
        found = pickle.load(file)
    np.testing.assert_array_equal(found["mux_layer.0.mux_layer.bias"].numpy().shape, (4,))


def test_a_read_plugin_can_be_written_and_mailed(tmp_path, golden_backbone):
    torch_files.save_zip(tmp_path / NAME, STATE)
    plugin = load_official(tmp_path / NAME, golden_backbone)
    save_plugins(tmp_path / "set", {4: plugin}, golden_backbone)
    loaded = load_plugins(tmp_path / "set", golden_backbone)[4]
    assert NAME in loaded.description["training"]["source"]
    for one, other in zip(
        jax.tree.leaves(plugin.variables), jax.tree.leaves(loaded.variables), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def _without(name):
    return {key: array for key, array in STATE.items() if key != name}


BIAS = "mux_layer.0.mux_layer.bias"


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (_without("mux_layer.1.demux_adapter.w_in.bias"), "no array 'mux_layer.1.demux_adapter"),
        ({k: v for k, v in STATE.items() if ".2." not in k}, "2 encoder layers of width 32"),
        ({k.replace(".1.", ".7."): v for k, v in STATE.items()}, "does not fit"),
        ({**STATE, "encoder.weight": np.zeros(3, "f4")}, "'encoder.weight' is not the name"),
        ({"encoder.weight": np.zeros(3, "f4")}, "No name starts with 'mux_layer.'"),
        ({**STATE, BIAS: np.zeros(5, "f4")}, r"shape \(5,\); expected \(4,\)"),
        ({**STATE, BIAS: np.zeros(4, "i8")}, "dtype int64"),
        ({**STATE, BIAS: np.full(4, np.nan, "f4")}, "NaN or infinite"),
    ],
)
def test_what_is_no_plugin_for_the_backbone_is_refused(tmp_path, golden_backbone, state, reason):
    torch_files.save_zip(tmp_path / NAME, state)
    with pytest.raises(CheckpointError, match=reason) as error:
        load_official(tmp_path / NAME, golden_backbone)
    assert NAME in str(error.value)


@pytest.mark.parametrize("scale", [0, -1.0, float("nan")])
def test_a_residual_scale_is_a_positive_number(tmp_path, golden_backbone, scale):
    torch_files.save_zip(tmp_path / NAME, STATE)
    with pytest.raises(CheckpointError, match="positive number such as 100"):
        load_official(tmp_path / NAME, golden_backbone, scale)


# Pickles that mean harm: each would leave a file behind, the canary, if it could run.


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def _harmful(canary):
    """name -> pickle; the first ones are proved to work with Python's own reader."""
    touch = f"touch {canary}"
    text = words = pickle.dumps(touch, 2)[2:-1]
    system = b"cos\nsystem\n"
    arguments = b"(" + text + b"t"
    working = {
        "global and reduce": b"\x80\x02" + system + arguments + b"R.",
        "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + arguments + b"R.",
        "protocol 0": b"cposix\nsystem\n(S'" + touch.encode() + b"'\ntR.",
        "inst": b"(" + text + b"ios\nsystem\n.",
        "obj": b"(" + system + text + b"o.",
        "an object's reduce": pickle.dumps({"weight": _Touch(str(canary))}),
        "eval": b"\x80\x02cbuiltins\neval\n(" + words + b"t0.",
        "in a value": b"\x80\x02}X\x01\x00\x00\x00a" + system + arguments + b"Rs.",
        "a memoised name": b"\x80\x02" + system + b"q\x000h\x00" + arguments + b"R.",
        "partial": dumps(Call(Name("functools", "partial"), Name("os", "system"), touch)),
        "newobj": b"\x80\x02csubprocess\nPopen\n((" + text + b"\x88\x88tt0.",
        "extension registry": b"\x80\x02\x82\xf0" + arguments + b"R.",
        "build": b"\x80\x02ccollections\nOrderedDict\n)R}X\x0a\x00\x00\x00__reduce__"
        + system + b"sb0" + system + arguments + b"R.",
    }  # fmt: skip
    call = Call(Name("os", "system"), touch)
    refused = {
        "import of a torch function": dumps(Call(Name("torch", "load"), str(canary))),
        "a dotted name": dumps(Call(Name("collections", "OrderedDict.fromkeys.__self__"), touch)),
        "numpy's loader": dumps(Call(Name("numpy", "load"), str(canary))),
        "builtins": dumps(Call(Name("builtins", "getattr"), Name("os", "x"), "system")),
        "bytes with arguments": dumps(Call(Name("builtins", "bytes"), 1 << 60)),
        "codecs": dumps(Call(Name("_codecs", "encode"), touch, "rot13")),
        "a call of what was built": b"\x80\x02}" + arguments + b"R.",
        "a call of a text": b"\x80\x02" + text + arguments + b"R.",
        "a persistent name": dumps({"a": Id(("module", "os", touch))}),
        "a persistent name, legacy": legacy({"a": Id(("module", touch, "x", "y", 1, None))}, {}),
        "legacy": legacy({"a": call}, {}),
        "nested in a storage": dumps(
            {"a": Call(Name("torch.storage", "_load_from_bytes"), dumps(call))}
        ),
        "nested twice": dumps(
            {
                "a": Call(
                    Name("torch.storage", "_load_from_bytes"),
                    dumps(Call(Name("torch.storage", "_load_from_bytes"), dumps(call))),
                )
            }
        ),
        "a buffer": b"\x80\x05\x97.",
        "sets": b"\x80\x04\x8f(K\x01\x90.",
    }
    return working, refused


def _refuses(file, data):
    file.write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        read_state_dict(file)
    assert file.name in str(error.value)
    return str(error.value)


def test_a_pickle_that_would_run_something_is_refused_and_nothing_runs(tmp_path, monkeypatch):
    canary, file = tmp_path / "canary", tmp_path / NAME
    working, refused = _harmful(canary)
    # What is in the registry of extensions comes without a name.
    monkeypatch.setitem(copyreg._inverted_registry, 0xF0, ("os", "system"))
    for name, data in (working | refused).items():
        message = _refuses(file, data)
        assert not canary.exists(), name
        assert "Traceback" not in message
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("plugin/data.pkl", data)
        _refuses(file, file.read_bytes())
        assert not canary.exists(), f"{name}, zipped"
    assert "os.system" in _refuses(file, working["global and reduce"])


@pytest.mark.parametrize(
    "name",
    ["global and reduce", "stack global", "protocol 0", "inst", "obj", "an object's reduce",
     "in a value", "a memoised name", "extension registry"],
)  # fmt: skip
def test_the_canary_sings(tmp_path, monkeypatch, name):
    """A control: with Python's own reader the harm is done."""
    monkeypatch.setitem(copyreg._inverted_registry, 0xF0, ("os", "system"))
    data = _harmful(tmp_path / "canary")[0][name]
    try:
        pickle.loads(data)
    except (pickle.UnpicklingError, TypeError):
        pass  # after it was done
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("mean", range(256))
def test_no_instruction_of_pickle_does_more_than_build_data(tmp_path, mean):
    """Every instruction there is, on a stack with a name, a text and a tuple."""
    canary = tmp_path / "canary"
    words = pickle.dumps(f"touch {canary}", 2)[2:-1]
    data = b"\x80\x04" + words + words + b"\x85" + bytes([mean]) + b"os\nsystem\n" + words + b"R."
    _refuses_or_builds(tmp_path / NAME, data)
    assert not canary.exists()


def _refuses_or_builds(file, data):
    file.write_bytes(data)
    with pytest.raises(CheckpointError):
        read_state_dict(file)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s, o, n, k: (s, 1, n, k), "exceeds its storage"),
        (lambda s, o, n, k: (s, 1 << 60, n, k), "proper shape"),
        (lambda s, o, n, k: (s, -1, n, k), "proper shape"),
        (lambda s, o, n, k: (s, o, (1 << 40, 1 << 40), (0, 0)), "exceeds its storage"),
        (lambda s, o, n, k: (s, o, n, (-1,)), "proper shape"),
        (lambda s, o, n, k: (s, o, n, (5,)), "exceeds its storage"),
        (lambda s, o, n, k: (s, o, n, ()), "strides"),
        (lambda s, o, n, k: ("text", o, n, k), "no storage"),
        (lambda s, o, n, k: (s, o), "broken pickle"),
    ],
)
def test_no_tensor_looks_outside_its_storage(tmp_path, change, reason):
    array = np.arange(6, dtype="f4")
    storage = Id(("storage", Name("torch", "FloatStorage"), "0", "cpu", 6, None))
    arguments = change(storage, 0, (6,), (1,))
    tensor = Call(Name("torch._utils", "_rebuild_tensor_v2"), *arguments)
    assert reason in _refuses(tmp_path / NAME, legacy({"a": tensor}, {"0": array}))


def test_damaged_layouts_have_their_reasons(tmp_path):
    file = tmp_path / NAME
    torch_files.save_legacy(file, STATE)
    data = file.read_bytes()
    assert "cut short" in _refuses(file, data[:-1])
    assert "left over" in _refuses(file, data + b"x")
    assert "no such file" in _reason(tmp_path / "none.pkl")
    assert "a folder" in _reason(tmp_path)
    assert "empty" in _refuses(file, b"")
    assert "broken pickle" in _refuses(file, b"\x80\x04")
    assert "broken pickle" in _refuses(file, b"hello")
    assert "no named tensors" in _refuses(file, pickle.dumps([1, 2]))
    assert "'a' is a str and no tensor" in _refuses(file, pickle.dumps({"a": "b"}))
    assert "a key without a value" in _refuses(file, b"\x80\x02}(K\x01u.")
    text = b"\x8d" + struct.pack("<Q", 1 << 62) + b"abc."  # claims to be four exabytes long
    assert "broken pickle" in _refuses(file, b"\x80\x04" + text)
    torch_files.save_zip(file, STATE, byteorder=b"big")
    assert "byte order" in _reason(file)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("plugin/data.pkl", dumps({}))
    assert "compressed" in _reason(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("word/document.xml", "<a/>")
    assert "not one that torch.save wrote" in _reason(file)


def _reason(file):
    with pytest.raises(CheckpointError) as error:
        read_state_dict(file)
    return str(error.value)
