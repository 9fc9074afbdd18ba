"""The `Accelerator` of a run: device, processes and autocast."""

from datetime import timedelta

from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import GradientAccumulationPlugin, patch_environment

from anima_train.core.device import choose_device

TIMEOUT = timedelta(minutes=15)  # after which a process that waits in vain for another one ends the run


def make_accelerator(autocast: bool) -> Accelerator:
    """Return what decides about device, processes and autocast.

    Args:
        autocast: True where the weights are float32 and the computation is in bfloat16; a model whose weights are in
            the dtype of the computation converts its inputs itself.
    """
    # What `distributed.environment` has read is not read again: accelerate would divide the model in its own way.
    with patch_environment(ACCELERATE_USE_FSDP="false", ACCELERATE_USE_PARALLELISM_CONFIG="false"):
        return Accelerator(
            cpu=choose_device().type == "cpu",
            mixed_precision="bf16" if autocast else "no",
            dynamo_backend="no",  # the blocks are compiled, by `model.compiled`
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # it would divide the loss
            kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
        )
