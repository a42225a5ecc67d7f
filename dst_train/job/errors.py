"""The error of a job that cannot be run as written."""

Key = tuple[str | int, ...]


class JobError(Exception):
    """One line for each thing that is wrong: where it stands, what was found, what to do. Programs exit with code 2.

    `key`: of the job that it is about, where the message does not say yet in which line that stands; see `locate`.
    """

    def __init__(self, message: str, key: Key | None = None) -> None:
        super().__init__(message)
        self.key = key
