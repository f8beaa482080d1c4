"""``python -m vlmflow.lmms`` prints the folder of the task files, for lmms-eval's ``--include_path``."""

from vlmflow.lmms import TASK_FILES

print(TASK_FILES)
