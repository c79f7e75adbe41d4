"""The older name of `python -m training.report.validation`."""

from training.report.validation import main

if __name__ == "__main__":
    main()
