"""``python -m vlmflow.plugins.lmms_eval`` prints the folder of the task files, for lmms-eval's ``--include_path``."""

from vlmflow.plugins.lmms_eval import TASK_FILES

print(TASK_FILES)
