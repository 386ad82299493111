"""The trainonce command with a store that serves nobody, so that torch is not imported."""

import sys

from trainonce.cli.main import main
from trainonce.controller import launch


class SilentStore:
    port = 1

    def __init__(self, port):
        pass

    def start(self):
        pass

    def renew(self):
        pass

    def close(self):
        pass


launch.TorchStore = SilentStore
sys.exit(main())
