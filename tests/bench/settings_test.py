import argparse

import pytest

from variator_jax import cli
from variator_jax.bench import arguments
from variator_jax.bench.settings import BenchSettings, Shape, StepSettings
from variator_jax.errors import ConfigError


def settings_of(*argv):
    parser = argparse.ArgumentParser()
    arguments.add_arguments(parser)
    return arguments.settings_of(parser.parse_args(argv))


def test_the_defaults():
    assert settings_of() == BenchSettings(
        "t5_1_0_base", (Shape(4, 256),), (1, 2, 4, 8), "float32", 11, False, None
    )


def test_ratio_1_is_always_measured_and_first():
    assert settings_of("--ratios", "8, 2").ratios == (1, 2, 8)


def test_shapes():
    assert settings_of("--batch", "2", "--length", "96").shapes == (Shape(2, 96),)
    twice = settings_of("--shape", "4x256", "--shape", "1x512", "--shape", "4x256")
    assert twice.shapes == (Shape(4, 256), Shape(1, 512))


def test_the_step():
    assert settings_of("--train").step == StepSettings(48, 1, False)
    step = settings_of("--train", "--remat", "--microbatches", "2", "--targets", "8").step
    assert step == StepSettings(8, 2, True)
    assert settings_of("--train", "--remat", "dots").step.remat == "dots"


def test_the_backbone_is_of_the_dtype():
    config = settings_of("--dtype", "bfloat16").config
    assert (config.dtype, config.param_dtype) == ("bfloat16", "bfloat16")


@pytest.mark.parametrize(
    "argv, message",
    [
        (("--backbone", "t5_1_0_bse"), "Did you mean 't5_1_0_base'"),
        (("--dtype", "bfloat61"), "Did you mean 'bfloat16'"),
        (("--shape", "4*256"), "rows x tokens, such as 4x256"),
        (("--shape", "0x256"), "both positive"),
        (("--shape", "4x256", "--batch", "4"), "one or the other"),
        (("--ratios", "1,four"), "write them as 1,2,4,8"),
        (("--ratios", "0,2"), "positive; found"),
        (("--ratios", "1", "--train"), "2 or more among --ratios"),
        (("--rounds", "0"), "at least one round"),
        (("--remat",), "--remat is of the distillation step: add --train"),
        (("--train", "--microbatches", "0"), "--microbatches is at least 1"),
        (("--batch", "0"), "both positive"),
        (("--train", "--batch", "2", "--microbatches", "3"), "batch of 2 does not divide into --m"),
        (("--backbone", "runs/nano"), "runs/nano is a path; bench takes named shapes only"),
    ],
)
def test_refusals(argv, message):
    with pytest.raises(ConfigError, match=message):
        settings_of(*argv)


def test_the_command_line_prints_a_refusal_as_one_line(capsys):
    assert cli.main(["bench", "--backbone", "t5_base_1_0"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("variator: error: No backbone is named 't5_base_1_0'.")
    assert error.count("\n") == 1
