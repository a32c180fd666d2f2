"""Every setting of a run: its name, type, default and meaning. No rules, no loading.

Rules that span fields live in `validate.py`; reading YAML and overrides in `load.py`.
"""

from dataclasses import dataclass, field
from typing import Literal

Precision = Literal["bf16", "fp16", "fp32"]
PreferenceLoss = Literal[
    "sigmoid",
    "ipo",
    "hinge",
    "robust",
    "apo_zero",
    "apo_down",
    "simpo",
    "orpo",
    "kto",
]
"""Losses of stage ``dpo``; the equation and paper of each: `megatron_cgn.objectives`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which model, and how it starts."""

    hf_path: str | None = None
    """Hugging Face directory (``config.json``, tokenizer, weights), or a checkpoint of ours."""
    init: Literal["from_hf", "random"] = "from_hf"
    """``from_hf`` loads the weights of ``hf_path``; ``random`` draws them from the seed."""
    backend: Literal["auto", "native", "te"] = "auto"
    """Layers: ``te`` (Transformer Engine), ``native`` (PyTorch), or TE where it can run."""
    make_vocab_size_divisible_by: int = 128
    """The embedding is padded to a multiple of this times the tensor-parallel size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How the model and the batch are laid out over processes."""

    tensor_model_parallel_size: int = 1
    """Processes that share every weight matrix."""
    pipeline_model_parallel_size: int = 1
    """Processes that share the layers, in consecutive stages."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks a pipeline stage holds (interleaved schedule); None for one chunk."""
    context_parallel_size: int = 1
    """Processes that share each sequence."""
    sequence_parallel: bool = False
    """Split activations outside attention and MLP over the tensor-parallel group."""
    distributed_optimizer: bool = True
    """Share optimizer state over the data-parallel group (ZeRO-1)."""
    overlap_p2p_comm: bool | None = None
    """Overlap pipeline communication with compute. None: on exactly when interleaved."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass already runs."""
    timeout_minutes: float = 30.0
    """How long a collective may wait for a rank before the run is stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileConfig:
    """One of several indices of a source."""

    path: str
    """Prefix of a ``.bin``/``.idx`` pair written by ``tools/preprocess_data.py``."""
    weight: float | None = None
    """Share of the source's tokens, relative to its other files. None: proportional to the
    tokens, so that every file is read equally often. Given for all files of a source or none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """One source of training documents."""

    name: str
    """Name used in metrics, e.g. ``domain``."""
    path: str | None = None
    """Prefix of a ``.bin``/``.idx`` pair written by ``tools/preprocess_data.py``."""
    files: tuple[FileConfig, ...] = ()
    """Several such pairs, instead of ``path``."""
    weight: float | None = None
    """Share of training tokens, relative to the other sources' weights; 1 if nobody says more.
    Not together with ``data.mix`` or ``data.phases``, which say the same by name."""
    validation_path: str | None = None
    """Prefix of a held-out pair. None: the last ``data.validation_fraction`` of documents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseConfig:
    """A part of the run with a mix of its own."""

    mix: dict[str, float]
    """Shares of the training tokens by source name, as in ``data.mix``."""
    until: int | float | None = None
    """Where it ends: up to 1 a fraction of the run's steps, above 1 the last step's number.
    The last phase goes to the end of the run: None or 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """What the model reads."""

    sources: tuple[SourceConfig, ...] = ()
    """Sources of training documents."""
    mix: dict[str, float] | None = None
    """Shares of the training tokens by source name, relative to one another."""
    phases: tuple[PhaseConfig, ...] = ()
    """Several mixes, one after another, instead of ``mix``."""
    epochs_of: str | None = None
    """The source that ``train.epochs`` counts under a mix. None: ``domain``, if it is in it."""
    seq_length: int = 4096
    """Tokens of one training sequence."""
    validation_fraction: float = 0.0
    """Share of each source's documents held out where it has no ``validation_path``."""
    reset_attention_mask: bool = False
    """Whether documents that share a training sequence are kept apart: attention and positions
    start anew behind each end-of-document token. False: a document sees those before it."""
    cache_dir: str | None = None
    """Where shuffled indices are cached. None: ``output_dir/cache``."""
    num_workers: int = 0
    """Loader processes per rank; 0 reads in the training process."""
    packing: bool = True
    """Whether conversations share training sequences, each attending to itself alone. False: one
    conversation a sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatConfig:
    """How conversations become tokens, and which of these count."""

    template: str | None = None
    """Chat template: the name of a bundled one, or a Jinja file. None: the tokenizer's own."""
    train_on_prompt: bool = False
    """Whether every token counts, not only those of the assistant's turns."""
    last_turn_only: bool = False
    """Whether only the last of the assistant's turns counts."""
    truncation: Literal["error", "drop", "keep_start", "keep_end"] = "drop"
    """What becomes of a conversation longer than ``data.seq_length``: the run is refused, the
    conversation is left out, or its first or last tokens are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplesConfig:
    """Answers generated at every validation, for people to read."""

    prompts: tuple[str, ...] = ()
    """What the user says. None given: the first ``count`` held-out conversations' beginnings."""
    count: int = 3
    """How many held-out conversations are answered where ``prompts`` gives none; 0 for none."""
    max_new_tokens: int = 128
    """Longest answer, in tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """What preference learning minimises. An option that the chosen loss does not use is refused.

    None stands for the loss's own default, so that whoever gives an option is told when it has no
    effect.
    """

    type: PreferenceLoss | None = None
    """Loss of stage ``dpo``. None: ``sigmoid``, the loss of the DPO paper."""
    beta: float | None = None
    """How strongly the policy is held to the reference; IPO's tau; ORPO's lambda; SimPO's scale.
    None: 0.1, and 2.0 for ``simpo``."""
    label_smoothing: float | None = None
    """Share of pairs taken to be the wrong way round: ``sigmoid`` (cDPO) and ``robust``.
    None: 0.0, and 0.1 for ``robust``."""
    length_normalized: bool | None = None
    """Whether the log-ratios compared are per counted token instead of per answer: ``sigmoid``,
    ``hinge``; usual are then a `beta` of 2 to 10. (``ipo``, ``simpo`` and ``orpo`` always are per
    token.) None: false."""
    rpo_alpha: float | None = None
    """Weight of the next-token loss of chosen answers, added to losses of pairs (``orpo`` has its
    own, with the weight 1). None: not added."""
    gamma: float | None = None
    """SimPO's target margin of rewards, which are `beta` times log-probabilities per token.
    None: 0.5."""
    desirable_weight: float | None = None
    """KTO's weight of good answers. None: 1.0."""
    undesirable_weight: float | None = None
    """KTO's weight of bad answers. None: 1.0."""
    use_margins: bool | None = None
    """Stage ``rm``: whether the ``margin`` of the data is asked of the difference of rewards.
    None: true."""
    center_rewards: float | None = None
    """Stage ``rm``: weight of the square of a pair's summed rewards, which keeps rewards around
    zero. None: not added."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters, trained in place of the model's weights, which stay as they are.

    Hu et al. 2021, https://arxiv.org/abs/2106.09685. Names are those of `peft`.
    """

    rank: int | None = None
    """Rank of the adapters. None: no adapters, all weights are trained."""
    alpha: float | None = None
    """Adapters are scaled by ``alpha / rank``. None: twice the rank."""
    dropout: float = 0.0
    """Probability of dropping an adapter's input."""
    targets: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Matrices with an adapter, by their names in a Hugging Face model."""
    use_rslora: bool = False
    """Scale by ``alpha / sqrt(rank)`` instead (https://arxiv.org/abs/2312.03732)."""
    use_dora: bool = False
    """Train the length of every matrix's rows too (DoRA, https://arxiv.org/abs/2402.09353)."""
    modules_to_save: tuple[str, ...] = ()
    """Matrices trained whole beside the adapters: ``embed_tokens``, ``lm_head``. Together with
    ``optim.param_groups`` only some of their rows, e.g. those of new tokens. A reward model's
    ``score`` is trained whole without being named."""
    adapter_path: str | None = None
    """Adapter directory of `peft` or of ours to start from. None: adapters that change nothing."""
    export: Literal["merged", "adapter", "both"] = "both"
    """What is written after training: ``output_dir/export`` with the adapters added to the
    weights, ``output_dir/adapter`` in the format of `peft`, or both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How long, in which portions."""

    micro_batch_size: int = 1
    """Sequences of one forward pass on one rank."""
    global_batch_size: int = 8
    """Sequences of one optimizer step over all ranks."""
    train_iters: int | None = None
    """Optimizer steps. Exactly one of ``train_iters`` and ``epochs`` is given."""
    epochs: float | None = None
    """Passes over the training tokens: of the source ``data.epochs_of`` under a mix, and of all
    sources together without."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: none, core attention, whole layers."""
    validation_interval_steps: int | None = None
    """Steps between validations. None: only before the first and after the last step."""
    validation_sequences: int | None = None
    """Held-out sequences scored per source. None: all of them."""
    log_interval_steps: int = 1
    """Steps between lines of ``metrics.jsonl``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamGroupConfig:
    """Parameters, or rows of them, that are trained at a rate or at a time of their own."""

    name: str
    """Name in messages and metrics (``lr/<name>``), e.g. ``new_rows``."""
    parameters: tuple[str, ...]
    """Which: ``embeddings``, ``output`` (a reward model's ``score``), ``norms``, ``blocks`` (the
    layers whole, their norms too), ``adapters`` (with ``lora.rank``), ``others`` (all that no other
    group has), or Hugging Face names, in which ``*`` stands for anything, as in
    ``model.layers.*.mlp.*`` or, of adapters, ``*.lora_B.weight``."""
    rows: Literal["all", "old", "new"] = "all"
    """Rows of ``embeddings`` and ``output``: all, those of the tokens that the model had before
    its vocabulary was extended, or those from the first new token to the end."""
    rows_from: int | None = None
    """Id of the first new token. None: what ``vocab_extension.json`` beside the model says."""
    lr: float | None = None
    """Peak learning rate; ``min_lr`` is scaled along. None: ``optim.lr``."""
    lr_mult: float | None = None
    """The same as a multiple of ``optim.lr``."""
    weight_decay: float | None = None
    """Weight decay of the group's matrices. None: ``optim.weight_decay``."""
    frozen_until_step: int = 0
    """The last step that leaves the group as it is; 0 trains it from the first."""
    trained_until_step: int | None = None
    """The last step that trains the group; 0 never does. None: to the end of the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 1e-5
    """Peak learning rate."""
    min_lr: float = 5e-6
    """Learning rate at the end of the decay."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0 to ``lr``."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Decay after the warm-up. ``wsd``: constant, then ``decay_steps`` of linear decay."""
    decay_steps: int | None = None
    """Steps of the final decay; only for ``wsd``."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; biases and norms have none."""
    adam_beta1: float = 0.9
    """Decay of the gradient's running mean."""
    adam_beta2: float = 0.95
    """Decay of the squared gradient's running mean."""
    adam_eps: float = 1e-8
    """Added to the root of the running squared gradient."""
    clip_grad: float = 1.0
    """Global gradient norm is clipped to this; 0 turns clipping off."""
    initial_loss_scale: float = 65536.0
    """First scale of the mean loss under ``precision=fp16``; it adapts from there."""
    param_groups: tuple[ParamGroupConfig, ...] = ()
    """Parameters with a rate, a decay or a time of training of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """What is kept so that a run can go on."""

    dir: str | None = None
    """Where checkpoints go. None: ``output_dir/checkpoints``."""
    interval_steps: int | None = None
    """Steps between checkpoints. None: only the last step."""
    keep_last: int | None = None
    """How many checkpoints are kept. None: all."""
    resume: Literal["auto", "never", "required"] = "auto"
    """``auto`` goes on from the latest checkpoint if there is one; ``required`` insists."""
    save_optimizer: bool = True
    """Whether checkpoints hold optimizer state (needed to go on training exactly)."""
    load_optimizer: bool = False
    """Whether the first step finds the optimizer state of ``model.hf_path``, which must be a
    checkpoint then, e.g. one whose vocabulary was extended. Data, steps and the learning-rate
    schedule begin anew all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """The Hugging Face directory written after training."""

    enabled: bool = True
    """Whether to write ``output_dir/export`` after the last step."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Type of the exported weights. ``auto``: the type named in the source ``config.json``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One run of ``train.py``."""

    stage: str | None = None
    """The training stage, chosen with ``+stage=cpt``."""
    output_dir: str = "runs/default"
    """Where everything the run writes goes."""
    seed: int = 1234
    """Seed of initialisation, data order and dropout."""
    precision: Precision = "bf16"
    """Arithmetic of the forward and backward pass; the optimizer is always FP32."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    loss: LossConfig = field(default_factory=LossConfig)
