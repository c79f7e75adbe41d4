"""Photographs, and tiny VAEs and an SVD trained on them; one run leaves nothing to the next."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from tests.support.tiny_training import settings_of
from training.__main__ import main
from training.loop.recipe import BUNDLED, read_recipe
from training.tasks.tasks import make_task
from vsr_ops.modules.capm import CAPM, SVD_UNET, SVD_VAE, CAPMShape, decoder_widths
from vsr_ops.modules.capm_file import CAPMs, write_capms


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps one precision for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.data.latents.SHARD", 2)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name in ("oak", "brick", "water"):  # numbered, they would be a video
        small = Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8))
        small.resize((200, 200), Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="session")
def vaes(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Runs of one step of a tiny picture VAE, and of the temporal VAE on top; beside them an untrained SVD on that,
    an untrained SD with its control, and a fresh CAPM. Every module's tests read them: none writes there."""
    folder = tmp_path_factory.mktemp("vaes")
    for recipe, sets in (
        ("lite_2_picture", []),
        ("vae_temporal_lite", ["data.frames=2", f"model.picture={folder / 'lite_2_picture'}"]),
    ):
        sets += ["train.steps=1", "train.precision=float32", "data.size=32", "model.block_out_channels=[32,32,32,32]"]
        sets += ["run.sample_every=100"]
        arguments = [
            str(BUNDLED / f"{recipe}.toml"),
            "--data",
            str(photos),
            "--out",
            str(folder / recipe),
            "--cpu",
        ]
        assert main([*arguments, *(word for text in sets for word in ("--set", text))]) == 0
    both = folder / "lite_2_picture", folder / "vae_temporal_lite"
    svd = make_task(read_recipe(BUNDLED / "lite_4_svd.toml", settings_of("svd", both)), photos, folder)
    svd.export(svd.build(), folder / "svd.safetensors", "nothing")
    sd = make_task(read_recipe(BUNDLED / "sd_lite.toml", settings_of("sd", both)), photos, folder)
    sd.export(sd.build(), folder / "sd.safetensors", "nothing")
    control = make_task(read_recipe(BUNDLED / "control_lite.toml", settings_of("control", both)), photos, folder)
    control.export(control.build(), folder / "control.safetensors", "nothing")
    widths = decoder_widths([32] * 4)
    halves = CAPMs(*(CAPM(CAPMShape(backbone, widths, code=8)) for backbone in (SVD_UNET, SVD_VAE)))
    write_capms(folder / "capm.safetensors", halves, "nothing")
    return both
