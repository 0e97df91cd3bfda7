"""Real language models: what a user gets from the commands, measured on SmolLM2-135M-Instruct or any other checkpoint.

Every row is one ``spap prune`` command as a user would type it. Its result is compared with the dense model on several
texts, and its report gives the seconds of each phase and the peak memory. Rows are stored as soon as they are measured,
so that an interrupted call goes on where it was, and the rows of most interest come first.
"""
