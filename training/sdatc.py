"""The older name of `python -m training.report.sdatc`."""

from training.report.sdatc import main

if __name__ == "__main__":
    main()
