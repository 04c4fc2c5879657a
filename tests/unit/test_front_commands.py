"""The command line as a person meets it: help in groups, a version, shell completion, one sentence where a model is missing."""

import pytest
from typer.testing import CliRunner

import microglia
import microglia.cli.commands
from microglia.cli.app import LazyGroup, app
from microglia.cli.listed import COMMANDS


def run(*words, **environment):
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "200", "TERM": "dumb", **environment}, prog_name="microglia")


def test_version():
    outcome = run("--version")
    assert (outcome.exit_code, outcome.output) == (0, f"microglia {microglia.__version__}\n")


def test_prune_help_is_grouped_and_ends_with_an_example():
    text = run("prune", "--help").output
    places = [text.index(f"─ {heading} ─") for heading in ("Arguments", "Options", "What to keep", "Training", "Run")]
    assert places == sorted(places)
    assert places[2] < text.index("--density") < places[3] < text.index("--epochs") < places[4] < text.index("--out")
    assert f"Example: {microglia.cli.commands.EXAMPLE}" in text


@pytest.mark.parametrize("words", [(), ("--density", "0.3"), ("method=gradual",), ("--recipe", "without.yaml")])
def test_prune_without_a_model_is_one_sentence_with_an_example(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "without.yaml").write_text("data: digits\n")
    outcome = run("prune", *words)
    assert outcome.exit_code == 1
    assert outcome.stderr.count("\n") == 1
    assert "Which model" in outcome.stderr
    assert microglia.cli.commands.EXAMPLE in outcome.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["without.yaml"]


@pytest.mark.parametrize("words", [("--recipe", "with.yaml"), ("model=lenet-300-100",), ("lenet-300-100",)])
def test_a_model_may_be_named_anywhere(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "with.yaml").write_text("model: lenet-300-100\n")
    outcome = run("prune", *words, "--data", "./nowhere")
    assert "There is no folder nowhere" in outcome.stderr


def test_the_shell_completes_commands_and_options():
    done = run(_MICROGLIA_COMPLETE="complete_bash", COMP_WORDS="microglia s", COMP_CWORD="1")
    assert set(done.output.split()) == {name for name in COMMANDS if name.startswith("s")}
    done = run(_MICROGLIA_COMPLETE="complete_bash", COMP_WORDS="microglia prune --den", COMP_CWORD="2")
    assert done.output.split() == ["--density"]
    assert "--install-completion" in run("--help").output


def test_a_command_of_another_package_is_listed_and_runs():
    """`microglia.cli.app.command` is all that another package needs."""
    from microglia.cli.app import Json, command

    def toy(json_: Json = False):
        """Say one word."""
        return {"word": "toy"}, ["toy word"]

    command(toy, example="microglia toy")
    try:
        assert "Say one word." in run("--help").output
        assert run("toy").output == "toy word\n"
        assert run("toy", "--json").output == '{"word": "toy"}\n'
        assert "Example: microglia toy" in run("toy", "--help").output
    finally:
        app.registered_commands.pop()


def test_the_list_keeps_its_order_whatever_was_imported():
    group = LazyGroup(name="microglia", commands={"sweep": LazyGroup(name="sweep")})
    assert list(group.commands) == list(COMMANDS)
    assert group.commands["sweep"].name == "sweep"
    assert isinstance(group.commands["sweep"], LazyGroup)
