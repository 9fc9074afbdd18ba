"""What a run does on a GPU, on CUDA tensors without values: everything is on the device, and nothing waits unseen.

`scripts/benchmarks/fake_cuda.py` says what has a stand-in. Not covered: values, memory, streams, kernels that only a
GPU has, what Accelerate does when it finds a GPU, and the pixels of a preview after the VAE, which PIL makes.
"""

import contextlib
import importlib
import itertools
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.checkpoint import checkpoint

from anima_train.checkpoint.async_writer import on_host
from anima_train.checkpoint.weights import weights_to_save
from anima_train.config.load import load_config
from anima_train.data.plan import EpochSchedule, Plan
from anima_train.evaluation.evaluate import evaluate, masked_ranks
from anima_train.evaluation.previews import Previews
from anima_train.model import block_swap, safetensors_io
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.loading import ModelSpec
from anima_train.model.recompute import runner
from anima_train.model.vae import load_vae
from anima_train.training.anomalies import UpdateGuard
from anima_train.training.context import RunContext, run_context
from anima_train.training.metrics import StepSums
from anima_train.training.prefetch import prefetch_steps, rank_steps
from anima_train.training.prepare import Prepared, prepare_data
from anima_train.training.setup import TrainState, build_model, build_plan, encode_previews
from anima_train.training.train import train_step

REPO = Path(__file__).parents[2]
CUDA = torch.device("cuda", 0)
BF16 = {"model": {"dtype": "bfloat16"}, "monitoring": {"tensorboard": False}}
FULL = BF16 | {"adapter": None, "optimizer": {"type": "adamw_optimi", "lr": 1e-5}}
T_LORA = {"adapter": {"rank": 4, "min_rank": 1}}
INT8 = BF16 | {"model": {"dtype": "bfloat16", "transformer_dtype": "int8"}}
WAITS_OF_A_STEP = 0  # its numbers are read later, see `test_waits.py`


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """The benchmarks can be imported."""
    with pytest.MonkeyPatch.context() as context:
        context.syspath_prepend(str(REPO / "scripts"))
        yield


@pytest.fixture(scope="module")
def fake(scripts) -> ModuleType:
    """`scripts/benchmarks/fake_cuda.py`."""
    return importlib.import_module("benchmarks.fake_cuda")


@pytest.fixture(scope="module")
def counting(scripts) -> ModuleType:
    """`scripts/benchmarks/counting.py`."""
    return importlib.import_module("benchmarks.counting")


@dataclass(frozen=True)
class CudaRun:
    """A run whose files are real, and whose model is on a device that is not there."""

    run: RunContext
    data: Prepared
    spec: ModelSpec
    plan: Plan
    schedule: EpochSchedule
    previews: Previews | None
    waits: TorchDispatchMode

    def load(self) -> TrainState:
        return build_model(self.run, self.spec, self.schedule.num_steps)

    def step(self, state: TrainState) -> None:
        """One optimizer step, as the training loop makes it."""
        steps = itertools.islice(rank_steps(self.plan, self.schedule, 0, 0, 1), 1)
        sums = StepSums(self.run.device, has_roles=False)
        with prefetch_steps(steps, self.data.train, self.run.config.timesteps().at, 0.0, 1) as prefetched:
            for step, batches in prefetched:
                train_step(self.run, state, step, batches, sums, UpdateGuard(self.run.device, 0))


@pytest.fixture
def started(trainer, fake, monkeypatch):
    """Starts a run: data, prompts and files on the CPU, everything after them on fake CUDA tensors."""
    read_entry = safetensors_io.read_entry

    def read_real(*arguments: object) -> Tensor:
        with _disable_current_modes():
            return read_entry(*arguments)

    with contextlib.ExitStack() as stack:

        def start(**changes) -> CudaRun:
            run = stack.enter_context(run_context(load_config(trainer.config(**changes), []), False, None))
            data = prepare_data(run.loaded, run.accelerator)
            plan, schedule = build_plan(run, data)
            previews = encode_previews(run, data.spec)
            spec = replace(data.spec, device=CUDA)
            PartialState().device = run.accelerator.state.device = CUDA
            monkeypatch.setattr(safetensors_io, "read_entry", read_real)
            waits = stack.enter_context(fake.fake_cuda())
            if previews is not None:
                previews = replace(previews, spec=spec)
            return CudaRun(run, data, spec, plan, schedule, previews, waits)

        reset()
        yield start
    reset()


def reset() -> None:
    """Accelerate keeps one configuration per process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def devices(tensors) -> set[torch.device]:
    return {tensor.device for tensor in tensors}


@pytest.mark.parametrize(
    "changes",
    [
        *(BF16, FULL, INT8),
        *(BF16 | T_LORA | {"activation_checkpointing": policy} for policy in (True, "selective", "offload")),
    ],
)
def test_a_step_is_on_the_device_from_the_files_to_the_update(started, changes):
    cuda = started(**changes)
    state = cuda.load()
    assert devices(state.transformer.parameters()) == devices(state.transformer.state_dict().values()) == {CUDA}
    assert cuda.waits.total == 0
    gradients = []
    is_int8 = state.transformer.blocks[0].mlp.layer1.weight in list(state.transformer.modules())
    step = state.optimizer.step
    state.optimizer.step = lambda: (gradients.extend(each.grad for each in state.parameters), step())
    with Operations() as operations:
        cuda.step(state)
    assert state.step == 1
    assert devices(gradients) == {CUDA}
    assert (operations.names["anima_train.integer_product.default"] > 0) == is_int8
    moments = [value for each in state.optimizer.state.values() for name, value in each.items() if name != "step"]
    assert len(moments) >= 2 * len(state.parameters)
    assert devices(moments) == {CUDA}
    assert cuda.waits.total == WAITS_OF_A_STEP, cuda.waits.numbers


SWAPPED = {"blocks_to_swap": 2, "gradient_accumulation_steps": 2}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [BF16, FULL], ids=["lora", "full"])
def test_a_step_with_swapped_blocks_waits_for_nothing_and_saves_the_bytes_that_are_told(
    started, counting, monkeypatch, changes
):
    monkeypatch.setattr(block_swap, "MAX_BUFFERS", 1)  # the tiny model has two blocks

    def held_bytes(cuda: CudaRun) -> list[int]:
        """Bytes on the device: when all is loaded, before each block of a step, and after it.

        Without the sample of weights that is compared, which leaves swapped ones out.
        """
        with counting.MadeStorages("cuda") as made:
            state = cuda.load()

            def alive() -> int:
                sample = (state.moved.first, *(state.moved.last or ()))
                return sum(made.alive().values()) - sum(tensor.nbytes for tensor in sample)

            held = [alive()]
            run = state.transformer.run_block

            def watched(*inputs: object) -> Tensor:
                held.append(alive())
                return run(*inputs)

            state.transformer.run_block = watched
            cuda.step(state)
            held.append(alive())
        assert devices(state.transformer.parameters()) == {CUDA}
        assert cuda.waits.total == WAITS_OF_A_STEP, cuda.waits.numbers
        return held

    cuda = started(**changes | SWAPPED)
    found = held_bytes(cuda)
    plain = held_bytes(replace(cuda, run=without_swapping(cuda.run)))
    shape = TransformerShape.of(cuda.spec.files.transformer_header.entries)
    told = block_swap.saved_bytes(block_swap.num_swapped_values(shape) * 2, 2)
    padding = 256 * 14  # for the alignment of the block's tensors
    assert len(found) == 2 + 2 * 2
    assert all(told - padding <= before - now <= told for before, now in zip(plain, found, strict=True))


def without_swapping(run: RunContext) -> RunContext:
    """The same run, its blocks on the device."""
    loaded = replace(run.loaded, config=run.config.model_copy(update={"blocks_to_swap": 0}))
    return replace(run, loaded=loaded)


def test_a_trained_llm_adapter_is_on_the_device(started):
    cuda = started(model={"dtype": "bfloat16", "llm_adapter_lr": 1e-5})
    state = cuda.load()
    cuda.step(state)
    assert state.step == 1
    assert cuda.waits.total == WAITS_OF_A_STEP, cuda.waits.numbers


def test_an_evaluation_reads_from_the_device_once_a_batch(started, images_drawer, tmp_path):
    images = images_drawer(tmp_path / "held", [(96, 96)] * 2)
    held = {"resolutions": [96], "directory": [{"path": str(images)}]}
    cuda = started(
        **BF16 | T_LORA, eval_datasets=[{"name": "held", "config": held}], eval_every_n_epochs=1,
        eval_micro_batch_size_per_gpu=2,
    )  # fmt: skip
    state = cuda.load()
    (eval_set,) = cuda.data.evals
    config = cuda.run.config
    found = evaluate(
        state.model, eval_set, config.loss(), config.timesteps(), cuda.run.accelerator, 1, cuda.run.signals,
        masking=partial(masked_ranks, state.transformer),
    )  # fmt: skip
    assert found.losses.shape == found.masked.shape == (2, 9)
    assert cuda.waits.total == 9
    assert state.model.training


def test_a_preview_reads_from_the_device_once_a_picture(started):
    prompts = [{"prompt": "red circle", "cfg": 1}, {"prompt": "1girl", "negative_prompt": "bad", "steps": 1}]
    cuda = started(**BF16, sampling={"every_n_steps": 2, "width": 96, "height": 64, "steps": 4, "prompts": prompts})
    state = cuda.load()
    state.transformer.eval()
    previews = cuda.previews
    latents = [previews.latents(each, previews.frozen_contexts, state.model) for each in previews.requests]
    assert devices(latents) == {CUDA}
    assert cuda.waits.total == 2  # whether they are finite
    vae = load_vae(cuda.spec.files.vae, cuda.spec.dtype, CUDA)
    pictures = [vae.decode(each) for each in latents]
    assert [picture.shape for picture in pictures] == [(1, 3, 64, 96)] * 2
    assert devices(pictures) == {CUDA}
    assert cuda.waits.total == 2


@pytest.mark.parametrize("changes", [BF16, FULL])
def test_saving_copies_each_tensor_once(started, changes):
    cuda = started(**changes)
    state = cuda.load()
    adapter = cuda.run.config.adapter
    trained = adapter.tensors(state.transformer)
    assert devices(trained.values()) == {CUDA}
    tensors = weights_to_save(adapter, state.transformer, cuda.spec.files, torch.bfloat16)
    before = cuda.waits.total
    copies = on_host({"weights": tensors})["weights"]
    assert devices(copies.values()) == {torch.device("cpu")}
    assert cuda.waits.total - before == len(trained)  # a frozen LLM adapter comes from its file
    assert copies.keys() >= trained.keys()


def test_a_tensor_on_the_wrong_device_a_wait_and_a_shape_from_values_are_seen(fake):
    with fake.fake_cuda() as waits:
        values = torch.rand(4, device=CUDA)
        with pytest.raises(RuntimeError, match="device"):
            values + torch.rand(4)
        assert waits.total == 0
        for read in (torch.Tensor.item, bool, float):
            read(values.sum())
        assert values.tolist() == [1.0] * 4
        values.cpu()
        values.to("cpu", non_blocking=True)
        pinned = torch.empty(4, pin_memory=True)
        pinned.copy_(values, non_blocking=True)
        assert waits.numbers == {"item": 3, "copy to the host": 2}
        event = torch.Event(CUDA)
        event.record()
        event.synchronize()
        torch.accelerator.synchronize()
        assert waits.numbers == {"item": 3, "copy to the host": 2, "event": 1, "device": 1}
        for shaped in (torch.nonzero, torch.unique, lambda tensor: tensor[tensor > 0]):
            with pytest.raises(RuntimeError):
                shaped(values)


class Operations(TorchDispatchMode):
    """The operations in their order."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[str(function)] += 1
        return function(*args, **(kwargs or {}))


class Twofold(torch.autograd.Function):
    """Two outputs, one of which nobody uses, from arguments of which one is no tensor."""

    @staticmethod
    def forward(ctx, x, factor, frozen):
        ctx.save_for_backward(x, frozen)
        return x * factor, x + frozen

    @staticmethod
    def backward(ctx, gradient, unused):
        assert not unused.any()
        return gradient * 2 + unused, None, None


@pytest.mark.parametrize("checkpoints", [False, True])
def test_the_walk_through_the_graph_is_the_engines(fake, checkpoints):
    torch.manual_seed(0)
    model = MiniTrainDIT(TransformerShape(2, 128, 64, 16, 64, 16))
    model.run_block = runner("blocks" if checkpoints else "nothing")
    x, t, text = torch.randn(2, 16, 1, 8, 8), torch.rand(2, 1), torch.randn(2, 9, 64)
    model(x, t, text)  # makes the table of rotary values, which is kept
    frozen = torch.ones(1)

    def run(patched) -> tuple[Counter, dict[str, Tensor]]:
        model.zero_grad(set_to_none=True)
        with patched, torch.autograd.set_multithreading_enabled(False), Operations() as operations:
            for _ in range(2):  # the second adds to the gradients of the first
                found = Twofold.apply(model(x, t, text), 2.0, frozen)[0]
                if checkpoints:
                    found = checkpoint(torch.tanh, found, use_reentrant=False)
                found.square().mean().backward()
        return operations.names, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    engine = run(contextlib.nullcontext())
    walked = run(patch.object(torch.autograd, "_engine_run_backward", fake.run_backward))
    assert walked[0] == engine[0]
    assert all(torch.equal(walked[1][name], gradient) for name, gradient in engine[1].items())


def test_autocast_attention_and_norms_are_those_of_cuda(fake):
    with fake.fake_cuda(), Operations() as operations:
        heads = torch.rand(1, 2, 8, 64, device=CUDA, requires_grad=True)
        F.scaled_dot_product_attention(heads, heads, heads).sum().backward()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            found = F.scaled_dot_product_attention(heads, heads, heads)
            assert F.linear(heads, heads[0, 0]).dtype == found.dtype == torch.bfloat16
            assert F.layer_norm(found, (64,)).dtype == torch.float32
        found.sum().backward()
        F.rms_norm(heads, (64,))
    assert operations.names >= Counter(
        f"aten._{name}.default"
        for name in (
            "scaled_dot_product_efficient_attention", "scaled_dot_product_efficient_attention_backward",
            "scaled_dot_product_flash_attention", "scaled_dot_product_flash_attention_backward", "fused_rms_norm",
        )
    )  # fmt: skip


def test_kernels_and_bytes_are_those_counted_by_hand(fake, counting):
    with fake.fake_cuda(), counting.KernelCounter("cuda") as counter:
        wide = torch.empty(8, 16, device=CUDA)  # float32, nothing is launched
        column = torch.empty(8, 1, device=CUDA)
        on_host = torch.ones(8) + 1
        assert (counter.kernels, counter.elementwise_bytes) == (0, 0)
        wide * wide  # one read, one write
        assert (counter.kernels, counter.elementwise_bytes) == (1, 2 * 512)
        wide * column.expand(8, 16)  # the view is none, and its source is read
        assert (counter.kernels, counter.elementwise_bytes) == (2, 2 * 512 + (2 * 512 + 32))
        wide[:, :4].add_(1)  # a quarter, read and written
        assert (counter.kernels, counter.elementwise_bytes) == (3, 2 * 512 + (2 * 512 + 32) + 256)
        wide.zero_()  # only written
        assert (counter.kernels, counter.elementwise_bytes) == (4, 2 * 512 + (2 * 512 + 32) + 256 + 512)
        product = wide @ wide.T
        product.addmm_(wide, wide.T)
        assert (counter.kernels, counter.elementwise_bytes) == (6, 2 * 512 + (2 * 512 + 32) + 256 + 512)
        torch.mul(wide, wide, out=torch.empty_like(wide))  # what it writes into is not read
        assert (counter.kernels, counter.elementwise_bytes) == (7, 2 * 512 + (2 * 512 + 32) + 256 + 512 + 2 * 512)
    assert on_host.device.type == "cpu"


def test_kept_bytes_are_those_counted_by_hand(fake, counting):
    with fake.fake_cuda():
        layer = torch.nn.Linear(16, 32, device=CUDA)
        x = torch.rand(8, 16, device=CUDA)

        def kept(forward, **options) -> int:
            with counting.KeptBytes(layer, [x], **options) as bytes_:
                loss = forward()
            assert loss.requires_grad
            return bytes_.total

        hidden, scalar = 8 * 32 * 4, 4
        assert kept(lambda: layer(x).sum()) == scalar  # the input is the caller's
        assert kept(lambda: layer(x).exp().sum()) == hidden + scalar  # its output
        assert kept(lambda: F.gelu(layer(x)).tanh().sum()) == 2 * hidden + scalar
        assert kept(lambda: F.gelu(layer(x)).tanh().sum(), sees_operations=False) == 2 * hidden
        assert kept(lambda: checkpoint(lambda y: layer(y).exp().sum(), x, use_reentrant=False)) == scalar
