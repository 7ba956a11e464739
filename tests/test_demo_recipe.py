"""The recipe of the demo: its commands, what it skips, what it refuses. No step is really run."""

import contextlib
import hashlib
import io
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from demo import __main__ as demo  # noqa: E402
from demo import ablation, steps  # noqa: E402
from demo.recipe import FURTHER_SPLITS, TEST_SPLITS, make_steps  # noqa: E402
from demo.recipe import STAGES as RECIPE  # noqa: E402
from demo.words import AVAILABLE, choose_languages  # noqa: E402

STAGES = ("vision", "text", "align", "instruct-1", "instruct-2", "instruct-3", "instruct")
NAMES = [
    "world",
    *("tokenizer en", "tokenizer ko", "tokenizer zh", "tokenizer merged"),
    *STAGES,
    "evaluate",
    "report",
]


class FakeRunner:
    """Does what the commands would do to the files: each output is a digest of its command's words
    and of the files that it names."""

    def __init__(self, version="1"):
        self.version = version
        self.commands = []
        self.status = {}  # {word of a command: exit status instead of a result}

    @property
    def names(self):
        """What was run, by the last part of each output's path."""
        return [self.output_of(command).name for command in self.commands]

    def output_of(self, command):
        """Where a command writes."""
        if "report" in command:
            return Path(command[-1]) / "report.html"
        return Path(command[command.index("-o") + 1])

    def __call__(self, command):
        self.commands.append(command)
        out = self.output_of(command)
        if out.name in self.status:
            # stopped half-way: a stage has its folder, another step a piece of its file
            if "train.py" in command:
                out.mkdir(parents=True, exist_ok=True)
            else:
                out.write_text("half", encoding="utf-8")
            return self.status[out.name]

        text = self.version
        for word in command:
            path = Path(word)
            text += path.read_text(encoding="utf-8") if path.is_file() else word.split("/")[-1]
            if (path / "model.safetensors").is_file():
                text += (path / "model.safetensors").read_text(encoding="utf-8")
        content = hashlib.sha256(text.encode()).hexdigest()
        if "demo.write" in command:
            self.write_world(out, content, command)
        elif "train.py" in command:
            out.mkdir(exist_ok=True)
            (out / "config.json").write_text("{}", encoding="utf-8")
            (out / "model.safetensors").write_text(content, encoding="utf-8")
        else:
            out.write_text(content, encoding="utf-8")
        return 0

    def write_world(self, out, content, command):
        """The files of a world."""
        (out / "text").mkdir(parents=True)
        files = ["captions", "phrases", "instruct-1", "instruct-2", "instruct-3", "instruct"]
        for name in (*files, *TEST_SPLITS[1:], *FURTHER_SPLITS):
            (out / f"{name}.json").write_text(f"[{content}{name}]", encoding="utf-8")
        for name in ("en", "ko", "zh", "parallel", "dictionary"):
            (out / "text" / f"{name}.txt").write_text(content + name, encoding="utf-8")
        turns = [{"value": "<image>\n몇 개?"}, {"value": "두 개예요"}]
        record = {"language": "ko", "image": "images/unseen_images/00001.png"}
        records = [{"language": "en"}, record | {"conversations": turns}]
        (out / "unseen_images.json").write_text(json.dumps(records), encoding="utf-8")
        shares = command[command.index("--share") + 1 :] if "--share" in command else []
        pairs = (share.split("=") for share in shares)
        arguments = {"shares": {name: float(share) for name, share in pairs}} if shares else {}
        (out / "world.json").write_text(json.dumps({"arguments": arguments}), encoding="utf-8")


@pytest.fixture(autouse=True)
def with_bf16(monkeypatch):
    """The processor for which the recipe has its seconds."""
    monkeypatch.setattr("kernels.device.has_bf16", lambda device: True)


@pytest.fixture
def out(tmp_path, monkeypatch):
    """An empty working directory; the name of the run's folder."""
    monkeypatch.chdir(tmp_path)
    return Path("out/demo")


def run(*words, runner=None):
    """`python -m demo WORDS` with a fake runner, which is returned."""
    runner = runner or FakeRunner()
    demo.main(["--out", "out/demo", *words], runner=runner)
    return runner


def refused(*words, runner=None):
    """The one line with which a run ends."""
    runner = runner or FakeRunner()
    with pytest.raises(SystemExit) as error:
        run(*words, runner=runner)
    assert "\n" not in str(error.value)
    return str(error.value)


def recorded(out, name="steps.json"):
    """A JSON file of the run's folder."""
    return json.loads((out / name).read_text(encoding="utf-8"))


# ---- the commands


def commands(*words):
    """{step: its command line} of a run."""
    return {step.name: " ".join(step.command) for step in make_steps(demo.parse_args(list(words)))}


def test_the_steps_and_their_values():
    found = commands()
    assert list(found) == NAMES
    assert found["world"] == "-m demo.write -o out/demo/data --images 6000 --seed 0"
    assert found["tokenizer zh"] == (
        "tokenizer.py train out/demo/data/text/zh.txt --vocab-size 700 --max-piece-length 1 "
        "--character-coverage 1 "
        "-o out/demo/zh.model"
    )
    assert found["tokenizer merged"] == (
        "tokenizer.py merge out/demo/en.model out/demo/ko.model out/demo/zh.model "
        "-o out/demo/tokenizer.model"
    )
    assert found["vision"] == (
        "train.py vision --preset tiny --tokenizer out/demo/tokenizer.model "
        "--data out/demo/data/phrases.json --dictionary out/demo/data/text/dictionary.txt "
        "--lr 1e-3 --muon-lr 0.01 --batch-size 32 --steps 4000 --seed 0 --resume "
        "--cache out/demo/cache -o out/demo/vision"
    )
    assert found["text"] == (
        "train.py text --model out/demo/vision --data out/demo/data/text/en.txt "
        "out/demo/data/text/ko.txt out/demo/data/text/zh.txt out/demo/data/text/parallel.txt "
        "--lr 1e-3 --muon-lr 0.005 --batch-size 32 --steps 300 --seed 0 --resume "
        "--cache out/demo/cache -o out/demo/text"
    )
    assert found["align"] == (
        "train.py align --model out/demo/text --data out/demo/data/captions.json "
        "--lr 2e-3 --batch-size 32 --steps 60 --seed 0 --resume "
        "--cache out/demo/cache -o out/demo/align"
    )
    usual, larger = "--lr 1e-3 --muon-lr 0.005", "--batch-size 16 --records-per-sample 8"
    first = f"{usual} --decay-ratio 0.3 --batch-size 32 --records-per-sample 4"
    lower = "--lr 6e-4 --muon-lr 0.003 --decay-ratio 0.6"
    for name, before, values in (
        ("instruct-1", "align", f"{first} --steps 1000"),
        ("instruct-2", "instruct-1", f"{usual} --decay-ratio 0.4 {larger} --steps 450"),
        ("instruct-3", "instruct-2", f"{usual} --decay-ratio 0.4 {larger} --steps 300"),
        ("instruct", "instruct-3", f"{lower} {larger} --steps 2600"),
    ):
        assert found[name] == (
            f"train.py instruct --model out/demo/{before} --data out/demo/data/{name}.json "
            f"--trainable projector decoder.layers {values} "
            f"--seed 0 --resume --cache out/demo/cache -o out/demo/{name}"
        )
    assert found["evaluate"] == (
        "-m evaluation answer --model out/demo/instruct --data out/demo/data/unseen_images.json "
        "out/demo/data/unseen_combinations.json out/demo/data/cross_lingual.json "
        "out/demo/data/unseen_phrasings.json out/demo/data/further_nouns.json "
        "out/demo/data/unanswerable.json out/demo/data/unseen_captions.json "
        "--fresh --blind other-image -o out/demo/eval.json"
    )
    assert found["report"] == "-m evaluation report out/demo"


def test_a_stage_that_is_left_out_hands_its_start_on():
    found = commands("--without", "text", "instruct-1", "report")
    assert list(found) == [n for n in NAMES if n not in ("text", "instruct-1", "report")]
    assert "--model out/demo/vision " in found["align"]
    assert "--model out/demo/align " in found["instruct-2"]
    found = commands("--without", "vision", "text")
    assert "align --preset tiny --tokenizer out/demo/tokenizer.model " in found["align"]


def test_options_reach_their_steps():
    found = commands(
        *("--seed", "5", "--processes", "2", "--vocabulary", "en", "--texts", "en"),
        *("--no-dictionary", "--trainable", "projector", "decoder", "--share", "ko=0.1", "zh=0"),
    )
    assert all("--seed 5" in found[name] for name in ("world", *STAGES))
    assert found["world"].endswith("--share ko=0.1 zh=0")
    launch = "-m torch.distributed.run --standalone --nproc_per_node=2 train.py "
    assert all(found[name].startswith(launch) for name in STAGES)
    assert "--dictionary" not in found["vision"]
    assert [name for name in found if "tokenizer" in name] == ["tokenizer en", "tokenizer merged"]
    assert found["tokenizer merged"].count(".model") == 2
    assert "--data out/demo/data/text/en.txt --lr" in found["text"]
    assert "--trainable projector decoder --lr" in found["instruct"]


def test_the_languages_of_a_run_reach_its_world_and_its_tokenizer(out):
    assert "--languages" not in commands()["world"]
    try:
        # The first is the base language, and the order of the others is fixed.
        assert commands("--languages", "tr", "en", "ar")["world"].endswith("--languages tr ar en")
        found = commands("--languages", "en", "tr", "ar")
        assert found["world"].endswith("--languages en ar tr")
        merged = found["tokenizer merged"]
        assert "out/demo/en.model out/demo/ar.model out/demo/tr.model" in merged
        # Turkish has letters of English: what becomes of English text is said.
        assert merged.endswith("--compare out/demo/data/text/en.txt")
        assert "text/ar.txt" in found["text"] and "text/ko.txt" not in found["text"]
        assert "--compare" not in commands("--languages", "en", "ar")["tokenizer merged"]
        assert "is none of the languages" in wrong_flag("--languages", "en", "ar", "--texts", "ko")
    finally:
        choose_languages()

    # A world has the languages that it was written with.
    run("--data", "world")
    try:
        said = refused("--data", "world", "--languages", "en", "tr", "--out", "out/b")
        assert said == "demo: world is of other languages: --languages en ko zh"
    finally:
        choose_languages()


def wrong_flag(*words):
    """What the parser says of wrong flags."""
    error = io.StringIO()
    with contextlib.redirect_stderr(error), pytest.raises(SystemExit):
        demo.parse_args(list(words))
    return error.getvalue()


def test_a_dry_run_prints_every_command_and_does_nothing(out, capsys):
    runner = run("--seed", "3", "--dry-run")
    lines = capsys.readouterr().out.splitlines()
    assert runner.commands == [] and not out.exists()
    printed = [shlex.split(line)[1:] for line in lines]
    args = demo.parse_args(["--seed", "3"])
    assert printed == [step.command for step in make_steps(args)]


def test_commands_run_without_a_shell(monkeypatch, tmp_path):
    """Each argument arrives as it is, quotes and spaces included."""
    script = tmp_path / "a script.py"
    words = f"import pathlib, sys; pathlib.Path({str(tmp_path / 'words')!r})"
    script.write_text(words + ".write_text(repr(sys.argv[1:])); sys.exit(3)\n", encoding="utf-8")
    arguments = ["--data", "a b;echo", "$HOME", "'\"", "&"]
    assert steps.run_command([str(script), *arguments]) == 3
    assert (tmp_path / "words").read_text() == repr(arguments)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_lets_the_command_save_first(tmp_path):
    """Ctrl-C reaches the whole group: the command ends by itself, and only then the recipe."""
    child = tmp_path / "child.py"
    child.write_text(
        "import pathlib, signal, sys, time\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "def save(*_):\n"
        "    time.sleep(0.7)\n"
        "    (folder / 'saved').touch()\n"
        "    sys.exit(7)\n"
        "signal.signal(signal.SIGINT, save)\n"
        "(folder / 'ready').touch()\n"
        "time.sleep(30)\n",
        encoding="utf-8",
    )
    # A shell's background job ignores Ctrl-C unless it is told not to.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += f"from demo.steps import run_command; print(run_command([{str(child)!r}]))"
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True
    )
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    os.killpg(parent.pid, 2)
    assert parent.communicate(timeout=20)[0] == b"7\n"
    assert (tmp_path / "saved").exists()


# ---- what is skipped, and what is refused


def test_without_bfloat16_it_says_that_training_takes_longer(out, capsys, monkeypatch):
    monkeypatch.setattr("kernels.device.has_bf16", lambda device: False)
    assert len(run().commands) == len(NAMES)
    printed = capsys.readouterr().out
    # 2.5 × 570 s of training, and 64 s of the rest
    assert "About 25 to 43 minutes on two cores: this processor does not multiply" in printed


def test_a_finished_run_is_not_run_again(out, capsys):
    assert len(run().commands) == len(NAMES)
    printed = capsys.readouterr().out
    assert "to do: world, tokenizer en" in printed and "About 11 to 18 minutes" in printed
    assert "out/demo/report.html" in printed.replace("\\", "/")

    assert run().commands == []
    printed = capsys.readouterr().out
    assert "done before: world, tokenizer en" in printed and "to do" not in printed


def test_an_example_command_can_be_pasted(out, capsys):
    run()
    line = capsys.readouterr().out.splitlines()[-1]
    words = shlex.split(line)
    assert words[1:4] == ["generate.py", "--model", "out/demo/instruct"]
    assert words[4:] == ["--image", "out/demo/data/images/unseen_images/00001.png", "몇 개?"]
    assert Path(words[0]).absolute() == Path(sys.executable).absolute()


def test_python_is_shown_relative_to_the_folder(monkeypatch, tmp_path):
    python = tmp_path / ".venv" / "bin" / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.chdir(tmp_path)
    assert steps.shown(["train.py", "a b"]) == ".venv/bin/python train.py 'a b'"


def test_an_absolute_path_of_the_same_folder_is_the_same_run(out):
    run()
    assert run("--out", str(Path("out/demo").absolute())).commands == []
    assert run("--out", "./out/../out/demo/").commands == []


@pytest.mark.parametrize(
    ("words", "was", "asked"),
    [
        (["--seed", "5"], "--seed 0", "--seed 5"),
        (["--vocabulary", "en"], "out/demo/ko.model", "merge out/demo/en.model"),
        (["--texts", "en", "parallel"], "out/demo/data/text/ko.txt", "text/parallel.txt"),
        (["--without", "align"], "--model out/demo/align", "--model out/demo/text"),
        (["--no-dictionary"], "--dictionary out/demo/data/text/dictionary.txt", "less"),
        (["--trainable", "projector"], "--trainable projector decoder.layers", "projector"),
        (["--share", "ko=0.1"], "less", "--share ko=0.1"),
        (["--processes", "2"], "train.py vision", "--nproc_per_node=2"),
    ],
)
def test_other_settings_on_a_finished_folder_are_refused_by_name(out, words, was, asked):
    run()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    runner = FakeRunner()
    message = refused(*words, runner=runner)
    made, _, wanted = message.partition(", not with ")
    assert was in made.partition("was made with ")[2] and asked in wanted
    assert "--out" in message and "--fresh" in message and message.startswith("demo: out")
    assert runner.commands == []
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_other_data_is_refused_by_name(out):
    run()
    path = out / "data" / "phrases.json"
    path.write_text("[other]", encoding="utf-8")
    runner = FakeRunner()
    message = refused(runner=runner)
    assert "out/demo/vision was made from another out/demo/data/phrases.json" in message
    assert runner.commands == []


def test_a_world_that_comes_out_otherwise_is_noticed_before_training(out):
    run()
    (out / "data" / "world.json").unlink()  # as if the words had been edited and the world removed
    for path in sorted((out / "data").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (out / "data").rmdir()
    runner = FakeRunner(version="2")
    message = refused(runner=runner)
    assert runner.names == ["data"]
    assert "out/demo/en.model was made from another out/demo/data/text/en.txt" in message


def test_a_result_of_unknown_making_is_refused(out):
    (out / "vision").mkdir(parents=True)
    runner = FakeRunner()
    assert "out/demo/vision is not in steps.json" in refused(runner=runner)
    assert runner.commands == []


def test_an_edited_value_of_the_recipe_is_refused(out, monkeypatch):
    run()
    edited = RECIPE["text"]._replace(flags=RECIPE["text"].flags.replace("--lr 1e-3", "--lr 2e-3"))
    monkeypatch.setitem(RECIPE, "text", edited)
    message = refused()
    assert "out/demo/text was made with --lr 1e-3, not with --lr 2e-3" in message


def test_changed_code_is_named_and_trains_nothing(out, monkeypatch, capsys):
    now = {"model.py": "1", "train.py": "1"}
    monkeypatch.setattr(steps, "code_digests", lambda: dict(now))
    run()
    assert "code has changed" not in capsys.readouterr().out
    now["model.py"] = "2"
    assert run().commands == []
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "changed" in line] == [
        "It is kept, though code has changed since: model.py"
    ]


def test_the_code_that_is_watched_is_that_of_the_steps(monkeypatch):
    monkeypatch.chdir(ROOT)
    watched = steps.code_digests()
    assert {"train.py", "model.py", "demo/world.py", "demo/words/ko.json"} <= watched.keys()
    assert not any(path.startswith(("tests", ".venv")) for path in watched)


def test_a_measurement_is_made_again_when_its_inputs_change(out):
    run()
    path = out / "data" / "cross_lingual.json"
    path.write_text("[other]", encoding="utf-8")
    assert run().names == ["eval.json", "report.html"]


def test_a_removed_stage_is_trained_again_and_what_follows_is_compared(out):
    run()
    for path in (out / "text").iterdir():
        path.unlink()
    (out / "text").rmdir()
    assert run().names == ["text"], "the same model came out, so nothing else is made again"
    for path in (out / "text").iterdir():
        path.unlink()
    (out / "text").rmdir()
    runner = FakeRunner(version="other code")
    message = refused(runner=runner)
    assert runner.names == ["text"]
    assert "out/demo/align was made from another out/demo/text/model.safetensors" in message


def seed_of_vision(out):
    command = recorded(out)["steps"]["vision"]["command"]
    return command[command.index("--seed") + 1]


def test_fresh_moves_the_folder_aside_and_never_over_another(out, capsys):
    for number in range(3):
        runner = run("--seed", str(number), "--fresh")
        assert len(runner.commands) == len(NAMES)
        assert seed_of_vision(out) == str(number)
    assert f"out{os.sep}demo is now out{os.sep}demo.old-2" in capsys.readouterr().err
    for number, seed in ((1, "0"), (2, "1")):
        assert seed_of_vision(Path(f"out/demo.old-{number}")) == seed


# ---- interruptions, and times


def test_an_interrupted_run_goes_on_where_it_stopped(out):
    runner = FakeRunner()
    runner.status = {"text": 130}
    message = refused(runner=runner)
    assert message == "demo: text ended early, with exit status 130: run it again"
    assert runner.names[-1] == "text" and not (out / "text" / "config.json").exists()
    assert not recorded(out)["steps"]["text"]["complete"]

    # Half a model is no reason to take other settings.
    assert "was made with --seed 0, not with --seed 5" in refused("--seed", "5")
    assert run().names == [*STAGES[1:], "eval.json", "report.html"]
    assert run().commands == []


def test_half_a_file_is_not_a_result(out):
    runner = FakeRunner()
    runner.status = {"ko.model": 1}
    assert "tokenizer ko ended early" in refused(runner=runner)
    assert run().names[:2] == ["ko.model", "zh.model"]


def test_a_stage_that_reports_success_without_a_model_is_not_done(out):
    runner = FakeRunner()
    runner.status = {"align": 0}  # stopped by Ctrl-C, saved, exit status 0
    assert "align ended early, with exit status 0" in refused(runner=runner)
    assert run().names[0] == "align"


def test_seconds_are_of_the_runs_that_made_the_result(out, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(steps.time, "time", lambda: clock[0])

    def timed(runner, seconds):
        """A runner whose every command takes so long."""

        def call(command):
            clock[0] += seconds
            return runner(command)

        return call

    stopped = FakeRunner()
    stopped.status = {"text": 130}
    refused(runner=timed(stopped, 10))
    assert recorded(out, "timing.json") == {"world": 10, "tokenizer": 40, "vision": 10, "text": 10}
    run(runner=timed(FakeRunner(), 7))
    times = recorded(out, "timing.json")
    assert times["text"] == 17, "a resumed stage took both"
    assert times["vision"] == 10 and times["align"] == 7
    run(runner=timed(FakeRunner(), 100))
    assert recorded(out, "timing.json") == times, "a run that has nothing to do takes no time"

    (out / "eval.json").unlink()
    for path in (out / "vision").iterdir():
        path.unlink()
    (out / "vision").rmdir()
    run(runner=timed(FakeRunner(), 3))
    times = recorded(out, "timing.json")
    assert times["vision"] == 3 and times["evaluate"] == 3, "made anew: the old time is gone"


def test_the_commands_of_a_run_are_kept_once_each(out):
    stopped = FakeRunner()
    stopped.status = {"text": 130}
    refused(runner=stopped)
    run()
    lines = (out / "commands.txt").read_text(encoding="utf-8").splitlines()
    assert [shlex.split(line)[1:] for line in lines] == [
        step.command for step in make_steps(demo.parse_args(["--out", "out/demo"]))
    ]


# ---- the world of another run


def test_a_world_that_is_there_is_used_as_it_is(out):
    first = run()
    assert first.names[0] == "data"
    second = FakeRunner()
    demo.main(["--out", "out/b", "--data", "out/demo/data", "--seed", "1"], runner=second)
    assert second.names[0] == "en.model" and len(second.commands) == len(NAMES) - 1
    text = "out/demo/data/text/en.txt"
    assert second.commands[0][2] == text

    third = FakeRunner()
    words = ["--out", "out/c", "--data", "out/new", "--share", "ko=0.1"]
    demo.main(words, runner=third)
    assert third.names[0] == "new"
    demo.main(words, runner=third)
    assert len(third.commands) == len(NAMES)
    with pytest.raises(SystemExit, match="out/demo/data was not written with --share ko=0.1"):
        demo.main(["--out", "out/d", "--data", "out/demo/data", "--share", "ko=0.1"])


def test_splits_that_an_older_world_lacks_are_named(out, capsys):
    run()
    for name in FURTHER_SPLITS[1:]:
        (out / "data" / f"{name}.json").unlink()
    found = commands()
    asked = found["evaluate"].split("--data ")[1].split(" --fresh")[0].split()
    assert [Path(path).stem for path in asked] == [*TEST_SPLITS, FURTHER_SPLITS[0]]
    told = capsys.readouterr().err
    assert f"an older world, not measured: {', '.join(FURTHER_SPLITS[1:])}" in told


def test_environment_variables_change_nothing(tmp_path, monkeypatch):
    names = ("OUT", "DATA", "SEED", "PROCESSES", "WITHOUT", "VOCABULARY", "SHARE", "ARGS")
    for name in names:
        monkeypatch.setenv(name, "elsewhere")
    clean = {name: value for name, value in os.environ.items() if name not in names}

    def dry_run(environment, command):
        """What a command prints."""
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=True
        ).stdout

    command = [sys.executable, "-m", "demo", "--dry-run"]
    assert dry_run(None, command) == dry_run(clean, command) != ""


def test_a_package_that_is_missing_is_named(out, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "sentencepiece" else name)
    message = refused()
    assert message.startswith("demo: the package sentencepiece is missing: ")
    assert message.endswith(" -m pip install -r requirements.txt")


# ---- the ablation


def printed_by(capsys, *words):
    """{group: the commands} that a dry run of the ablation prints."""
    ablation.main(["--out", "out/a", "--seeds", "1", "--dry-run", *words])
    groups = {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("# "):
            own = groups.setdefault(line[2:].partition(":")[0], [line])
        else:
            own.append(line.partition(" ")[2])
    return groups


def runs_among(commands):
    """{name of a run: its flags} among commands."""
    found = {}
    for words in map(str.split, commands):
        if words[:2] == ["-m", "demo"]:
            assert words[2] == "--out" and words[6:8] == ["--seed", "1"]
            assert demo.parse_args(words[2:])
            own = " ".join(words[8:]).removesuffix(" --without report")
            found[words[3].removeprefix("out/a/")] = f"{words[5]} {own}"
    return found


@pytest.fixture
def default_languages():
    """Parsing a run's flags chooses its languages: afterwards there are those of before."""
    yield
    choose_languages()


def test_the_ablation_runs_the_ideas_of_the_paper(out, capsys, default_languages):
    group = printed_by(capsys)["paper"]
    assert group[0] == "# paper: 4 of 4 runs to do: 0.9 to 2.0 hours with a core each"
    assert group[1] == "-m demo.write -o out/a/data --images 6000 --seed 0"
    assert {name: own.split()[1:] for name, own in runs_among(group).items()} == {
        "full.1": ["--without", "report"],
        "no-V.1": ["--vocabulary", "en"],
        "no-P.1": ["--texts", "en", "--no-dictionary"],
        "no-V-P.1": ["--vocabulary", "en", "--texts", "en", "--no-dictionary"],
    }
    assert group[-1].startswith("-m evaluation compare full=out/a/full.1/eval.json no-V=")


def test_a_poor_language_describes_fewer_and_fewer_images(out, capsys, default_languages):
    group = printed_by(capsys, "--groups", "poor")["poor"]
    worlds = [line for line in group if line.startswith("-m demo.write")]
    assert worlds[0].endswith("--seed 0") and len(worlds) == 5
    shares = [line.partition("--share ")[2] for line in worlds[1:]]
    assert shares == ["ko=0.3", "ko=0.1", "ko=0.03", "ko=0.01"]
    found, world = runs_among(group), "out/a/data.ko=0.1"
    assert list(found) == [
        *("full.1", "ko-30.1", "ko-10.1", "ko-3.1", "ko-1.1"),
        *("ko-10-no-V.1", "ko-10-no-parallel.1", "ko-10-no-dictionary.1"),
    ]
    assert found["ko-10-no-V.1"] == f"{world} --vocabulary en zh"
    assert found["ko-10-no-parallel.1"] == f"{world} --texts en ko zh"
    assert found["ko-10-no-dictionary.1"] == f"{world} --no-dictionary"
    compared = [
        [word.partition("=")[0] for word in line.split() if "eval.json" in word]
        for line in group[-2:]
    ]
    assert compared == [
        ["full", "ko-30", "ko-10", "ko-3", "ko-1"],
        ["ko-10", "ko-10-no-V", "ko-10-no-parallel", "ko-10-no-dictionary"],
    ]
    # a language that the default world lacks
    found = runs_among(printed_by(capsys, "--groups", "poor", "--poor", "sw")["poor"])
    assert list(found)[:2] == ["sw-100.1", "sw-30.1"] and len(found) == 8
    assert found["sw-3.1"] == "out/a/data.en-ko-sw-zh.sw=0.03 --languages en ko sw zh"


def test_runs_of_other_languages_are_asked_the_same_questions(out, capsys, default_languages):
    groups = printed_by(capsys, "--groups", "pairs", "number")
    every = "-".join(ablation.EVERY)
    asked = [f"out/a/data.{every}/{split}.json" for split in TEST_SPLITS]
    pairs, numbers = (runs_among(groups[name]) for name in ("pairs", "number"))
    for own in (*pairs.values(), *numbers.values()):
        assert own.partition("--test ")[2].split() == asked
    others = sorted(set(AVAILABLE) - {"en"})
    assert sorted(pairs) == [*(f"en-{name}.1" for name in others), "ko-zh.1"]
    assert "--languages ko zh" in pairs["ko-zh.1"], "without the base language of the others"
    assert pairs["en-ko.1"] == numbers["en-ko.1"], "the same run counts in both"

    # as many examples of a language as in the world of three
    lengths = {name: own.partition("--length ")[2].split()[:1] for name, own in numbers.items()}
    assert lengths == {
        **dict.fromkeys(("en.1", "en-ko.1", "en-ko-zh.1", "en-every.1"), []),
        **{"en-x0.33.1": ["0.3333"], "en-ko-x0.67.1": ["0.6667"], "en-every-x2.3.1": ["2.333"]},
    }
    korean = next(line for line in groups["number"] if line.endswith("out/a/number.ko.json"))
    assert "--languages ko" in korean and " en=" not in korean
    assert [word.partition("=")[0] for word in korean.split()[3:6]] == [
        *("en-ko", "en-ko-zh", "en-every"),
    ]


def test_each_language_in_turn_names_the_base_only_kinds(out, capsys, default_languages):
    found = runs_among(printed_by(capsys, "--groups", "transfer")["transfer"])
    firsts = [own.partition("--languages ")[2].split()[0] for own in found.values()]
    assert firsts == ["en", *sorted(set(AVAILABLE) - {"en"})] and len(found) == 7
    assert "--test" not in found["ko-every-x2.3.1"], "asked the questions of its own world"
    assert "--length 2.333" in found["ko-every-x2.3.1"]


def test_some_runs_of_the_ablation_and_the_quick_recipe(out, capsys, default_languages):
    groups = printed_by(capsys, "--variants", "en-ko", "ko-zh", "full", "--quick")
    assert {name: list(runs_among(own)) for name, own in groups.items()} == {
        "paper": ["full.1"],
        "pairs": ["en-ko.1", "ko-zh.1"],
    }
    assert all("--quick" in line for line in groups["pairs"] if line.startswith("-m demo --out"))
    assert "--images 1500 --documents 4000" in groups["pairs"][1]
    with pytest.raises(SystemExit):
        ablation.main(["--variants", "fulll"])
    assert "no fulll; there are full no-V" in capsys.readouterr().err


def test_the_ablation_says_how_long_it_will_take_and_skips_finished_runs(out, monkeypatch, capsys):
    done = []

    def fake_run_all(runs, jobs):
        """Each run leaves its result."""
        for folder in runs:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "eval.json").write_text("{}", encoding="utf-8")
            done.append((folder.name, jobs))

    def runner(command):
        """As the fake runner, and the findings' file."""
        if "demo.findings" in command:
            Path("out/ablation/findings.json").write_text("{}", encoding="utf-8")
            return 0
        return fake(command)

    monkeypatch.setattr(ablation, "run_all", fake_run_all)
    fake, original = FakeRunner(), steps.Run.run
    monkeypatch.setattr(steps.Run, "run", lambda self, made: original(self, made, runner))
    words = ["--out", "out/ablation", "--variants", "full", "no-V", "--groups", "paper"]
    words += ["--jobs", "2"]
    ablation.main([*words, "--seeds", "0"])
    printed = capsys.readouterr().out
    assert "paper, seed 0: 2 of 2 runs to do: 0.2 to 0.5 hours with a core each" in printed
    assert done == [("full.0", 2), ("no-V.0", 2)]
    assert fake.names == ["data", "paper.json", "report.html"]

    ablation.main([*words, "--seeds", "0", "1"])
    printed = capsys.readouterr().out
    assert "paper, seed 0: 0 of 2 runs to do" in printed
    assert "paper, seed 1: 2 of 2 runs to do" in printed
    compared = [" ".join(command) for command in fake.commands if "compare" in command]
    assert "full.0/eval.json,out/ablation/full.1/eval.json" in compared[-1], "both seeds"


def test_runs_go_side_by_side_and_a_failure_stops_those_that_wait(tmp_path):
    folders = [tmp_path / name for name in "abcd"]
    begun = []

    def runner(command, log, jobs):
        """The second run fails."""
        begun.append(log.name)
        time.sleep(0.05)
        if command == ["b"]:
            raise ValueError("b ended early")

    with pytest.raises(ValueError, match="b ended early"):
        ablation.run_all({folder: [folder.name] for folder in folders}, 1, runner)
    assert begun[:2] == ["a.log", "b.log"] and "d.log" not in begun
    begun.clear()
    ablation.run_all({folder: ["x"] for folder in folders}, 2, runner)
    assert sorted(begun) == [f"{name}.log" for name in "abcd"]


def test_a_run_beside_others_writes_a_log_and_has_its_share_of_threads(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    log = tmp_path / "full.0.log"
    code = "import os, sys; print(os.environ['OMP_NUM_THREADS']); sys.exit(int(sys.argv[1]))"
    ablation.run_one(["-c", code, "0"], log, jobs=10_000)
    assert log.read_text(encoding="utf-8") == "1\n"
    with pytest.raises(ValueError, match="full.0 ended early, with exit status 4"):
        ablation.run_one(["-c", code, "4"], log, jobs=2)
