"""The single-frame VAE against diffusers' 3-D one."""

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.torch import load_file, save_file

from anima_train.core.errors import ModelFileError
from anima_train.model.vae import load_vae, to_pixels, wan_key

CPU = torch.device("cpu")
SIZES = [(32, 32), (24, 56), (72, 8)]


def random_vae(seed=0):
    generator = torch.Generator().manual_seed(seed)
    vae = AutoencoderKLQwenImage(base_dim=4).double()
    for name, parameter in vae.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        # Kernels of unit gain, so that nothing saturates; norms away from one and biases away from zero.
        scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 and "gamma" not in name else 0.3
        parameter.data = noise * scale + ("gamma" in name)
    return vae.requires_grad_(False)


@pytest.fixture(scope="module")
def oracle():
    return random_vae()


@pytest.fixture(scope="module")
def path(oracle, tmp_path_factory):
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    save_file({wan_key(name): tensor for name, tensor in oracle.state_dict().items()}, path)
    return path


def pixels(*size, seed=1):
    return torch.rand(size[0], 3, *size[1:], generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def constants(vae):
    mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    return mean.view(1, 16, 1, 1, 1).double(), std.view(1, 16, 1, 1, 1).double()


def test_wan_key_is_the_inverse_of_the_converter():
    with torch.device("meta"):
        names = list(AutoencoderKLQwenImage().state_dict())
    assert convert_wan_vae_to_diffusers({wan_key(name): name for name in names}) == {name: name for name in names}


@pytest.mark.parametrize(
    ("diffusers_name", "name"),
    [
        ("quant_conv.weight", "conv1.weight"),
        ("post_quant_conv.bias", "conv2.bias"),
        ("encoder.conv_in.weight", "encoder.conv1.weight"),
        ("encoder.down_blocks.3.conv_shortcut.weight", "encoder.downsamples.3.shortcut.weight"),
        ("encoder.mid_block.attentions.0.to_qkv.bias", "encoder.middle.1.to_qkv.bias"),
        ("decoder.mid_block.resnets.1.norm2.gamma", "decoder.middle.2.residual.3.gamma"),
        ("decoder.up_blocks.1.resnets.0.conv_shortcut.bias", "decoder.upsamples.4.shortcut.bias"),
        ("decoder.up_blocks.2.upsamplers.0.resample.1.weight", "decoder.upsamples.11.resample.1.weight"),
        ("decoder.conv_out.weight", "decoder.head.2.weight"),
    ],
)
def test_wan_key_gives_the_official_name(diffusers_name, name):
    assert wan_key(diffusers_name) == name


@pytest.mark.parametrize("size", SIZES)
def test_networks_equal_the_3d_ones_in_float64(oracle, path, error, size):
    vae = load_vae(path, torch.float64, CPU)
    x = pixels(2, *size)
    moments = vae.quant_conv(vae.encoder(x.unsqueeze(2)))
    expected = oracle.encode(x.unsqueeze(2)).latent_dist
    assert error(moments[:, :16], expected.mode()) < 1e-10
    z = torch.randn(2, 16, 1, size[0] // 8, size[1] // 8, generator=torch.Generator().manual_seed(2)).double()
    assert error(vae.decoder(vae.post_quant_conv(z)).clamp(-1, 1), oracle.decode(z).sample) < 1e-10


@pytest.mark.parametrize("size", SIZES)
def test_encode_is_the_normalised_mode(oracle, path, error, size):
    x = pixels(2, *size)
    mean, std = constants(oracle)
    expected = (oracle.encode(x.unsqueeze(2)).latent_dist.mode() - mean) / std
    latents = load_vae(path, torch.float32, CPU).encode(x.float())
    assert latents.dtype == torch.float32
    assert latents.shape == (2, 16, 1, size[0] // 8, size[1] // 8)
    assert error(latents, expected) < 1e-5


@pytest.mark.parametrize("size", SIZES)
def test_decode_undoes_the_normalisation_and_clamps(oracle, path, error, size):
    latents = torch.randn(2, 16, 1, size[0] // 8, size[1] // 8, generator=torch.Generator().manual_seed(3))
    mean, std = constants(oracle)
    expected = oracle.decode(latents.double() * std + mean).sample.squeeze(2)
    assert expected.abs().max() == 1  # some pixels are out of range, so the clamp is seen
    decoded = load_vae(path, torch.float32, CPU).decode(latents)
    assert decoded.dtype == torch.float32
    assert error(decoded, expected) < 1e-5


def test_batch_equals_one_by_one(path, error):
    vae = load_vae(path, torch.float32, CPU)
    x = pixels(3, 24, 40).float()
    latents = vae.encode(x)
    assert error(latents, torch.cat([vae.encode(image[None]) for image in x])) < 1e-5
    assert error(vae.decode(latents), torch.cat([vae.decode(latent[None]) for latent in latents])) < 1e-5


def test_bfloat16_weights_give_float32_near_the_exact_ones(path, error):
    exact, rounded = load_vae(path, torch.float32, CPU), load_vae(path, torch.bfloat16, CPU)
    x = pixels(1, 32, 32).float()
    latents = rounded.encode(x)
    assert latents.dtype == rounded.decode(latents).dtype == torch.float32
    assert error(latents, exact.encode(x)) < 0.05
    assert error(rounded.decode(latents), exact.decode(latents)) < 0.05


def test_only_the_last_temporal_tap_is_kept(oracle, path):
    vae = load_vae(path, torch.float32, CPU)
    state, full = vae.state_dict(), oracle.state_dict()
    assert set(state) == {name for name in full if ".time_conv." not in name}
    for name, tensor in state.items():
        expected = full[name][:, :, -1] if full[name].dim() == 5 else full[name]
        assert torch.equal(tensor, expected.float())
        assert tensor.untyped_storage().nbytes() == tensor.numel() * 4  # no view of the 3-D kernel
    assert not any(parameter.requires_grad for parameter in vae.parameters())


def test_another_kind_of_file_is_named(tmp_path):
    path = tmp_path / "llm.safetensors"
    save_file({"model.layers.0.self_attn.q_norm.weight": torch.ones(4)}, path)
    with pytest.raises(ModelFileError, match=r"model\.vae_path: expects the Qwen-Image VAE.*looks like a Qwen3"):
        load_vae(path, torch.float32, CPU)


def test_a_vae_in_diffusers_names_is_named(oracle, tmp_path):
    path = tmp_path / "vae.safetensors"
    save_file(oracle.state_dict(), path)
    with pytest.raises(ModelFileError, match=r"model\.vae_path: .*looks like a VAE in diffusers names"):
        load_vae(path, torch.float32, CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("encoder.conv1.weight"), r"1 keys missing: encoder\.conv_in\.weight"),
        (lambda weights: weights.update(extra=torch.ones(1)), "1 keys unexpected: extra"),
        (
            lambda weights: weights.update({"conv2.bias": torch.ones(3)}),
            r"1 shapes differ: post_quant_conv\.bias \(3,\)",
        ),
    ],
)
def test_keys_and_shapes_have_to_fit(path, tmp_path, change, message):
    weights = load_file(path)
    change(weights)
    changed = tmp_path / "vae.safetensors"
    save_file(weights, changed)
    with pytest.raises(ModelFileError, match=message) as caught:
        load_vae(changed, torch.float32, CPU)
    assert "model.vae_path" in str(caught.value)
    assert str(changed) in str(caught.value)


def test_pixels_are_channels_first_from_minus_one_to_one():
    pixels = to_pixels(torch.tensor([[[[0, 127, 255], [255, 0, 128]]]], dtype=torch.uint8))[0]
    assert (pixels.shape, pixels.dtype, pixels.is_contiguous()) == ((3, 1, 2), torch.float32, True)
    assert torch.allclose(pixels[:, 0].T, torch.tensor([[-1, -1 / 255, 1], [1, -1, 1 / 255]]), atol=1e-7)
