"""A small data set, and a server of it that fails in every way."""

from __future__ import annotations

import http.server
import socket
import threading
from collections import Counter
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import numpy as np

from crysforge.datapipe.storage.dataset import DatasetWriter

COUNT, SHARD = 60, 10
SHARDS = [f"train-{i:06d}.tar" for i in range(COUNT // SHARD)]
FAULTS = ["drop", "truncate", "short", "garbage", 500, 503, 429]


def make_set(root, random_crystal):
    rng = np.random.default_rng(0)
    with DatasetWriter(root, ["gap"], shard_size=SHARD) as writer:
        for i in range(COUNT):
            writer.add("train", random_crystal(rng, 1 + i % 5, f"mp-{i}", {"gap": float(i)}))
        writer.finish({})
    return root


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder. `faults` holds what goes wrong with the next requests for a file. A `flaky`
    one serves a shard at every third request for it, so three tries suffice as long as processes
    download a shard in turn."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.flaky, self.kinds = folder, {}, False, cycle(FAULTS)
        self.asked, self.served, self.endless = Counter(), Counter(), 0
        self.lock, self.stalled, self.end = threading.Lock(), threading.Event(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def next_fault(self, name):
        with self.lock:
            self.asked[name] += 1
            if planned := self.faults.get(name):
                return planned.pop(0)
            fails = self.flaky and name in SHARDS and self.asked[name] % 3
            return next(self.kinds) if fails else None

    def handle_error(self, request, client_address):
        pass  # clients that were killed or gave up


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.split("?")[0].removeprefix("/")
        fault, path = self.server.next_fault(name), self.server.folder / name
        if isinstance(fault, int) or not path.is_file():
            self.send_error(fault or 404)
        elif fault == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)  # a forked process may have it open, too
        else:
            self.send(name, path.read_bytes(), fault)

    def send(self, name, data, fault):
        if fault == "garbage":
            data = bytes(reversed(data))
        self.send_response(200)
        if fault == "endless":
            self.end_headers()
            while not self.server.end.is_set():
                self.wfile.write(bytes(1 << 20))
                self.server.endless += 1 << 20
            return
        if fault == "announced":
            self.send_header("Content-Length", str(1 << 50))
        elif fault != "short":  # then the end of the connection is the end of the file
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault in ("truncate", "short", "stall"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if fault == "stall":
                self.server.stalled.set()
                self.server.end.wait()
        else:
            with self.server.lock:
                self.server.served[name] += fault is None
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@contextmanager
def serve(folder):
    """A server of the folder that runs in a thread."""
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.end.set()
            server.shutdown()
            thread.join()


def read(dataset, items=range(COUNT)):
    return [crystal.id for _, crystal in dataset.read(items)]


def kept(access):
    return sorted(p.name for p in Path(access.cache_dir).iterdir() if p.name != "lock")
