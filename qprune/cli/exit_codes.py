"""Exit codes of the command line."""

USER = 2  # the input is wrong
FAILURE = 1  # a run failed, or something that was asked for could not be made
STOPPED = 75  # a signal stopped runs; the same command resumes them
INTERRUPTED, TERMINATED = 130, 143  # SIGINT or SIGTERM stopped anything else
TRAINING_VERBS = ("run", "sweep", "frontier")  # what they stop can be resumed
