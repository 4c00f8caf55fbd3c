"""What README, --help and the package say is what there is."""

import contextlib
import importlib.machinery
import importlib.util
import inspect
import os
import re
import shlex
import sqlite3
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import inbound

ROOT = Path(inbound.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
USAGE = inbound.__doc__[inbound.__doc__.index("Usage:"):].strip()
COMMANDS = re.findall(r"^    (python3 -m venv \.venv .*)$", README, re.M)
BLOCKS = "\n".join(re.findall(r"^    (.*)$", README, re.M)).replace("\\\n", "")
FIRST_WORDS = "|".join(sorted({name.split()[0] for name in inbound.VERBS}))
# Up to what is the shell's: a pipe, a file on standard input.
SHOWN = re.findall(rf"(?<!from )\binbound ((?:--db \S+ +)?(?:{FIRST_WORDS})\b[^|<>\n]*)", BLOCKS)


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
    section = README[README.index("## Your provider"):README.index("**A system of your own**")]
    named = re.findall(r"^\| (.+?) \|", section, re.M)
    assert named[:1] == ["provider"]
    known = {provider.name for provider in inbound.PROVIDERS} - {"canonical"}
    assert sorted(named[1:]) == sorted(known)


def test_each_command_that_the_readme_shows_runs(desk, tmp_path, monkeypatch):
    """In their order, on one database; `serve` and `relay` as far as their options go."""
    def nobody(*_):
        raise OSError("no relay, no proxy")
    monkeypatch.setattr(inbound.Relay, "connect", nobody)
    monkeypatch.setattr(inbound, "post_to", nobody)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "support").write_text("From: ada@example.org\n\nA mail that was there before.")
    content = {"filename": "report.pdf", "content": "MTIz"}
    answer = desk.post(desk.mail(**{"from": "ada@example.org"}, attachments=[content]))
    assert len(SHOWN) > 25
    for line in SHOWN:
        line = re.sub(r"T-\w{4}-\w{4}", answer["ticket"], line)
        given, words = inbound.parse(shlex.split(re.sub(r"/var/\w+/", f"{tmp_path}/", line)))
        given.pop("db", None)
        name, rest = inbound.verb_of(words)
        if name in ("serve", "relay"):
            inbound.options_of(inbound.VERBS[name], given, rest)
            continue
        options = [f"--{name}={value}" for name, value in given.items()]
        desk.run(*words, *options, stdin="We looked.", status=int(name == "doctor"))
    assert (tmp_path / "report.pdf").read_bytes() == b"123"


def test_each_statement_that_the_readme_shows_runs(desk):
    statements = re.findall(r'^sqlite3 \S+ "((?:\\"|[^"])+)"$', BLOCKS, re.M)
    assert len(statements) >= 4
    desk.post(desk.mail(attachments=[{"filename": ".profile", "content": "MTIz"}]))
    written = []
    with contextlib.closing(sqlite3.connect(desk.path)) as connection:
        # The shell's own, which writes over what is there: never to a name that a mail chose.
        connection.create_function("writefile", 2, lambda path, content: written.append(path))
        for statement in statements:
            connection.execute(statement.replace('\\"', '"')).fetchall()
    assert written == ["report.pdf"]


def test_each_recipe_of_the_readme_is_tried_by_a_script():
    loader = importlib.machinery.SourceFileLoader("recipes", str(ROOT / "tests/recipes/run"))
    run_recipes = importlib.util.module_from_spec(
        importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(run_recipes)
    scripts = "".join(path.read_text() for path in (ROOT / "tests/recipes").glob("*.sh"))
    written = run_recipes.recipes(README)
    assert len(written) >= 14
    assert [name for name in written if not re.search(rf"\b{name}\b", scripts)] == []


def test_the_limits_in_the_readme_are_the_codes():
    assert "TimeoutStartSec=infinity" in README     # of 90 s a migration of 5 GB takes more
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
