"""The older name of `python -m training.report.validation`."""

from training.report.validation import main
from vsr_ops.system.allocator import keep_freed

if __name__ == "__main__":
    keep_freed()
    main()
