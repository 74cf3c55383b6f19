"""The wheel and the source archive: every file once, nothing missing, and usable from another folder."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.xdist_group("package")  # one worker builds for all


def expected() -> list[str]:
    """Files of the package that git knows, or would: sources, data and the typing marker."""
    files = (p for p in (ROOT / "lightning_hpo").rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return sorted(p.relative_to(ROOT).as_posix() for p in files)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and a source archive, built from a copy so that the tree stays clean."""
    folder = tmp_path_factory.mktemp("dist")
    names = ["lightning_hpo", "callbacks", "models", "setup.cfg", "pyproject.toml", "MANIFEST.in", "LICENSE", "tests"]
    copy = folder / "tree"
    copy.mkdir()
    # `cp -P` keeps the two links links.
    present = [str(ROOT / name) for name in [*names, "README.md"] if (ROOT / name).exists()]
    subprocess.run(["cp", "-rP", *present, str(copy)], check=True)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(copy)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


def test_links_at_the_top_point_into_the_package() -> None:
    for name in ("callbacks", "models"):
        assert (ROOT / name).is_symlink()
        assert (ROOT / name).readlink().as_posix() == f"lightning_hpo/{name}"


def test_wheel_holds_each_file_once_under_the_package(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert sorted(names) == expected()
    assert "lightning_hpo/py.typed" in names


def test_source_archive_holds_each_file_once_under_the_package(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = [member.name.partition("/")[2] for member in file.getmembers() if not member.isdir()]
    assert sorted(n for n in names if n.startswith("lightning_hpo/")) == expected()
    assert len(names) == len(set(names))
    rest = {name for name in names if not name.startswith(("lightning_hpo/", "lightning_hpo.egg-info/"))}
    assert rest - {"README.md"} == {"LICENSE", "MANIFEST.in", "PKG-INFO", "pyproject.toml", "setup.cfg"}


def test_installed_wheel_works_from_another_folder(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    code = (
        "import lightning_hpo as hpo; print(hpo.__file__, len(hpo.PUBLISHED_SCHEDULES), hpo.__version__);"
        "print(hpo.HyperparameterSet(a=hpo.Positive(0.5))['a'].item())"
    )
    # -P leaves the current folder out of the path; PYTHONPATH comes before any editable install.
    run = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = run.stdout.splitlines()
    where, schedules, version = first.split()
    assert Path(where) == target / "lightning_hpo" / "__init__.py"
    assert (int(schedules) > 0, version, float(second)) == (True, "0.1.0", 0.5)


def test_metadata_names_what_users_need(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    info = next(name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name)
    metadata = archive.read(f"{info}/METADATA").decode()
    needed = {line.removeprefix("Requires-Dist: ") for line in metadata.splitlines() if "Requires-Dist" in line}
    required = {line for line in needed if "extra ==" not in line}
    for package in ("lightning>=2.6", "torch>=", "timm>=", "torch-geometric>=", "jsonargparse[signatures]>=", "rich>="):
        assert any(line.startswith(package) for line in required), package
    extras = {line.removeprefix("Provides-Extra: ") for line in metadata.splitlines() if "Provides-Extra" in line}
    assert extras == {"test", "docs", "peers", "communities", "search", "dev"}
    assert any(line.startswith("mkdocs-material") and 'extra == "dev"' in line for line in needed)
    assert "lightning-hpo = lightning_hpo.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert f"{info}/licenses/LICENSE" in archive.namelist()
