"""`python run.py STAGE ...`: the one command; see `chatyuan.main`."""

import sys

from chatyuan.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
