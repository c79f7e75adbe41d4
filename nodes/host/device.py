"""Where hosts of different age differ: memory, compilation, precision between nodes; one name for each thing."""

from __future__ import annotations

import inspect
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP

from ...vsr_ops.system.memory import Memory, ran_out


def make_patcher(
    module: torch.nn.Module, load_device: torch.device, offload_device: torch.device, disable_dynamic: bool = False
) -> Any:
    """What the host manages a module's weights by. Under dynamic VRAM newer hosts read weights from the disk as they
    are needed, and one patcher of the older kind beside theirs makes them estimate again. Which kind it is they settle
    when they start, so it is looked up at each use."""
    kinds = comfy.model_patcher
    kind = kinds.ModelPatcher if disable_dynamic else getattr(kinds, "CoreModelPatcher", kinds.ModelPatcher)
    return kind(module, load_device=load_device, offload_device=offload_device)


def _ran_out(error: BaseException) -> bool:
    """The host's own predicate: more than one class counts since 2026, and it clears what the error left behind."""
    manage = comfy.model_management
    if hasattr(manage, "is_oom"):
        return bool(manage.is_oom(error))
    # Older hosts know fewer kinds, and without an accelerator's class take any error for one.
    own = manage.OOM_EXCEPTION is not Exception and isinstance(error, manage.OOM_EXCEPTION)
    return own or ran_out(error)


#: How the host tells that memory ran out, and frees it.
MEMORY = Memory(_ran_out, comfy.model_management.soft_empty_cache)


def is_compiled(model: Any) -> bool:
    """Whether Torch Compile, or a node like it, is on a MODEL's UNet."""
    wrapped = model.get_wrappers(WrappersMP.APPLY_MODEL, "torch.compile")
    return bool(wrapped) or hasattr(model.get_model_object("diffusion_model"), "_orig_mod")


def uncompiled() -> AbstractContextManager[object]:
    """Within, compiled modules run as they are written. A compiled UNet would keep the first call's attention, banks
    and step for ever: nodes that compile guard nothing that is in a call's options."""
    # Whatever compiles has loaded torch's compiler by now; loading it takes seconds.
    loaded = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()


def is_torchs(function: object) -> bool:
    """Whether an attention function, as the host hands it to an override, does torch's own and nothing else."""
    return function is inspect.unwrap(comfy.ldm.modules.attention.attention_pytorch)


def intermediate_dtype() -> torch.dtype:
    """What IMAGEs are handed on in: float32, or half of it where the artist has asked the host for that."""
    asked = getattr(comfy.model_management, "intermediate_dtype", None)
    return torch.float32 if asked is None else asked()
