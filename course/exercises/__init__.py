"""The exercises, one file a lesson. At their top they import no module of the project: a check
takes these from the student's copy."""
