"""The kernel of attention is one that works here, and the one that is used."""

import logging
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from anima_train.core.determinism import deterministic_kernels
from anima_train.core.errors import ConfigError
from anima_train.model.attention_choice import (
    FUSED,
    AttentionChoice,
    AttentionShape,
    choose_attention,
    fastest,
    try_kernels,
)
from anima_train.model.loading import ModelFiles
from anima_train.model.tiny import tiny_paths

CPU = torch.device("cpu")
SHAPE = AttentionShape(batch_size=1, num_heads=2, num_tokens=4096, head_dim=32)


def kernel_of(mask=None):
    """The name of the operation that attention records for its backward pass."""
    query = torch.ones(1, 2, 16, 32, requires_grad=True)
    out = F.scaled_dot_product_attention(query, query, query, attn_mask=mask)
    return type(out.grad_fn).__name__


def state_of_torch():
    order = torch._C._get_sdp_priority_order()
    names = ("cudnn", "flash", "mem_efficient", "math", "overrideable")
    return order, [getattr(torch._C, f"_get_{name}_sdp_enabled")() for name in names]


def test_the_cpu_takes_its_fused_kernel():
    choice = choose_attention("auto", CPU, torch.float32, SHAPE)
    assert choice.kernel == "flash"
    assert str(choice) == "attention: flash, the first that works here"


@pytest.mark.parametrize("wanted", ["flash", "math"])
def test_a_kernel_that_is_asked_for_is_used_for_every_call_and_only_for_the_run(wanted):
    before = state_of_torch()
    choice = choose_attention(wanted, CPU, torch.float32, SHAPE)
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    with choice.in_use(CPU):
        assert ("Flash" in kernel_of(), "Flash" in kernel_of(mask)) == (wanted == "flash",) * 2
    assert state_of_torch() == before


@pytest.mark.parametrize("wanted", ["cudnn", "efficient"])
def test_a_kernel_that_does_not_work_is_refused_with_those_that_do(wanted):
    with pytest.raises(ConfigError) as caught:
        choose_attention(wanted, CPU, torch.bfloat16, SHAPE)
    (problem,) = caught.value.problems
    assert problem.startswith(
        f'attention: found "{wanted}", which does not work on the CPU in bfloat16 with heads of 32'
    )
    assert problem.endswith('; use "flash", "math", or "auto"')


def test_a_device_without_a_choice_is_left_to_torch():
    device = torch.device("mps")
    before = state_of_torch()
    choice = choose_attention("auto", device, torch.float32, SHAPE)
    with choice.in_use(device):
        assert state_of_torch() == before
    assert str(choice) == "attention: default, as torch decides on mps"
    with pytest.raises(ConfigError, match='attention: found "flash", but mps has no such choice; use "auto"'):
        choose_attention("flash", device, torch.float32, SHAPE)


def test_what_is_left_out_is_told_at_debug_level(caplog):
    with caplog.at_level(logging.DEBUG, logger="anima_train"):
        choose_attention("auto", CPU, torch.float32, SHAPE)
    told = [record.getMessage() for record in caplog.records]
    assert [line.partition(" is left out: ")[0] for line in told] == ["attention: efficient", "attention: cudnn"]


def test_a_choice_moves_no_random_state():
    before = torch.get_rng_state()
    choose_attention("auto", CPU, torch.float32, SHAPE)
    assert torch.equal(torch.get_rng_state(), before)


def test_kernels_that_are_level_are_flash_so_that_each_start_takes_the_same():
    assert fastest({"flash": 2.0, "efficient": 3.0, "cudnn": 1.95}) == "flash"
    assert fastest({"flash": 2.0, "efficient": 3.0, "cudnn": 1.5}) == "cudnn"
    assert fastest({"efficient": 3.0, "cudnn": 3.5}) == "efficient"


def test_masked_calls_of_flash_come_to_the_efficient_kernel_before_cudnn():
    flash = AttentionChoice("flash", "")
    assert flash.backends == [
        SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH,
    ]  # fmt: skip
    cudnn = AttentionChoice("cudnn", "", {"flash": 2.0, "cudnn": 1.5})
    assert cudnn.backends[0] == SDPBackend.CUDNN_ATTENTION
    assert set(cudnn.backends) == set(flash.backends)
    assert str(cudnn) == "attention: cudnn,  (flash 2.00 ms, cudnn 1.50 ms)"


def test_the_shape_is_that_of_the_transformer(tiny):
    shape = AttentionShape.of(ModelFiles(**vars(tiny_paths(tiny))), batch_size=3, num_tokens=64)
    assert (shape.batch_size, shape.num_tokens) == (3, 64)
    assert shape.num_heads * shape.head_dim == 64
    assert shape.num_heads > 1


@pytest.mark.gpu
def test_the_gpu_measures_all_that_work_and_uses_the_chosen_one():
    device, shape = torch.device("cuda", 0), AttentionShape(2, 16, 1024, 128)
    before = torch.cuda.get_rng_state()
    choice = choose_attention("auto", device, torch.bfloat16, shape)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert choice.milliseconds
    assert min(choice.milliseconds.values()) > 0
    assert choice.kernel in choice.milliseconds
    # Fresh processes are where torch's own order could come over the chosen one: this one has dispatched before.
    with choice.in_use(device):
        query = torch.randn(1, 16, 256, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
        used = torch._fused_sdp_choice(query, query, query)
        mask = torch.ones(1, 1, 256, 256, dtype=torch.bool, device=device)
        F.scaled_dot_product_attention(query, query, query, attn_mask=mask).sum().backward()  # by whichever can
    assert used == choice.backends[0].value


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", FUSED)
def test_a_fresh_process_uses_the_kernel_that_is_asked_for(wanted, command):
    """At its first dispatch torch sets an order of its own, on Hopper cuDNN first."""
    device, shape = torch.device("cuda", 0), AttentionShape(1, 16, 256, 128)
    if try_kernels((wanted,), device, torch.bfloat16, shape, measures=False).problems:
        pytest.skip(f"{wanted} does not work here")
    script = (
        "import sys, torch; from anima_train.model.attention_choice import AttentionChoice\n"
        "cuda = torch.device('cuda', 0); choice = AttentionChoice(sys.argv[1], '')\n"
        "with choice.in_use(cuda):\n"
        "    query = torch.ones(1, 16, 256, 128, device=cuda, dtype=torch.bfloat16)\n"
        "    sys.exit(torch._fused_sdp_choice(query, query, query) != choice.backends[0].value)"
    )
    assert command([sys.executable, "-c", script, wanted]).returncode == 0


@pytest.mark.gpu
def test_deterministic_runs_measure_nothing_and_have_no_cudnn():
    device, shape = torch.device("cuda", 0), AttentionShape(1, 16, 256, 128)
    with deterministic_kernels(True):
        choice = choose_attention("auto", device, torch.bfloat16, shape)
        assert choice.kernel == "flash"
        assert not choice.milliseconds
        with pytest.raises(ConfigError, match="not deterministic"):
            choose_attention("cudnn", device, torch.bfloat16, shape)
