"""`python WORDS` without its imports: has the server fork, passes signals on, and ends as the fork ends (warm.py)."""

import json
import os
import signal
import socket
import sys

server = socket.socket(socket.AF_UNIX)
server.connect(sys.argv[1])
wanted = json.dumps({"words": sys.argv[2:], "environment": dict(os.environ), "folder": os.getcwd()}).encode()
socket.send_fds(server, [len(wanted).to_bytes(4, "big")], [0, 1, 2])
server.sendall(wanted)
fork = int.from_bytes(server.recv(4), "big")
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: os.kill(fork, number))
answer = server.recv(4)
status = int.from_bytes(answer, "big", signed=True) if answer else 1
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
    os.kill(os.getpid(), -status)
os._exit(status)
