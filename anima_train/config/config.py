"""The configuration tree, in diffusion-pipe's words. The docstring under each key is its reference."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from anima_train.adapters.choice import AnyAdapter
from anima_train.adapters.full import Full
from anima_train.config.combinations import CHECKS, DEFAULT_KEEP_LAST, STATE_INTERVALS
from anima_train.config.model_settings import AnyModel
from anima_train.config.sections import (
    EarlyStopping,
    EvalDataset,
    LicensedMetadata,
    Metadata,
    Monitoring,
    PreservationSettings,
    VariantSampling,
)  # fmt: skip
from anima_train.config.values import BatchSizes, Dtype, Folder, plain_name  # fmt: skip
from anima_train.core.settings import Settings
from anima_train.data.settings import DatasetSettings
from anima_train.model.recompute import Recompute
from anima_train.objective.losses import Loss
from anima_train.objective.timesteps import Timesteps
from anima_train.optim.ema import Ema
from anima_train.optim.groups import COMPONENTS, Component, LearningRates
from anima_train.optim.lr_schedules import Constant, ScheduleSetting
from anima_train.optim.optimizers import AnyOptimizer


class Config(Settings):
    """One run."""

    output_dir: Folder
    """Run folders are made in here. Relative to the current folder."""
    dataset: str | DatasetSettings
    """A dataset TOML, or an inline table with the same keys."""
    run_name: Annotated[str, AfterValidator(plain_name)] | None = None
    """Name of the run folder and of the saved files. Absent: the config's name and the time."""
    seed: int = Field(default=0, ge=0)
    """Everything random follows from it."""
    epochs: int | None = Field(default=None, ge=1)
    """Times through the dataset. One of epochs and max_steps is required; with both, the run ends at whichever is
    first."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps."""
    micro_batch_size_per_gpu: BatchSizes = 1
    """Images that go through the model at once: a number, or a list of [resolution, number]; other resolutions take
    the nearest entry."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Micro-batches per process and optimizer step."""
    gradient_clipping: float = Field(default=1.0, ge=0)
    """Largest norm of the gradient; 0 does not clip."""
    lr_scheduler: ScheduleSetting = Constant()
    """The fall of the learning rate after the warmup: a name, or a table {type = "...", ...} with the schedule's own
    keys."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises from nearly 0."""
    force_constant_lr: float | None = Field(default=None, gt=0)
    """One learning rate for every component that is not frozen, without schedule or warmup."""
    activation_checkpointing: bool | Literal["selective", "offload", "unsloth"] = False
    """The activations that blocks compute again in the backward pass instead of keeping them. "selective": all but
    products and attention, which is half of the memory for at most 8 % more work; true: everything, far less memory for
    about 40 % more work; "offload" (or "unsloth"): the same, and what is left waits in the host's memory. Absent: none
    of it, or what memory chooses."""
    checkpointed_blocks: int = Field(default=0, ge=0)
    """Number of blocks, the first ones, that compute everything again, as with activation_checkpointing = true, beside
    others with "selective", which it needs: what lies between the two in memory and time. At 1024 pixels each saves 0.2
    GiB an image, for 1.4 % more work. Absent: none, or what memory chooses."""
    blocks_to_swap: int = Field(default=0, ge=0)
    """Number of blocks whose weights wait in the host's memory, pinned on CUDA, and come to the device when they are at
    work, forward and backward: saves the memory of all of them but two (0.12 GiB each in bfloat16), for copies that are
    told at the start. Results do not depend on it. In a full fine-tune gradients and the optimizer's state stay on the
    device."""
    memory: Literal["auto", "fast", "low"] = "auto"
    """The way to fit into the device's memory: settings that are not written are chosen, the fastest that fit. "auto"
    takes activation_checkpointing, swapped blocks and moments on the host, which leave what is learned as it is. "fast"
    takes weights in int8 (of a full fine-tune: moments in 8 bits), too, before slower settings; results change a little
    then. "low" begins with these and checkpointing, for the least memory. What is chosen, and why, is told at the start
    and tried on the largest micro-batch. What is written stays."""
    max_memory_gib: float | None = Field(default=None, gt=0)
    """The memory of the device that a run may take, in GiB, which memory has to fit into; on CUDA it gets no more.
    Absent: what is free at the start."""
    compile: bool | None = None
    """Compile the blocks with torch.compile: fewer passes over memory, faster steps after a minute or two at the start.
    Absent: on CUDA, where a compiler is there. What cannot be compiled runs as it is, with a warning."""
    sharding: Literal["fsdp2"] | None = None
    """Divide weights, gradients, optimizer state and average among the processes of a run, which gather each block to
    compute it (FSDP2): less memory on each GPU for more traffic between them. Absent: each holds all of it.
    accelerate's configuration with fsdp_version 2 asks for the same."""
    deterministic: bool = False
    """Take kernels that give the same bits each time, on one GPU of the same kind: for comparisons. Slower."""
    attention: Literal["auto", "cudnn", "flash", "efficient", "math"] = "auto"
    """The kernel of attention. "auto" takes the fastest one for this device and the largest images, by a short
    measurement at the start; a name forces that one."""
    huber_delta: float | None = Field(default=None, gt=0)
    """Huber loss with this delta instead of MSE. At most one of the three."""
    smooth_l1_beta: float | None = Field(default=None, gt=0)
    """Smooth L1 loss with this beta instead of MSE."""
    pseudo_huber_c: float | None = Field(default=None, gt=0)
    """Pseudo-Huber loss sqrt(d^2 + c^2) - c with this c instead of MSE."""
    normalize_masked_loss: bool = False
    """Divide the loss of a masked image by the share of it that its mask leaves, so that small masks weigh as much as
    large ones. false: the mean is over all of the image."""
    uncond_fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of the samples trained with the empty caption, drawn anew each time; never in evaluation."""
    eval_datasets: list[EvalDataset] = Field(default=[])
    """Datasets to measure the loss on, at fixed noise levels with fixed noise, beside the base model's."""
    eval_every_n_epochs: int | None = Field(default=None, ge=1)
    """Evaluate after every n epochs."""
    eval_every_n_steps: int | None = Field(default=None, ge=1)
    """Evaluate after every n steps."""
    eval_every_n_examples: int | None = Field(default=None, ge=1)
    """Evaluate after every n images seen."""
    eval_before_first_step: bool = True
    """Evaluate the base model first; later evaluations also report their difference from it."""
    eval_micro_batch_size_per_gpu: BatchSizes | None = None
    """As micro_batch_size_per_gpu, for evaluation. Absent: the same."""
    keep_best: str | None = Field(default=None, min_length=1)
    """Save the weights of the best evaluation until now as NAME-best.safetensors: the one with the lowest value of this
    number, as the evaluations log it ("held/loss", "known/drift_relative", "evaluation/forgetting"; the highest of
    "evaluation/learning"), within forgetting_budget. "score" is the mean that the judge of [sampling] gives the
    previews, and the judge says whether the highest or the lowest is the best: of CLIP the highest."""
    forgetting_budget: float | None = Field(default=None, gt=0)
    """Largest drift that is allowed, relative to the base (`drift_relative`), mean over the sets with role =
    "retention". The last evaluation within it is saved as NAME-best.safetensors, or that which keep_best names."""
    at_budget: Literal["stop", "go_on"] = "stop"
    """At an evaluation beyond forgetting_budget the run ends, or goes on, and what is kept stays within."""
    strengths_after_training: list[Annotated[float, Field(ge=0, le=4)]] = Field(default=[])
    """Strengths of the adapter at which the run, at its end, measures learning and forgetting on all eval_datasets, and
    draws the [sampling] prompts, such as [0.25, 0.5, 0.75, 1.0, 1.25]; 0, the base, is always among them. Each costs as
    much as an evaluation and a preview. They are kept in the run's strengths.json and shown in its report. Not with
    use_dora."""
    save_every_n_epochs: int | None = Field(default=None, ge=1)
    """Save the adapter or the model after every n epochs. It is always saved at the end."""
    save_every_n_steps: int | None = Field(default=None, ge=1)
    """Save after every n steps."""
    save_every_n_examples: int | None = Field(default=None, ge=1)
    """Save after every n images seen."""
    save_every_n_minutes: float | None = Field(default=None, gt=0)
    """Save at the first step after every n minutes."""
    save_dtype: Dtype | None = None
    """The type that the saved weights are converted to. Absent: as they are trained."""
    checkpoint_every_n_epochs: int | None = Field(default=None, ge=1)
    """Save the training state, to resume from, after every n epochs."""
    checkpoint_every_n_steps: int | None = Field(default=None, ge=1)
    """Save the training state after every n steps."""
    checkpoint_every_n_minutes: float | None = Field(default=None, gt=0)
    """Save the training state at the first step after every n minutes."""
    keep_last: int = Field(default=DEFAULT_KEEP_LAST, ge=2)
    """Number of training states that are kept."""
    caching_batch_size: int | None = Field(default=None, ge=1)
    """Images the VAE, and captions the text encoder, take at once while the cache is filled. Absent: 1 on the CPU; on
    a GPU what suits its free memory and the resolution, halved if memory runs out. Values may differ by rounding with
    the number; with 1 none depends on what is encoded beside it."""
    cache_dir: Folder | None = None
    """Folder of the cache. Absent: `.anima_cache` in each data folder."""
    num_workers: int = Field(default=2, ge=0)
    """Threads that read the cache, and encode captions drawn at run time, ahead of the step; 0: the step waits for
    it. Results do not depend on it."""
    offline: bool = False
    """Open no connection: nothing is looked up or downloaded, and W&B only writes files, for `wandb sync` to send."""
    x_axis_examples: bool = False
    """Curves in TensorBoard and W&B over images seen instead of steps."""
    model: AnyModel
    """The model."""
    adapter: AnyAdapter = Full()
    """The thing to train: a LoRA, a LoKr, a LoHa, or (absent) the whole model."""
    optimizer: AnyOptimizer
    """The optimizer."""
    preservation: PreservationSettings | None = None
    """Samples that keep the base model as it is. Absent: none."""
    ema: Ema | None = None
    """Save, evaluate and draw an average of the trained weights. Absent: the weights as they are."""
    monitoring: Monitoring = Monitoring()
    """Trackers."""
    metadata: LicensedMetadata = Metadata()
    """The texts in saved files."""
    sampling: VariantSampling | None = None
    """Previews. Absent: none."""
    early_stopping: EarlyStopping | None = None
    """An end where evaluations, or the scores of previews, no longer get better. Absent: the run ends after its last
    step."""

    @field_validator(*CHECKS)
    @classmethod
    def fits(cls, value: Any, earlier: ValidationInfo) -> Any:
        """Refuse what excludes a field above, or could not take effect beside it."""
        for check in CHECKS[str(earlier.field_name)]:
            if (fault := check(value, earlier.data)) is not None:
                raise ValueError(fault)
        return value

    # What the rooms below take, made from the flat keys ---------------------------------------------------------------

    def timesteps(self) -> Timesteps:
        """Return the distribution of t."""
        model = self.model
        return Timesteps(model.timestep_sample_method, model.sigmoid_scale, model.shift, model.flux_shift)

    def loss(self) -> Loss:
        """Return the loss."""
        weight, by_area = self.model.multiscale_loss_weight, self.normalize_masked_loss
        if self.huber_delta is not None:
            return Loss("huber", self.huber_delta, weight, by_area)
        if self.smooth_l1_beta is not None:
            return Loss("smooth_l1", self.smooth_l1_beta, weight, by_area)
        if self.pseudo_huber_c is not None:
            return Loss("pseudo_huber", self.pseudo_huber_c, weight, by_area)
        return Loss(multiscale_weight=weight, by_mask_area=by_area)

    @property
    def recompute(self) -> Recompute:
        """The policy that `activation_checkpointing` names."""
        policies: dict[bool | str, Recompute] = {False: "nothing", True: "blocks", "selective": "selective"}
        return policies.get(self.activation_checkpointing, "offload")

    def learning_rates(self) -> LearningRates:
        """Return the base learning rate of each component."""
        rates: dict[Component, float] = {}
        for component in COMPONENTS:
            rate = self.model.learning_rate(component, self.optimizer.lr)
            rates[component] = rate if self.force_constant_lr is None or rate == 0 else self.force_constant_lr
        return LearningRates(rates) if self.force_constant_lr is not None else self.adapter.learning_rates(rates)

    @property
    def saves_states(self) -> bool:
        """True if training states are saved without being asked for."""
        return any(getattr(self, key) is not None for key in STATE_INTERVALS)

    def measures_drift(self, entry: EvalDataset) -> bool:
        """Return True if the drift on an evaluation set is measured."""
        keeps = self.adapter.leaves_base or self.eval_before_first_step
        return keeps and entry.measures_drift

    def eval_batch_sizes(self) -> int | list[list[int]]:
        """Return the micro-batch sizes for evaluation."""
        own = self.eval_micro_batch_size_per_gpu
        return self.micro_batch_size_per_gpu if own is None else own
