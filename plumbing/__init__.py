"""What no reader of the papers has to open. It imports nothing from above."""


class UserError(Exception):
    """Something that the person at the keyboard can fix. The scripts print it as one line and exit with 2."""
