"""The older name of `python -m training.report.sdatc`."""

from training.report.sdatc import main
from vsr_ops.system.allocator import keep_freed

if __name__ == "__main__":
    keep_freed()
    main()
