"""What README, --help and the package say is what there is."""

import os
import re
import sqlite3
import subprocess
import sys
import zipfile
from pathlib import Path

import inbound

ROOT = Path(inbound.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
USAGE = inbound.__doc__[inbound.__doc__.index("Usage:"):].strip()
COMMANDS = re.findall(r"^    (python3 -m venv .*)$", README, re.M)


def schema():
    connection = sqlite3.connect(":memory:")
    connection.executescript((ROOT / "schema.sql").read_text(encoding="utf-8"))
    return connection


def values(query):
    connection = schema()
    rows = [value for value, in connection.execute(query)]
    connection.close()
    return rows


def test_the_readme_shows_the_usage_as_help_prints_it():
    assert f"```\n{USAGE}\n```" in README


def test_help_prints_the_docstring(desk):
    assert desk.run("--help").strip() == inbound.__doc__.strip()


def test_two_commands_set_everything_up():
    assert COMMANDS == [
        "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/inbound serve",
        "python3 -m venv .venv && .venv/bin/pip install '.[test]' && .venv/bin/python -m pytest"]


def test_ci_runs_the_readmes_test_command():
    assert "README.md" in (ROOT / ".ci/run").read_text()


def test_every_command_of_the_tables_stands_in_the_usage():
    usages = [*values("SELECT usage FROM command"), *inbound.FUNCTIONS]
    verbs = {usage.split()[0] for usage in usages}
    assert {line.split()[0] for line in re.findall(r"^  (\w+ ?.*)$", USAGE, re.M)} == verbs
    for usage in usages:
        verb, *rest = re.sub(r"[\[\]]", "", usage).split()
        line = next(line for line in USAGE.splitlines() if line.startswith(f"  {verb} "))
        assert all(word in line for word in rest[:1]), usage


def test_the_provider_table_of_the_readme_names_the_rows_of_the_table():
    named = re.findall(r"^\| ([A-Z][\w ]+?) \|", README, re.M)
    assert sorted(named) == sorted(set(values("SELECT name FROM provider")))


def test_settings_that_the_readme_names_exist():
    settable = values("SELECT name FROM pragma_table_info('account')")
    examples = "".join(re.findall(r"^    \S*inbound account set (.*(?:\n {8}\S.*)*)", README, re.M))
    named = re.findall(r"\b([a-z_]+)=\S", examples)
    assert named and set(named) <= set(settable)


def test_the_limits_in_the_readme_are_the_codes():
    assert str(inbound.MAX_BODY) in README and f"{inbound.MAX_BODY >> 20} MiB" in README


def run(*command, **more):
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_carries_the_schema_and_runs_in_an_empty_environment(tmp_path):
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT)
    [wheel] = tmp_path.glob("*.whl")
    assert {"inbound.py", "schema.sql"} <= set(zipfile.ZipFile(wheel).namelist())
    run(sys.executable, "-m", "venv", tmp_path / "empty")
    run(tmp_path / "empty/bin/python", "-m", "pip", "install", "-q", wheel)
    environment = {"PATH": os.environ["PATH"], "INBOUND_DB": str(tmp_path / "new.db")}
    secret = run(tmp_path / "empty/bin/inbound", "secret", env=environment, cwd=tmp_path).strip()
    assert len(secret) >= 16
    assert run(tmp_path / "empty/bin/inbound", "tickets", env=environment, cwd=tmp_path) == "\n"
