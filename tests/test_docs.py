"""What README, --help and the package say is what there is."""

import inspect
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import inbound

ROOT = Path(inbound.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
USAGE = inbound.__doc__[inbound.__doc__.index("Usage:"):].strip()
COMMANDS = re.findall(r"^    (python3 -m venv .*)$", README, re.M)


def test_the_readme_shows_the_usage_as_help_prints_it():
    assert f"```\n{USAGE}\n```" in README


def test_help_prints_the_docstring(desk):
    assert desk.run("--help").strip() == inbound.__doc__.strip()


def test_two_commands_set_everything_up():
    assert COMMANDS == [
        "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/inbound serve",
        "python3 -m venv .venv && .venv/bin/pip install '.[test]' && .venv/bin/python -m pytest"]


@pytest.mark.slow
def test_ci_runs_the_readmes_test_command():
    script = re.search(r"sed -n '[^']+' README.md", (ROOT / ".ci/run").read_text())
    assert run("bash", "-c", script[0], cwd=ROOT).splitlines() == COMMANDS[1:]


def usage_line(verb):
    return next(line for line in USAGE.splitlines() if line.startswith(f"  {verb} "))


def test_every_verb_stands_in_the_usage_in_its_order_and_no_other_does():
    verbs = list(dict.fromkeys(name.split()[0] for name in inbound.VERBS))
    assert re.findall(r"^  (\w+) ", USAGE, re.M) == verbs
    for name in inbound.VERBS:
        verb, *second = name.split()
        assert all(word in usage_line(verb) for word in second), name


@pytest.mark.parametrize("name", inbound.VERBS)
def test_each_verb_has_a_help_of_its_own_with_its_usage(desk, name):
    shown = desk.run(*name.split(), "--help")
    usage, words = shown.split("\n\n", 1)
    assert re.match(rf"Usage: inbound {name}(?: [A-Z\[]|$)", usage) and words.strip()
    assert shown == f"Usage: {inspect.getdoc(inbound.VERBS[name])}\n"


def test_the_provider_table_of_the_readme_names_the_providers_that_are_read():
    section = README[README.index("## Providers"):README.index("**A system of your own**")]
    named = re.findall(r"^\| (.+?) \|", section, re.M)
    assert named[:1] == ["provider"]
    known = {provider.name for provider in inbound.PROVIDERS} - {"canonical"}
    assert sorted(named[1:]) == sorted(known)


def test_settings_that_the_readme_names_exist(desk):
    settable = json.loads(desk.run("account", "--json"))
    examples = re.findall(r"^    \S*inbound account set (.*(?:\n {8}\S.*)*)", README, re.M)
    named = re.findall(r"\b([a-z_]+)=\S", "\n".join(examples))
    assert named and set(named) <= set(settable)


def test_the_limits_in_the_readme_are_the_codes():
    assert str(inbound.MAX_BODY) in README and f"{inbound.MAX_BODY >> 20} MiB" in README


def run(*command, **more):
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_carries_the_schema_and_runs_in_an_empty_environment(tmp_path):
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT)
    [wheel] = tmp_path.glob("*.whl")
    assert {"inbound.py", "schema.sql"} <= set(zipfile.ZipFile(wheel).namelist())
    run(sys.executable, "-m", "venv", tmp_path / "empty")
    run(tmp_path / "empty/bin/python", "-m", "pip", "install", "-q", wheel)
    environment = {"PATH": os.environ["PATH"], "INBOUND_DB": str(tmp_path / "new.db")}
    script = tmp_path / "empty/bin/inbound"
    done = subprocess.run([script, "secret"], capture_output=True, text=True, env=environment)
    assert (done.returncode, "no database at" in done.stderr) == (1, True)
    make = "import inbound; inbound.Store('new.db').open()"
    run(tmp_path / "empty/bin/python", "-c", make, cwd=tmp_path)
    assert len(run(script, "secret", env=environment).strip()) >= 16
    assert run(script, "tickets", env=environment) == "\n"
