"""Reads one 3D file with open3d: a program that `xblip_point_files` runs as a process of its own.

open3d prints its warnings, fills what a truncated file lacks with uninitialised memory, and crashes or hangs
on some damaged files (0.20.0 does on a text renamed .obj). Here its output becomes the reason of an error,
and a crash ends this process alone.

    python xblip_point_open3d.py FILE RESULT.npz

Writes the arrays points (V, 3), triangles (F, 3) and colors (V, 3) or (0, 3). Exit status 1: the file cannot
be read;
3: open3d cannot be imported. The last line of standard error says why.
"""

import contextlib
import ctypes
import io
import sys
from pathlib import Path

import numpy as np

MEMORY_BYTES = 8 * 2**30  # a damaged header may declare billions of points
CANNOT_IMPORT = 3


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


def main(path: str, result: str) -> None:
    """Does what the module says; exits with a reason when it cannot."""
    limit_memory()
    try:
        open3d = import_open3d()
    except Exception as cause:
        print(f"{type(cause).__name__}: {cause}".splitlines()[0], file=sys.stderr)
        sys.exit(CANNOT_IMPORT)
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
        sys.exit(failures[-1].split("WARNING] ")[-1].split("\x1b")[0])
    np.savez(result, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
