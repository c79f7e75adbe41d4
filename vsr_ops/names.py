"""The names that options and nodes offer, in the order of the tables they stand for, and nothing that takes long to
import: a command's help must not wait for torch.

What a name does stands in its table; tests/test_names.py holds the two together.
"""

from __future__ import annotations

GUIDANCE = ("none", "cfg", "dssag", "pag", "sag")
LAYOUTS = ("paper", "balanced", "shifted")
PROPAGATION = ("sap+tap", "sap", "tap", "none")
SAP_MODES = ("auto", "synchronous", "lagged")
BRANCH_MODES = ("auto", "together", "apart")
SAMPLERS = ("euler", "ddpm", "dpmpp_2m")
ALIGN_MODES = ("gradient", "propagate")
ALIGN_SCALES = ("bounded", "ddpm")
FLOWS = ("dis", "raft")
COLOR = ("adain", "wavelet", "detail", "none")
PREDICTIONS = ("v_prediction", "epsilon")
DTYPES = ("float32", "float16", "bfloat16")
CODECS = ("h264", "prores", "ffv1", "png", "png8", "jpeg")
METRICS = (
    *("psnr_y", "ssim_y", "psnr", "vmaf", "vmaf_neg", "gmsd", "haarpsi", "lpips", "dists", "tof", "tlp", "warp_error"),
    *("flicker", "seam", "color_drift", "niqe", "musiq", "maniqa", "clipiqa", "dover"),
)
PUBLISHED = ("none", "dc-vsr", "sdatc", "sateco", "all")
