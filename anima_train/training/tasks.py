"""What a run leaves while it trains, beside its numbers: evaluations, previews, weights and training states."""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from anima_train.checkpoint.async_writer import AsyncWriter, Groups
from anima_train.checkpoint.training_state import StateManifest, save_state, state_tensors
from anima_train.checkpoint.weights import save_weights, weights_metadata, weights_to_save
from anima_train.config.config import Config
from anima_train.core.device import DTYPES
from anima_train.core.errors import Interrupted
from anima_train.core.files import write_text
from anima_train.core.format import count
from anima_train.data.plan import Plan, Timetable
from anima_train.distributed.signals import Abandoned, Stopping
from anima_train.evaluation.evaluate import EvalSet, base_text, evaluate, read_base
from anima_train.evaluation.previews import Previews
from anima_train.model.dit import MiniTrainDIT
from anima_train.model.loading import ModelFiles
from anima_train.optim.ema import WeightAverage
from anima_train.run.folder import RunFolder
from anima_train.run.manifest import plain
from anima_train.run.progress import ProgressBar
from anima_train.run.trackers import Trackers


@dataclass(frozen=True)
class Moment:
    """A time between two steps."""

    step: int  # how many were made
    seen: int  # images in them


@dataclass(frozen=True)
class Trained:
    """A transformer in training."""

    transformer: MiniTrainDIT
    model: nn.Module  # the same, as the device and the processes need it
    optimizer: Optimizer
    average: WeightAverage | None

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """While entered, the weights are those that are looked at and saved: with [ema], their average."""
        return contextlib.nullcontext() if self.average is None else self.average.in_place()


@dataclass
class Outputs:
    """Makes what is due after a step."""

    config: Config
    run: RunFolder
    accelerator: Accelerator
    stopping: Stopping
    writer: AsyncWriter
    progress: ProgressBar
    trackers: Trackers
    trained: Trained
    files: ModelFiles
    plan: Plan
    timetable: Timetable
    evals: Sequence[EvalSet]
    previews: Previews | None
    facts: Mapping[str, Any]  # what the run is made from
    scores: dict[int, float] = field(default_factory=dict)  # mean evaluation loss after a step

    def make(self, names: Iterable[str], moment: Moment) -> list[str]:
        """Make what is due; returns the names of what is left to the process that goes on, as this one is to stop."""
        makers: dict[str, Callable[[Moment], None]] = {"evaluation": self.evaluate, "preview": self.preview}
        left = []
        for name in names:
            if self.stopping.is_asked(self.accelerator):
                left.append(name)
                continue
            try:
                makers[name](moment)
            except Abandoned:
                left.append(name)
        return left

    def evaluate(self, moment: Moment) -> None:
        """Measure and log the loss of every evaluation set.

        Raises:
            Abandoned: the run is to stop; nothing is logged.
        """
        config = self.config
        with self.trained.averaged():
            results = [
                evaluate(
                    self.trained.model, eval_set, config.loss(), config.timesteps(), self.accelerator,
                    config.num_workers, self.stopping,
                )
                for eval_set in self.evals
            ]  # fmt: skip
        if not self.accelerator.is_main_process:
            return
        if moment.step == 0:
            write_text(self.run.base_path, base_text(results, self.evals))
        base = read_base(self.run.base_path, self.evals)
        for result in results:
            values = result.metrics(base.get(result.name))
            self.run.log(self.run.evaluations_path, {"step": moment.step, "examples": moment.seen, **values})
            self.progress.say(f"step {moment.step}: {result.name}/loss {values[f'{result.name}/loss']:.5f}")
            self.trackers.log(values, self.x(moment))
        if results:
            self.scores = {moment.step: sum(float(result.losses.mean()) for result in results) / len(results)}

    def preview(self, moment: Moment) -> None:
        """Draw the previews, if this process does; a failure is a warning.

        Raises:
            Abandoned: the run is to stop.
        """
        previews, trained = self.previews, self.trained
        if previews is None:
            return
        model = self.accelerator.unwrap_model(trained.model, keep_fp32_wrapper=True)

        def forward(latents: Tensor, t: Tensor, context: Tensor) -> Tensor:
            self.stopping.leave_if_asked()
            velocity: Tensor = model(latents, t, context)
            return velocity

        try:
            with trained.averaged():
                paths = previews.draw(moment.step, trained.transformer, forward)
            pictures = previews.pictures(paths)
        except (Abandoned, Interrupted):
            raise
        except Exception as error:  # noqa: BLE001  # whatever it is, the training goes on
            self.progress.say(f"warning: step {moment.step}: no preview ({error})")
            self.run.warn(moment.step, f"no preview ({error})")
            return
        self.progress.say(f"step {moment.step}: {count(len(paths), 'preview')} in {previews.folder}")
        self.trackers.show(pictures, self.x(moment))

    def x(self, moment: Moment) -> int:
        """Where a moment is on the curves' axis."""
        return moment.seen if self.config.x_axis_examples else moment.step

    def save_weights(self, step: int | None) -> Path:
        """Have the LoRA or the model written; None: after the last step. Returns where it will be."""
        path = self.run.weights_path(step)
        done = self.timetable.num_steps if step is None else step
        epoch = self.timetable.place(max(0, done - 1))[0] + 1
        config = self.config
        metadata = weights_metadata(
            self.run.name, done, epoch, len(self.plan.samples), config.seed, config.adapter, config.optimizer,
            config.lr_scheduler.type,
        )  # fmt: skip

        def write(groups: Groups) -> None:
            save_weights(path, groups["weights"], metadata)
            if self.config.adapter.is_without_effect(groups["weights"]):
                warning = f"{path.name} changes nothing: every lora_B in it is zero; is the learning rate too low?"
                self.progress.say(f"warning: {warning}")
                self.run.warn(done, warning)
            if step is not None:
                self.progress.say(f"step {step}: saved {path}")

        with self.trained.averaged():
            dtype = None if self.config.save_dtype is None else DTYPES[self.config.save_dtype]
            tensors = weights_to_save(self.config.adapter, self.trained.transformer, self.files, dtype)
            self.writer.write({"weights": tensors}, write)
        return path

    def save_state(self, step: int, pending: Sequence[str] = ()) -> None:
        """Have the training state after a step written."""
        trained = self.trained
        facts = StateManifest(
            step=step,
            optimizer=type(trained.optimizer).__name__,
            pending=list(pending),
            score=self.scores.get(step),
            run=dict(self.facts),
            config=plain(self.config),
        )

        def write(groups: Groups) -> None:
            self.run.sync()  # what was logged before the state
            save_state(self.run.checkpoints, facts, groups, self.config.keep_last)

        self.writer.write(state_tensors(trained.transformer, trained.optimizer, trained.average), write)
