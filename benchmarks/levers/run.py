"""What levers save at equal quality; takes the options of `trainonce bench levers`."""

import sys
from pathlib import Path

from trainonce.cli.main import main

if __name__ == "__main__":
    folder = str(Path(__file__).parent / "results")
    sys.exit(main(["bench", "levers", "--out", folder, *sys.argv[1:]]))
