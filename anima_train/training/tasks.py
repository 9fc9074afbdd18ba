"""The work of a run between steps: evaluations, previews, and the times at which it is saved."""

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from anima_train.core.errors import Interrupted
from anima_train.core.files import write_text
from anima_train.core.format import count
from anima_train.data.plan import EpochSchedule, Plan
from anima_train.distributed.collectives import broadcast_from_main, patient_barrier
from anima_train.distributed.signals import Abandoned
from anima_train.evaluation.base_velocities import BaseVelocity, FromWeights, Recording, recorded
from anima_train.evaluation.bounds import Bounds, History, history_of
from anima_train.evaluation.evaluate import EvalSet, base_text, evaluate, masking_of, read_base
from anima_train.evaluation.previews import Previews
from anima_train.evaluation.results import Evaluation, described, score, summary
from anima_train.run.intervals import next_event
from anima_train.run.manifest import seen_facts
from anima_train.training.anomalies import naming, step_names
from anima_train.training.build import all_intervals
from anima_train.training.context import RunContext
from anima_train.training.divided import LLM_ADAPTER, TRANSFORMER, divided_passes, whole_pass
from anima_train.training.late import LateSteps
from anima_train.training.memory import MicroBatchShape
from anima_train.training.metrics import MadeStep, StepLogger
from anima_train.training.prefetch import RankStep
from anima_train.training.prepare import Prepared
from anima_train.training.saving import Saver
from anima_train.training.setup import TrainState
from anima_train.training.strengths import try_all

logger = logging.getLogger(__name__)

RESUME_HINT = "resume with the same command or --resume"


@dataclass
class PeriodicTasks:
    """Does what is due between steps: all processes evaluate, the main one draws and writes."""

    context: RunContext
    state: TrainState
    data: Prepared
    plan: Plan
    schedule: EpochSchedule
    previews: Previews | None
    saver: Saver
    log: StepLogger
    evaluated: MicroBatchShape  # the largest micro-batch of an evaluation
    lag: int  # see `LateSteps`

    def __post_init__(self) -> None:
        self.late = self.context.stack.enter_context(LateSteps(self.lag, self.log_step, self.check_skipped))
        config = self.context.config
        self.bounds = Bounds(
            config.keep_best, config.early_stopping, config.forgetting_budget, config.at_budget == "stop",
            tuple(f"{each.name}/drift_relative" for each in self.data.evals
                  if each.role == "retention" and each.measures_drift),
        )  # fmt: skip
        self.ending = self.end_by_bounds()  # why the run ends now, before its last step; the same on all processes
        self.lockstep = None if self.state.shards is None else divided_passes(self.context, self.state)
        self.intervals = all_intervals(self.context.config, time.monotonic())

    def before_first_step(self) -> list[str]:
        """Return the names of what is to be done before the first step, or was left by a process that had to stop."""
        if (saved := self.context.resume_point.saved) is not None:
            return saved.manifest.pending
        config = self.context.config
        draws = config.sampling is not None and config.sampling.before_first_step
        return [name for name, due in (("evaluation", config.eval_before_first_step), ("preview", draws)) if due]

    def run_due(self, step: RankStep) -> None:
        """Do what is due after a step, and what signals and files ask for.

        Raises:
            Interrupted: the run is to stop, and its state is saved.
        """
        context, state = self.context, self.state
        self.saver.writer.check()
        seen_before = state.samples_seen - step.planned.num_samples
        place = (state.step, step.epoch, self.schedule.epochs_done(step.index), seen_before, state.samples_seen)
        due = {name: interval.after(*place) for name, interval in self.intervals.items()}
        looks = [name for name in ("evaluation", "preview") if due[name]]
        if looks:
            self.late.tell_all()
        pending = self.run(looks)
        writes = [context.is_main and due[name] for name in ("save", "training state")]  # the others' clocks differ
        request = context.signals.requested(context.accelerator, *writes)
        is_last = state.step == self.schedule.num_steps or self.ending is not None
        if request.waits or is_last:
            self.late.tell_all()  # not before the request: all processes do it in the same step
        if self.saver.writes and request.waits:
            with self.log.progress.doing("saving"):
                if request.weights and not is_last:
                    self.saver.save_weights(state.step)
                if request.state:
                    self.saver.save_state(state.step, pending)
        if request.exit_code is not None and (pending or not is_last):
            self.wait_for_writes()
            raise Interrupted(f"after step {state.step}; {RESUME_HINT}", request.exit_code)
        if request.waits:
            patient_barrier(context.accelerator)  # where the disk is slower than the steps, saving waits for it

    def run(self, names: Sequence[str]) -> list[str]:
        """Evaluate or draw; return the names of what is left to the process that goes on, as this one is to stop."""
        makers: dict[str, Callable[[], None]] = {"evaluation": self.evaluate, "preview": self.preview}
        left = []
        for name in names:
            if self.context.signals.is_requested(self.context.accelerator):
                left.append(name)
                continue
            memory = self.context.memory
            memory.doing, memory.shape = (
                ("an evaluation", self.evaluated) if name == "evaluation" else ("a preview", None)
            )
            try:
                with self.log.progress.doing(name):
                    makers[name]()
            except Abandoned:
                left.append(name)
            patient_barrier(self.context.accelerator)  # one process draws
        if names:  # also what was left by the process before this one
            self.heed_bounds()
        return left

    def evaluate(self) -> None:
        """Measure and log the loss of every evaluation set.

        Raises:
            Abandoned: the run is to stop; nothing is logged.
        """
        context, state = self.context, self.state
        with state.averaged():
            results = self.measured()
            norms = state.update_norms() if self.saver.writes else {}
        if not context.is_main or not results:
            return
        folder = context.folder
        if state.step == 0:
            write_text(folder.base_path, base_text(results, self.data.evals))
        base = read_base(folder.base_path, self.data.evals)
        for result in results:
            numbers = result.metrics(base.get(result.name))
            self.log_evaluation(numbers | norms if result is results[0] else numbers)
            logger.info("step %d: %s", state.step, described(result, base.get(result.name)))
        self.log_evaluation(summary(results, base))
        found = score(results)
        self.saver.scores = {state.step: found} if math.isfinite(found) else {}  # such a step is not the best one
        kept = "" if math.isfinite(found) else "; a state of this step is not kept as the best"
        for result in results:
            if not math.isfinite(result.loss):
                text = "the loss of the evaluation set %s is not finite%s"
                logger.warning(text, result.name, kept, extra={"step": state.step})

    def measured(self) -> list[Evaluation]:
        """Return the evaluation of every set with the weights as they are; raises as `evaluate`."""
        context, config, state = self.context, self.context.config, self.state
        idle = None if state.shards is None else partial(whole_pass, state.transformer, context.device)
        results = []
        for eval_set in self.data.evals:
            velocities = self.base_velocity(eval_set)
            results.append(evaluate(
                state.model, eval_set, config.loss(), config.timesteps(), context.accelerator, config.num_workers,
                context.signals, idle, velocities, masking_of(state.transformer),
            ))  # fmt: skip
            if isinstance(velocities, Recording):
                rank = context.accelerator.process_index
                velocities.save(context.folder.base_velocities, eval_set.name, eval_set.identity, rank)
        return results

    def base_velocity(self, eval_set: EvalSet) -> BaseVelocity | None:
        """Return the base model's velocity on a set; None where drift is not measured, or the base was not kept."""
        config, state = self.context.config, self.state
        if not eval_set.measures_drift:
            return None
        if config.adapter.leaves_base:
            return FromWeights(state.model, partial(config.adapter.as_base, state.transformer))
        if state.step == 0:
            return Recording()
        folder = self.context.folder.base_velocities
        found = recorded(folder, eval_set.name, eval_set.identity, eval_set.places)
        if found is None:
            text = "no drift of the evaluation set %s: what the base does with these pictures is not in %s"
            logger.warning(text, eval_set.name, folder, extra={"step": state.step})
        return found

    def history(self) -> History:
        """Return what evaluations and previews have logged, on the main process."""
        folder = self.context.folder
        return history_of(folder.lines(folder.evaluations_path), folder.lines(folder.scores_path))

    def end_by_bounds(self) -> str | None:
        """Return on all processes why the run has come to its end by what was logged; None: it has not.

        After the last step, where it ends anyway, nothing else has ended it.
        """
        if not self.bounds.are_any or self.state.step >= self.schedule.num_steps:
            return None
        return broadcast_from_main(self.context.accelerator, lambda: self.bounds.ending(self.history()))

    def is_best(self) -> bool:
        """Return on all processes whether the weights as they are now are the best until now."""
        step = self.state.step
        return bool(step) and broadcast_from_main(
            self.context.accelerator, lambda: self.bounds.best(self.history()) == step
        )  # fmt: skip

    def heed_bounds(self) -> None:
        """Keep the weights of this step if they are the best, and look whether the run ends by them."""
        if not self.bounds.are_any:
            return
        if self.is_best() and self.saver.writes:
            self.saver.save_weights(self.state.step, self.context.folder.best_path)
        self.ending = self.end_by_bounds()

    def log_evaluation(self, values: Mapping[str, float]) -> None:
        """Log numbers of an evaluation, in the run's folder and to the trackers."""
        if values:
            step, examples, folder = self.state.step, self.state.samples_seen, self.context.folder
            folder.log(folder.evaluations_path, {"step": step, "examples": examples, **values})
            self.log.trackers.log(values, self.log.x(step, examples))

    def preview(self) -> None:
        """Draw the previews, if this process does; a failure is a warning.

        Raises:
            Abandoned: the run is to stop.
        """
        with self.state.averaged():
            paths, pictures = self.draw(self.previews)
            norms = self.state.update_norms() if self.saver.writes and not self.data.evals else {}
        if not paths or self.previews is None:
            return
        step, examples, folder = self.state.step, self.state.samples_seen, self.context.folder
        logger.info("step %d: %s in %s", step, count(len(paths), "preview"), self.previews.folder)
        self.log.trackers.show(pictures, self.log.x(step, examples))
        self.log_evaluation(norms)  # where no evaluation does
        if (found := self.previews.scored(paths)) is not None:
            folder.log(folder.scores_path, {"step": step, "examples": examples, **self.previews.record(found)})
            self.log.trackers.log(found.metrics(), self.log.x(step, examples))
            better = "higher" if found.higher_is_better else "lower"
            text = "step %d: %s %.4g, mean over the previews; %s is better"
            logger.info(text, step, found.judge, found.mean, better)

    def draw(self, previews: Previews | None) -> tuple[list[Path], Mapping[str, np.ndarray]]:
        """Draw with the weights as they are; return files and pictures, none where it fails, with a warning.

        Args:
            previews: None: another process draws, and this one takes part in its passes.

        Raises:
            Abandoned: the run is to stop.
        """
        state, lockstep = self.state, self.lockstep
        if previews is None:
            if lockstep is not None:
                lockstep.follow()
            return [], {}
        self.context.folder.check()
        model = self.context.accelerator.unwrap_model(state.model, keep_fp32_wrapper=True)

        def lead(kind: int, make: Callable[[], Tensor]) -> Tensor:
            if lockstep is not None:
                return lockstep.lead(kind, make)
            self.context.signals.leave_if_requested()
            return make()

        def forward(latents: Tensor, t: Tensor, context: Tensor) -> Tensor:
            return lead(TRANSFORMER, lambda: model(latents, t, context))

        try:
            with contextlib.nullcontext() if lockstep is None else lockstep.leading():
                paths = previews.draw(state.step, state.transformer, forward, partial(lead, LLM_ADAPTER))
            return paths, previews.pictures(paths)
        except (Abandoned, Interrupted):
            raise
        except Exception as error:
            if lockstep is not None and lockstep.is_broken:
                raise  # the others are in a pass that this process has left
            logger.warning("no preview (%s)", error, extra={"step": state.step})
            return [], {}

    def try_strengths(self) -> None:
        """Measure and draw the adapter, as it is saved, at each of the wished strengths; keep and tell what is found.

        Raises:
            Interrupted: the run is to stop; the process that resumes tries them.
        """
        context = self.context
        if not context.config.strengths_after_training:
            return
        try:
            with self.log.progress.doing("strengths"), self.state.averaged():
                try_all(context, self.state, self.evaluated, self.measured, self.previews, self.draw)
        except Abandoned:
            request = context.signals.requested(context.accelerator)
            if self.saver.writes:
                self.saver.save_state(self.state.step)
            self.wait_for_writes()
            assert request.exit_code is not None
            raise Interrupted(f"while strengths were tried; {RESUME_HINT}", request.exit_code) from None

    def log_step(self, made: MadeStep) -> None:
        """Log a step's numbers; warn of an update that was skipped, with the images of the step."""
        result = made.result()
        if problem := self.state.skipped.after(result.losses.loss, result.grad_norm):
            warning = naming(problem, step_names(made.planned.planned, self.plan.samples))
            logger.warning(warning, extra={"step": made.number})
        self.log.step(made, result, next_event(self.intervals, made.number, self.schedule))

    def check_skipped(self, made: MadeStep) -> None:
        """Look at how many updates in a row were skipped with that of this step.

        Raises:
            NumericError: too many; the state before them is saved.
        """
        skipped = self.state.skipped
        if skipped.is_over:
            if self.saver.writes and self.state.release is None:
                self.saver.save_state(made.number - skipped.in_a_row)  # nothing has changed since, see `UpdateGuard`
            self.wait_for_writes()
        skipped.check(is_saved=self.state.release is None)

    def finish(self) -> Path:
        """Save the weights after the last step, and note that the run has come to its end; return their path."""
        folder = self.context.folder
        if self.ending is not None:
            logger.info("the run ends after step %d: %s", self.state.step, self.ending)
        with self.log.progress.doing("saving"):
            if self.saver.writes:
                self.saver.save_weights(None)
            self.saver.writer.wait()
        self.try_strengths()
        if self.context.is_main:
            seen = seen_facts(self.plan, self.schedule, self.state.step)
            folder.check()
            write_text(folder.seen_path, json.dumps(seen, indent=1))
            folder.finish(self.ending)
            logger.info("saved %s", folder.weights_path(None))
        patient_barrier(self.context.accelerator)
        return folder.weights_path(None)

    def wait_for_writes(self) -> None:
        """Wait until all is written: a process that leaves while another one saves would end that, too."""
        with self.log.progress.doing("saving"):
            self.saver.writer.wait()
            patient_barrier(self.context.accelerator)
