"""A benchmark program as its own ranks: on this machine, or joined by an emulated link."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastattn.spec import Link

from .network import Unavailable, network


def as_ranks(
    program: str,
    own: Sequence[str],
    world: int,
    link: Link | None,
    where: str,
    env: Mapping[str, str] | None = None,
) -> Any:
    """Runs ``program`` again with its arguments, ``own`` and --result FILE, as every rank; what rank 0 wrote.

    ``link`` joins the ranks, None: this machine's memory. Ends this process where there can be no such link,
    or a rank fails, with ``where`` it was.
    """
    name = f"bench/{Path(program).name}"
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [program, *sys.argv[1:], *own, "--result", str(result)]
        try:
            status = _status(command, world, link, env or {})
        except Unavailable as reason:
            sys.exit(f"{name}: {reason}")
        if status:
            sys.exit(f"{name}: {where}: a rank ended with status {status}")
        return json.loads(result.read_text())


def _status(command: Sequence[str], world: int, link: Link | None, env: Mapping[str, str]) -> int:
    if link and world > 1:
        with network(world, link) as net:
            return net.run([sys.executable, *command], env)
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}")
    launched = [sys.executable, *(torchrun if world > 1 else ()), *command]
    return subprocess.run(launched, env={**os.environ, **env}, check=False).returncode
