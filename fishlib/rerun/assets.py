"""What the site loads from outside, fetched once at set-up so that it reads without a network: MathJax.

``python -m fishlib.rerun.assets`` fetches it. MathJax and its fonts come as one package from the npm registry, which is
asked through npm itself; version and sha512 are pinned. Without npm or a network the site loads the same version from a
public server instead, and says so.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERSION = "3.2.2"
SHA512 = "Bt+SSVU8eBG27zChVewOicYs7Xsdt40qm4+UpHyX7k0/O9NliPc+x77k1/FEsPsjKPZGJvtRZM1vO+geW0OhGw=="
ENTRY = "tex-chtml-full.js"
CDN = f"https://cdn.jsdelivr.net/npm/mathjax@{VERSION}/es5/{ENTRY}"
# The formulas, their fonts, the menu, and what reads formulas aloud; the other two thirds of the package are variants.
WANTED = (ENTRY, "output/chtml/fonts/", "a11y/", "sre/", "ui/")
PREFIX = "package/es5/"


def fetch(root: Path = ROOT) -> Path | None:
    """The folder of the vendored MathJax, fetched if it is not there; None, with a printed note, if it cannot be had.

    Nothing half-written stays behind: the folder appears only when the package was checked and unpacked whole.
    """
    folder = Path(root) / "_build" / "assets" / f"mathjax-{VERSION}"
    if (folder / ENTRY).is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            unpacked = unpack(check(_pack(Path(work))), Path(work) / "mathjax")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(unpacked, folder)
    except (OSError, ValueError, tarfile.TarError, subprocess.SubprocessError) as error:
        print(f"MathJax {VERSION} could not be fetched from the npm registry ({_reason(error)}). Formulas on the site "
              f"will need a network: they load {CDN}. To change that, install npm and run "
              "`python -m fishlib.rerun.assets`.", file=sys.stderr)
        return None
    return folder


def _pack(folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("npm is not installed")
    command = [npm, "pack", f"mathjax@{VERSION}", "--prefer-offline", "--silent", "--pack-destination", str(folder)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, cwd=folder)
    return folder / f"mathjax-{VERSION}.tgz"


def check(archive: Path, sha512: str = SHA512) -> Path:
    """`archive` itself if its sha512 (base64, as npm prints it) is the pinned one; ValueError otherwise."""
    found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != sha512:
        raise ValueError(f"{archive.name} has sha512 {found}, expected {sha512}")
    return archive


def unpack(archive: Path, folder: Path) -> Path:
    """Write the wanted regular files of an npm package below `folder`; ValueError for a name that leads outside it."""
    with tarfile.open(archive) as package:
        for member in package:
            name = member.name.removeprefix(PREFIX)
            if not member.isfile() or name == member.name or not name.startswith(WANTED):
                continue
            target = (folder / name).resolve()
            if not target.is_relative_to(folder.resolve()):
                raise ValueError(f"{archive.name} holds {member.name}, which leads outside its folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(package.extractfile(member).read())
    if not (folder / ENTRY).is_file():
        raise ValueError(f"{archive.name} holds no {PREFIX}{ENTRY}")
    return folder


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = (error.stderr or "").strip().splitlines()
        return next((line for line in lines if "error" in line.lower()), f"npm exited with {error.returncode}")
    return str(error)


if __name__ == "__main__":
    if found := fetch():
        print(f"MathJax {VERSION}: {found}")
