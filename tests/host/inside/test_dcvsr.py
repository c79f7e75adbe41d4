"""A UNet alone, as DC-VSR's was published, in the host: the same MODEL as from a file of ours or of the host's."""

from __future__ import annotations

import importlib
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.support.tensors import relative

from .conftest import NAME, part
from .wiring import dssag, refused, sampled, tiled

STEM = "diffusion_pytorch_model"


def module(name: str) -> Any:
    return importlib.import_module(f"{NAME}.{name}")


def models() -> Path:
    return Path(importlib.import_module("folder_paths").models_dir)


@pytest.fixture(scope="module")
def small(wired: Any) -> Any:
    return part(wired, 6, 24, 16)


@pytest.fixture(scope="session")
def lite_unet(host: ModuleType) -> Any:
    """The bundled UNet as diffusers' own model."""
    svd = module("vsr_ops.checkpoints.svd")
    weights = svd.read_svd(svd.LITE)
    model = importlib.import_module("diffusers").UNetSpatioTemporalConditionModel(**weights.unet_config)
    model.load_state_dict(weights.unet)
    return model


@pytest.fixture
def place(host: ModuleType) -> Iterator[Callable[[str], Path]]:
    """Folders below the host's models, which go again."""
    made: list[Path] = []

    def make(name: str) -> Path:
        made.append(models() / name)
        made[-1].mkdir(parents=True, exist_ok=True)
        return made[-1]

    yield make
    for path in made:
        shutil.rmtree(path)


def options(nodes: dict[str, Any], which: str = "unet") -> list[str]:
    return next(each.options for each in nodes["VSRLoadDCVSR"].define_schema().inputs if each.id == which)


def load(nodes: dict[str, Any], unet: str, svd: str = "lite") -> Any:
    return nodes["VSRLoadDCVSR"].execute(unet, svd).args


# --- The same MODEL -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["folder", "file", "shards", "index"])
def test_the_node_samples_as_load_lite(
    host: ModuleType, nodes: dict[str, Any], lite: Any, small: Any, place: Any, lite_unet: Any, layout: str
) -> None:
    folder = place("diffusion_models/dcvsr_test") / "unet_ema"
    lite_unet.save_pretrained(folder, **({} if layout in ("folder", "file") else {"max_shard_size": "3MB"}))
    unet = "dcvsr_test/unet_ema"
    if layout in ("file", "index"):
        # Below no folder of its own, where files are listed by themselves.
        suffix = ".safetensors" if layout == "file" else ".safetensors.index.json"
        if layout == "file":
            shutil.copy(folder / f"{STEM}.safetensors", folder / "second.safetensors")
            (folder / f"{STEM}.safetensors").rename(folder / "first.safetensors")
            unet += f"/second{suffix}"
        else:
            shutil.copy(folder / f"{STEM}{suffix}", folder / f"second{suffix}")
            (folder / f"{STEM}{suffix}").rename(folder / f"first{suffix}")
            unet += f"/second{suffix}"
    assert unet in options(nodes)
    model, vae, _ = load(nodes, unet)
    assert type(model) is type(lite[0]) and type(model.model) is type(lite[0].model)
    assert model.get_attachment("vsr_tile") == lite[0].get_attachment("vsr_tile")
    found, expected = (sampled(host, dssag(nodes, tiled(nodes, each)), small, 1.0) for each in (model, lite[0]))
    assert relative(found, expected) < 1e-5
    latent = {"samples": small[2]["samples"][:2]}
    pictures = [nodes["VSRDecode"].execute(each, latent, 0).args[0] for each in (vae, lite[1])]
    assert torch.equal(*pictures)


def test_half_precision(host: ModuleType, nodes: dict[str, Any], lite: Any, small: Any, place: Any) -> None:
    """From models/vsr; the bundled weights are of half precision already, so that they are the same."""
    svd = module("vsr_ops.checkpoints.svd")
    weights = svd.read_svd(svd.LITE)
    model = importlib.import_module("diffusers").UNetSpatioTemporalConditionModel(**weights.unet_config)
    model.load_state_dict(weights.unet)
    model.half().save_pretrained(place("vsr/dcvsr_test"), variant="fp16")
    found = load(nodes, "dcvsr_test")[0]
    assert relative(sampled(host, found, small, 1.0), sampled(host, lite[0], small, 1.0)) < 1e-5


def test_the_host_may_ask_for_it_again(host: ModuleType, nodes: dict[str, Any], place: Any, lite_unet: Any) -> None:
    lite_unet.save_pretrained(place("vsr/dcvsr_test"))
    model = load(nodes, "dcvsr_test")[0]
    make, arguments = model.cached_patcher_init
    again = make(*arguments, disable_dynamic=True)
    pairs = zip(again.model.diffusion_model.parameters(), model.model.diffusion_model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert again.get_attachment("vsr_tile") == model.get_attachment("vsr_tile")


def test_the_published_configuration_key_by_key(host: ModuleType) -> None:
    """Stock SVD's UNet without memory: every name and size is that of the host's own."""
    with torch.device("meta"):
        theirs = importlib.import_module("diffusers").UNetSpatioTemporalConditionModel()
    config = module("vsr_ops.checkpoints.diffusers_folder").config_kwargs(theirs.config)
    keymap, load_unet = module("vsr_ops.checkpoints.keymap"), module("nodes.host.load_unet")
    state, names = theirs.state_dict(), keymap.unet_map(theirs.config)
    expected = {old.removeprefix(keymap.UNET): tuple(state[new].shape) for old, new in names.items()}
    kind, make = module("nodes.host.load").svd({"unet": load_unet.host_config(Path("x"), config)})
    kind.set_inference_dtype(torch.float16, None)
    with torch.device("meta"):
        unet = make("meta").diffusion_model
    assert {name: tuple(value.shape) for name, value in unet.state_dict().items()} == expected
    assert kind.unet_config["num_head_channels"] == 64


def test_unknown_names(nodes: dict[str, Any], place: Any, lite_unet: Any) -> None:
    assert options(nodes) == ["no file found"]
    with refused("unet is 'no file found'", "there is none yet", "models/diffusion_models or models/vsr"):
        load(nodes, "no file found")
    lite_unet.save_pretrained(place("vsr/dcvsr_test"))
    with refused("unet is '../x'", "expected one of dcvsr_test"):
        load(nodes, "../x")
    with refused("svd is 'x.safetensors'", "expected one of lite"):
        load(nodes, "dcvsr_test", "x.safetensors")


# --- Beside an SVD as published -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stock(host: ModuleType) -> Iterator[Any]:
    """A checkpoint that the host takes for SVD, as narrow as may be, and a UNet alone of its widths."""
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    stock_svd = importlib.import_module("tests.host.stock_svd")
    folder = models() / "checkpoints"
    stock_svd.place_stock_svd(folder, "stock.safetensors")
    svd = module("vsr_ops.checkpoints.svd")
    unet = models() / "vsr" / "dcvsr_stock"
    unet.mkdir(parents=True)
    with torch.device("meta"):
        kind = importlib.import_module("diffusers").UNetSpatioTemporalConditionModel(**stock_svd.UNET)
    config = {key: value for key, value in kind.config.items() if not key.startswith("_")}
    (unet / "config.json").write_text(json.dumps({"_class_name": type(kind).__name__, **config}))
    weights = svd.read_svd(folder / "stock.safetensors", torch.float16).unet
    importlib.import_module("safetensors.torch").save_file(weights, unet / f"{STEM}.safetensors")
    del weights
    yield stock_svd
    (folder / "stock.safetensors").unlink()
    shutil.rmtree(unet)


def test_beside_a_checkpoint_that_the_host_takes_for_svd(
    host: ModuleType, nodes: dict[str, Any], small: Any, stock: Any
) -> None:
    assert "stock.safetensors" in options(nodes, "svd")
    model, vae, vision = load(nodes, "dcvsr_stock", "stock.safetensors")
    loader = importlib.import_module("comfy_extras.nodes_video_model").ImageOnlyCheckpointLoader
    own, own_vision, own_vae = loader().load_checkpoint("stock.safetensors")
    assert [type(each) for each in (model, vae, vision)] == [type(each) for each in (own, own_vae, own_vision)]
    assert type(model.model) is type(own.model) and model.model_dtype() == own.model_dtype()
    ours, theirs = (each.model.diffusion_model.state_dict() for each in (model, own))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    picture = torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(vae.encode(picture), own_vae.encode(picture))
    values = (picture.repeat(2, 1, 1, 1), 127, 8, 0.0, "noise", "one scene")
    video = nodes["VSRSVDConditioning"].execute(model, vae, *values)
    found, expected = (sampled(host, each, video.args, 1.0, 1) for each in (model, own))
    assert relative(found, expected) < 1e-5


def test_lite_is_of_other_widths(nodes: dict[str, Any], stock: Any) -> None:
    with refused("a UNet of widths 320 and cross-attention 1024", "has widths 64 and cross-attention", "give the SVD"):
        load(nodes, "dcvsr_stock", "lite")


# --- What is refused ------------------------------------------------------------------------------------------------


def test_lite_has_no_clip_vision(nodes: dict[str, Any], place: Any, lite_unet: Any) -> None:
    lite_unet.save_pretrained(place("vsr/dcvsr_test"))
    vision = load(nodes, "dcvsr_test")[2]
    encode = importlib.import_module("nodes").CLIPVisionEncode()
    with refused("svd_lite has no CLIP vision", "leave clip_vision_output"):
        encode.encode(vision, torch.zeros(1, 16, 16, 3), "center")


def test_a_file_that_cannot_be_read_hides_no_other(nodes: dict[str, Any], place: Any, lite_unet: Any) -> None:
    folder = place("vsr/dcvsr_test")
    lite_unet.save_pretrained(folder / "good")
    (folder / "pickle.safetensors").write_bytes(pickle.dumps({"a": 1}))
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "bad").mkdir()
    (folder / "bad" / "config.json").write_text("{")
    (folder / "bad" / f"{STEM}.safetensors").write_bytes(b"<html>")
    ours = ["dcvsr_test/bad", "dcvsr_test/empty.safetensors", "dcvsr_test/good", "dcvsr_test/pickle.safetensors"]
    assert [name for name in options(nodes) if name.startswith("dcvsr_test")] == ours
    words = ("a web page", "truncated or damaged", None, "a pickle, which can run code")
    for name, word in zip(ours, words, strict=True):
        if word is None:
            assert load(nodes, name)[0] is not None
        else:
            with refused(word):
                load(nodes, name)


def test_names_of_two_folders_do_not_hide_each_other(nodes: dict[str, Any], place: Any) -> None:
    for folder in ("diffusion_models", "vsr"):
        (place(f"{folder}/dcvsr_test") / "x.safetensors").write_bytes(b"")
    names = [name for name in options(nodes) if "dcvsr_test" in name]
    assert names == ["dcvsr_test/x.safetensors", "vsr/dcvsr_test/x.safetensors"]


def test_a_checkpoint_that_is_no_svd(nodes: dict[str, Any], place: Any, lite_unet: Any) -> None:
    lite_unet.save_pretrained(place("vsr/dcvsr_test"))
    save = importlib.import_module("safetensors.torch").save_file
    file = models() / "checkpoints" / "sdxl.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    save({"conditioner.embedders.1.model.ln_final.bias": torch.zeros(1)}, file)
    try:
        with refused("looks like an SDXL checkpoint", "Stable Video Diffusion"):
            load(nodes, "dcvsr_test", "sdxl.safetensors")
    finally:
        file.unlink()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_attention_heads": [1, 2, 1, 1]}, "expected heads of one width"),
        ({"transformer_layers_per_block": 2}, "expected one transformer in a block"),
    ],
)
def test_configurations_that_the_hosts_svd_has_not(
    host: ModuleType, lite_unet: Any, values: dict[str, Any], words: str
) -> None:
    config = module("vsr_ops.checkpoints.diffusers_folder").config_kwargs(lite_unet.config)
    with refused(words, "use the command line"):
        module("nodes.host.load_unet").host_config(Path("x"), {**config, **values})
