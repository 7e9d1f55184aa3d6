"""One of the two processes of the fixture ``two_ranks``: ``rank.py MODULE FILE FUNCTION FOLDER``.

Calls the function of a test file with the rank and the arguments in FOLDER, inside a process group, and leaves what it
returns there.
"""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist


def load(name: str, file: str) -> ModuleType:
    """The test file under the name that pytest gave it, which pickled arguments may hold; it finds what lies beside."""
    sys.path.insert(0, str(Path(file).parent))
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def main(name: str, file: str, function: str, folder: str) -> None:
    torch.set_num_threads(1)
    rank, module = int(os.environ["RANK"]), load(name, file)
    arguments = torch.load(Path(folder) / "arguments.pt", weights_only=False)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(getattr(module, function)(rank, *arguments), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)      # as `Engine.leave` does: the threads that gloo leaves behind abort some ordinary exits


if __name__ == "__main__":
    main(*sys.argv[1:])
