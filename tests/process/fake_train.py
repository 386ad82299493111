"""A worker without torch that does what a test tells it over a socket.

It forwards what the launcher says to the test as JSON lines, and obeys lines from the test:
{"send": message}, {"page": fields}, {"mirror": text}, {"spawn": true}, {"exit": code}.
"""

import json
import os
import select
import socket
import subprocess
import sys

from trainonce.wire import messages
from trainonce.wire.channel import Channel
from trainonce.wire.progress import Progress

test = socket.socket(socket.AF_UNIX)
test.connect(sys.argv[1])
commands = test.makefile("r")
channel = Channel.from_fd(int(os.environ["TRAINONCE_CONTROL_FD"]))
page = Progress(int(os.environ["TRAINONCE_PROGRESS_FD"]))


def tell(**record):
    test.sendall(json.dumps(record).encode() + b"\n")


def obey(command):
    if "send" in command:
        channel.send(messages.decode(json.dumps(command["send"]).encode()))
    if "page" in command:
        for field, value in command["page"].items():
            page[field] = value
    if "mirror" in command:
        fd = os.memfd_create("mirror")
        os.write(fd, command["mirror"].encode())
        channel.send(messages.Mirror(rank=command["rank"], size_bytes=os.fstat(fd).st_size), [fd])
    if "spawn" in command:
        tell(child=subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]).pid)
    if "exit" in command:
        sys.exit(command["exit"])
    tell(obeyed=True)


tell(
    worker=int(os.environ["TRAINONCE_WORKER"]),
    pid=os.getpid(),
    rank=int(os.environ.get("RANK", "-1")),
)
while True:
    for ready in select.select([channel, test], [], [])[0]:
        if ready is test:
            obey(json.loads(commands.readline() or '{"exit": 8}'))
            continue
        found, alive = channel.receive_ready()
        for message in found:
            record = json.loads(messages.encode(message))
            if record.get("mirrors"):
                record["mirror"] = os.pread(channel.take_fd(), 100, 0).decode()
            tell(heard=record)
            if isinstance(message, messages.Exit) or getattr(message, "stop", False):
                sys.exit(0)
        if not alive:
            tell(orphaned=True)
            sys.exit(9)
