"""The error of a job that cannot be run as written."""


class JobError(Exception):
    """One line for each thing that is wrong: where it stands, what was found, what to do. Programs exit with code 2."""
