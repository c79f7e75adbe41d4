r"""Puts a trained UNet and VAE into one file of the pack, the latents scaled to SVD's factor.

python -m training.export --unet runs/unet --vae runs/vae --latents runs/latents \
    --out vsr_ops/weights/svd_lite.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.svd import FRAMES, UNET_LITE, latent_spread
from training.vae import SCALE, SHAPE
from vsr_ops.checkpoint import SVDWeights, write_svd

#: Default tile: as trained.
TILE = (24, 24, FRAMES)
SOURCES = (
    "DAVIS 2016 (BSD) without kite-surf and car-shadow; SAM 2 clips (Apache-2.0); 32 CC0 photographs;"
    " CID22 photographs (CC BY-SA 4.0)"
)


def scaled_vae(state: dict[str, Tensor], spread: Tensor) -> dict[str, Tensor]:
    """The VAE with its latents divided by `spread * SCALE`, so that SCALE brings them to deviation 1 as SVD's are.

    Folded into the encoder's last and the decoder's first convolution: pictures come out the same. The variance, which
    is not trained, becomes zero.
    """
    state = {name: value.clone() for name, value in state.items()}
    factor = (spread * SCALE).view(4, 1, 1, 1)
    state["encoder.conv_out.weight"][:4] /= factor
    state["encoder.conv_out.bias"][:4] /= factor.flatten()
    state["encoder.conv_out.weight"][4:] = 0
    state["encoder.conv_out.bias"][4:] = -30
    state["decoder.conv_in.weight"] *= factor.view(1, 4, 1, 1)
    state["quant_conv.weight"] = torch.eye(8).view(8, 8, 1, 1)
    state["quant_conv.bias"] = torch.zeros(8)
    return state


def average(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["average"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("unet", "vae", "latents", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    weights = SVDWeights(
        unet_config=UNET_LITE,
        vae_config={**SHAPE, "scaling_factor": SCALE},
        image_encoder_config=None,
        unet=average(args.unet),
        vae=scaled_vae(average(args.vae), latent_spread(args.latents)),
        image_encoder=None,
        tile=TILE,
        metadata={},
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_svd(args.out, weights, SOURCES)
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
