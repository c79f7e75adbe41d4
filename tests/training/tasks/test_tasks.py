"""What can be trained: what a task leaves is what the next one and the pack read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import AutoencoderKLTemporalDecoder
from safetensors.torch import load_file
from torch import nn

from tests.support.tiny_training import BICUBIC, TINY_DCM, settings_of, train_tiny
from training.__main__ import main
from training.loop.convolutions import safe_convolutions
from training.loop.draws import generator_at
from training.loop.recipe import BUNDLED, read_recipe
from training.loop.state import load
from training.loop.trainer import Batches, built
from training.tasks.dcm import DCM
from training.tasks.refiner import decode_refined, grown
from training.tasks.sampled import SampledLatents, SampledSettings
from training.tasks.svd import velocity
from training.tasks.tasks import make_task
from training.tasks.upscalers import ARCHITECTURES, upscaler_of
from training.tasks.vae import TEMPORAL, encoded, read_vae
from vsr_ops.backbones.svd import load_svd
from vsr_ops.checkpoints.safefile import UPSCALER_KEY, open_safely
from vsr_ops.errors import SettingError
from vsr_ops.modules.dcm import load_dcm
from vsr_ops.modules.refiner import Refiner, RefinerShape, load_refiner, refine


def test_the_video_teaches_the_unet(photos: Path, vaes: tuple[Path, Path], tmp_path: Path) -> None:
    """A gradient through the sampler's very last step, whose noise is next to nothing, would not."""
    recipe = read_recipe(BUNDLED / "lite_6_whole.toml", [*settings_of("whole", vaes), "loss.edm=0", "data.steps=[3]"])
    task = make_task(recipe, photos, tmp_path)
    task.prepare(torch.device("cpu"))
    torch.manual_seed(0)
    model = task.build().train()
    nn.init.normal_(model["refiner"].leave.weight, std=0.1)  # type: ignore[index]
    batch = Batches(task, 0, 1)[0]
    felt: dict[float, dict[str, float]] = {}
    for true in (0.0, 1.0):
        batch["true"][:] = true
        model.zero_grad()
        task.loss(model, batch)[0].backward()
        felt[true] = {
            part: sum(float(p.grad.square().sum()) for p in module.parameters() if p.grad is not None) ** 0.5
            for part, module in model.named_children()
        }
    assert felt[0.0]["unet"] > 1e-3 * felt[0.0]["decoder"] > 0
    assert felt[0.0]["encoder"] > 0, "by way of the LR latents"
    assert felt[1.0]["unet"] == 0 < felt[1.0]["encoder"]


@pytest.mark.parametrize("path", sorted(BUNDLED.glob("*.toml")), ids=lambda path: path.stem)
def test_bundled_recipes_fit_their_tasks(path: Path, tmp_path: Path) -> None:
    wants = {"vae_temporal": ["model.picture=x"], "svd": ["model.start=x"], "refiner": ["model.start=x"]}
    name = read_recipe(path).task
    recipe = read_recipe(path, wants.get(name, []))
    make_task(recipe, tmp_path, tmp_path)
    assert recipe.flat()["train.steps"] >= 400
    assert recipe.run.trained_on or "lite" not in path.stem


@pytest.mark.parametrize(
    ("name", "recipe", "sets", "said"),
    [
        ("svd", "lite_4_svd", [], "bicubic"),
        ("svd", "lite_4_svd", ["data.upscaler=lite"], "dcm"),
        ("svd", "lite_4_svd", ["data.upscaler=models/SwinIR_x4.pth"], "SwinIR_x4.pth"),
        ("refiner", "lite_5_refiner", ["data.upscaler=lite"], "dcm"),
        ("whole", "lite_6_whole", [], "dcm"),
        ("whole_dcm", "whole_dcm_lite", [], "dcm.safetensors"),
        ("sd", "sd_lite", ["data.upscaler=lite"], "dcm"),
        ("control", "control_lite", [], "bicubic"),
    ],
)
def test_a_model_says_what_enlarged_the_videos_that_it_learnt_from(
    name: str, recipe: str, sets: list[str], said: str, photos: Path, vaes: tuple[Path, Path], tmp_path: Path
) -> None:
    task = make_task(read_recipe(BUNDLED / f"{recipe}.toml", [*settings_of(name, vaes), *sets]), photos, tmp_path)
    task.export(task.build(), tmp_path / "model.safetensors", "nothing")
    with open_safely(tmp_path / "model.safetensors") as source:
        assert source.metadata[UPSCALER_KEY] == said


def test_full_size_recipes_are_the_papers() -> None:
    """DC-VSR starts from the SVD of 14 frames and enlarges bicubically (section 4.1); SDATC trains at bit rates of 10K
    to 100K, on clips of 5, patches of 512, batch 4, Adam at 5e-5 (section IV-A)."""
    for name in ("svd_stage1", "svd_stage2", "svd_8bit", "svd_lora"):
        data = read_recipe(BUNDLED / f"{name}.toml").data
        assert (data["frames"], data["upscaler"]) == (14, "bicubic")
    for name in ("control", "control_dcm", "capm_vae", "cfw", "stam"):
        recipe = read_recipe(BUNDLED / f"{name}.toml")
        data = recipe.data
        assert data.get("bit_rate") == [10_000, 100_000] or data["degradation"] == "bitrate"
        assert (data["frames"], data["size"], data["clean_share"]) == (5, 512, 0.0)
        assert recipe.train.batch * recipe.train.accumulation == 4 and recipe.optimizer.lr == 5e-5
    assert read_recipe(BUNDLED / "dcm.toml").data["degradation"] == "bitrate"
    texts = {path.name: path.read_text(encoding="utf-8") for path in BUNDLED.glob("*.toml")}
    assert [name for name, text in texts.items() if "svd_xt" in text] == []


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_an_exported_dcm_is_what_spandrel_loads(architecture: str, photos: Path, tmp_path: Path) -> None:
    from spandrel import ModelLoader

    recipe = tmp_path / "tiny.toml"
    recipe.write_text(TINY_DCM)
    read = read_recipe(recipe if architecture == "swinir" else BUNDLED / "dcm_lite.toml")
    task = make_task(read, photos, tmp_path)
    torch.manual_seed(0)
    model = task.build().eval()
    name = "dcm.safetensors"
    task.export(model, tmp_path / name, "nothing")
    loaded = ModelLoader().load_from_file(tmp_path / name)
    x = torch.rand(1, 3, 24, 40, generator=generator_at(0, 3))
    with torch.no_grad():
        ours, theirs = model(x).clamp(0, 1), loaded(x)  # type: ignore[operator]
        again = read_recipe(
            recipe if architecture == "swinir" else BUNDLED / "dcm_lite.toml", [f"model.start={tmp_path / name}"]
        )
        goes_on = make_task(again, photos, tmp_path).build().eval()(x).clamp(0, 1)
    assert (goes_on - theirs).norm() / ours.norm() < 1e-3
    assert loaded.scale == 4 and ours.shape == (1, 3, 96, 160)
    assert (ours - theirs).norm() / ours.norm() < 1e-3


def test_a_compact_grows_without_changing_a_picture(photos: Path, tmp_path: Path) -> None:
    sets = ["model.num_feat=8", "data.size=64", "data.frames=2", "data.patch=8"]
    dcm = train_tiny("dcm_lite", [*sets, "model.num_conv=3"], photos, tmp_path / "dcm")
    before = load_dcm(dcm / "weights.safetensors", "cpu")
    recipe = read_recipe(BUNDLED / "dcm_lite_deeper.toml", [*sets, "model.num_conv=5", f"model.start={dcm}"])
    task = make_task(recipe, photos, tmp_path)
    task.export(task.build(), tmp_path / "grown.safetensors", "nothing")
    after = load_dcm(tmp_path / "grown.safetensors", "cpu")
    frames = torch.rand(2, 3, 20, 23)
    assert torch.equal(after(frames), before(frames)) and frames.std() > 0.2


def test_compact_starts_near_the_nearest_neighbour_and_sees_the_picture() -> None:
    """torch's own start leaves no signal after eighteen layers (1e-7), and such a network stays where it is."""
    torch.manual_seed(0)
    model = upscaler_of({"architecture": "compact"})[0].build(16)
    x = torch.rand(2, 3, 16, 16, generator=generator_at(0, 3))
    with torch.no_grad():
        added = model(x) - torch.nn.functional.interpolate(x, scale_factor=4)
    assert float(added.square().mean().sqrt()) < 0.1
    assert float((added[0] - added[1]).std()) > 1e-3


def test_the_chain_of_lite_weights_fits_together(photos: Path, vaes: tuple[Path, Path], tmp_path: Path) -> None:
    """Each run starts from those before it by their folders, and what the last one leaves is what the pack loads."""
    dcm = train_tiny("dcm_lite", settings_of("dcm", vaes), photos, tmp_path / "dcm")
    guide = [f"data.upscaler={dcm}"]
    refined = train_tiny(
        "lite_3_refined", [*settings_of("vae_refined", vaes), f"model.dcm={dcm}"], photos, tmp_path / "r"
    )
    svd_sets = [text for text in settings_of("svd", vaes) if text != BICUBIC] + [f"model.vae={refined}"]
    svd = train_tiny("lite_4_svd", [*svd_sets, *guide], photos, tmp_path / "svd")
    clips = [text for text in settings_of("refiner", vaes) if text.startswith("data.") and text != BICUBIC]
    starts = [f"model.start={svd}", f"model.refiner={refined}"]
    last = train_tiny("lite_5_refiner", [*starts, *clips, *guide], photos, tmp_path / "last")

    low = torch.rand(2, 3, 16, 16, generator=generator_at(0, 6))
    upscaled = load_dcm(dcm / "weights.safetensors", "cpu")(low)
    model = load_svd(last / "weights.safetensors", torch.device("cpu"), torch.float32)
    refiner = load_refiner(last / "weights_refiner.safetensors")
    assert upscaled.shape == (2, 3, 64, 64) and refiner.shape.width == 8
    decoded = model.decode(model.encode(upscaled)).clamp(0, 1)
    added = refine(refiner, decoded, upscaled) - upscaled
    assert 0 < float(added.abs().mean()) < 0.05, "a refiner starts at nothing, and has learnt for two steps"
    before, after = (load_file(run / "weights.safetensors") for run in (svd, last))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("first_stage_model.decoder.") for name in changed)
    assert not torch.equal(*(load_file(run / "weights_refiner.safetensors")["leave.weight"] for run in (refined, last)))


def test_a_refined_vae_becomes_a_temporal_one_that_gives_the_same_pictures(
    photos: Path, vaes: tuple[Path, Path], tmp_path: Path
) -> None:
    """Its latents have deviation 1 after SVD's factor; nothing else changes, frame by frame."""
    task = make_task(read_recipe(BUNDLED / "lite_3_refined.toml", settings_of("vae_refined", vaes)), photos, tmp_path)
    model: Any = task.build().eval()
    task.export(model, tmp_path / "vae.safetensors", "nothing")
    config, state = read_vae(tmp_path / "vae.safetensors", TEMPORAL)
    temporal = AutoencoderKLTemporalDecoder(**config)
    temporal.load_state_dict(state)
    x = 2 * torch.rand(2, 3, 32, 32, generator=generator_at(0, 7)) - 1
    with torch.no_grad():
        theirs = model["vae"].decoder(encoded(model["vae"], x))
        ours = temporal.decoder(temporal.quant_conv(temporal.encoder(x))[:, :4], torch.zeros(1, 2), num_frames=2)
        truth = torch.cat([task.sample(generator_at(0, n))["truth"] for n in range(16)])
        z = encoded(temporal, 2 * truth - 1) * config["scaling_factor"]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    assert 0.7 < float(z.square().mean().sqrt()) < 1.4


def test_the_refiners_decoder_starts_and_ends_as_the_svds(
    photos: Path, vaes: tuple[Path, Path], tmp_path: Path
) -> None:
    task = make_task(read_recipe(BUNDLED / "lite_5_refiner.toml", settings_of("refiner", vaes)), photos, tmp_path)
    model: Any = task.build().eval()
    start = vaes[1].parent / "svd.safetensors"
    svd = load_svd(start, torch.device("cpu"), torch.float32)
    z = torch.randn(1, 2, 4, 4, 4, generator=generator_at(0, 8))
    guide = torch.rand(1, 2, 3, 32, 32, generator=generator_at(0, 9))
    with torch.no_grad():
        decoded, refined = decode_refined(model, z, guide)
        theirs = svd.decode(z[0] / svd.scaling_factor)
    torch.testing.assert_close(decoded, theirs, atol=1e-4, rtol=1e-3)
    assert torch.equal(refined, guide)  # a new refiner adds nothing
    task.export(model, tmp_path / "again.safetensors", "nothing")
    before, after = load_file(start), load_file(tmp_path / "again.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], atol=1e-6, rtol=1e-3)


def test_a_refiner_grows_without_changing_a_picture() -> None:
    torch.manual_seed(0)
    small = Refiner(RefinerShape(8, 2, 1))
    nn.init.normal_(small.leave.weight, std=0.1)
    large = grown(small, RefinerShape(8, 4, 3, True))
    frames = torch.rand(2, 4, 3, 16, 16)
    assert large.reach > small.reach
    with torch.no_grad():
        assert torch.allclose(large(*frames), small(*frames), atol=1e-6) and bool(small(*frames).any())
    for less in (RefinerShape(8, 1, 1), RefinerShape(8, 2, 3), RefinerShape(9, 2, 1)):
        with pytest.raises(SettingError, match="expected the same width, nothing less than it has"):
            grown(small, less)


def test_convolutions_over_time_give_the_same_as_2d_ones() -> None:
    torch.manual_seed(0)
    video, layer = torch.randn(2, 3, 5, 6, 7), nn.Conv3d(3, 4, (3, 1, 1), padding=(1, 0, 0))
    expected = layer(video)
    safe_convolutions(layer)
    assert torch.allclose(layer(video), expected, atol=1e-6)


def test_a_refiners_sample_is_one_place_of_latents_guide_and_truth(tmp_path: Path) -> None:
    """Every latent of the shard holds its own number, and so do the pixels it stands for."""
    settings = SampledSettings(size=64, frames=4, clips=2, crop=32, crop_frames=2, sampled_share=0.5, latent_noise=0.0)
    latents = SampledLatents(tmp_path, settings, "float32")
    numbers = torch.arange(256.0).view(4, 1, 8, 8)
    cells = numbers.expand(-1, 4, -1, -1).half()
    pixels = numbers.repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1).byte()
    clip = {"sampled": cells, "clean": cells / 2, "guide": pixels, "truth": 255 - pixels, "factor": torch.tensor(2.0)}
    latents._write(0, [clip, clip])
    seen: set[float] = set()
    for number in range(40):
        sample = latents.draw(generator_at(0, number))
        z, guide, truth = (sample[key] for key in ("z", "guide", "truth"))
        assert z.shape == (2, 4, 4, 4) and guide.shape == truth.shape == (2, 3, 32, 32)
        torch.testing.assert_close(255 * guide[:, :1, ::8, ::8], z[:, :1])
        torch.testing.assert_close(255 * guide[:, :1, 7::8, 7::8], z[:, :1])
        torch.testing.assert_close(guide + truth, torch.ones_like(guide))
        assert abs(float(z[1, 0, 0, 0] - z[0, 0, 0, 0])) == 64  # neighbours in time, forwards or backwards
        seen.add(float(z[0, 0, 0, 0]))
    assert len(seen) > 20


def test_a_share_of_the_refiners_latents_is_sampled(photos: Path, vaes: tuple[Path, Path], tmp_path: Path) -> None:
    sets = [*settings_of("refiner", vaes), "data.crop=64"]
    make_task(read_recipe(BUNDLED / "lite_5_refiner.toml", sets), photos, tmp_path).prepare(torch.device("cpu"))
    shard = torch.load(tmp_path / "latents" / "shard_0000.pt", weights_only=True)
    found = {"sampled": shard["sampled"].float(), "clean": shard["clean"].float() * shard["factor"]}
    for share, name in ((1.0, "sampled"), (0.0, "clean")):
        chosen = read_recipe(BUNDLED / "lite_5_refiner.toml", [*sets, f"data.sampled_share={share}"])
        z = make_task(chosen, photos, tmp_path).sample(generator_at(0, 1))["z"]
        known = [clip for both in (found[name], found[name].flip(1)) for clip in both]
        noise = min(float((z - clip).std()) for clip in known)
        assert noise == 0 if name == "sampled" else 0.12 < noise < 0.18


def test_an_exported_svd_runs_in_the_pipeline_and_starts_stage_two(
    photos: Path, vaes: tuple[Path, Path], tmp_path: Path
) -> None:
    sets = [*settings_of("svd", vaes), "train.steps=2", "train.precision=float32", "run.sample_every=100"]
    first = [str(BUNDLED / "lite_4_svd.toml"), "--data", str(photos), "--out", str(tmp_path / "one"), "--cpu"]
    assert main([*first, *(word for text in sets for word in ("--set", text))]) == 0
    model = load_svd(tmp_path / "one" / "weights.safetensors", torch.device("cpu"), torch.float32)
    assert (model.tile.height, model.tile.frames) == (8, 2)
    frames = torch.rand(2, 3, 64, 64, generator=generator_at(0, 4))
    z = model.encode(frames) * model.scaling_factor
    assert 0.3 < float(z.std()) < 3  # scaled to SVD's deviation
    noisy, lr, context = (
        z + torch.randn(z.shape, generator=generator_at(0, 5)),
        model.encode(frames),
        model.context(None),
    )
    recipe = read_recipe(BUNDLED / "lite_4_svd.toml", sets)
    unet = built(recipe, make_task(recipe, photos, tmp_path / "one"), load(tmp_path / "one"))
    with torch.no_grad():
        found = model.denoise(noisy, 1.0, lr, context, 2)
        v = velocity(unet, noisy[None], lr[None], context, torch.ones(1))[0]
    # Equation 12's estimate at noise level 1, of the run's own network: what is written has half its digits.
    assert float((found - (noisy - 2**0.5 * v) / 2).norm() / found.norm()) < 1e-3 < float(v.norm() / found.norm())

    shared = f"data.latents={tmp_path / 'one' / 'latents'}"
    two = ["data.size=64", "data.frames=2", "data.clips=2", BICUBIC, "train.steps=1", "train.precision=float32"]
    two += [f"model.start={tmp_path / 'one'}", shared, "run.sample_every=100"]
    second = [str(BUNDLED / "svd_lite_stage2.toml"), "--data", str(photos), "--out", str(tmp_path / "two"), "--cpu"]
    assert main([*second, *(word for text in two for word in ("--set", text))]) == 0
    a, b = (load_file(tmp_path / name / "weights.safetensors") for name in ("one", "two"))
    same = {key for key in a if torch.equal(a[key], b[key])}
    unet = [key for key in a if key.startswith("model.diffusion_model.")]
    temporal = [key for key in unet if ".time_stack." in key or "time_pos_embed" in key]
    assert temporal and same.issuperset(temporal)
    assert len(same & set(unet)) < len(unet) and "model.diffusion_model.out.2.weight" not in same


def test_latents_of_another_recipe_are_refused(photos: Path, vaes: tuple[Path, Path], tmp_path: Path) -> None:
    sets = settings_of("svd", vaes)
    make_task(read_recipe(BUNDLED / "lite_4_svd.toml", sets), photos, tmp_path).prepare(torch.device("cpu"))
    other = make_task(read_recipe(BUNDLED / "lite_4_svd.toml", [*sets, "data.clean_share=0.9"]), photos, tmp_path)
    with pytest.raises(SettingError, match=r"latents of another recipe .settings differ"):
        other.prepare(torch.device("cpu"))


def test_dcm_crops_input_and_truth_at_one_place(photos: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(TINY_DCM)
    task = make_task(read_recipe(recipe), photos, tmp_path)
    assert isinstance(task, DCM)
    sample = task.sample(generator_at(0, 1))
    small = torch.nn.functional.avg_pool2d(sample["truth"], 4)
    assert sample["lr"].shape == (2, 3, 8, 8) and sample["truth"].shape == (2, 3, 32, 32)
    right = (small - sample["lr"]).abs().mean()
    assert right < 0.5 * (small.rot90(1, (2, 3)) - sample["lr"]).abs().mean()
    assert right < 0.5 * (small.flip(-1) - sample["lr"]).abs().mean()
