"""`python -m benchmarks.full_size`: its plans and models, what its rows do, and the whole of it on tiny models."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from torch import Tensor, nn

from benchmarks.full_size import __main__ as command
from benchmarks.full_size import measure, parts
from benchmarks.full_size.build import CONFIGS, MODELS, SD21_UNET, SD21_VAE, Sizes
from benchmarks.full_size.measure import FACTOR, Case, Limits
from benchmarks.full_size.report import Line
from benchmarks.full_size.rows import PLAIN, ROWS, Bench, Traffic
from vsr_ops.backbones.svd import Backbone
from vsr_ops.pipeline.sampler import strengths
from vsr_ops.sampling.guidance import guide
from vsr_ops.sampling.tiling import TileSize

ROOT = Path(__file__).resolve().parents[2]
CPU, TINY = torch.device("cpu"), CONFIGS["tiny"]
EVERYTHING = (*ROWS, "vae")


@pytest.fixture(scope="module")
def model() -> Backbone:
    return MODELS["svd"].build(TINY, CPU, torch.float32)


@pytest.fixture(scope="module")
def bench(model: Backbone) -> Bench:
    made = Bench(model, measure.small_plan(TINY.tile), evaluated=1)
    made.warm_up()
    return made


def case(rows: tuple[str, ...] = EVERYTHING, sizes: Sizes = TINY) -> Case:
    return Case("svd", sizes, "a size", CPU, torch.float32, rows)


def test_the_options_name_what_there_is() -> None:
    assert EVERYTHING == command.ROW_NAMES
    assert (tuple(parts.PARTS), tuple(MODELS)) == (command.PARTS, command.MODEL_NAMES)


def test_plans_are_of_the_pictures_that_artists_ask_for() -> None:
    tile = CONFIGS["full"].tile
    found = {size: measure.plan_of(size, tile) for size in measure.PICTURES}
    assert {size: (len(p.spatial), len(p.windows), p.frames) for size, p in found.items()} == {
        "720p": (8, 3, 28),
        "1080p": (28, 3, 28),
        "4k": (112, 3, 28),
    }


def test_on_a_cpu_sap_and_tap_have_neighbours() -> None:
    plan = measure.small_plan(parts.CPU_TILE)
    assert (len(plan.rows), len(plan.cols), len(plan.windows)) == (2, 2, 2)
    assert plan.tile_size(0) == parts.CPU_TILE == TileSize(64, 64, 2)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_models_are_of_the_published_size() -> None:
    full = CONFIGS["full"]
    with torch.device("meta"):
        assert count(UNetSpatioTemporalConditionModel(**full.svd)) == 1_524_623_082
        assert count(UNet2DConditionModel(**SD21_UNET)) == 865_910_724
        assert round(count(AutoencoderKLTemporalDecoder(**full.svd_vae)) / 1e6, 1) == 97.7
        assert count(AutoencoderKL(**SD21_VAE)) == 83_653_863


def test_every_level_of_a_tile_is_whole() -> None:
    for sizes in CONFIGS.values():
        assert sizes.tile.height % FACTOR == sizes.tile.width % FACTOR == 0


@pytest.mark.parametrize(("name", "evaluated"), [*((name, 1) for name in ROWS), ("sap-lagged", None), ("tap", None)])
def test_a_row_takes_the_passes_of_its_guidance(bench: Bench, name: str, evaluated: int | None) -> None:
    row = ROWS[name]
    taken = replace(bench, evaluated=evaluated, seen=bench.seen).step(row)
    power = strengths(row.settings)[-1]
    assert taken.passes == row.passes == guide(row.guidance).passes(power)
    assert taken.seconds > 0 and taken.peak > 0 and not taken.parted


def banks_seen(bench: Bench, name: str) -> tuple[tuple[int, tuple[int, ...]], int]:
    """Of the last UNet call of a row's step: its window and tiles, and the lagged banks' bytes when it begins."""
    seen: list[tuple[tuple[int, tuple[int, ...]], int]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert bench.model.active is not None
        run, call = bench.model.active
        seen.append(((call.window, call.tiles), run.bank_bytes))

    hook = bench.model.unet.register_forward_pre_hook(note)
    bench.step(ROWS[name])
    hook.remove()
    return seen[-1]


def test_a_call_sees_the_same_banks_where_the_others_are_left_out(bench: Bench) -> None:
    alone, whole = (banks_seen(replace(bench, evaluated=n, seen=bench.seen), "sap-lagged") for n in (1, None))
    # The second step runs backward.
    assert alone == whole and alone[0] == (0, (3,)) and alone[1] > 0


def test_a_synchronous_step_takes_a_window_at_once(bench: Bench) -> None:
    assert banks_seen(bench, "sap-sync")[0] == (1, (0, 1, 2, 3))


def test_the_model_is_left_as_it_was(bench: Bench) -> None:
    bench.step(ROWS[PLAIN])
    assert "denoise" not in vars(bench.model) and "decode" not in vars(bench.model)


def test_traffic_is_counted_in_the_precision_of_the_device() -> None:
    with Traffic() as traffic:
        there = torch.ones(10).to("meta", torch.float16)
        torch.ones(10).to(torch.float64)
        torch.empty(3, device="meta").copy_(torch.ones(3))
        there.to("meta", torch.float32)
    assert (traffic.sent, traffic.received) == (20 + 12, 0)


def test_nan_fails_its_row_and_no_other() -> None:
    model = MODELS["svd"].build(TINY, CPU, torch.float32)
    bench = Bench(model, measure.small_plan(TINY.tile), evaluated=1)
    bench.warm_up()
    with torch.no_grad():
        model.unet.conv_out.bias.fill_(float("nan"))
    others: list[Line] = []
    times = measure.rounds(bench, case(("plain", "tap")), Limits(), others)
    assert not any(times.values())
    assert [line.failed for line in others] == [True, True] and "NaN" in others[0].error


def test_where_no_time_is_left_rows_are_named(bench: Bench) -> None:
    others: list[Line] = []
    times = measure.rounds(bench, case(), Limits(rounds=3, deadline=0.0), others)
    assert {name: len(taken) for name, taken in times.items() if taken} == {PLAIN: 1}
    assert len(others) == len(ROWS) - 1 and not any(line.failed for line in others)


def table_of(text: str) -> dict[str, str]:
    """The printed table's lines, by what they are of."""
    lines = text.split("---\n")[-1].split("\n\n")[0].splitlines()
    return {line.split("   ")[0].strip(): line for line in lines}


def test_the_whole_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--config", "tiny", "--device", "cpu", "--models", "sd21", "--part", "small", "correctness"])
    found = table_of(capsys.readouterr().out)
    label = "SD 2.1, 192x192x3, float32"
    titles = [*(row.title for row in ROWS.values()), "encode", "decode"]
    assert {f"{label}: {title}" for title in titles} < set(found)
    errors = {what: float(line.split()[-1]) for what, line in found.items() if not what.startswith(label)}
    assert len(errors) == 6 and all(0 < error < 0.05 for error in errors.values())
    assert errors["SD 2.1, bfloat16: UNet"] > errors["SD 2.1, float16: UNet"]


def test_a_failure_is_an_error_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(wishes: parts.Wishes, part: str) -> list[Line]:
        raise ValueError("it does not work")

    monkeypatch.setitem(parts.PARTS, "small", fails)
    with pytest.raises(SystemExit, match="1 of 1 rows failed"):
        command.main(["--config", "tiny", "--device", "cpu", "--part", "small"])


def test_a_cpu_refuses_what_needs_a_card() -> None:
    with pytest.raises(SystemExit, match="--part 4k needs a card"):
        command.main(["--part", "small", "4k", "--device", "cpu"])


def test_the_host_needs_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    with pytest.raises(SystemExit, match="--comfyui"):
        command.main(["--part", "host", "--device", "cpu"])


def test_wheels_stand_behind_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit, match=r"no \.whl"):
        command.add_wheels(tmp_path)
    with zipfile.ZipFile(tmp_path / "some-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("only_in_a_wheel.py", "value = 3")
    unpacked = command.add_wheels(tmp_path)
    assert sys.path[-1] == unpacked.name and (Path(unpacked.name) / "only_in_a_wheel.py").is_file()
    unpacked.cleanup()


def test_a_machine_without_video_libraries_can_run_it() -> None:
    names = ("av", "kornia", "psutil", "transformers", "cv2", "scenedetect", "skimage", "spandrel", "scipy")
    absent = "; ".join(f"sys.modules[{name!r}] = None" for name in names)
    code = f"import sys; {absent}; import benchmarks.full_size.parts; print('loaded')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().endswith("loaded"), done.stderr
