"""The engine: a model and its optimizer on a parallel layout, trained on any objective.

It knows how to take a step, to score without gradients, and to store and restore itself. It does
not know what is trained on (`stages/`), which loss it is (`objectives/`) or who watches
(`callbacks.py`).
"""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_cgn.config.schema import RunConfig
from megatron_cgn.engine import checkpoint as ckpt
from megatron_cgn.engine import optimizer_state
from megatron_cgn.engine.forward_step import (
    LOSS,
    ScoringForwardStep,
    TrainingForwardStep,
    sum_reports,
)
from megatron_cgn.engine.optim import build_optimizer, leaves, set_rates, wrap_model
from megatron_cgn.engine.schedule import learning_rate
from megatron_cgn.errors import CheckpointError
from megatron_cgn.model.architecture import Architecture
from megatron_cgn.model.build import build_model, resolve_backend, transformer_config
from megatron_cgn.model.heads import padded_vocab_size
from megatron_cgn.model.packing import check_packing
from megatron_cgn.objectives.base import ForwardArgs, Objective
from megatron_cgn.parallel import cpu
from megatron_cgn.parallel.context import gather_sequence
from megatron_cgn.parallel.reduce import sum_over_data
from megatron_cgn.parallel.seed import rng_state, seed_everything, set_rng_state
from megatron_cgn.parallel.state import ParallelState

logger = logging.getLogger(__name__)

_SCORED_PER_STAGE = 4
"""Micro-batches that `Engine.score` sends through the pipeline at once, times its stages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one optimizer step was.

    Attributes:
        step: Steps done, this one included.
        metrics: Means over this step's global batch by name, ``loss`` among them; a name that
            nothing of the batch belongs to is absent. Empty if they were not asked for.
        count: Units (tokens, pairs, sequences) that the loss was averaged over; 0 likewise.
        lr: Learning rate of this step.
        grad_norm: Global gradient norm before clipping; None if the step was skipped.
        skipped: Whether FP16 gradients overflowed, so that weights did not change.
    """

    step: int
    metrics: dict[str, float]
    count: int
    lr: float
    grad_norm: float | None
    skipped: bool


class Engine:
    """A model on a parallel layout, and its optimizer.

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
        """
        self.run = run
        self.architecture = architecture
        self.state = state
        self.backend = resolve_backend(run.model.backend)
        if run.data.reset_attention_mask:
            check_packing(self.backend, cp_size=state.cp_size)
        self.total_steps = total_steps
        self.step = 0
        self.consumed_sequences = 0
        seed_everything(run.seed, state)
        self.model_config = transformer_config(
            architecture,
            parallel=run.parallel,
            model=run.model,
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
        self._wrapped: list[DistributedDataParallel] = []
        self._optimizer: Any = None
        self._gather_pending = False
        self._optimizer_steps = 0

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

    def prepare_training(self) -> None:
        """Wrap the model for data parallelism and build the optimizer from its weights.

        Call it once, after the weights have their values: master weights are copied here.
        """
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

    def train_step[B](
        self, micro_batches: Sequence[B], objective: Objective[B], *, reduce_metrics: bool = True
    ) -> StepReport:
        """Take one optimizer step.

        Args:
            micro_batches: This data-parallel rank's share of the global batch; every rank brings
                the same number, of the same shapes.
            objective: What to minimise.
            reduce_metrics: Whether the report has metrics, which costs a host synchronisation.

        Returns:
            The step's report, equal on every rank.
        """
        assert self._optimizer is not None, "call prepare_training first"
        for chunk in self._wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        lr = learning_rate(self.step, self.run.optim, total_steps=self.total_steps)
        set_rates(self._optimizer, lr=lr, weight_decay=self.run.optim.weight_decay)
        function = TrainingForwardStep(objective, self.state, backend=self.backend)
        reports = self._schedule(function, self._wrapped, micro_batches)
        success, grad_norm, _ = self._optimizer.step()
        self._gather_pending = self.run.parallel.overlap_param_gather
        self.step += 1
        self._optimizer_steps += bool(success)
        metrics, count = self._reduce(reports) if reduce_metrics else ({}, 0)
        return StepReport(
            step=self.step,
            metrics=metrics,
            count=count,
            lr=lr,
            grad_norm=None if grad_norm is None else float(grad_norm),
            skipped=not success,
        )

    @torch.no_grad()
    def score[B](
        self, batches: Iterable[B], forward_args: Callable[[B], ForwardArgs]
    ) -> Iterator[tuple[B, Tensor]]:
        """Run the model forward only, micro-batch by micro-batch.

        With labels in the arguments, the output is the per-token negative log-likelihood, so
        log-probabilities are its negative.

        Args:
            batches: Micro-batches of this data-parallel rank; every rank brings as many.
            forward_args: What the model is called with, e.g. an objective's method.

        Yields:
            Each batch with the model's output for it, float32 ``[B, S]``, on every rank of the
            model-parallel and context-parallel groups.
        """
        chunks: Sequence[torch.nn.Module] = self._wrapped or self._half_chunks()
        for chunk in chunks:
            chunk.eval()
        function = ScoringForwardStep(forward_args, self.state, backend=self.backend)
        pp_size = self.state.groups.pp.size()
        # Several at a time keep all pipeline stages busy; their outputs are small.
        group_size = 1 if pp_size == 1 else _SCORED_PER_STAGE * pp_size
        for group in _groups(batches, group_size):
            # The interleaved schedule only takes multiples of the pipeline's size.
            missing = -len(group) % pp_size if len(chunks) > 1 else 0
            padded = [*group, *itertools.repeat(group[-1], missing)]
            outputs = self._schedule(function, chunks, padded, forward_only=True)
            for index, batch in enumerate(group):
                output = outputs[index] if self.state.is_last_stage else None
                yield batch, self._from_last_stage(output, forward_args(batch))

    def _half_chunks(self) -> Sequence[torch.nn.Module]:
        """The chunks as `prepare_training` would wrap them, for an engine that only scores."""
        if self.run.precision == "fp32":
            return self.chunks
        from megatron.core.transformer.module import Float16Module

        return [Float16Module(self.model_config, chunk) for chunk in self.chunks]

    def _from_last_stage(self, scored: Tensor | None, args: ForwardArgs) -> Tensor:
        """Bring an output ``[B, S / cp]`` from the last stage to all ranks, as ``[B, S]``."""
        if scored is not None:
            output = scored.float().contiguous()
        else:
            batch_size, length = args.tokens.shape
            shape = (batch_size, length // self.state.cp_size)
            output = torch.empty(shape, dtype=torch.float32, device=cpu.device())
        dist.broadcast(output, src=self.state.loss_rank, group=self.state.groups.pp)
        return gather_sequence(output, self.state.groups.cp)

    def _schedule(
        self,
        function: Callable[..., Any],
        chunks: Sequence[torch.nn.Module],
        micro_batches: Sequence[Any],
        *,
        forward_only: bool = False,
    ) -> list[Any]:
        """Run Megatron's pipeline schedule over micro-batches."""
        batch_size, seq_length = _shape(micro_batches[0])
        results: list[Any] = get_forward_backward_func()(
            forward_step_func=function,
            # One iterator a chunk: each runs every micro-batch.
            data_iterator=[iter(micro_batches) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(micro_batches),
            seq_length=seq_length,
            micro_batch_size=batch_size,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
        return results

    def _reduce(self, reports: list[Any]) -> tuple[dict[str, float], int]:
        """Average a step's reports over micro-batches and data-parallel ranks."""
        names, sums = sum_reports(reports)
        if self.state.groups.pp.size() > 1:  # only the last stage has seen the objective's names
            shared: list[Any] = [names]
            dist.broadcast_object_list(shared, src=self.state.loss_rank, group=self.state.groups.pp)
            names = shared[0]
        if not self.state.is_last_stage:
            sums = torch.zeros(len(names), 2, dtype=torch.float64)
        totals = sum_over_data(sums, self.state).tolist()
        metrics = {
            name: total / count if count else 0.0
            for name, (total, count) in zip(names, totals, strict=True)
            if count or name == LOSS
        }
        return metrics, int(totals[names.index(LOSS)][1])

    def model_state(self) -> ShardedStateDict:
        """The weights as sharded tensors that share memory with the model; see `chunks`."""
        if len(self.chunks) == 1:
            return {"model": self.chunks[0].sharded_state_dict()}
        return {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(self.chunks)}

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
                self._optimizer, self.model_state(), self.state
            )
            sharded["grad_scaler"] = [
                leaf.grad_scaler.state_dict() if getattr(leaf, "grad_scaler", None) else None
                for leaf in leaves(self._optimizer)
            ]
            has_master = optimizer_state.has_master_weights(self._optimizer)
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
        )
        return ckpt.save_checkpoint(
            root, sharded, info, hf_files=hf_files, keep_last=self.run.checkpoint.keep_last
        )

    def load_model(self, directory: Path) -> None:
        """Fill the model, and nothing else, from a checkpoint of any layout.

        Args:
            directory: A checkpoint directory.

        Raises:
            CheckpointError: If it is damaged or does not hold this model.
        """
        ckpt.check_tensors(directory, ckpt.read_info(directory))
        self._put_weights(ckpt.load_checkpoint(directory, self.model_state()))

    def resume(self, directory: Path, *, fit: dict[str, Any]) -> None:
        """Go on exactly where a checkpoint stopped; call it after `prepare_training`.

        Random states return only under the layout that saved them, since they are per rank.

        Args:
            directory: A checkpoint directory.
            fit: What this run needs it to share, by dotted name.

        Raises:
            CheckpointError: If it is damaged or does not fit.
        """
        info = ckpt.read_info(directory)
        ckpt.check_fit(info, fit, directory)
        if info.step == self.total_steps and not info.has_optimizer:
            self.load_model(directory)  # nothing is left to train
            self.step = info.step
            self.consumed_sequences = info.consumed_sequences
            return
        if not info.has_optimizer:
            raise CheckpointError(
                f"{directory}: holds no optimizer state (checkpoint.save_optimizer was false), so "
                "training cannot go on from it. Use it as a starting model instead."
            )
        ckpt.check_tensors(directory, info)
        sharded = self.model_state()
        sharded["optimizer"] = optimizer_state.empty_optimizer_state(
            self._optimizer, self.model_state(), with_master=info.has_master_weights
        )
        same_layout = dict(info.layout) == self._layout()
        if same_layout:
            sharded["rng"] = ckpt.per_rank_object("rng_state", None)
        elif dist.get_rank() == 0:
            logger.warning(
                "%s was written under another layout (%s): random states start anew",
                directory.name,
                ", ".join(f"{k}={v}" for k, v in info.layout.items()),
            )
        loaded = ckpt.load_checkpoint(directory, sharded)
        self._put_weights(loaded)
        exact = dict(loaded["optimizer"])
        if not info.has_master_weights and optimizer_state.has_master_weights(self._optimizer):
            masters = optimizer_state.empty_master_weights(self._optimizer, self.model_state())
            exact |= ckpt.load_checkpoint(directory, masters)
        optimizer_state.fill_optimizer_state(self._optimizer, exact, info.optimizer_steps)
        for leaf, scaler in zip(leaves(self._optimizer), loaded["grad_scaler"], strict=False):
            if scaler is not None and getattr(leaf, "grad_scaler", None):
                leaf.grad_scaler.load_state_dict(scaler)
        if same_layout:
            set_rng_state(loaded["rng"])
        self.step = info.step
        self._optimizer_steps = info.optimizer_steps
        self.consumed_sequences = info.consumed_sequences

    def _put_weights(self, loaded: dict[str, Any]) -> None:
        """Copy loaded tensors into the model; most were filled in place already."""
        for index, chunk in enumerate(self.chunks):
            weights = loaded["model" if len(self.chunks) == 1 else f"model{index}"]
            # Not strict: backends differ in non-tensor "extra state" that holds nothing here.
            missing, unexpected = chunk.load_state_dict(weights, strict=False)
            wrong = [n for n in (*missing, *unexpected) if not n.endswith("_extra_state")]
            assert not wrong, f"weights and model disagree: {wrong}"

    def _layout(self) -> dict[str, int]:
        groups = self.state.groups
        return {
            "tp": groups.tp.size(),
            "pp": groups.pp.size(),
            "vp": len(self._chunks),
            "cp": groups.cp.size(),
            "dp": groups.dp.size(),
        }


def _groups[B](batches: Iterable[B], limit: int) -> Iterator[tuple[B, ...]]:
    """Up to `limit` batches at a time, each group of one shape: a pipeline's messages have one."""
    for _, same in itertools.groupby(batches, key=_shape):
        yield from itertools.batched(same, limit)


def _shape(batch: Any) -> tuple[int, int]:
    """Sequences and tokens of a batch, before context parallelism."""
    batch_size, seq_length = batch.tokens.shape
    return int(batch_size), int(seq_length)
