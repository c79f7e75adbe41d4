"""A UNet alone in diffusers' layout, as DC-VSR's is published: every way it may lie, and what memory it takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from tests.support.svd_files import UNET_CONFIG, VAE_CONFIG, make, make_stock, outputs, same, save_folder, stock_file
from tests.support.unet_files import STEM, changed, save_unet, unet_of
from vsr_ops.checkpoints.keymap import unet_map
from vsr_ops.checkpoints.svd import LITE, SVDWeights, read_svd, svd_configs, write_svd
from vsr_ops.checkpoints.svd_parts import infer_unet_alone
from vsr_ops.checkpoints.unet_alone import find_unet, list_unets, open_unet

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def svd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the pack, whose UNet is another one of the same widths."""
    path = tmp_path_factory.mktemp("svd") / "svd.safetensors"
    other = make(UNET_CONFIG, VAE_CONFIG)
    write_svd(path, replace(other, unet={k: t + 0.1 for k, t in other.unet.items()}), "test noise", torch.float32)
    return path


@pytest.fixture(scope="module")
def tuned() -> SVDWeights:
    return make(UNET_CONFIG, VAE_CONFIG)


# --- Layouts --------------------------------------------------------------------------------------------------------

#: How diffusers saves it, and what of that is given.
LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "folder": ({}, ""),
    "the folder above": ({}, ".."),
    "file": ({}, f"{STEM}.safetensors"),
    "shards": ({"max_shard_size": "300KB"}, ""),
    "index": ({"max_shard_size": "300KB"}, f"{STEM}.safetensors.index.json"),
    "fp16": ({"half": True, "variant": "fp16"}, ""),
    "shards of fp16": ({"half": True, "variant": "fp16", "max_shard_size": "300KB"}, ""),
    "half precision": ({"half": True}, ""),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_takes_the_place_of_the_svds_own(layout: str, svd: Path, tuned: SVDWeights, tmp_path: Path) -> None:
    how, given = LAYOUTS[layout]
    folder = save_unet(tmp_path, tuned, **how)
    assert ("shards" in layout or layout == "index") == any("-of-" in file.name for file in folder.iterdir())
    found, alone = read_svd(svd, unet=(folder / given).resolve()), read_svd(svd)
    expected = {k: t.half().float() for k, t in tuned.unet.items()} if "half" in how else tuned.unet
    assert same(found.unet, expected) and not same(found.unet, alone.unet)
    assert same(found.vae, alone.vae) and same(found.image_encoder, alone.image_encoder)
    assert (found.tile, found.vae_config) == (alone.tile, alone.vae_config)
    assert {k: found.unet_config[k] for k in UNET_CONFIG} == UNET_CONFIG


def test_it_is_the_model_that_was_saved(svd: Path, tuned: SVDWeights, tmp_path: Path) -> None:
    found = read_svd(svd, unet=save_unet(tmp_path, tuned))
    torch.testing.assert_close(outputs(found)[0], outputs(tuned)[0], rtol=0, atol=0)


def test_beside_a_diffusers_folder_with_and_without_a_unet(tmp_path: Path) -> None:
    stock = make_stock()
    save_folder(tmp_path / "svd", stock)
    folder = save_unet(tmp_path, replace(stock, unet={k: t * 1.5 for k, t in stock.unet.items()}))
    found = read_svd(tmp_path / "svd", unet=folder)
    assert torch.equal(found.unet["conv_in.weight"], stock.unet["conv_in.weight"] * 1.5)
    shutil.rmtree(tmp_path / "svd" / "unet")
    again = read_svd(tmp_path / "svd", unet=folder)
    assert same(again.unet, found.unet) and same(again.image_encoder, stock.image_encoder)


def test_an_svds_folder_gives_its_unet(tmp_path: Path) -> None:
    save_folder(tmp_path, make_stock())
    assert find_unet(tmp_path).path == tmp_path / "unet"


def test_a_file_without_a_configuration(tmp_path: Path) -> None:
    """Its heads are 64 wide, as SVD's."""
    stock = make_stock()
    stock_file(tmp_path / "svd.safetensors", stock)
    folder = save_unet(tmp_path, stock)
    (folder / "config.json").unlink()
    found = read_svd(tmp_path / "svd.safetensors", unet=folder / f"{STEM}.safetensors")
    assert same(found.unet, stock.unet)
    torch.testing.assert_close(outputs(found)[0], outputs(stock)[0], rtol=0, atol=0)


def test_a_folder_whose_one_file_has_another_name(svd: Path, tuned: SVDWeights, tmp_path: Path) -> None:
    folder = save_unet(tmp_path, tuned)
    (folder / f"{STEM}.safetensors").rename(folder / "dc_vsr.safetensors")
    assert same(read_svd(svd, unet=folder).unet, tuned.unet)


def test_the_index_that_is_named_is_read(svd: Path, tuned: SVDWeights, tmp_path: Path) -> None:
    folder = save_unet(tmp_path, tuned)
    save_unet(tmp_path, tuned, half=True, variant="fp16", max_shard_size="300KB")
    assert same(read_svd(svd, unet=folder).unet, tuned.unet)
    index = folder / f"{STEM}.safetensors.index.fp16.json"
    assert not same(read_svd(svd, unet=index).unet, tuned.unet)


def test_what_the_average_of_weights_notes_is_no_setting_of_the_model(
    svd: Path, tuned: SVDWeights, tmp_path: Path
) -> None:
    """diffusers' EMAModel, which writes folders of that name, adds its own settings to the configuration."""
    model = unet_of(tuned)
    EMAModel(model.parameters(), model_cls=UNetSpatioTemporalConditionModel, model_config=model.config).save_pretrained(
        tmp_path / "unet_ema"
    )
    assert "optimization_step" in json.loads((tmp_path / "unet_ema" / "config.json").read_text())
    assert same(read_svd(svd, unet=tmp_path / "unet_ema").unet, tuned.unet)


@pytest.mark.parametrize("layout", ["folder", "file", "index"])
def test_every_file_that_is_read_is_told(layout: str, tuned: SVDWeights, tmp_path: Path) -> None:
    how, given = LAYOUTS[layout]
    folder = save_unet(tmp_path, tuned, **how)
    told = set(find_unet(folder / given).files())
    assert told >= {file for file in folder.iterdir() if file.suffix == ".safetensors" or file.name == "config.json"}


# --- At full size ---------------------------------------------------------------------------------------------------


def test_the_published_configuration_key_by_key() -> None:
    """Stock SVD's UNet without memory: names and sizes alone give its configuration, and each key has one in the
    host's layout."""
    with torch.device("meta"):
        model: Any = UNetSpatioTemporalConditionModel()
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    config = infer_unet_alone(shapes)
    depth, layers = config.pop("transformer_layers_per_block"), config.pop("layers_per_block")
    assert {key: model.config[key] for key in config} == config and (depth, layers) == (1, 2)
    with torch.device("meta"):
        again: Any = UNetSpatioTemporalConditionModel(**config)
    assert {key: tuple(tensor.shape) for key, tensor in again.state_dict().items()} == shapes
    names = unet_map(model.config)
    assert sorted(names.values()) == sorted(shapes) and len(names) == len(set(names.values()))


def test_configurations_of_a_file_are_read_without_its_tensors() -> None:
    configs, metadata = svd_configs(LITE)
    assert set(configs) == {"unet", "vae"} and metadata["vsr.kind"] == "svd"


# --- Memory ---------------------------------------------------------------------------------------------------------

#: Reads argv[2] beside argv[1], and prints by how much memory that is no file's rose at most, in kB.
MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
from vsr_ops.checkpoints.svd import read_svd

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

torch.set_num_threads(1)
svd, small, large = map(Path, sys.argv[1:4])
read_svd(svd, unet=small)  # what is imported and set up once
peak, running = [held()], True
start = peak[0]

def watch():
    while running:
        peak[0] = max(peak[0], held())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
weights = read_svd(svd, unet=large)
running = False
thread.join()
print(max(peak[0], held()) - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from Linux's /proc")
def test_memory_is_that_of_the_file_alone(tmp_path: Path) -> None:
    svd, large = tmp_path / "svd", tmp_path / "large"
    save_folder(svd, make_stock())
    small = save_unet(tmp_path / "small", make_stock())
    config = json.loads((small / "config.json").read_text())
    config = {k: v for k, v in config.items() if not k.startswith("_")} | {"layers_per_block": 3}
    with torch.device("meta"):
        wide: Any = UNetSpatioTemporalConditionModel(
            **{**config, "block_out_channels": (192, 192), "num_attention_heads": 3}
        )
    shutil.copytree(small, large)
    changed(large, layers_per_block=3, block_out_channels=[192, 192], num_attention_heads=3)
    save_file({k: torch.rand(t.shape) for k, t in wide.state_dict().items()}, large / f"{STEM}.safetensors")
    shutil.rmtree(svd / "unet")  # so that widths may differ
    size = (large / f"{STEM}.safetensors").stat().st_size
    assert size > 80e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, svd, small, large], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rise = int(done.stdout) * 1024
    print(f"{rise / size:.3f} of {size / 1e6:.0f} MB")
    assert 0.8 < rise / size < 1.1


# --- What a folder offers -------------------------------------------------------------------------------------------


def test_a_folders_list(tuned: SVDWeights, tmp_path: Path) -> None:
    save_unet(tmp_path / "dc-vsr", tuned)
    save_unet(tmp_path / "shards", tuned, max_shard_size="300KB")
    bare = save_unet(tmp_path / "bare", tuned, max_shard_size="300KB")
    (bare / "config.json").unlink()
    (tmp_path / "flat").mkdir()
    for name in ("config.json", "one.safetensors", "two.safetensors", "old.ckpt", "notes.txt"):
        (tmp_path / "flat" / name).write_bytes(b"not what it seems")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "hidden.safetensors").write_bytes(b"")
    (tmp_path / "at the root.safetensors").write_bytes(b"")
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle").symlink_to(tmp_path, target_is_directory=True)
    closed = tmp_path / "closed.safetensors"
    closed.write_bytes(b"")
    closed.chmod(0)
    assert list_unets(tmp_path) == [
        "at the root.safetensors",
        f"bare/unet_ema/{STEM}.safetensors.index.json",
        "closed.safetensors",
        "dc-vsr/unet_ema",
        "flat/one.safetensors",
        "flat/two.safetensors",
        "gone.safetensors",
        "shards/unet_ema",
    ]
    assert list_unets(tmp_path / "no such folder") == []
    with open_unet(tmp_path / "dc-vsr/unet_ema") as unet:
        assert unet.config["in_channels"] == 8
    assert load_file(tmp_path / "dc-vsr/unet_ema" / f"{STEM}.safetensors").keys() == tuned.unet.keys()
