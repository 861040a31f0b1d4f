"""One host of several that do what docs/hosts.md says: a process that SLURM would have started.

python -m tests.distributed.documented_host
"""

import os
import re

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

from tests import readme
from tests.compiled_programs import compile_fast

BLOCKS = readme.blocks("docs/hosts.md")


def commands():
    """What the page starts on every host: by SLURM first, then what nothing here can start."""
    text = "\n".join(text for _, text in BLOCKS).replace("\\\n", " ")
    by_slurm, by_cloud = (re.findall(line, text, re.MULTILINE) for line in (r"^srun (.*)$", r'--command="(.*)"$'))
    in_pods = [line.replace(",", "") for line in re.findall(r"command: \[(.*)\]$", text, re.MULTILINE)]
    return by_slurm, by_cloud + in_pods


if __name__ == "__main__":
    compile_fast(True)
    for command in commands()[0]:
        readme.run("shell", command)
    for language, text in BLOCKS:
        if language == "python":
            readme.run(language, text, {})  # joins, which has happened
