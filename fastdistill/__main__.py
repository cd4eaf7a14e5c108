"""``python -m fastdistill`` and ``torchrun -m fastdistill``: the command line."""

from fastdistill.cli import main

if __name__ == "__main__":
    main()
