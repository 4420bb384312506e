"""The documents: links lead somewhere, commands exist, tables are what the code says."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer
from pydantic_core import PydanticUndefined

from forgetrain.cli.main import app
from forgetrain.engine.plan import FSDP, SCALE, SCHEDULE, STRUCTURE
from forgetrain.ops.table import OPS
from forgetrain.spec.target import Target

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
#: Programs that are not ours, before our own in a line.
TORCHRUN = re.compile(r"^torchrun .*?-m forgetrain ")


def blocks(page):
    return re.findall(r"^```[a-z]*\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def commands(page):
    """Every line of a fenced block that calls forgetrain, continued lines joined, comments left out."""
    for block in blocks(page):
        for line in block.replace("\\\n", " ").splitlines():
            line = TORCHRUN.sub("forgetrain ", line.strip().removeprefix("$ "))
            if re.match(r"forgetrain [a-z]", line) and not re.match(r"forgetrain [a-z]+:", line):
                yield shlex.split(line, comments=True)[1:]


def check(words):
    """Walks the command tree by these words; every option must be one of the command's."""
    command = typer.main.get_command(app)
    while words and hasattr(command, "commands"):
        if words[0].startswith("-"):
            break
        assert words[0] in command.commands, f"no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    known = {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}
    known |= {"--help"}
    for word in words:
        if word.startswith("--"):
            assert word.partition("=")[0] in known, f"no option {word}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not link.startswith(("http://", "https://")):
            assert (page.parent / link).exists(), f"{link} is not there"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_exist_with_their_options(page):
    for words in commands(page):
        check(words)


def test_the_commands_are_found():
    assert ["collect", "targets/nano-cpu.toml"] in list(commands(ROOT / "README.md"))
    with pytest.raises(AssertionError):
        check(["collect", "x.toml", "--no-such-option"])


def test_every_command_is_in_a_document():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name in typer.main.get_command(app).commands:
        assert f"forgetrain {name}" in text, f"no document shows forgetrain {name}"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, f"{page.name} is not in docs/README.md"
    for page in (ROOT / "docs" / "decisions").glob("*.md"):
        assert f"(decisions/{page.name})" in index


def default_of(field):
    value = field.default if field.default_factory is None else field.default_factory()
    if isinstance(value, list):
        value = value[0].path if value else None
    if value is PydanticUndefined:
        return "-"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize("section", [name for name in Target.model_fields if name != "name"])
def test_the_table_of_a_target_section_has_its_keys_and_defaults(section):
    page = (ROOT / "docs" / "target.md").read_text(encoding="utf-8")
    part = page.split(f"\n## {section}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \|", part, flags=re.M)
    fields = Target.model_fields[section].annotation.model_fields
    expected = [(name, default_of(field)) for name, field in fields.items()]
    assert rows == expected


def test_each_dependency_has_its_line():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    names = {re.match(r"[A-Za-z0-9_.-]+", line).group() for line in lines} - {"forgetrain"}
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `([^`]+)` \|", page, flags=re.M))
    assert names == listed


def test_nothing_speaks_of_a_machine_of_ours():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert "/root/" not in text
        assert "/tmp/" not in text


def test_the_tables_of_ops_and_variants_are_the_codes():
    page = (ROOT / "docs" / "ops-and-variants.md").read_text(encoding="utf-8")
    rows = [(op, name, variant.note) for op, table in OPS.items() for name, variant in table.items()]
    assert re.findall(r"^\| `(\w+)` \| `(\w+)` \| (.*) \|$", page, flags=re.M)[: len(rows)] == rows
    for key, (options, why) in {**STRUCTURE, **SCHEDULE, **SCALE, **FSDP}.items():
        assert f"| `{key}` | {', '.join(f'`{option}`' for option in options)} | {why} |" in page
