"""A model and its optimizer on a parallel layout: built, stored and restored.

What is done with them is `engine.py`'s.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.gpt import GPTModel

from megatron_cgn.config.schema import RunConfig
from megatron_cgn.engine import checkpoint as ckpt
from megatron_cgn.engine import optimizer_state
from megatron_cgn.engine.adapter_checkpoint import (
    adapter_record,
    check_adapters,
    check_is_whole,
)
from megatron_cgn.engine.group_selection import configured_groups
from megatron_cgn.engine.grouped_optimizer import GroupedOptimizer
from megatron_cgn.engine.optim import build_optimizer, leaves, wrap_model
from megatron_cgn.engine.param_groups import Grouping, uncorrected_moments, with_new_rows
from megatron_cgn.engine.slots import Slot, slots_of
from megatron_cgn.errors import CheckpointError
from megatron_cgn.hf.checkpoint_layout import DIST_DIRECTORY
from megatron_cgn.hf.dist_reader import DistReader
from megatron_cgn.hf.families import HEAD_KEY
from megatron_cgn.model.architecture import Architecture
from megatron_cgn.model.build import Backend, build_model, resolve_backend, transformer_config
from megatron_cgn.model.heads import padded_vocab_size
from megatron_cgn.model.initialize import initialize_scalar_head
from megatron_cgn.model.lora import ADAPTERS, add_adapters, start_magnitudes, trained_whole
from megatron_cgn.model.packing import check_packing
from megatron_cgn.parallel.seed import rng_state, seed_everything, set_rng_state
from megatron_cgn.parallel.state import ParallelState

logger = logging.getLogger(__name__)


class TrainingState:
    """The model, its optimizer, and how far they are.

    Every method is collective over all ranks unless it says otherwise.
    """

    def __init__(
        self,
        run: RunConfig,
        architecture: Architecture,
        state: ParallelState,
        *,
        total_steps: int,
    ) -> None:
        """Build the model without its weights' values; call `load_weights` or `resume` next.

        Args:
            run: The whole configuration, validated.
            architecture: The model.
            state: This process's place in the layout.
            total_steps: Steps of the whole run, which the learning-rate schedule spans.

        Raises:
            ConfigError: If ``optim.param_groups`` does not fit the model.
        """
        self.run = run
        self.architecture = architecture
        self.state = state
        self.backend: Backend = (
            "native" if self.has_adapters else resolve_backend(run.model.backend)
        )
        if run.data.reset_attention_mask:
            check_packing(self.backend, cp_size=state.cp_size)
        self.total_steps = total_steps
        self.step = 0
        self.consumed_sequences = 0
        self._grouping = configured_groups(run, architecture)
        seed_everything(run.seed, state)
        self.model_config = transformer_config(
            architecture,
            parallel=run.parallel,
            model=replace(run.model, backend=self.backend),
            precision=run.precision,
            recompute=run.train.recompute,
        )
        self._chunks: list[GPTModel] = build_model(
            architecture,
            config=self.model_config,
            groups=state.groups,
            seq_length=run.data.seq_length,
            make_vocab_size_divisible_by=run.model.make_vocab_size_divisible_by,
            backend=self.backend,
            seed=run.seed if run.model.init == "random" else None,
        )
        if architecture.head == "score":
            # What the model starts from may have none.
            for chunk in self._chunks:
                initialize_scalar_head(
                    chunk, seed=run.seed, standard_deviation=architecture.initializer_range
                )
        if self.has_adapters:
            add_adapters(
                self._chunks,
                architecture=architecture,
                lora=run.lora,
                groups=state.groups,
                seed=run.seed,
            )
        self._wrapped: list[DistributedDataParallel] = []
        self._optimizer: Any = None
        self._slots: list[Slot] = []
        self._grouped: GroupedOptimizer | None = None
        self._gather_pending = False
        self._optimizer_steps = 0
        self._adapter_record: dict[str, Any] | None = None

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are trained beside weights that stay as they are."""
        return self.run.lora.rank is not None

    @property
    def chunks(self) -> list[GPTModel]:
        """This rank's model chunks, with every weight up to date.

        Collective over dp_cp after a step with ``overlap_param_gather``, which otherwise leaves
        the other data-parallel ranks' share of the weights to the next forward pass.
        """
        if self._gather_pending:
            self._gather_pending = False
            with torch.no_grad():
                for wrapped in self._wrapped:
                    wrapped.start_param_sync(force_sync=True)
        return self._chunks

    @property
    def grouping(self) -> Grouping | None:
        """Groups of ``optim.param_groups``, if there are any."""
        return self._grouping

    def prepare_training(self) -> None:
        """Wrap the model for data parallelism and build the optimizer from its weights.

        Call it once, after the weights have their values: master weights are copied here.
        """
        start_magnitudes(self.chunks)
        self.adapter_record()  # of the weights as they are now
        self._wrapped = wrap_model(
            self.chunks,
            config=self.model_config,
            parallel=self.run.parallel,
            precision=self.run.precision,
            state=self.state,
        )
        self._optimizer = build_optimizer(
            self._wrapped,
            optim=self.run.optim,
            parallel=self.run.parallel,
            precision=self.run.precision,
            params_dtype=self.model_config.params_dtype,
            micro_batch_tokens=self.run.train.micro_batch_size * self.run.data.seq_length,
        )
        self._slots = slots_of(leaves(self._optimizer))
        if self._grouping is not None:
            self._grouped = GroupedOptimizer(
                self._optimizer,
                self._slots,
                self._chunks,
                grouping=self._grouping,
                architecture=self.architecture,
                tp_rank=self.state.groups.tp.rank(),
            )
            self._slots = self._grouped.slots
        self.model_config.finalize_model_grads_func = finalize_model_grads
        self.model_config.grad_scale_func = self._optimizer.scale_loss
        if self.run.parallel.overlap_grad_reduce:
            no_syncs = [chunk.no_sync for chunk in self._wrapped]
            syncs = [chunk.start_grad_sync for chunk in self._wrapped]
            several = len(self._wrapped) > 1
            self.model_config.no_sync_func = no_syncs if several else no_syncs[0]
            self.model_config.grad_sync_func = syncs if several else syncs[0]
        if self.run.parallel.overlap_param_gather and len(self._wrapped) > 1:
            # Only the interleaved schedule asks; otherwise hooks before each layer gather.
            gathers = [chunk.start_param_sync for chunk in self._wrapped]
            self.model_config.param_sync_func = gathers

    def adapter_record(self) -> dict[str, Any] | None:
        """What checkpoints say of this run's adapters; None without. Made once.

        Raises:
            UserError: On every rank, if the weights beside them cannot be read.
        """
        if self.has_adapters and self._adapter_record is None:
            self._adapter_record = adapter_record(self.run)
        return self._adapter_record

    def model_state(self) -> ShardedStateDict:
        """The trained weights as sharded tensors that share memory with the model; see `chunks`.

        All of them, or with adapters these, what ``lora.modules_to_save`` names, and a scalar head.
        """
        if not self.has_adapters:
            return self._state(lambda name: True)
        whole = {name for name, _ in trained_whole(self._chunks)}
        return self._state(lambda name: name in whole or name.startswith(f"{ADAPTERS}."))

    def _base_state(self) -> ShardedStateDict:
        """The weights without adapters."""
        return self._state(lambda name: not name.startswith(f"{ADAPTERS}."))

    def _state(self, wanted: Callable[[str], bool]) -> ShardedStateDict:
        states = [
            {n: entry for n, entry in chunk.sharded_state_dict().items() if wanted(n)}
            for chunk in self.chunks
        ]
        if len(states) == 1:
            return {"model": states[0]}
        return {f"model{i}": state for i, state in enumerate(states)}

    def save(
        self,
        root: Path,
        *,
        fit: dict[str, Any],
        hf_files: Callable[[Path], None],
        with_optimizer: bool = True,
    ) -> Path:
        """Write a checkpoint.

        Args:
            root: ``checkpoint.dir``.
            fit: What a run must share with this one to go on from it, by dotted name.
            hf_files: Writes configuration and tokenizer into a directory; called on rank 0.
            with_optimizer: Whether training can go on from it exactly.

        Returns:
            The checkpoint's directory.

        Raises:
            CheckpointError: On every rank, if it could not be written.
        """
        sharded = self.model_state()
        sharded["rng"] = ckpt.per_rank_object("rng_state", rng_state())
        has_master = False
        if with_optimizer:
            sharded["optimizer"] = optimizer_state.sharded_optimizer_state(
                self._slots, self.model_state(), self.state
            )
            sharded["grad_scaler"] = [
                leaf.grad_scaler.state_dict() if getattr(leaf, "grad_scaler", None) else None
                for leaf in leaves(self._optimizer)
            ]
            if self._grouped is not None:
                sharded["group_steps"] = self._grouped.record()
            has_master = optimizer_state.has_master_weights(self._slots)
        info = ckpt.CheckpointInfo(
            step=self.step,
            optimizer_steps=self._optimizer_steps,
            consumed_sequences=self.consumed_sequences,
            has_optimizer=with_optimizer,
            has_master_weights=has_master,
            layout=self._layout(),
            fit=fit,
            vocab_size=self.architecture.vocab_size,
            padded_vocab_size=padded_vocab_size(
                self.architecture.vocab_size,
                multiple=self.run.model.make_vocab_size_divisible_by,
                tensor_parallel_size=self.state.groups.tp.size(),
            ),
            dtype=self.run.precision,
            adapter=self.adapter_record(),
        )
        return ckpt.save_checkpoint(
            root, sharded, info, hf_files=hf_files, keep_last=self.run.checkpoint.keep_last
        )

    def load_model(self, directory: Path) -> None:
        """Fill the model, and nothing else, from a checkpoint of any layout.

        A scalar head stays as it is where the checkpoint is of a language model.

        Args:
            directory: A checkpoint directory of all weights.

        Raises:
            CheckpointError: If it is damaged or does not hold this model.
        """
        info = ckpt.read_info(directory)
        check_is_whole(directory, info)
        ckpt.check_tensors(directory, info)
        has_head = self._is_stored(directory)
        state = self._base_state() if has_head else self._state(_is_body)
        self._put_weights(ckpt.load_checkpoint(directory, state), without_head=not has_head)

    def load_adapters(self, directory: Path) -> None:
        """Fill the adapters, and nothing else, from a checkpoint of adapters of any layout.

        Args:
            directory: A checkpoint directory of a run with the same adapters on the same weights.

        Raises:
            CheckpointError: If it is damaged or does not fit.
        """
        info = ckpt.read_info(directory)
        check_adapters(info, self.adapter_record(), directory)
        ckpt.check_tensors(directory, info)
        self._put_weights(ckpt.load_checkpoint(directory, self.model_state()))

    def resume(self, directory: Path, *, fit: dict[str, Any]) -> None:
        """Go on exactly where a checkpoint stopped; call it after `prepare_training`.

        With adapters the weights beside them must have been loaded, since the checkpoint has none.
        Random states return only under the layout that saved them, since they are per rank.

        Args:
            directory: A checkpoint directory.
            fit: What this run needs it to share, by dotted name.

        Raises:
            CheckpointError: If it is damaged or does not fit.
        """
        info = ckpt.read_info(directory)
        check_adapters(info, self.adapter_record(), directory)
        ckpt.check_fit(info, fit, directory)
        if info.step == self.total_steps and not info.has_optimizer:
            ckpt.check_tensors(directory, info)
            self._put_weights(ckpt.load_checkpoint(directory, self.model_state()))
            # Nothing is left to train.
            self.step = info.step
            self.consumed_sequences = info.consumed_sequences
            return
        if not info.has_optimizer:
            raise CheckpointError(
                f"{directory}: holds no optimizer state (checkpoint.save_optimizer was false), so "
                "training cannot go on from it. Use it as a starting model instead."
            )
        ckpt.check_tensors(directory, info)
        same_layout = dict(info.layout) == self._layout()
        more: ShardedStateDict = {}
        if same_layout:
            more["rng"] = ckpt.per_rank_object("rng_state", None)
        elif dist.get_rank() == 0:
            logger.warning(
                "%s was written under another layout (%s): random states start anew",
                directory.name,
                ", ".join(f"{k}={v}" for k, v in info.layout.items()),
            )
        loaded = self._read_exactly(directory, info, more)
        if same_layout:
            set_rng_state(loaded["rng"])
        self.step = info.step
        self.consumed_sequences = info.consumed_sequences

    def start_optimizer(self, directory: Path) -> None:
        """Take weights and optimizer state from a checkpoint, but neither step nor position.

        For a run with other data than the checkpoint's: one whose vocabulary was extended, for
        which all data is indexed anew. Call it after `prepare_training`.

        Args:
            directory: A checkpoint directory of any layout.

        Raises:
            CheckpointError: If it is damaged or holds no optimizer state.
        """
        info = ckpt.read_info(directory)
        check_is_whole(directory, info)
        if not self._is_stored(directory):
            raise CheckpointError(
                f"{directory}: holds the optimizer state of a language model, which has another "
                "head than this run's model; set checkpoint.load_optimizer=false"
            )
        if not info.has_optimizer:
            raise CheckpointError(
                f"{directory}: holds no optimizer state; set checkpoint.load_optimizer=false"
            )
        ckpt.check_tensors(directory, info)
        self._read_exactly(directory, info, {})

    def _read_exactly(
        self, directory: Path, info: ckpt.CheckpointInfo, more: ShardedStateDict
    ) -> dict[str, Any]:
        """Read weights and optimizer state, and `more` with them; return what was loaded."""
        sharded = self.model_state() | more
        sharded["optimizer"] = optimizer_state.empty_optimizer_state(
            self._slots, self.model_state(), with_master=info.has_master_weights
        )
        loaded = ckpt.load_checkpoint(directory, sharded)
        self._put_weights(loaded)
        exact = dict(loaded["optimizer"])
        if not info.has_master_weights and optimizer_state.has_master_weights(self._slots):
            masters = optimizer_state.empty_master_weights(self._slots, self.model_state())
            exact |= ckpt.load_checkpoint(directory, masters)
        record = with_new_rows(loaded.get("group_steps"), info.new_rows, info.optimizer_steps)
        if self._grouped is not None:
            self._grouped.restore(record, info.optimizer_steps)
        steps = {"": info.optimizer_steps} if self._grouped is None else self._grouped.steps
        fault = uncorrected_moments(record, self._grouping, steps, optim=self.run.optim)
        if fault and dist.get_rank() == 0:
            logger.warning("%s: %s", directory, fault)
        optimizer_state.fill_optimizer_state(
            self._slots,
            exact,
            info.optimizer_steps,
            group_steps=self._grouped.steps if self._grouped is not None else None,
        )
        for leaf, scaler in zip(leaves(self._optimizer), loaded["grad_scaler"], strict=False):
            if scaler is not None and getattr(leaf, "grad_scaler", None):
                leaf.grad_scaler.load_state_dict(scaler)
        self._optimizer_steps = info.optimizer_steps
        return loaded

    def _put_weights(self, loaded: dict[str, Any], *, without_head: bool = False) -> None:
        """Copy loaded tensors into the model; most were filled in place already."""
        for index, chunk in enumerate(self.chunks):
            weights = loaded["model" if len(self.chunks) == 1 else f"model{index}"]
            # Not strict: backends differ in non-tensor "extra state" that holds nothing here.
            missing, unexpected = chunk.load_state_dict(weights, strict=False)
            # A run with adapters reads either these or the weights that they adapt.
            missing = [] if self.has_adapters else missing
            missing = [name for name in missing if not without_head or name != HEAD_KEY]
            wrong = [n for n in (*missing, *unexpected) if not n.endswith("_extra_state")]
            assert not wrong, f"weights and model disagree: {wrong}"

    def _is_stored(self, directory: Path) -> bool:
        """Whether a checkpoint of all weights has this model's head; a scalar one may be new.

        Raises:
            CheckpointError: If it is of a reward model, and this is a language model.
        """
        stored = DistReader(directory / DIST_DIRECTORY).tensors.get(HEAD_KEY)
        is_scalar = stored is not None and stored.size[0] == 1
        if is_scalar and self.architecture.head == "lm":
            raise CheckpointError(
                f"{directory}: is of a reward model: it gives a score and no probabilities of ids. "
                "Give a language model."
            )
        return is_scalar == (self.architecture.head == "score")

    def _layout(self) -> dict[str, int]:
        groups = self.state.groups
        return {
            "tp": groups.tp.size(),
            "pp": groups.pp.size(),
            "vp": len(self._chunks),
            "cp": groups.cp.size(),
            "dp": groups.dp.size(),
        }


def _is_body(name: str) -> bool:
    """Whether a parameter is neither an adapter's nor the head's."""
    return name != HEAD_KEY and not name.startswith(f"{ADAPTERS}.")
