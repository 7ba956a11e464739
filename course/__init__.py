"""The course: twelve lessons with exercises that grade themselves. Begin at lessons/README.md.

    python -m course COMMAND --help
    COMMAND: start, check, break, report, figures, pack or prove

lessons/        the pages: a syllabus for the teacher, and twelve lessons
exercises/      lesson_01.py …: each lesson's exercises and their checks
wrong/          plausible wrong solutions, which the checks must find
exercise.py     what a check, an exercise and a fault to repair are
copies.py       a student's copy, with some functions empty
worker.py       runs checks in a process of its own
grade.py        points, what is wrong in plain words, a hint; the table of a class
repairs.py      faults that really happen
stand_in.py     a judge on this computer, whose taste is known
figures/        the figures of the lessons, one a file
pack.py         everything for a class without a network
prove.py        proves that the checks find what is wrong and pass what is right
"""
