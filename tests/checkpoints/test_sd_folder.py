"""Stable Diffusion in a diffusers folder, and as a pickle: the same model as in one file, with what its scheduler
says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.refusals import refused
from tests.support.sd_files import StableDiffusion, once, stable_diffusion
from vsr_ops.checkpoints.diffusers_folder import config_kwargs
from vsr_ops.checkpoints.sd import SD_UNET_PART, SDWeights, is_own, read_sd, write_sd
from vsr_ops.checkpoints.sd_keymap import infer_sd_unet


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return stable_diffusion()


@pytest.fixture(scope="module")
def one_file(sd: StableDiffusion, tmp_path_factory: pytest.TempPathFactory) -> SDWeights:
    path = tmp_path_factory.mktemp("sd") / "sd.safetensors"
    save_file(sd.tensors(), path)
    return read_sd(path)


def same(found: SDWeights, expected: SDWeights) -> bool:
    assert found.vae is not None and expected.vae is not None
    return all(
        ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())
        for ours, theirs in ((found.unet, expected.unet), (found.vae, expected.vae))
    )


# --- diffusers folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("said", "zero"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)])
def test_a_folder_is_the_one_file_and_its_scheduler(
    said: str, zero: bool, sd: StableDiffusion, one_file: SDWeights, tmp_path: Path
) -> None:
    sd.save(tmp_path, prediction_type=said, rescale_betas_zero_snr=zero)
    assert any("attentions.0.query" in key for key in load_file(tmp_path / "vae/diffusion_pytorch_model.safetensors"))
    found = read_sd(tmp_path)
    assert same(found, one_file) and (found.prediction, found.zero_snr) == (said, zero)
    inferred = one_file.unet_config.items() - {("attention_head_dim", one_file.unet_config["attention_head_dim"])}
    assert all(found.unet_config[key] == value for key, value in inferred)


def test_the_published_configuration_of_2_1_is_that_of_its_single_file() -> None:
    """As `unet/config.json` of stable-diffusion-2-1 has it, at full size, on meta: 686 tensors."""
    levels = {"down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]}
    levels |= {
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "block_out_channels": [320, 640, 1280, 1280],
    }
    config: dict[str, Any] = {
        **levels,
        **{"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.10.0.dev0", "act_fn": "silu"},
        **{"attention_head_dim": [5, 10, 20, 20], "center_input_sample": False, "cross_attention_dim": 1024},
        **{"downsample_padding": 1, "dual_cross_attention": False, "flip_sin_to_cos": True, "freq_shift": 0},
        **{"in_channels": 4, "out_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05},
        **{"norm_num_groups": 32, "num_class_embeds": None, "only_cross_attention": False, "sample_size": 96},
        **{"upcast_attention": True, "use_linear_projection": True},
    }
    kwargs = config_kwargs(config)
    state, names = SD_UNET_PART.plan(Path("full"), kwargs)
    inferred = infer_sd_unet({old: tuple(state[new].shape) for old, new in names.items()})
    assert len(names) == 686 and {key: kwargs[key] for key in inferred} == inferred


def test_a_folder_with_names_of_today(sd: StableDiffusion, one_file: SDWeights, tmp_path: Path) -> None:
    sd.save(tmp_path)
    sd.vae.save_pretrained(tmp_path / "vae")
    assert not any(once(key) == key for key in sd.vae.state_dict() if ".to_q." in key)
    assert same(read_sd(tmp_path), one_file)


def test_without_a_scheduler_the_weights_say_it(sd: StableDiffusion, tmp_path: Path) -> None:
    sd.save(tmp_path, prediction_type="v_prediction")
    (tmp_path / "scheduler/scheduler_config.json").unlink()
    assert read_sd(tmp_path).prediction == "epsilon"  # no level that would say v


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"beta_schedule": "linear"}, "'beta_schedule': 'linear'"),
        ({"beta_end": 0.02}, "'beta_end': 0.02"),
        ({"prediction_type": "sample"}, "prediction_type 'sample', expected one of v_prediction, epsilon"),
    ],
)
def test_another_schedule_is_refused(change: dict[str, Any], words: str, sd: StableDiffusion, tmp_path: Path) -> None:
    sd.save(tmp_path)
    file = tmp_path / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=r"scheduler_config\.json") as caught:
        read_sd(tmp_path)
    assert words in str(caught.value)


def test_other_folders_are_refused(sd: StableDiffusion, tmp_path: Path) -> None:
    sd.save(tmp_path)
    config = json.loads((tmp_path / "unet/config.json").read_text())
    (tmp_path / "unet/config.json").write_text(json.dumps(config | {"_class_name": "UNetSpatioTemporalConditionModel"}))
    with pytest.raises(ValueError, match="a 'UNetSpatioTemporalConditionModel', expected a 'UNet2DConditionModel'"):
        read_sd(tmp_path)
    with pytest.raises(ValueError, match="no such file, expected in a diffusers folder; give lite, Stable Diffusion"):
        read_sd(tmp_path / "vae")


# --- Single files that say something ----------------------------------------------------------------------------------


def test_what_files_say_of_their_noise(sd: StableDiffusion, tmp_path: Path) -> None:
    """The host's marks, and the schedule that LDM keeps."""
    kept = torch.linspace(0.999, 0.0047, 1000)
    zero = torch.cat([kept[:-1], torch.zeros(1)])
    for extra, expected in (
        ({}, ("epsilon", False)),
        ({"v_pred": torch.zeros(0)}, ("v_prediction", False)),
        ({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, ("v_prediction", True)),
        ({"alphas_cumprod": kept}, ("epsilon", False)),
        ({"alphas_cumprod": zero}, ("v_prediction", True)),
    ):
        save_file(sd.tensors() | extra, tmp_path / "sd.safetensors")
        found = read_sd(tmp_path / "sd.safetensors")
        assert (found.prediction, found.zero_snr) == expected


# --- Pickles ----------------------------------------------------------------------------------------------------------


class Runs:
    """Runs when it is unpickled as pickle does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.path, "ran"))


@pytest.mark.parametrize("whole", [True, False], ids=["training checkpoint", "state dict"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])
def test_a_pickle_of_tensors_is_the_same(
    whole: bool, zipped: bool, sd: StableDiffusion, one_file: SDWeights, tmp_path: Path
) -> None:
    tensors = sd.tensors()
    stored = {"state_dict": tensors, "global_step": 100} if whole else tensors
    torch.save(stored, tmp_path / "sd.ckpt", _use_new_zipfile_serialization=zipped)
    found = read_sd(tmp_path / "sd.ckpt")
    assert same(found, one_file) and not is_own(tmp_path / "sd.ckpt")
    # Its tensors are its own: the file may go.
    (tmp_path / "sd.ckpt").write_bytes(b"")
    assert same(found, one_file)


def test_nothing_in_a_pickle_runs(sd: StableDiffusion, tmp_path: Path) -> None:
    ran = tmp_path / "ran.txt"
    torch.save({"state_dict": sd.tensors(), "hook": Runs(ran)}, tmp_path / "sd.ckpt")
    refused(read_sd, tmp_path / "sd.ckpt", "not a pickle of tensors alone")
    assert not ran.exists()
    torch.load(tmp_path / "sd.ckpt", weights_only=False)
    assert ran.exists()


def test_own_files_are_told(tmp_path: Path, sd: StableDiffusion) -> None:
    config = {key: value for key, value in sd.unet.config.items() if key[0] != "_"}
    weights = SDWeights(config, "epsilon", sd.unet.state_dict(), (8, 8, 4))
    write_sd(tmp_path / "own.safetensors", weights, "nothing")
    save_file(sd.tensors(), tmp_path / "sd.safetensors")
    assert is_own(tmp_path / "own.safetensors") and not is_own(tmp_path / "sd.safetensors") and not is_own(tmp_path)
