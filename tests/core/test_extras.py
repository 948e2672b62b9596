"""The extras that pyproject.toml declares, the errors that name them, and the lock that pins them all."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from worldloom.core.errors import ConfigError
from worldloom.core.extras import EXTRAS, require
from worldloom.federation import Accountant, PrivacyConfig
from worldloom.training import RunFolder

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_extras_are_those_that_the_library_knows_and_all_has_each() -> None:
    declared = PROJECT["optional-dependencies"]
    assert set(declared) == {*EXTRAS, "all", "dev"}
    (everything,) = declared["all"]
    assert Requirement(everything).extras == set(EXTRAS)


def test_each_extra_has_a_check_of_what_it_promises() -> None:
    script = (ROOT / "scripts" / "check_extras").read_text()
    assert set(re.findall(r"^check_(\w+)\(\)", script, re.MULTILINE)) == {"core", *EXTRAS}


def test_a_missing_module_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, extra in EXTRAS.items():
        for module in extra.modules:
            monkeypatch.setitem(sys.modules, module, None)
            with pytest.raises(ConfigError, match=rf"pip install 'worldloom\[{name}\]'"):
                require(module, name)


def test_sampled_rounds_cannot_be_counted_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    accountant = Accountant(PrivacyConfig(clip=1.0, noise=1.0))
    assert accountant.spend(rounds=3) > 0
    with pytest.raises(ConfigError, match=r"pip install 'worldloom\[weave\]'"):
        accountant.spend(sample_rate=0.5)


def test_a_run_is_logged_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worldloom.training.run_folder.find_spec", lambda name: None)
    run = RunFolder.create(tmp_path / "run", {}, {})
    run.log(1, {"loss": 2.0})
    run.close()
    assert run.metrics() == [{"step": 1, "loss": 2.0}]
    assert not (run.path / "tensorboard").exists()


def lock() -> tuple[dict[str, int], dict[str, int]]:
    """Return the number of hashes of each package of the demo, and of each other package."""
    demo, _, others = (ROOT / "requirements.lock").read_text().partition("# Extras")
    entries = (
        re.findall(r"^([A-Za-z0-9._-]+)==\S+((?: \\\n    --hash=sha256:[0-9a-f]{64})*)$", part, re.M)
        for part in (demo, others)
    )
    first, rest = ({canonicalize_name(name): hashes.count("--hash") for name, hashes in part} for part in entries)
    return first, rest


def brought_by(*roots: str) -> set[str]:
    """Return the names of the packages that these requirements bring, themselves included."""
    found: set[str] = set()
    waiting = [Requirement(text) for text in roots]
    seen: set[str] = set()
    while waiting:
        wanted = waiting.pop()
        if str(wanted) in seen or wanted.name == PROJECT["name"]:
            continue
        seen.add(str(wanted))
        found.add(canonicalize_name(wanted.name))
        try:
            brought = [Requirement(text) for text in requires(wanted.name) or []]
        except PackageNotFoundError:
            continue
        extras = wanted.extras | {""}
        waiting += [
            each
            for each in brought
            if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in extras)
        ]
    return {name for name in found if not name.startswith(("nvidia-", "cuda-", "triton"))} - {"torch"}


def test_the_lock_pins_whatever_an_installation_brings() -> None:
    demo, others = lock()
    optional = PROJECT["optional-dependencies"]
    assert brought_by(*PROJECT["dependencies"]) <= set(demo)
    assert brought_by(*optional["dev"], *(text for name in EXTRAS for text in optional[name])) <= {*demo, *others}
    assert (ROOT / "requirements-torch.lock").read_text().startswith("torch==")


def test_every_pin_of_the_lock_has_hashes_and_the_constraints_have_none() -> None:
    demo, others = lock()
    assert min([*demo.values(), *others.values()]) > 0
    pins = subprocess.run([ROOT / "scripts" / "pins"], capture_output=True, text=True, check=True).stdout.split()
    assert {canonicalize_name(pin.partition("==")[0]) for pin in pins} == {*demo, *others, "torch"}
    assert len(pins) == len(demo) + len(others) + 1
    assert "--hash" not in "".join(pins)
