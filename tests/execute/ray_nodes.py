"""Three machines, as far as Ray can tell: three raylets of one processor each, and workers that can be waited for."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "memory": 4 * 2**30}


@contextlib.contextmanager
def three_nodes() -> Iterator[Any]:
    """A `ray.cluster_utils.Cluster`; nobody is connected to it."""
    from rlmerge.execute.ray_cluster import load_ray

    load_ray()
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    try:
        cluster.add_node(**NODE)
        cluster.add_node(**NODE)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


def kill_node(cluster: Any, marks: Path) -> None:
    """SIGKILL for a raylet and for what it runs, which would go on for a second without it. Never the head."""
    node = cluster.list_all_nodes()[-1]
    os.kill(int((marks / node.node_id).read_text()), signal.SIGKILL)
    cluster.remove_node(node, allow_graceful=False)


def restore(cluster: Any) -> None:
    """Three nodes again."""
    while len(cluster.list_all_nodes()) < 3:
        cluster.add_node(**NODE)
    cluster.wait_for_nodes()


def begin_together(marks: Path, count: int = 3, patience: float = 60.0) -> None:
    """In a worker: says which process it is, and waits until so many nodes have one, so that each has work."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    part = marks.with_name(f"{marks.name}-{node}")  # beside, so that a mark is there with its number or not at all
    part.write_text(str(os.getpid()))
    part.replace(marks / node)
    deadline = time.monotonic() + patience
    while len(os.listdir(marks)) < count and time.monotonic() < deadline:
        time.sleep(0.02)
