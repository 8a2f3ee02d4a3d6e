import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import small_t5
import t5x_files

from variator_jax import cli
from variator_jax.errors import CheckpointError, ConfigError
from variator_jax.store import convert, dtypes, load_backbone, save_backbone, stream
from variator_jax.store.hf_folder import load_hf, save_hf
from variator_jax.store.t5x import load_t5x

LOADERS = {"hf": load_hf, "t5x": load_t5x, "variator": load_backbone}


@pytest.fixture
def backbone(tmp_path):
    vocabulary = tmp_path / "some.model"
    vocabulary.write_bytes(b"any SentencePiece model")
    return small_t5.backbone(small_t5.GATED, vocabulary_file=vocabulary)


@pytest.fixture
def sources(backbone, tmp_path):
    """The same backbone in every format."""
    save_hf(tmp_path / "hf", backbone)
    save_backbone(tmp_path / "variator", backbone.config, backbone.params, backbone.vocabulary_file)
    tree = t5x_files.t5x_tree(backbone.config, backbone.params)
    t5x_files.write_legacy(tmp_path / "t5x" / "checkpoint_5", tree)
    return {name: tmp_path / name for name in LOADERS}


@pytest.mark.parametrize("target", LOADERS)
@pytest.mark.parametrize("source", LOADERS)
def test_every_pair_of_formats_keeps_every_bit(source, target, sources, backbone, tmp_path):
    made = convert.convert(source, target, sources[source], tmp_path / "out")
    loaded = LOADERS[target](made.path)
    small_t5.assert_same(loaded.params, backbone.params)
    assert made.summary.fingerprint == loaded.fingerprint == backbone.fingerprint
    assert made.summary.bytes == sum(x.nbytes for x in small_t5.flat(backbone.params).values())
    kept = "t5x" not in (source, target)  # T5X keeps no vocabulary
    assert (loaded.vocabulary_file is not None) == kept


@pytest.mark.parametrize("target, words", [("hf", "knows one d_ff"), ("t5x", "has mlp_dim 24")])
def test_a_narrower_encoder_has_no_other_format(target, words, tmp_path):
    narrow = small_t5.backbone(dataclasses.replace(small_t5.GATED, encoder_mlp_dim=8))
    save_backbone(tmp_path / "narrow", narrow.config, narrow.params)
    with pytest.raises(CheckpointError, match=words):
        convert.convert("variator", target, tmp_path / "narrow", tmp_path / "out")
    assert not any((tmp_path / "out").rglob("*"))


@pytest.mark.parametrize("target", LOADERS)
def test_casting_on_the_way(target, sources, backbone, tmp_path):
    made = convert.convert("hf", target, sources["hf"], tmp_path / "out", dtype="bf16")
    loaded = LOADERS[target](made.path)
    assert {x.dtype.name for x in small_t5.flat(loaded.params).values()} == {"bfloat16"}
    assert loaded.config.param_dtype == made.summary.dtype == "bfloat16"
    assert loaded.fingerprint == backbone.fingerprint


def test_weights_that_leave_the_range_are_refused(sources, backbone, tmp_path):
    backbone.params["encoder"]["encoder_norm"]["scale"] = np.full(16, 1e6, np.float32)
    save_hf(tmp_path / "large", backbone)
    with pytest.raises(CheckpointError, match="final_layer_norm.weight as float16"):
        convert.convert("hf", "variator", tmp_path / "large", tmp_path / "out", dtype="f16")
    assert not any((tmp_path / "out").rglob("*"))


class TestCommand:
    def run(self, capsys, *arguments):
        code = cli.main(["convert", *map(str, arguments)])
        return code, *capsys.readouterr()

    def test_the_summary_says_what_was_made(self, capsys, sources, backbone, tmp_path):
        code, out, err = self.run(
            capsys,
            *("--from", "hf", "--to", "t5x", sources["hf"], tmp_path / "checkpoint_3"),
            *("--dtype", "bf16", "--scan"),
        )
        assert code == 0, err
        size = sum(x.nbytes for x in small_t5.flat(backbone.params).values()) // 2
        for words in (
            f"t5_1_1_custom in {tmp_path / 'checkpoint_3'}",
            f"leaves:      {len(small_t5.flat(backbone.params))}",
            f"bytes:       {size:,}",
            "dtype:       bfloat16",
            f"fingerprint: {backbone.fingerprint}",
            "seconds:",
        ):
            assert words in out
        total = len(small_t5.flat(backbone.params))
        assert f"{total} of {total} leaves" in err
        assert load_t5x(tmp_path / "checkpoint_3").fingerprint == backbone.fingerprint

    def test_without_tqdm_and_with_it(self, sources, tmp_path, monkeypatch, capsys):
        pytest.importorskip("tqdm")
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        convert.convert("hf", "variator", sources["hf"], tmp_path / "with")
        assert "100%" in capsys.readouterr().err
        monkeypatch.setitem(sys.modules, "tqdm", None)
        convert.convert("hf", "variator", sources["hf"], tmp_path / "without")
        assert "%" not in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("--from", "hff", "--to", "t5x", "hf", "out"), "Did you mean 'hf'"),
            (("--from", "hf", "--to", "official", "hf", "out"), "--to official is no format"),
            (("--from", "hf", "--to", "hf", "hf", "out", "--scan"), "--to t5x only"),
            (("--from", "hf", "--to", "hf", "hf", "out", "--dtype", "f64"), "no dtype 'f64'"),
            (("--from", "hf", "--to", "hf", "hf", "out", "--backbone", "b"), "--from official"),
            (("--from", "official", "--to", "hf", "p.pkl", "out"), "--to variator"),
            (("--from", "official", "--to", "variator", "p.pkl", "out"), "--backbone PATH"),
            (("--from", "hf", "--to", "t5x", "nowhere", "out"), "There is no folder nowhere"),
            (("--from", "t5x", "--to", "hf", "hf", "out"), "no T5X checkpoint"),
            (("--from", "hf", "--to", "hf", "gs://b/x", "out"), "only T5X"),
            (("--from", "hf", "--to", "hf", "hf", "variator"), "exists already"),
            (("--to", "hf", "hf", "out"), "--from"),
        ],
    )
    def test_slips(self, capsys, arguments, words, sources, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        code, out, err = self.run(capsys, *arguments)
        assert code == 2 and words in err and err.count("\n") == 1 and not out
        assert not any((tmp_path / "out").rglob("*"))


def test_a_source_in_memory_is_checked_too(backbone):
    params = {**backbone.params, "decoder": {}}
    with pytest.raises(CheckpointError, match="0 decoder layers"):
        memory_source("here", dataclasses.replace(backbone, params=params))
    with pytest.raises(ConfigError, match="int8"):
        dtypes.parse_dtype(np.int8)


PEAK = """
import json, pathlib, sys
import numpy as np
from flax import traverse_util
from variator_jax.backbones.t5 import T5Config, shape_params
from variator_jax.store import convert, hf_folder, stream

layers, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])

def peak():
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024

config = T5Config("wide", vocab_size=64, embed_dim=512, num_heads=8, head_dim=64, mlp_dim=4096,
                  num_encoder_layers=layers, num_decoder_layers=0)
# A source that makes its leaves when they are asked for: even writing it must not need them all.
shapes = traverse_util.flatten_dict(shape_params(config), sep="/")
leaves = [stream.Leaf(path, x.shape, np.dtype(np.float32), lambda x=x: np.ones(x.shape, np.float32),
                      path) for path, x in shapes.items()]
source = stream.checked_source("made up", config, leaves)
(folder / "hf").mkdir()
size = hf_folder.write(folder / "hf", source, shard_size=64_000_000).bytes
convert.convert("hf", "variator", folder / "hf", folder / "ours", dtype="bf16")
made = convert.convert("hf", "t5x", folder / "hf", folder / "t5x", dtype="bf16", scan=True)
convert.convert("t5x", "variator", made.path, folder / "back")
print(json.dumps([peak(), size]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_the_peak_of_memory_does_not_grow_with_the_layers(tmp_path):
    def measured(layers):
        folder = tmp_path / str(layers)
        folder.mkdir()
        command = [sys.executable, "-c", PEAK, str(layers), str(folder)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    (few, small), (many, large) = measured(2), measured(8)
    assert large - small > 150e6  # what a conversion that keeps its leaves would take
    assert many - few < 0.25 * (large - small)
