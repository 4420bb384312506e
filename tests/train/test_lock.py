import subprocess
import sys

import pytest

from forgetrain.errors import UserError
from forgetrain.train.lock import only_run

HOLDS = """
import sys, time
from pathlib import Path
from forgetrain.train.lock import only_run
with only_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_in_the_folder_is_refused_until_the_first_is_gone_in_any_way(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another process trains in this folder"), only_run(tmp_path, 0.2):
        pass
    first.kill()
    with only_run(tmp_path, 10):
        pass
    first.communicate()
