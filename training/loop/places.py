"""What a run may write over: its own files, never an input of its recipe, nor what lay in its folder before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate.utils import get_int_from_env

from training.loop.recipe import Recipe
from training.loop.state import CHECKPOINT, DCM_WEIGHTS, REFINER, SD_WEIGHTS, WEIGHTS
from vsr_ops.errors import CheckpointError, SettingError
from vsr_ops.system.outputs import claimed, files_of, give_name, new_part, refuse_inputs, refuse_taken, remove_part

#: The settings that may name a file or a run, and what stands there for neither.
_INPUTS = ("start", "vae", "picture", "dcm", "refiner", "capm", "control", "sateco", "upscaler")
_NAMES = ("", "none", "lite", "sd_lite", "bicubic")
#: What a run writes under names of its own beside the checkpoint.
_LEFT = ("loss.csv", "loss.png", "samples", WEIGHTS, REFINER, DCM_WEIGHTS, SD_WEIGHTS)


def inputs_of(recipe: Recipe) -> list[Path]:
    """The files that a recipe starts from. Its folder of latents is not among them: a run may add to that."""
    named = [value for key, value in recipe.flat().items() if key.rpartition(".")[2] in _INPUTS]
    paths = [Path(name) for name in named if isinstance(name, str) and name not in _NAMES]
    return [file for path in paths if path.exists() for file in files_of(path)]


@contextmanager
def held_run(folder: Path, recipe: Recipe) -> Iterator[None]:
    """Holds a run's folder for this process and those beside it.

    Raises VideoError where another run holds it, or an input of the recipe lies in it, SettingError where it has no
    checkpoint but files that the run would write over.
    """
    # Of the processes of one run the first writes; the others are told by the environment who they are.
    if get_int_from_env(["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"], 0):
        yield
        return
    with claimed(folder):
        refuse_inputs(folder, inputs_of(recipe))
        left = [name for name in _LEFT if (folder / name).exists() or (folder / name).is_symlink()]
        if left and not (folder / CHECKPOINT).exists():
            raise SettingError(
                f"{folder} holds {', '.join(left)} but no checkpoint, so they are of no run to go on from; move them"
                " away or give another --out"
            )
        yield


def check_target(target: Path, overwrite: bool, inputs: Iterable[Path]) -> None:
    """Raises VideoError where weights may not be written to `target`, CheckpointError for a name of another kind."""
    if target.suffix != ".safetensors":
        raise CheckpointError(f"{target}: suffix '{target.suffix}', expected '.safetensors'; rename the output")
    refuse_inputs(target, inputs)
    refuse_taken(target, overwrite)


def write_weights(write: Callable[[Path], None], target: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Has `write` make the file `target`, and others beside it, in a hidden folder, and gives them their names.

    Raises VideoError where one of them may not be replaced, CheckpointError where the disk does not take them.
    """
    read = list(inputs)
    check_target(target, overwrite, read)
    try:
        place = new_part(target, folder=True)
        try:
            write(place / target.name)
            names = sorted(entry.name for entry in place.iterdir())
            for name in names:
                refuse_inputs(target.parent / name, read)
                refuse_taken(target.parent / name, overwrite)
            for name in names:
                give_name(place / name, target.parent / name, overwrite)
        finally:
            with suppress(OSError):
                remove_part(place)
    except OSError as error:
        what = f"{target}: cannot be written ({error.strerror})"
        raise CheckpointError(f"{what}; expected an existing folder with room and write permission") from error
