"""Scores weights on clips kept out of training, against bicubic: what the model card says.

python -m training.score --data ../shared/clips --model lite
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from training.data import HELD_OUT, PICTURES, halve, read_picture
from training.degradation import h264
from vsr_ops.clip import camera_path, load_frames, write_video
from vsr_ops.metrics import measure, table
from vsr_ops.pipeline import Job, Settings, upscale
from vsr_ops.resize import quantize8, resize_bicubic
from vsr_ops.svd import load_svd, pick_device
from vsr_ops.video import probe

FRAMES, HEIGHT, WIDTH = 8, 192, 320


def held_out_clips(root: Path) -> dict[str, Tensor]:
    """Clean clips `(8, 3, 192, 320)` by name: videos halved and cropped, photographs under a moving camera."""
    clips: dict[str, Tensor] = {}
    for folder in sorted(path for path in root.rglob("*") if path.is_dir() and path.name in HELD_OUT):
        paths = sorted(path for path in folder.iterdir() if path.suffix in PICTURES)[:FRAMES]
        frames = halve(torch.stack([read_picture(path) for path in paths])).float() / 255
        top, left = (frames.shape[-2] - HEIGHT) // 2, (frames.shape[-1] - WIDTH) // 2
        clips[folder.name] = frames[..., top : top + HEIGHT, left : left + WIDTH]
    for path in sorted(path for path in root.rglob("*") if path.suffix in PICTURES and path.stem in HELD_OUT):
        small = halve(halve(read_picture(path)[None]))[0].float() / 255
        clips[path.stem] = camera_path(small, FRAMES, HEIGHT, WIDTH)
    return {name: quantize8(clip) for name, clip in clips.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="lite")
    parser.add_argument("--crf", type=int, default=25, help="H.264 quality of the input")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--guidance", default=Settings.guidance)
    parser.add_argument("--color", default=Settings.color)
    args = parser.parse_args()
    model = load_svd(args.model, pick_device("cpu"), torch.float32)
    settings = Settings(steps=args.steps, guidance=args.guidance, color=args.color)
    rows: dict[str, dict[str, float]] = {}
    for name, truth in held_out_clips(args.data).items():
        small = h264(quantize8(resize_bicubic(truth, (HEIGHT // 4, WIDTH // 4))), args.crf)
        with tempfile.TemporaryDirectory() as folder:
            source, output = Path(folder) / "in.mp4", Path(folder) / "out.mp4"
            write_video(source, small)
            info = probe(source)
            upscale(model, Job(info, 0, info.frames, 4), output, settings, cuts=())
            bicubic = quantize8(resize_bicubic(load_frames(source), (HEIGHT, WIDTH)))
            rows[f"{name}, bicubic"] = measure(bicubic, truth)
            rows[f"{name}, model"] = measure(quantize8(load_frames(output)), truth)
    for method in ("bicubic", "model"):
        chosen = [row for name, row in rows.items() if name.endswith(method)]
        rows[f"mean, {method}"] = {key: sum(row[key] for row in chosen) / len(chosen) for key in chosen[0]}
    print(table(rows))


if __name__ == "__main__":
    main()
