"""``python -m bench`` is `fastdistill bench`."""

import sys

from fastdistill.cli import main

sys.argv[1:1] = ["bench"]
main()
