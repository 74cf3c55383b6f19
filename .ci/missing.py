"""Prints the requirements of setup.cfg that this environment lacks, on one line; reads them, installs nothing."""

from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ModuleNotFoundError:  # a bare environment has pip's own copy
    from pip._vendor.packaging.requirements import Requirement  # type: ignore[assignment]


def is_missing(line: str) -> bool:
    """Whether no installed version, or one out of bounds, answers a requirement."""
    requirement = Requirement(line)
    try:
        return not requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return True


config = ConfigParser()
config.read(Path(__file__).parent.parent / "setup.cfg")
wanted = f"{config['options']['install_requires']}\n{config['options.extras_require']['dev']}".split("\n")
print(*dict.fromkeys(line for line in map(str.strip, wanted) if line and is_missing(line)))  # noqa: T201
