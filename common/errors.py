class UserError(ValueError):
    """Something that the user can mend; the command line prints its one sentence instead of a traceback."""
