"""What a chat model gains if it is calibrated in its own format, and on its own answers.

The same words calibrate twice: as plain text without roles, and as conversations through the chat template of the
model, of which joint steps count what the assistant wrote. Then the dense model answers the same prompts itself, once
and several times. All results are judged on the assistant's tokens in other conversations. All conversations were
written for this benchmark: `calibration.jsonl` and `held_out.jsonl`.
"""
