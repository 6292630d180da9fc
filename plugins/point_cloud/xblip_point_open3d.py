"""Reads one 3D file with open3d: a program that `xblip_point_files` runs as a process of its own.

open3d prints its warnings, fills what a truncated file lacks with uninitialised memory, and crashes or hangs
on some damaged files (0.20.0 does on a text renamed .obj). Here its output becomes the reason of an error,
and a crash ends this process alone.

    python xblip_point_open3d.py FILE RESULT.npz
    python xblip_point_open3d.py --many

Writes the arrays points (V, 3), triangles (F, 3) and colors (V, 3) or (0, 3). Exit status 1: the file cannot be read;
3: open3d cannot be imported. The last line of standard error says why.

`--many` (Linux) reads lines `["FILE", "RESULT.npz"]`, each file in a fork that has open3d imported, and answers each by a
line `[status, "the last line of standard error"]`. It ends with its input, or when nothing came for a minute.
"""

import contextlib
import ctypes
import io
import json
import os
import select
import sys
from pathlib import Path

import numpy as np

MEMORY_BYTES = 8 * 2**30  # a damaged header may declare billions of points
CANNOT_IMPORT = 3
IDLE_SECONDS = 60
REASON_BYTES = 4096
REASON_CHARACTERS = 500


def limit_memory() -> None:
    """Lets absurd amounts that a file asks for end this process alone, and a crash leave no core file."""
    try:
        import resource
    except ImportError:  # there is none on Windows
        return
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def import_open3d():
    """Imports open3d beside the libusb that it links to, which bare Linux systems lack."""
    if sys.platform == "linux":
        import libusb_package

        ctypes.CDLL(str(libusb_package.get_library_path()), mode=ctypes.RTLD_GLOBAL)
    import open3d

    return open3d


def read(open3d, path: str) -> dict[str, np.ndarray]:
    """Reads a mesh; its polygons come as triangles."""
    suffix = Path(path).suffix.lower()
    if suffix == ".off":
        mesh = open3d.io.read_triangle_mesh(path)
        points, colors, triangles = mesh.vertices, mesh.vertex_colors, mesh.triangles
    else:  # the older reader of these formats leaves out every polygon that is not a triangle
        mesh = open3d.t.io.read_triangle_mesh(path)
        points, triangles = mesh.vertex.positions.numpy(), mesh.triangle.indices.numpy()
        colors = mesh.vertex.colors.numpy() if "colors" in mesh.vertex else np.empty((0, 3))
    return {"points": np.asarray(points), "colors": np.asarray(colors), "triangles": np.asarray(triangles)}


def read_into(open3d, path: str, result: str) -> None:
    """Writes what a file holds; exits with a reason when it cannot be read."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            arrays = read(open3d, path)
        except MemoryError:
            sys.exit(f"it asks for more than {MEMORY_BYTES >> 30} GiB of memory")
        except IndexError:  # what open3d raises for "nothing found"
            sys.exit("open3d finds no mesh in it")
        except Exception as cause:
            sys.exit(str(cause).splitlines()[0])
    failures = [line for line in said.getvalue().splitlines() if "failed" in line.lower()]
    if failures:
        sys.exit(failures[-1].split("WARNING] ")[-1].split("\x1b")[0][:REASON_CHARACTERS])  # it repeats what it read
    np.savez(result, **arrays)


def import_or_exit():
    """Returns open3d, or exits with the reason why it cannot be imported."""
    try:
        return import_open3d()
    except Exception as cause:
        print(f"{type(cause).__name__}: {cause}".splitlines()[0], file=sys.stderr)
        sys.exit(CANNOT_IMPORT)


def read_many() -> None:
    """Answers lines as the module says."""
    open3d = import_or_exit()
    while select.select([sys.stdin], [], [], IDLE_SECONDS)[0]:
        line = sys.stdin.readline()
        if not line:
            return
        print(json.dumps(read_in_fork(open3d, *json.loads(line))), flush=True)


def read_in_fork(open3d, path: str, result: str) -> tuple[int, str]:
    """Reads a file in a fork; returns its status and the last line that it wrote to standard error."""
    there, here = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(here, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 1
        try:
            limit_memory()
            read_into(open3d, path, result)
            status = 0
        except SystemExit as reason:
            print(reason, file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    os.close(here)
    said = b""
    while there in (ready := select.select([there, sys.stdin], [], [])[0]):
        new = os.read(there, REASON_BYTES)
        if not new:
            break
        said = (said + new)[-REASON_BYTES:]
    if there not in ready:  # whoever asked is gone: nothing else comes before the answer
        os.kill(child, 9)
    os.close(there)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, (said.decode(errors="replace").strip().splitlines() or [""])[-1]


def main(*given: str) -> None:
    """Does what the module says."""
    if given == ("--many",):
        return read_many()
    limit_memory()
    read_into(import_or_exit(), *given)


if __name__ == "__main__":
    main(*sys.argv[1:])
