"""Fetching MathJax: the pinned hash is checked, archives stay inside their folder, and its absence is survived."""

import errno
import io
import os
import tarfile
from pathlib import Path

import pytest

from fishlib.rerun import assets


def archive(path, **files):
    with tarfile.open(path, "w:gz") as package:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))
    return path


def test_altered_package_is_refused_and_nothing_stays_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(assets, "_pack", lambda folder: archive(folder / "m.tgz", **{f"package/es5/{assets.ENTRY}": b"x"}))
    assert assets.fetch(tmp_path) is None
    assert "expected " + assets.SHA512 in capsys.readouterr().err
    assert list((tmp_path / "_build" / "assets").iterdir()) == []


@pytest.mark.parametrize("trouble", [OSError(errno.ENOSPC, "full disk"), PermissionError(errno.EACCES, "closed folder"),
                                     KeyboardInterrupt("Ctrl-C")], ids=str)
@pytest.mark.parametrize("place", [(os, "replace"), (Path, "write_bytes")], ids=["in its place", "in the middle"])
def test_trouble_leaves_nothing_behind_and_only_ctrl_c_ends_the_set_up(place, trouble, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise trouble

    monkeypatch.setattr(assets, "_pack", lambda folder: archive(folder / "m.tgz", **{f"package/es5/{assets.ENTRY}": b"x"}))
    monkeypatch.setattr(assets, "check", lambda package: package)
    monkeypatch.setattr(*place, fail)
    if isinstance(trouble, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            assets.fetch(tmp_path)
    else:
        assert assets.fetch(tmp_path) is None
        assert str(trouble) in capsys.readouterr().err
    assert list((tmp_path / "_build" / "assets").iterdir()) == []


def test_without_npm_the_note_says_where_formulas_will_come_from(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(assets.shutil, "which", lambda name: None)
    assert assets.fetch(tmp_path) is None
    note = capsys.readouterr().err
    assert "npm is not installed" in note
    assert assets.CDN in note


def test_what_is_there_already_is_not_fetched_again(tmp_path, monkeypatch):
    folder = tmp_path / "_build" / "assets" / f"mathjax-{assets.VERSION}"
    folder.mkdir(parents=True)
    (folder / assets.ENTRY).write_text("")
    monkeypatch.setattr(assets, "_pack", lambda folder: pytest.fail("asked npm"))
    assert assets.fetch(tmp_path) == folder


def test_only_wanted_files_are_unpacked(tmp_path):
    package = archive(tmp_path / "m.tgz", **{f"package/es5/{assets.ENTRY}": b"x", "package/es5/tex-svg.js": b"y",
                                            "package/es5/output/chtml/fonts/woff-v2/a.woff": b"z", "other": b"o"})
    folder = assets.unpack(package, tmp_path / "out")
    assert sorted(file.name for file in folder.rglob("*") if file.is_file()) == ["a.woff", assets.ENTRY]


def test_name_that_leads_outside_is_refused(tmp_path):
    package = archive(tmp_path / "m.tgz", **{"package/es5/ui/../../../escaped.js": b"x"})
    with pytest.raises(ValueError, match="leads outside"):
        assets.unpack(package, tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("escaped.js"))


def test_package_without_the_script_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no"):
        assets.unpack(archive(tmp_path / "m.tgz", **{"package/es5/ui/menu.js": b"x"}), tmp_path / "out")
