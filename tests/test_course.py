"""The course: a student's copy, its grades, the table of a class, the stick, the lessons' pages.

That each check finds what is wrong is proven outside these tests: `python -m course prove`."""

import ast
import importlib.metadata
import json
import re
import shlex
import subprocess
import sys
import textwrap

import pytest
from packaging.requirements import Requirement
from test_flags import leaves
from test_readme import COMMANDS, MODULES, ROOT, options, parser_of

import course.__main__
from course import copies, exercise, grade, pack, prove
from course.exercise import Check, Exercise, Repair, lesson_numbers, load_lesson, load_repairs
from vocabulary.command import run_main

LESSONS = sorted((ROOT / "course" / "lessons").glob("*.md"))

SOURCE = '''\
"""Ein Modul."""
import functools

# before plain
def plain(x, y=(1, 2)):   # beside the signature
    """What it does: ü가.

    x (B, T) -> (B, T)
    """
    # the first step

    total = x  # half
    def inner(z):
        return z
    return inner(total) + len("""a
b""")   # the end
# after plain

class Box:
    @property
    @functools.lru_cache(
        maxsize=None)
    def size(self): return "가나" and 2   # one line

    async def load(self):
        @functools.cache
        def inner():
            pass
        return inner

    class Lid:
        def open(self):
            "Only a docstring."

    tail = 1\t# odd  spacing   stays
def last(): """Doc."""; return 5'''


def names_of_functions(source):
    return [node.name for node in ast.walk(ast.parse(source)) if hasattr(node, "decorator_list")]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_body_is_cut_out_and_the_rest_stays_byte_for_byte(newline):
    source = SOURCE.replace("\n", newline).encode()
    message = 'raise NotImplementedError("m")'
    hand = {
        "plain": ("    total = x", '"""a\nb""")   # the end', "    " + message),
        "Box.size": (' return "가나" and 2   # one line', "", " " + message),
        "Box.load": ("        @functools.cache", "        return inner", "        " + message),
        "last": (" return 5", "", " " + message),
    }
    for name, (first, end, new) in hand.items():
        before, _, rest = SOURCE.partition(first)
        after = rest[rest.index(end) + len(end) :] if end else rest
        expected = (before + new + after).replace("\n", newline).encode()
        assert copies.empty_function(source, name, "m") == expected, name
        ast.parse(expected)

    # A function that is only a docstring keeps it.
    found = copies.empty_function(source, "Box.Lid.open", "m").decode()
    doc = '            "Only a docstring."'
    assert found == SOURCE.replace(doc, f"{doc}\n            {message}").replace("\n", newline)
    with pytest.raises(ValueError, match="has no function Box.nothing"):
        copies.empty_function(source, "Box.nothing", "m")


def test_an_emptied_function_raises_and_the_others_work():
    space = {}
    source = SOURCE.encode()
    for name in ("plain", "Box.size", "last"):
        source = copies.empty_function(source, name, name)
    exec(compile(source, "emptied", "exec"), space)
    for call in (lambda: space["plain"](1), lambda: space["Box"]().size, space["last"]):
        with pytest.raises(NotImplementedError):
            call()
    assert space["plain"].__doc__.startswith("What it does: ü가.")
    assert space["Box"].tail == 1


def test_a_wrong_solution_takes_the_place_of_ours_with_what_surrounds_it():
    wrong = b"import x\n\nclass Box:\n    def size(self): return 3\n\ndef last():\n    return 6\n"
    found = copies.replace_functions(SOURCE.encode(), ["Box.size", "last"], wrong).decode()
    space = {}
    exec(found, space)
    assert space["Box"]().size() == 3 and space["last"]() == 6
    assert "# after plain" in found and "\t# odd  spacing" in found
    assert names_of_functions(found) == names_of_functions(SOURCE)
    with pytest.raises(ValueError, match="has no function plain"):
        copies.replace_functions(SOURCE.encode(), ["plain"], wrong)


# ------------------------------------------------------------------------- a small project
@pytest.fixture
def small(tmp_path, monkeypatch):
    """A project of one file with two lessons, in place of the real one; paths are not ASCII."""
    root = tmp_path / "das Projekt 수업"
    (root / "course" / "exercises").mkdir(parents=True)
    (root / "out").mkdir()
    (root / "part").mkdir()
    (root / "part" / "__init__.py").touch()
    (root / "few.txt").touch()  # somebody's
    (root / "README.md").write_text("the project's\n", encoding="utf-8")
    source = '''
    def one(x):
        """x + 1"""
        return x + 1


    def two(x):
        """2 · x"""
        return 2 * x
    '''
    (root / "sums.py").write_text(textwrap.dedent(source), encoding="utf-8")

    def check(points, what, test):
        return Check(points, what, f"hint: {what}", test)

    # Each is called in this process's place: see `each_result` below.
    one = [check(1, "one of 1", None), check(2, "one of many", None)]
    first = Exercise("one", "Add one", "sums.py", ["one"], 20, one, {"x": 1})
    second = Exercise("two", "Double", "sums.py", ["two"], 20, [check(3, "two", None)], {"x": 1})
    lessons = {1: [first], 2: [second]}

    class Lesson:
        def __init__(self, number):
            self.EXERCISES = lessons[number]

    for module in (copies, grade, prove):
        monkeypatch.setattr(module, "load_lesson", Lesson)
    for module in (copies, prove):
        monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(copies, "FILES", ("README.md", "sums.py", "three.py"))
    monkeypatch.chdir(tmp_path)
    return root


def test_a_copy_has_the_project_and_empty_functions_and_says_which(small, tmp_path):
    mine = tmp_path / "김 민수" / "mine"
    copies.start(1, mine)
    assert sorted(path.name for path in mine.iterdir()) == [
        ".gitignore",
        "README.md",
        "course.json",
        "part",
        "sums.py",
    ]
    source = (mine / "sums.py").read_text(encoding="utf-8")
    assert 'raise NotImplementedError("lesson 01, exercise one")' in source
    assert "return 2 * x" in source and "return x + 1" not in source
    assert "- write sums.py: one (one)" in (mine / "README.md").read_text(encoding="utf-8")


def test_the_next_lesson_keeps_the_work_and_work_is_never_emptied(small, tmp_path):
    mine = tmp_path / "mine"
    copies.start(1, mine)
    copies.start(1, mine)  # nothing was written yet
    path = mine / "sums.py"
    empty = path.read_text(encoding="utf-8")
    done = empty.replace('raise NotImplementedError("lesson 01, exercise one")', "return 1 + x")
    path.write_text(done, encoding="utf-8")

    copies.start(2, mine)
    source = path.read_text(encoding="utf-8")
    assert "return 1 + x" in source and "lesson 02, exercise two" in source
    assert json.loads((mine / "course.json").read_text(encoding="utf-8"))["lessons"] == [1, 2]

    with pytest.raises(ValueError, match=r"mine: holds your work on all of lesson 01"):
        copies.start(1, mine)
    path.write_text(source + "\ndef broken(:\n", encoding="utf-8")
    with pytest.raises(ValueError, match="sums.py: .*mend it first"):
        copies.start(2, mine)
    assert path.read_text(encoding="utf-8").endswith("broken(:\n")


def test_what_an_earlier_lesson_left_empty_is_given_and_may_be_emptied_again(small, tmp_path):
    mine = tmp_path / "mine"
    copies.start(1, mine)
    assert copies.start(2, mine)["given"] == ["sums.py: one (one)"]
    source = (mine / "sums.py").read_text(encoding="utf-8")
    assert "return x + 1" in source and "lesson 02, exercise two" in source
    assert copies.read_notes(mine)["given"] == ["sums.py: one"]

    done = copies.start(1, mine)
    assert (done["empty"], done["given"]) == (["sums.py: one (one)"], ["sums.py: two (two)"])
    assert copies.read_notes(mine)["given"] == ["sums.py: two"]


def test_a_folder_of_somebody_is_left_alone(small, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.txt").touch()
    for folder in ("photos", "photos/a.txt"):
        with pytest.raises(ValueError, match="is no copy of the course; give another -o"):
            copies.start(1, tmp_path / folder)
    with pytest.raises(ValueError, match="photos: is no copy of the course; `start` makes one"):
        copies.require_copy(tmp_path / "photos")


def test_a_fault_is_planted_once_and_only_where_the_code_is_ours(small, tmp_path):
    mine = tmp_path / "mine"
    fault = Repair(
        3, 1, "Doubles are odd.", "sums.py", "return 2 * x", "return 2 * x + 1", "", None
    )
    copies.plant(fault, mine)
    assert "return 2 * x + 1" in (mine / "sums.py").read_text(encoding="utf-8")
    copies.start(1, mine)
    told = (mine / "README.md").read_text(encoding="utf-8").splitlines()
    assert told.count("- mend what causes this: Doubles are odd.") == 1
    copies.tell_fault(fault, mine, is_mended=True)
    copies.start(1, mine)
    told = (mine / "README.md").read_text(encoding="utf-8").splitlines()
    assert told[-1] == "- mended: Doubles are odd." and "- mend what" not in "".join(told)
    assert "- write sums.py: one (one)" in told
    copies.start(1, tmp_path / "other")
    copies.start(2, tmp_path / "other")
    with pytest.raises(ValueError, match="was changed where the fault belongs"):
        copies.plant(fault, tmp_path / "other")


# ------------------------------------------------------------------------- grades
CHECKS = """
import os, sys, time
from course.exercise import Check, Exercise

def passes():
    from sums import one
    print("noise")
    assert one(1) == 2, f"one(1) is {one(1)}, should be 2"

def differs():
    from sums import one
    assert one(2) == 3, f"one(2) is {one(2)}, should be 3"

def raises():
    from sums import boom
    boom()

def hangs():
    time.sleep(600)

def crashes():
    print("seen to the end")
    os._exit(7)

def leaves():
    sys.exit("done")

def unsaid():
    assert 0

tests = [passes, differs, raises, hangs, crashes, leaves, unsaid, passes]
checks = [Check(1, test.__name__, "look", test) for test in tests]
EXERCISES = [Exercise("one", "One", "sums.py", ["one"], 20, checks, {})]
"""


def test_each_check_gives_one_plain_line_whatever_the_code_does(tmp_path, capfd):
    """The real worker, with a course of its own beside a copy."""
    root, mine = tmp_path / "그 course", tmp_path / "my copy"
    (root / "course" / "exercises").mkdir(parents=True)
    mine.mkdir()
    for name in ("__init__.py", "exercise.py", "worker.py", "exercises/__init__.py"):
        text = (ROOT / "course" / name).read_text(encoding="utf-8")
        (root / "course" / name).write_text(text, encoding="utf-8")
    (root / "course" / "exercises" / "lesson_01.py").write_text(CHECKS, encoding="utf-8")
    (root / "sums.py").write_text("raise SystemExit('of the project, not of the copy')\n")
    source = "def one(x):\n    return 2\n\ndef boom():\n    return {}['key']\n"
    (mine / "sums.py").write_text(source, encoding="utf-8")

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(grade, "ROOT", root)
        monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # few computers have it
        results = grade.run_checks("01", mine, list(range(8)), limit=5)
        exercises = [[2, 3, 4, 5], [6, 7]]
        stopped = list(grade.each_result("01", mine, list(range(2, 8)), 2, exercises))
        # What is not the student's raises an error, and only that.
        given = dict(grade.each_result("01", mine, [0, 6], given=["sums.py: one"]))
        assert given == {0: f"one: {grade.GIVEN}", 6: "is not right yet"}
        (mine / "sums.py").write_text("def one(x:\n", encoding="utf-8")
        broken = grade.run_checks("01", mine, [0])[0]
    assert results[0] is None and results[7] is None
    assert results[1] == "one(2) is 2, should be 3"
    assert results[2] == "sums.py, line 5: KeyError: 'key'"
    assert results[3] == "still running after 5 seconds: an endless loop?"
    assert results[4] == "Python stopped during this check (exit code 7)"
    assert "seen to the end" in capfd.readouterr().err, "what a student prints is not lost"
    assert results[5] == "SystemExit: done"
    assert results[6] == "is not right yet"
    # The rest of its exercise is not run, the next exercise is.
    assert [number for number, _ in stopped] == [2, 3, 4, 5, 6, 7]
    assert [message for _, message in stopped[1:]] == [
        "still running after 2 seconds: an endless loop?",
        grade.NOT_RUN,
        grade.NOT_RUN,
        "is not right yet",
        None,
    ]
    assert broken.startswith("sums.py, line 1: Python can't read it: ")


@pytest.fixture
def graded(small, tmp_path, monkeypatch):
    """Grades of the small project, with results that a test chooses."""
    results = {}

    def each_result(what, folder, numbers, exercises, given):
        yield from ((number, results.get((what, number))) for number in numbers)

    monkeypatch.setattr(grade, "each_result", each_result)
    return results


def test_points_hints_and_the_teachers_file(graded, tmp_path, capsys):
    mine = tmp_path / "mine"
    copies.start(1, mine)
    graded["01", 1] = "one(5) is 7"
    grades = grade.grade(1, mine, show=grade.print_grade)
    shown = capsys.readouterr().out.splitlines()
    assert shown[1] == "one: Add one (1 of 3 points)"
    assert [line.split() for line in shown[2:4]] == [
        ["ok", "one", "of", "1"],
        "not yet one of many".split(),
    ]
    assert [line.strip() for line in shown[4:]] == ["one(5) is 7", "Hint: hint: one of many"]

    value = json.loads(grade.save_grades(1, mine, grades).read_text(encoding="utf-8"))
    assert (value["lesson"], value["points"], value["of"]) == (1, 1, 3)
    checks = value["exercises"][0]["checks"]
    assert [check["points"] for check in checks] == [1, 0]
    assert [check["message"] for check in checks] == [None, "one(5) is 7"]

    graded["01", 0] = graded["01", 1] = "lesson 01, exercise one: still empty"
    grade.grade(1, mine, show=grade.print_grade)
    assert capsys.readouterr().out.splitlines()[-1] == "  one in sums.py: still empty"
    (grades,) = grade.grade(1, mine, given=["sums.py: one"])
    assert grades.points == 0 and set(grades.messages) == {grade.GIVEN}
    with pytest.raises(ValueError, match="lesson 01 has no exercise two; it has one"):
        grade.grade(1, mine, only="two")


def test_of_a_half_written_exercise_the_written_half_counts(small, tmp_path, monkeypatch):
    both = grade.load_lesson(1).EXERCISES[0]
    both.functions, mine, seen = ["one", "two"], tmp_path / "mine", []
    other = Exercise("three", "Three", "three.py", ["three"], 20, both.checks, {"x": 1})
    (small / "three.py").write_text("def three(x):\n    return 3\n", encoding="utf-8")
    lessons = {1: [both], 2: [other]}
    for module in (copies, grade):
        by_number = lambda number: type("L", (), {"EXERCISES": lessons[number]})  # noqa: E731
        monkeypatch.setattr(module, "load_lesson", by_number)
    copies.start(1, mine)
    source = (mine / "sums.py").read_text(encoding="utf-8")
    source = source.replace('raise NotImplementedError("lesson 01, exercise one")', "return 5", 1)
    (mine / "sums.py").write_text(source, encoding="utf-8")
    assert copies.start(2, mine)["given"] == ["sums.py: two (one)"]

    def each_result(what, folder, numbers, exercises, given):
        seen.append(given)
        yield from ((number, None) for number in numbers)

    monkeypatch.setattr(grade, "each_result", each_result)
    (half,) = grade.grade(1, mine, given=copies.read_notes(mine)["given"])
    assert half.points == 3 and seen == [["sums.py: two"]]


def test_one_exercise_alone_keeps_the_grades_of_the_others(graded, tmp_path, monkeypatch):
    both = grade.load_lesson(1).EXERCISES + grade.load_lesson(2).EXERCISES
    monkeypatch.setattr(grade, "load_lesson", lambda number: type("L", (), {"EXERCISES": both}))
    graded["01", 2] = "no"
    grade.save_grades(1, tmp_path, grade.grade(1, tmp_path))
    graded["01", 0], graded["01", 2] = "no", None
    path = grade.save_grades(1, tmp_path, grade.grade(1, tmp_path, only="two"))
    value = json.loads(path.read_text(encoding="utf-8"))
    assert [each["points"] for each in value["exercises"]] == [3, 3] and value["points"] == 6


def test_what_a_computer_lacks_costs_no_points(graded, tmp_path, monkeypatch, capsys):
    both = grade.load_lesson(1).EXERCISES + grade.load_lesson(2).EXERCISES
    monkeypatch.setattr(both[1], "needs", "no_such_package")
    monkeypatch.setattr(grade, "load_lesson", lambda number: type("L", (), {"EXERCISES": both}))
    grades = grade.grade(1, tmp_path, show=grade.print_grade)
    assert "needs no_such_package" in capsys.readouterr().out
    for some in (grades, grades[:1]):  # whether it was asked for or not
        value = json.loads(grade.save_grades(1, tmp_path, some).read_text(encoding="utf-8"))
        assert (value["points"], value["of"]) == (3, 3)
    assert grade.grade(1, tmp_path, only="two")[0].most == 0


def test_a_class_is_a_table_with_a_row_for_each_student(graded, tmp_path, capsys):
    room = tmp_path / "class"
    for student, number, wrong in [("Ada", 1, 0), ("Ada", 2, None), ("김민수", 1, 1)]:
        graded.clear()
        graded[f"{number:02}", wrong] = "no"
        (room / student / "mine").mkdir(parents=True, exist_ok=True)
        grade.save_grades(number, room / student / "mine", grade.grade(number, room / student))
    # a second copy with fewer points does not count
    value = json.loads((room / "Ada" / "mine" / "course-02.json").read_text(encoding="utf-8"))
    (room / "Ada" / "mine2").mkdir()
    worse = json.dumps(value | {"points": 0})
    (room / "Ada" / "mine2" / "course-02.json").write_text(worse, encoding="utf-8")
    (room / "Bob").mkdir()
    (room / "Bob" / "course-01.json").write_text('{"lesson": 1}', encoding="utf-8")

    grade.print_report(room)
    lines = capsys.readouterr().out.splitlines()
    assert "Bob" in lines[0] and "is not what `check` wrote" in lines[0]
    assert lines[1].split() == ["student", "1", "2", "all"]
    assert lines[2].split() == ["Ada", "2/3", "3/3", "5"]
    assert lines[3].split() == ["김민수", "1/3", "–", "1"]
    assert lines[2].index("2/3") - lines[3].index("1/3") == 3  # three letters of double width
    assert "01 one: one of 1" in "".join(lines[4:])
    with pytest.raises(ValueError, match="no folder in it holds a course-NN.json"):
        grade.print_report(room / "Ada" / "nobody")


# ------------------------------------------------------------------------- the proof
def test_the_proof_finds_checks_that_are_too_weak_or_too_strict(small, tmp_path, monkeypatch):
    monkeypatch.setattr(prove, "COURSE", tmp_path)
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "x").write_text("def one(x):\n    return 2\n", encoding="utf-8")
    (each,) = prove.load_lesson(1).EXERCISES
    mine = tmp_path / "mine"
    copies.make_copy(mine)

    def play(passing):
        """Which checks pass, by what the file holds."""

        def fake(number, folder, only):
            source = (folder / "sums.py").read_text(encoding="utf-8")
            kind = "empty" if "NotImpl" in source else "wrong" if "return 2\n" in source else "ours"
            return [grade.Grade(each, [None if ok == "1" else "no" for ok in passing[kind]])]

        monkeypatch.setattr(prove, "grade", fake)
        return prove.prove_exercise(1, each, mine)

    assert play({"empty": "00", "wrong": "10", "ours": "11"}) == []
    assert play({"empty": "10", "wrong": "10", "ours": "11"}) == ["emptied passes: one of 1"]
    assert play({"empty": "00", "wrong": "11", "ours": "11"}) == ["x: passes check 1: one of many"]
    assert "x: fails before check 1" in play({"empty": "00", "wrong": "00", "ours": "11"})[0]
    assert play({"empty": "00", "wrong": "10", "ours": "10"}) == ["ours fails: one of many: no"]
    assert (mine / "sums.py").read_bytes() == (small / "sums.py").read_bytes()


# ------------------------------------------------------------------------- the stick
def test_a_stick_has_wheels_for_each_system_the_project_and_its_models(tmp_path, monkeypatch):
    calls = []

    def pip(command, check):
        calls.append(command)
        return subprocess.CompletedProcess(command, int("3.13" in command))

    monkeypatch.setattr(pack.subprocess, "run", pip)
    run = tmp_path / "run"
    for name in ("instruct/model.safetensors", "text/checkpoints/big.pt"):
        (run / name).parent.mkdir(parents=True)
        (run / name).touch()
    out = tmp_path / "stick 1"
    pack.pack(out, run, ["windows", "linux"], ["3.10"], "https://index")
    assert (out / "project" / "out" / "quick" / "instruct" / "model.safetensors").is_file()
    assert not list(out.rglob("big.pt")) and not list(out.rglob(".venv"))
    for name in ("train.py", "course/copies.py", "course/lessons/README.md", "demo/world.py"):
        assert (out / "project" / name).is_file(), name
    torch_of_windows, windows, torch_of_linux, linux = calls
    assert "win_amd64" in windows and "colorama" in windows and "colorama" not in linux
    assert "tomli" in linux and "3.10" in linux and "manylinux_2_28_x86_64" in linux
    assert not any("triton" in word for call in calls for word in call)
    assert "https://index" in torch_of_linux and torch_of_linux[-3].endswith("+cpu")
    assert "https://index" not in torch_of_windows and torch_of_windows[-1].startswith("torch==")
    lines = (out / "needed.txt").read_text(encoding="utf-8").split()
    assert set(lines) < {*windows, *torch_of_windows}

    text = (out / "READ-ME.txt").read_text(encoding="utf-8")
    assert "The wheels are for windows, Python 3.10; linux, Python 3.10.\n" in text
    assert "could be loaded" not in text

    pack.pack(out, run, [], [], "https://index")  # what is ours may be written again
    with pytest.raises(ValueError, match="no wheels for mac, Python 3.13; windows, .*: pip says"):
        pack.pack(out, run, ["mac", "windows"], ["3.13"], "https://index")
    text = (out / "READ-ME.txt").read_text(encoding="utf-8")
    assert "for these could be loaded: mac, Python 3.13; windows, Python 3.13.\n" in text
    assert "The wheels are for" not in text
    assert "win_amd64" in calls[-1], "one system without wheels stops no other"
    with pytest.raises(ValueError, match="was not written by `pack`"):
        pack.pack(tmp_path, run, [], [], "https://index")


def test_a_copy_and_the_stick_have_all_files_of_the_project_and_no_others():
    command = ["git", "-C", str(ROOT), "ls-files"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip("not a clone")
    files = {path for path in found.stdout.split("\n") if path and "/" not in path}
    assert files - {".gitignore"} == {*copies.FILES}


@pytest.mark.parametrize("version", ["3.10", "3.12"])
@pytest.mark.parametrize("system, name", [("windows", "Windows"), ("linux", "Linux")])
def test_a_stick_leaves_out_nothing_that_a_package_needs(system, name, version):
    """pip follows no dependencies when it loads for another system."""
    platform = {"Windows": "win32", "Linux": "linux"}[name]
    place = {"platform_system": name, "sys_platform": platform, "extra": ""}
    place |= {"python_version": version, "python_full_version": f"{version}.1"}
    there = {Requirement(line).name for line in pack.packages(system, version)} | {"torch"}
    for package in sorted(there - {"colorama", "exceptiongroup", "tomli"}):
        for line in importlib.metadata.requires(package) or []:
            need = Requirement(line)
            if need.name.startswith(("cuda", "nvidia", "triton")):
                continue  # only of the build with CUDA
            if need.marker is None or need.marker.evaluate(place):
                assert need.name.lower() in there, f"{package} needs {need.name}"


# ------------------------------------------------------------------------- the real exercises
def test_every_exercise_can_be_emptied_and_has_what_a_student_and_the_proof_need():
    names, functions = [], []
    for number in lesson_numbers():
        for each in load_lesson(number).EXERCISES:
            names.append(each.name)
            functions += [(each.file, name) for name in each.functions]
            source = copies.emptied(each, number, (ROOT / each.file).read_bytes())
            ast.parse(source)
            assert source.count(b"lesson %02d, exercise " % number) == len(each.functions)
            assert len(each.checks) >= 2 and all(check.hint for check in each.checks), each.name
            assert len(each.wrong) >= 2, each.name
            for file, index in each.wrong.items():
                assert 1 <= index < len(each.checks), file
                other = (ROOT / "course" / "wrong" / file).read_bytes()
                assert copies.replace_functions(source, each.functions, other) != source, file
    assert len(set(names)) == len(names), "--only needs names that differ"
    assert len(set(functions)) == len(functions), "a function is an exercise of one lesson only"
    used = {file for n in lesson_numbers() for e in load_lesson(n).EXERCISES for file in e.wrong}
    assert {path.name for path in (ROOT / "course" / "wrong").glob("*.py")} == used


def test_every_fault_has_its_one_place_in_the_code():
    """A change of the code around a fault must not wait for `course prove` to be noticed."""
    for number, each in load_repairs().items():
        source = (ROOT / each.file).read_text(encoding="utf-8")
        assert source.count(each.sound) == 1, f"fault {number}: {each.file} has changed"
        ast.parse(source.replace(each.sound, each.faulty))


def test_exercises_load_no_module_of_the_project():
    """Else a check would test the project instead of the copy."""
    code = "import sys; from course.exercise import *; [load_lesson(n) for n in lesson_numbers()]; "
    code += "load_repairs(); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    ours = {name.removesuffix(".__init__") for name in MODULES if not name.startswith("course")}
    assert not ours & {*found.stdout.decode().split()}


# ------------------------------------------------------------------------- the pages
def fences(page):
    """The lines of a page's ```bash blocks, joined where they go on."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def module_of(words):
    """("train.py", ["align", …]) -> the name of its module, and what follows."""
    if words[:2] == ["python", "-m"]:
        name, rest = words[2], words[3:]
        return (f"{name}.__main__" if f"{name}.__main__" in COMMANDS else name), rest
    return words[1].removesuffix(".py"), words[2:]


@pytest.mark.parametrize("page", LESSONS, ids=lambda page: page.stem)
def test_the_commands_of_a_page_are_commands(page, monkeypatch):
    for line in fences(page):
        words = shlex.split(line)
        if words[0] in ("cd", "source") or words[:3] == ["python", "-m", "pytest"]:
            continue
        assert words[0] == "python", line
        if words[1] == "-c":
            compile(words[2], line, "exec")
            continue
        module, rest = module_of(words)
        assert module in COMMANDS, line
        first = rest[0] if rest else ""
        parser = parser_of(module, first, monkeypatch)
        commands = options(parser)[1]
        leaf = next((p for p in leaves(parser) if p.prog.split()[-1] == first), parser)
        assert not commands or first in commands or first.startswith("-"), line
        flags = {flag for action in leaf._actions for flag in action.option_strings}
        for word in rest:
            if re.fullmatch(r"--?[a-z][a-z0-9-]*", word):
                assert word in flags, f"{line}: {word}"


@pytest.mark.parametrize("page", LESSONS, ids=lambda page: page.stem)
def test_the_links_of_a_page_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    for name in re.findall(r"course (?:start|check|break) (?:repair-)?(\d+)", text):
        assert 1 <= int(name) <= 12


def test_what_a_student_types_wrong_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for words, message in {
        "start 13 -o mine": "must be 12 or less",
        "check 01 mine": "mine: no such folder",
        "check fünf .": "fünf: must be a lesson, 05, or a repair, repair-5",
        "check 01 . --only nothing": "nothing: no such exercise; there are ",
        "check 01 .": ".: is no copy of the course; `start` makes one",
        "report .": "no folder in it holds a course-NN.json",
        "pack -o stick": "out/quick: no such folder; python -m demo --quick makes out/quick",
    }.items():
        monkeypatch.setattr(sys, "argv", ["course", *words.split()])
        with pytest.raises(SystemExit) as done:
            run_main(course.__main__.main, "python -m course")
        error = capsys.readouterr().err if done.value.code == 2 else f"{done.value.code}\n"
        assert message in error and error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())


def test_the_lessons_numbers_are_those_of_the_pages():
    numbers = {int(page.stem[:2]) for page in LESSONS if page.stem[:2].isdecimal()}
    assert set(exercise.lesson_numbers()) >= numbers
