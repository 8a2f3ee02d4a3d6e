import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from variator_jax.backbones.t5 import get_config, shape_params
from variator_jax.backbones.t5.cost import backbone_parameters, encoder_flops
from variator_jax.errors import ConfigError
from variator_jax.plugin import PluginConfig
from variator_jax.train.plan import plan
from variator_jax.train.student import narrowed, student_leaves, student_mlp_dim

BASE = get_config("t5_1_0_base")


@given(
    name=st.sampled_from(["nano", "micro", "t5_1_0_base", "t5_1_1_large"]),
    length=st.integers(16, 512),
    ratio=st.sampled_from([2, 4, 8]),
    bottleneck=st.sampled_from([8, 64]),
)
def test_a_student_costs_no_more_than_the_plugin_and_hardly_less(name, length, ratio, bottleneck):
    config, plugin = get_config(name), PluginConfig(ratio, bottleneck)
    width = student_mlp_dim(config, length, plugin)
    most = encoder_flops(config, length, ratio, plugin)
    assert encoder_flops(narrowed(config, width), length, 1) <= most
    more = (width // 8 + 1) * 8
    assert encoder_flops(narrowed(config, more), length, 1) > most or more > config.mlp_dim


def test_the_width_at_t5_base():
    # A quarter of the width is 768, and the plugin's own products pay for 74.5 neurons more.
    assert student_mlp_dim(BASE, 256, PluginConfig(4)) == 840
    assert student_mlp_dim(BASE, 256, PluginConfig(4, layers=(0, 1, 2))) > 2000


def test_a_plugin_that_costs_more_than_it_saves_has_the_teacher_as_student():
    config = get_config("nano")
    assert student_mlp_dim(config, 64, PluginConfig(2, bottleneck=4096)) == config.mlp_dim
    assert narrowed(config, config.mlp_dim) is config


def test_no_student_is_smaller_than_one_neuron():
    tiny = get_config("nano", mlp_dim=1)
    with pytest.raises(ConfigError, match="less than one neuron"):
        student_mlp_dim(tiny, 64, PluginConfig(4, compression="mean", decompression="repeat"))


def test_a_narrow_encoder_has_its_own_width_and_name_and_the_decoder_keeps_its():
    student = narrowed(BASE, 840)
    assert (student.name, student.encoder_mlp, student.mlp_dim) == ("t5_1_0_base_ffn840", 840, 3072)
    shapes = shape_params(student)
    assert shapes["encoder"]["layers_3"]["mlp"]["wi"]["kernel"].shape == (768, 840)
    assert shapes["encoder"]["layers_3"]["mlp"]["wo"]["kernel"].shape == (840, 768)
    assert shapes["decoder"]["layers_3"]["mlp"]["wi"]["kernel"].shape == (768, 3072)
    assert backbone_parameters(student) == sum(x.size for x in jax.tree.leaves(shapes))
    with pytest.raises(ConfigError, match="encoder_mlp_dim is 0"):
        get_config("nano", encoder_mlp_dim=0)


def test_a_student_trains_its_encoder_without_the_norms():
    leaves = student_leaves(shape_params(BASE))
    assert len(leaves) == 12 * (4 + 2) + 1  # kernels of attention and FFN, and the position bias
    assert all(path.startswith("encoder/") and "norm" not in path for path in leaves)


def test_a_dry_run_tells_what_a_student_needs():
    lengths = {"inputs": 256, "targets": 8}
    told = plan(backbone=BASE, plugin=PluginConfig(4), feature_lengths=lengths, trained="student")
    own = student_leaves(shape_params(narrowed(BASE, 840)))
    assert {part.name: part.numbers for part in told.parts} == {
        "backbone": backbone_parameters(BASE),
        "student": sum(x.size for x in own.values()),
    }
