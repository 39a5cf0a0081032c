"""torchrun --max_restarts: the ranks of a new attempt meet each other, and not the dead ones of the attempt before.

The store in which ranks publish their addresses lives in torchrun and outlives a restart. Up to torch 2.12 each attempt had its
own prefix in it; 2.13 dropped that (distributed/rendezvous.py, _create_c10d_store), so a fast rank reads the address of a rank that
was killed, and the attempt fails or hangs. Here rank 0 opens a new store for each attempt.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch.distributed import PrefixStore, TCPStore

from sft.arguments import rank, world_size

_kept: list[TCPStore] = []  # the process group talks through it until the process ends


@contextmanager
def new_store_for_each_attempt(patience_s: float = 600) -> Iterator[None]:
    """Around a run: MASTER_PORT is that of this attempt's store. It does nothing without --max_restarts."""
    agent_port = os.environ.get("MASTER_PORT", "")
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts == 0 or world_size() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        yield
        return
    address = os.environ["MASTER_ADDR"]
    agent = PrefixStore("attempt", TCPStore(address, int(agent_port), is_master=False))
    if rank() == 0:
        store = TCPStore(address, 0, world_size(), is_master=True, wait_for_workers=False)
        agent.set("port", str(store.port))
    else:
        store = _current_store(address, agent, time.monotonic() + patience_s)
    _kept.append(store)
    os.environ["MASTER_PORT"] = str(store.port)
    try:
        yield
    finally:
        os.environ["MASTER_PORT"] = agent_port


def _current_store(address: str, agent: PrefixStore, until: float) -> TCPStore:
    """Connect to the store of this attempt's rank 0: the one of an earlier attempt has died with its process."""
    while True:
        try:
            port = int(agent.get("port"))
            return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=2))
        except torch.distributed.DistError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)
