"""How a T5X run starts, steps and reads its batches.

Frozen leaves are verified, the plugin is calibrated, and averages are exact. The batches are those
of the built-in engine, in the same order, exactly resumed.
"""

import contextlib
import functools
import itertools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu.data import dataset_iterator
from flax import traverse_util
from t5x import checkpoints, utils
from t5x import trainer as t5x_trainer
from tensorflow.io import gfile

from variator_jax.backbones.base import Mask
from variator_jax.data.batches import batches
from variator_jax.errors import CheckpointError, ConfigError
from variator_jax.files import is_url, lock_folder
from variator_jax.plugin import PluginConfig, calibrate, site_output_rms
from variator_jax.t5x_engine.checks import record_run
from variator_jax.t5x_engine.model import DistillationModel
from variator_jax.t5x_engine.network import PLUGIN, from_tree, to_tree
from variator_jax.t5x_engine.partitioning import axes_leaves
from variator_jax.train.checks import check_packing


class PluginInitializer(utils.TrainStateInitializer):
    """Makes what a checkpoint of a backbone lacks: the plugin and the optimizer's state.

    Modifications to the host: the backbone's leaves are not initialised but left as NaN that takes
    no memory. T5X falls back on them for every leaf that it does not find; random weights would
    hide a missing leaf, and double the memory at the start.
    """

    def from_scratch(self, init_rng: jax.Array) -> Any:
        """A train state whose plugin is real and whose backbone is not a number."""
        shapes = self.global_train_state_shape
        real = jax.tree_util.tree_map_with_path(lambda path, _: not _is_backbone(path), shapes)

        def kept(leaves: list[Any]) -> list[Any]:
            return list(itertools.compress(leaves, jax.tree.leaves(real)))

        initialize = self._partitioner.partition(
            lambda rng: kept(jax.tree.leaves(self._initialize_train_state(rng))),
            in_axis_resources=None,
            out_axis_resources=kept(axes_leaves(self.train_state_axes)),
        )
        made = iter(initialize(init_rng))
        nan = lambda x: np.broadcast_to(np.asarray(np.nan, x.dtype), x.shape)  # noqa: E731
        return jax.tree.map(lambda x, keep: next(made) if keep else nan(x), shapes, real)


class PluginTrainer(t5x_trainer.Trainer):
    """T5X's trainer for a `DistillationModel`.

    Modifications to the host:
      A fresh run's backbone is checked leaf by leaf, and its plugin calibrated on the first batch.
      A microbatch's loss is divided by the whole batch's weights, for T5X adds gradients up.
      The plugin's settings are written next to the checkpoints.
    """

    def __init__(
        self,
        model: DistillationModel,
        train_state: Any,
        *,
        training: Mapping[str, Any] | None = None,
        initial_checkpoint_path: str | None = None,
        **kwargs: Any,
    ) -> None:
        """As T5X's; `training` and `initial_checkpoint_path` are for the record of the run."""
        super().__init__(model=model, train_state=train_state, **kwargs)
        self._calibrated, self._writer = True, contextlib.ExitStack()
        if train_state is None:  # T5X's evaluation sets it later.
            return
        if int(utils.get_local_data(train_state.step)) == 0:
            verify(train_state.params)
            self._calibrated = model.start.loaded is not None
        if (folder := kwargs.get("summary_dir")) and jax.process_index() == 0:
            if not is_url(folder):
                self._writer.enter_context(lock_folder(pathlib.Path(folder)))
            record_run(folder, model, training or {}, initial_checkpoint_path)

    def close(self) -> None:
        """As T5X's, and lets another run write the folder."""
        super().close()
        self._writer.close()

    def train(
        self, batch_iter: Iterator[Any], num_steps: int, start_step: int | None = None
    ) -> Any:
        """T5X's loop; before the first step of all, the output scales are measured."""
        if not self._calibrated:
            self._calibrate(batch_iter.peek())  # type: ignore[attr-defined]
            self._calibrated = True
        return super().train(batch_iter, num_steps, start_step)

    def _calibrate(self, batch: Mapping[str, jax.Array]) -> None:
        model, state = self._model, self.train_state  # type: ignore[has-type]
        config = model.start.plugin

        def measure(params: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
            mask = Mask(batch["encoder_input_tokens"] > 0)
            forward = functools.partial(model.outputs, params, batch, compressed=False)
            return site_output_rms(forward, config, model.module.stack, mask)

        axes = (self._train_state_axes.params, self._partitioner.data_partition_spec)
        compiled = self._partitioner.partition(measure, axes, None)
        plugin = calibrate(from_tree(state.params[PLUGIN]), compiled(state.params, batch))
        self.train_state = state.replace_params(state.params.copy({PLUGIN: to_tree(plugin)}))

    @functools.cached_property
    def _partitioned_train_step(self) -> Any:
        def train_step(train_state: Any, batch: Any) -> Any:
            return t5x_trainer.train_with_lr(
                train_state,
                batch,
                learning_rate=self._learning_rate_fn(train_state.step),
                dropout_rng=self._get_step_rng(train_state.step),
                model=self._model.for_batch(batch),
                num_microbatches=self._num_microbatches,
                weight_metrics_computer=self._weight_metrics_computer,
                data_partition_spec=self._partitioner.data_partition_spec,
            )

        return self._partitioner.partition(
            train_step,
            in_axis_resources=(self._train_state_axes, self._partitioner.data_partition_spec),
            out_axis_resources=(self._train_state_axes, None),
            donate_argnums=(0,),
        )


def verify(params: Any) -> None:
    """Looks at every leaf of a state that was just restored.

    Raises:
      CheckpointError: naming leaves that the checkpoint did not fill, or filled with NaN or
        infinity; or a plugin that is not float32.
    """
    finite = jax.jit(lambda tree: jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), tree))(params)
    leaves = traverse_util.flatten_dict(finite, sep="/")
    bad = [name for name, good in leaves.items() if not bool(utils.get_local_data(good))]
    if bad:
        raise CheckpointError(
            f"INITIAL_CHECKPOINT_PATH left {len(bad)} of {len(leaves)} leaves without finite "
            f"values, such as {bad[0]}. It is a checkpoint of another network, or damaged."
        )
    for name, leaf in traverse_util.flatten_dict(params.get(PLUGIN, {}), sep="/").items():
        if leaf.dtype != jnp.float32:
            raise CheckpointError(f"The plugin's {name} is {leaf.dtype}; plugins are float32.")


def _is_backbone(path: tuple[Any, ...]) -> bool:
    """Whether a path of a train state leads to a parameter that is not the plugin's."""
    # T5X's train state holds them in its optimizer's `target`, its inference state in `params`.
    names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
    return (names[0] == "params" or "target" in names[:2]) and PLUGIN not in names


Batch = Mapping[str, np.ndarray]


def get_dataset(
    cfg: utils.DatasetConfig,
    shard_id: int,
    num_shards: int,
    *t5x_arguments: Any,
    model_dir: str,
    seed: int = 0,
    plugin: PluginConfig | None = None,
    pack_multiple: int = 1,
    **t5x_options: Any,
) -> "BatchIterator":
    """T5X's `get_dataset_fn` over the built-in engine's batches, which never end.

    A resumed run continues at its latest checkpoint without any saved iterator: the order depends
    on the seed alone, and neither on the process nor on the number of hosts.

    Args:
      cfg: T5X's settings.
      shard_id: which part of each batch this host feeds.
      num_shards: of how many.
      *t5x_arguments: T5X's other arguments, which are ignored.
      model_dir: the folder of the run's checkpoints.
      seed: of the order, and of span corruption.
      plugin: the plugin's settings.
      pack_multiple: packed examples start on multiples of it; itself one of every site's ratio.
      **t5x_options: T5X's other options, which are ignored.

    Raises:
      ConfigError: for settings that these batches do not have.
      DataError: for an unknown task, or one without examples.
    """
    if cfg.pack:
        check_packing(pack_multiple, plugin.period if plugin else 1)
    if cfg.use_cached:
        raise ConfigError(
            "USE_CACHED_TASKS = True is for T5X's own pipeline: set "
            "train_script.train.get_dataset_fn = @utils.get_dataset in a gin file."
        )
    if cfg.batch_size % num_shards:
        raise ConfigError(f"BATCH_SIZE {cfg.batch_size} does not divide among {num_shards} hosts.")
    steps = checkpoints.latest_step(model_dir) if gfile.isdir(model_dir) else None
    order = batches(
        cfg.mixture_or_task_name,
        cfg.split,
        cfg.batch_size,
        cfg.task_feature_lengths,
        seed=seed,
        start_batch=steps or 0,
        shuffle=cfg.shuffle,
        packed=cfg.pack,
        pad_inputs_to_multiple=pack_multiple,
    )
    rows = cfg.batch_size // num_shards
    return BatchIterator(order, slice(shard_id * rows, (shard_id + 1) * rows))


class BatchIterator(dataset_iterator.DatasetIterator):
    """One host's rows of each batch. It is not saved: the step alone decides what comes next."""

    def __init__(self, order: Iterator[Batch], rows: slice) -> None:
        self._rows = rows
        self._first = next(order)
        self._batches = itertools.chain([self._first], order)

    def __next__(self) -> dict[str, np.ndarray]:
        return {name: array[self._rows] for name, array in next(self._batches).items()}

    @property
    def element_spec(self) -> dict[str, dataset_iterator.ArraySpec]:
        """Shapes and dtypes of this host's part of a batch."""
        return {
            name: dataset_iterator.ArraySpec(array.dtype, array[self._rows].shape)
            for name, array in self._first.items()
        }
