"""Pickled state dicts and official plugins: read without torch to the same numbers, never run."""

import contextlib
import copyreg
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import small_t5
import torch_files
from golden_vectors import backbone, load, relative_error, under
from torch_files import WRITERS, Call, Id, Name, dumps, legacy, words

from variator_jax import VariatorModel, cli, load_official, load_plugins, save_backbone
from variator_jax.errors import CheckpointError
from variator_jax.store import Backbone
from variator_jax.store.arrays import fingerprint
from variator_jax.store.other_plugins import plugin_from_state_dict
from variator_jax.store.pickles import open_state_dict

GOLDEN = load("scale100_t5_1_0_4")
STATE = under(GOLDEN, "plugin_official/")
NAME = "plugin-t5_base-mux_4.pkl"
BIAS = "mux_layer.0.mux_layer.bias"


@pytest.fixture(scope="module")
def owner():
    # The official norm's epsilon of 1e-6 acts on a residual stream 1/100 as large: 1e-6 * 100^2.
    config, params = backbone(GOLDEN, "1_0", layer_norm_epsilon=1e-2)
    return Backbone(config, params, fingerprint(params))


def read(path):
    return {name: stored.read() for name, stored in open_state_dict(path).items()}


def refused(file, data=None):
    """The message for a file; both for `data`, as `data.pkl` in a zip file and as it is."""
    inside = ""
    if data is not None:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("plugin/data.pkl", data)
        inside = refused(file)
        file.write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        read(file)
    message = str(error.value)
    assert str(file) in message and len(message) < 600 and "Traceback" not in message
    return inside + message


class TestOfficial:
    @pytest.mark.parametrize("layout", WRITERS)
    @pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16, "float64"])
    def test_both_layouts_in_all_precisions_give_the_same_plugin(
        self, tmp_path, owner, layout, dtype
    ):
        state = {name: array.astype(dtype) for name, array in STATE.items()}
        WRITERS[layout](tmp_path / NAME, state)
        plugin = load_official(tmp_path / NAME, owner)
        config, variables = plugin_from_state_dict(state)
        assert plugin.config == config and (config.ratio, config.pool_padding) == (4, True)
        small_t5.assert_same(vars(plugin.variables), vars(variables))

    @pytest.mark.parametrize("scale", [100, 1])
    def test_convert_makes_a_folder_that_computes_what_the_official_student_computes(
        self, tmp_path, owner, scale, capsys
    ):
        save_backbone(tmp_path / "backbone", owner.config, owner.params)
        torch_files.save_zip(tmp_path / NAME, STATE)
        arguments = [tmp_path / NAME, tmp_path / "plugin", "--backbone", tmp_path / "backbone"]
        command = ["convert", "--from", "official", "--to", "variator", *map(str, arguments)]
        assert cli.main([*command, "--residual_scale", str(scale)]) == 0
        assert "compression plugin" in capsys.readouterr().out
        plugins = load_plugins(tmp_path / "plugin", owner)
        assert NAME in plugins[4].description["training"]["source"]
        model = VariatorModel(owner, plugins)
        ids = GOLDEN["input_ids"], GOLDEN["decoder_input_ids"]
        found = {"enc": model.encode(ids[0], ratio=4), "logits": model.logits(*ids, ratio=4)}
        for name, states in found.items():
            error = relative_error(states, GOLDEN[f"student.{name}"])
            assert error < 2e-5 if scale == 100 else error > 1e-3  # without it, another model

    @pytest.mark.parametrize(("change", "reason"), [
        ({"mux_layer.1.demux_adapter.w_in.bias": None}, "is missing mux_layer.1.demux_adapter"),
        ({k: None for k in STATE if ".2." in k}, "is missing .*layers_2"),
        ({"encoder.weight": np.zeros(3, "f4")}, "has unexpected encoder.weight"),
        ({BIAS: np.zeros(5, "f4")}, r"shape \(5,\) of float32; expected \(4,\)"),
        ({BIAS: np.full(4, np.nan, "f4")}, "NaN or infinite"),
    ])  # fmt: skip
    def test_what_is_not_a_plugin_for_the_backbone_is_refused(
        self, tmp_path, owner, change, reason
    ):
        state = {k: v for k, v in {**STATE, **change}.items() if v is not None}
        torch_files.save_zip(tmp_path / NAME, state)
        with pytest.raises(CheckpointError, match=f"{NAME}.*{reason}"):
            load_official(tmp_path / NAME, owner)
        with pytest.raises(CheckpointError, match="positive number"):
            load_official(tmp_path / NAME, owner, float("nan"))


def test_files_that_torch_writes_are_read_and_ours_are_files_of_torchs(tmp_path):
    torch = pytest.importorskip("torch")
    for name in WRITERS:
        WRITERS[name](tmp_path / name, STATE)
        found = torch.load(tmp_path / name, weights_only=True)
        for key, array in STATE.items():
            np.testing.assert_array_equal(found[key].numpy(), array)
    module = torch.nn.Linear(3, 5).to(torch.bfloat16)
    weight = module.weight.detach().float().numpy()
    content = {"model": module.state_dict(), "epoch": 3, "optimizer": "Adam"}
    parameters = {"weight": module.weight.T, "b": module.bias}  # one of them transposed
    for is_zip in (True, False):
        torch.save(content, tmp_path / "m.bin", _use_new_zipfile_serialization=is_zip)
        np.testing.assert_array_equal(read(tmp_path / "m.bin")["weight"], weight)
        torch.save(parameters, tmp_path / "p.bin", _use_new_zipfile_serialization=is_zip)
        np.testing.assert_array_equal(read(tmp_path / "p.bin")["weight"], weight.T)


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def _harmful(canary):
    """name -> pickle that would leave a file, the canary; the first do with Python's own reader."""
    touch = f"touch {canary}"
    text = pickle.dumps(touch, 2)[2:-1]
    system, arguments = b"cos\nsystem\n", b"(" + text + b"t"
    working = {
        "global and reduce": b"\x80\x02" + system + arguments + b"R.",
        "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + arguments + b"R.",
        "protocol 0": b"cposix\nsystem\n(S'" + touch.encode() + b"'\ntR.",
        "inst": b"(" + text + b"ios\nsystem\n.",
        "obj": b"(" + system + text + b"o.",
        "an object's reduce": pickle.dumps({"weight": _Touch(str(canary))}),
        "in a value": b"\x80\x02}X\x01\x00\x00\x00a" + system + arguments + b"Rs.",
        "a memoised name": b"\x80\x02" + system + b"q\x000h\x00" + arguments + b"R.",
        "extension registry": b"\x80\x02\x82\xf0" + arguments + b"R.",
    }
    call = Call(Name("os", "system"), touch)
    ordered_dict = Name("collections", "OrderedDict")
    state = words({"__code__": 1, "_call": 1}) + b"b."
    refused = {
        "import of a torch function": dumps(Call(Name("torch", "load"), str(canary))),
        "a dotted name": dumps(Call(Name("collections", "OrderedDict.fromkeys.__self__"), touch)),
        "storage from bytes": dumps(Call(Name("torch.storage", "_load_from_bytes"), dumps(call))),
        "a call of what was built": b"\x80\x02}" + arguments + b"R.",
        "a call of a text": b"\x80\x02" + text + arguments + b"R.",
        "a call of a dtype": dumps(Call(Name("torch", "FloatStorage"), touch)),
        "a name's attributes": b"\x80\x02" + words(ordered_dict) + state,
        "a tensor's attributes": b"\x80\x02" + words(Name("torch", "FloatStorage")) + state,
        "a text's attributes": b"\x80\x02" + text + state,
        "a persistent name": dumps({"a": Id(("module", "os", touch))}),
        "legacy": legacy({"a": call}, {}),
        "a persistent name, legacy": legacy({"a": Id(("module", touch, "x", "y", 1, None))}, {}),
        "a buffer": b"\x80\x05\x97.",
        "sets": b"\x80\x04\x8f(K\x01\x90.",
        "a byte array of an exabyte": b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b".",
    }
    return working, refused


class TestHarm:
    def test_what_would_run_something_is_refused_and_nothing_runs(self, tmp_path, monkeypatch):
        canary, file = tmp_path / "canary", tmp_path / NAME
        # What is in the registry of extensions comes without a name.
        monkeypatch.setitem(copyreg._inverted_registry, 0xF0, ("os", "system"))
        working, harmful = _harmful(canary)
        for name, data in (working | harmful).items():
            refused(file, data)
            assert not canary.exists(), name
        assert "'os.system'; nothing was run" in refused(file, working["global and reduce"])

    @pytest.mark.parametrize("name", _harmful("")[0])
    def test_the_canary_sings(self, tmp_path, monkeypatch, name):
        """A control: with Python's own reader the harm is done."""
        monkeypatch.setitem(copyreg._inverted_registry, 0xF0, ("os", "system"))
        with contextlib.suppress(pickle.UnpicklingError, TypeError):  # after it was done
            pickle.loads(_harmful(tmp_path / "canary")[0][name])
        assert (tmp_path / "canary").exists()

    def test_no_instruction_of_pickle_does_more_than_build_data(self, tmp_path):
        """Every instruction there is, on a stack with a name, a text and a tuple."""
        text = pickle.dumps(f"touch {tmp_path / 'canary'}", 2)[2:-1]
        for byte in range(256):
            data = b"\x80\x04" + text + text + b"\x85" + bytes([byte]) + b"os\nsystem\n" + text
            refused(tmp_path / NAME, data + b"R.")
            assert not (tmp_path / "canary").exists()


STORAGE = Id(("storage", Name("torch", "FloatStorage"), "0", "cpu", 6, None))


@pytest.mark.parametrize(("arguments", "reason"), [
    ((STORAGE, 1, (6,), (1,)), "exceeds its storage"),
    ((STORAGE, 1 << 60, (6,), (1,)), "proper shape"),
    ((STORAGE, 0, (1 << 40, 1 << 10), (0, 0)), "exceeds its storage"),
    ((STORAGE, 0, (6,), (-1,)), "proper shape"),
    ((STORAGE, 0, (6,), (5,)), "exceeds its storage"),
    ((STORAGE, 0, (6,), ()), "strides"),
    (("text", 0, (6,), (1,)), "no storage"),
])  # fmt: skip
def test_no_tensor_looks_outside_its_storage(tmp_path, arguments, reason):
    tensor = Call(Name("torch._utils", "_rebuild_tensor_v2"), *arguments)
    data = legacy({"a": tensor}, {"0": np.arange(6, dtype="f4")})
    assert reason in refused(tmp_path / NAME, data)


PAIRS = words([("a", 1)] * 100)
COPY = Name("collections", "OrderedDict").words + b"h\x00\x85R0"


@pytest.mark.parametrize(("data", "reason"), [
    (b"\x80\x04", "exhausted"),
    (b"hello", "KeyError"),
    (pickle.dumps([1, 2]), "a list without named tensors"),
    (pickle.dumps({"a": "b"}), "'a' is a str and not a tensor"),
    (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"abc.", "bytes"),
    (b"\x80\x02}r\xff\xff\xff\xff.", "memo is larger than the file"),
    (b"\x80\x02})" + b"2\x86" * 40 + b"K\x01s.", "tuple that is too large"),
    (dumps({1 << 20_000: "b"}), "more than 128 bits"),
    (b"\x80\x02" + PAIRS + b"q\x000" + COPY * 99 + b"N.", "copy more than the file holds"),
])  # fmt: skip
def test_pickles_that_are_broken_or_made_to_exhaust_their_reader(tmp_path, data, reason):
    assert reason in refused(tmp_path / NAME, data)


def test_damaged_layouts_have_their_reasons(tmp_path):
    file = tmp_path / NAME
    torch_files.save_zip(file, STATE, byteorder=b"big")
    assert "byte order" in refused(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("word/document.xml", "<a/>")
    assert "not one that torch.save wrote" in refused(file)
    torch_files.save_legacy(file, STATE)
    data = file.read_bytes()
    for content, reason in ((data[:-1], "cut short"), (data + b"x", "left over"), (b"", "empty")):
        file.write_bytes(content)
        assert reason in refused(file)
    assert "No such file" in refused(tmp_path / "none.pkl")


@pytest.mark.parametrize("layout", WRITERS)
def test_random_damage_is_refused_or_leaves_only_numbers(tmp_path, layout):
    """torch's older layout has no checksums: there, a flipped number is a number."""
    rng = np.random.default_rng(7)
    state = {f"layer.{i}.weight": rng.normal(size=(8, 6)).astype("f4") for i in range(4)}
    file = tmp_path / "model.bin"
    WRITERS[layout](file, state)
    data, loaded = file.read_bytes(), 0
    for _ in range(100):
        changed = bytearray(data)
        if rng.random() < 0.3:
            changed = changed[: rng.integers(0, len(data))]
        else:
            changed[rng.integers(0, len(data))] ^= 1 << int(rng.integers(0, 8))
        file.write_bytes(changed)
        try:
            found = read(file)
        except CheckpointError as error:
            assert file.name in str(error)
            continue
        loaded += 1
        assert all(isinstance(array, np.ndarray) for array in found.values())
        if layout == "zip":  # what was changed is no content, such as a file's date
            small_t5.assert_same(found, state)
    assert loaded < 100
